"""Sets of labelled texts as tokens: read and tokenised once, cached, padded batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from subspan.errors import SubspanError
from subspan.training.data import cache, parts, sources, tables
from subspan.training.data.order import TEST, VALIDATION, hold_out
from subspan.training.data.tensors import Raw, Tensors
from subspan.training.pretrained import Tokenizer

FORMAT = 3  # of the cached tokens: a change of what tokenising gives must change it
EXPECTED = (
    "a folder of parquet, CSV or JSON files with a column of texts and one of labels, or another "
    "layout that datasets.load_dataset knows"
)


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts of one length."""

    tokens: Tensor  # int64 (n, length), filled up with the tokenizer's padding
    mask: Tensor  # int64 (n, length), 1 where a text's own tokens are
    labels: Tensor  # int64 (n,)


@dataclass(frozen=True, eq=False)
class Texts(Tensors):
    """Some labelled texts, one after the other."""

    tokens: Tensor  # int32 (T,), of all texts
    ends: Tensor  # int64 (N,), where each text ends in them
    labels: Tensor  # int64 (N,), in [0, classes)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> Tensor:
        """How many tokens each text has, int64 (N,)."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    def select(self, index: Tensor) -> Texts:
        """Return the texts at ``index`` (int64), in that order."""
        lengths = self.lengths[index]
        ends = lengths.cumsum(0)
        shift = (self.ends[index] - ends).repeat_interleave(lengths)
        return Texts(self.tokens[torch.arange(len(shift)) + shift], ends, self.labels[index])

    def batch(self, index: Tensor, pad: int) -> Batch:
        """Return the texts at ``index``, padded to the longest of them."""
        lengths = self.lengths[index]
        places = torch.arange(int(lengths.max()), device=index.device)
        inside = places < lengths[:, None]
        starts = self.ends[index] - lengths
        found = self.tokens[(starts[:, None] + places).clamp(max=len(self.tokens) - 1)]
        return Batch(found.long().where(inside, pad), inside.long(), self.labels[index])

    def by_length(self, tokens: int) -> Iterator[Tensor]:
        """Yield all texts' numbers in batches of like length, of at most so many tokens each."""
        lengths, order = self.lengths.sort(descending=True, stable=True)
        start = 0
        while start < len(order):
            size = max(1, tokens // int(lengths[start]))
            yield order[start : start + size]
            start += size

    def digest(self) -> str:
        """Return 8 hexadecimal digits that tell these texts and labels from others."""
        sums = hashlib.blake2b(digest_size=4)
        for tensor in (self.tokens, self.ends, self.labels):
            sums.update(tensor.cpu().numpy().tobytes())
        return sums.hexdigest()


@dataclass(frozen=True, eq=False)
class RawTexts(Raw):
    """The content of a source of labelled texts."""

    train: Texts  # the whole training part
    test: Texts  # the test part
    names: tuple[str, ...]  # of the classes, in order


@dataclass(frozen=True, eq=False, kw_only=True)
class TextData(RawTexts):
    """A set of labelled texts, ready to train on: its training part is without validation."""

    name: str  # what it was loaded by
    validation: Texts  # the part of the set's training part that was drawn for choices
    digest: str  # of training and validation part, whichever share of them is for choices


def load(
    name: str,
    tokenizer: Tokenizer,
    *,
    validation: float,
    seed: int,
    text_column: str | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
) -> TextData:
    """Load a set of labelled texts; names, folders and caches are those of images.

    The other arguments are those of :func:`subspan.training.data.load`, and ``max_length``: tokens
    of a text that are kept, by default as many as the network takes.

    Raises:
        SubspanError: there is no such set, it cannot be reached or read, it has no texts, or no
            two labels.
    """
    length = tokenizer.length if max_length is None else max_length
    columns: dict[str, Any] = {"text_column": text_column, "label_column": label_column}
    read = partial(_read, tokenizer=tokenizer, length=length, **columns)
    place, read_it = sources.find(name, name, read)
    identity = [*place, columns, tokenizer.digest, tokenizer.rules, length]
    raw = cache.fetch_set(name, FORMAT, identity, RawTexts, read_it)
    train, held_out = hold_out(raw.train, validation, seed=seed, stream=VALIDATION)
    own = vars(raw) | {"train": train}
    return TextData(**own, name=name, validation=held_out, digest=raw.train.digest())


def _read(
    path: str,
    *,
    revision: str | None = None,
    tokenizer: Tokenizer,
    length: int | None,
    text_column: str | None,
    label_column: str | None,
) -> RawTexts:
    """Read and tokenise a set."""
    found, features, left_out = tables.open_set(path, revision, "texts", EXPECTED)
    labels = tables.column("label", path, features, label_column)
    others = {name: feature for name, feature in features.items() if name != labels}
    texts = tables.column("text", path, others, text_column)
    train, test, notes = parts.choose(path, list(found), "texts")
    split: list[Texts] = []
    values: list[list[Any]] = []
    cut = total = 0
    for part in [train, test] if test else [train]:
        with tables.readable(path, "texts", EXPECTED):
            rows = [
                (row[texts], row[labels]) for row in found[part].select_columns([texts, labels])
            ]
        if not rows:
            raise SubspanError(f"the part {part!r} of {path} must have texts, got none: add some")
        tables.check_texts(path, part, texts, (text for text, _ in rows))
        ids, longer = tokenizer.encode([text for text, _ in rows], length)
        cut += longer
        total += len(ids)
        ends = torch.tensor([len(one) for one in ids]).cumsum(0)
        tokens = torch.tensor([token for one in ids for token in one], dtype=torch.int32)
        split.append(Texts(tokens, ends, torch.empty(len(ids))))
        values.append([value for _, value in rows])
    encoded, names = tables.encode(path, labels, features[labels], values)
    pieces = [replace(one, labels=label) for one, label in zip(split, encoded, strict=True)]
    train_part, test_part = pieces if test else hold_out(pieces[0], 1 / 6, seed=0, stream=TEST)
    notes += left_out
    if cut:
        notes += (f"{cut:,} of {total:,} texts are longer than {length} tokens, and cut there",)
    return RawTexts(train_part, test_part, names, notes=notes)
