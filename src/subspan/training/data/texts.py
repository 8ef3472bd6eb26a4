"""Sets of labelled texts as tokens: read and tokenised once, cached, padded batch by batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from subspan.errors import SubspanError
from subspan.files import readable
from subspan.training.data import cache, parts, sources, tables
from subspan.training.data.order import TEST, VALIDATION, hold_out
from subspan.training.pretrained import Tokenizer

TEXT_COLUMNS = ("text", "sentence", "content", "review")
FORMAT = 2  # of the cached tokens: a change of what tokenising gives must change it
EXPECTED = (
    "a folder of parquet, CSV or JSON files with a column of texts and one of labels, or another "
    "layout that datasets.load_dataset knows"
)


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts of one length.

    Attributes:
        tokens: int64 (n, length), filled up with the tokenizer's padding.
        mask: int64 (n, length), 1 where a text's own tokens are.
        labels: int64 (n,).
    """

    tokens: Tensor
    mask: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Texts:
    """Some labelled texts, one after the other.

    Attributes:
        tokens: int32 (T,), of all texts.
        ends: int64 (N,), where each text ends in them.
        labels: int64 (N,), in [0, classes).
    """

    tokens: Tensor
    ends: Tensor
    labels: Tensor

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

    def to(self, device: torch.device | str) -> Texts:
        """Return the texts on another device."""
        return Texts(self.tokens.to(device), self.ends.to(device), self.labels.to(device))

    def digest(self) -> str:
        """Return 8 hexadecimal digits that tell these texts and labels from others."""
        sums = hashlib.blake2b(digest_size=4)
        for tensor in (self.tokens, self.ends, self.labels):
            sums.update(tensor.cpu().numpy().tobytes())
        return sums.hexdigest()


@dataclass(frozen=True, eq=False)
class RawTexts:
    """The content of a source, before a validation part is drawn from its training part.

    Attributes:
        train: the whole training part.
        test: the test part.
        names: of the classes, in order.
        notes: sentences that a reader of the results should know.
    """

    train: Texts
    test: Texts
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors, and the rest as JSON values, for the cache."""
        tensors = {
            f"{part}.{name}": tensor
            for part, texts in (("train", self.train), ("test", self.test))
            for name, tensor in vars(texts).items()
        }
        return tensors, {"names": self.names, "notes": self.notes}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], told: dict[str, Any]) -> Self:
        """Return the content that :meth:`pack` took apart."""
        train, test = (
            Texts(*(tensors[f"{part}.{name}"] for name in ("tokens", "ends", "labels")))
            for part in ("train", "test")
        )
        return cls(train, test, tuple(told["names"]), tuple(told["notes"]))


@dataclass(frozen=True, eq=False)
class TextData:
    """A set of labelled texts, ready to train on.

    Attributes:
        name: what it was loaded by.
        train: the training part.
        validation: the part of the set's training part that was drawn for choices.
        test: the test part.
        names: of the classes, in order.
        notes: sentences that a reader of the results should know.
        digest: of training and validation part, whichever share of them is for choices.
    """

    name: str
    train: Texts
    validation: Texts
    test: Texts
    names: tuple[str, ...]
    notes: tuple[str, ...]
    digest: str

    def to(self, device: torch.device | str) -> TextData:
        """Return the set on another device."""
        moved = {part: getattr(self, part).to(device) for part in ("train", "validation", "test")}
        return replace(self, **moved)


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

    Args:
        name: as of :func:`subspan.training.data.load`.
        tokenizer: of the network.
        validation: share of the set's training part that is held out for choices, in [0, 1).
        seed: of the draw of that share.
        text_column: where the texts are, if it cannot be told from the columns' types and names.
        label_column: where the labels are, likewise.
        max_length: tokens of a text that are kept; None are those that the network takes.

    Raises:
        SubspanError: there is no such set, it cannot be reached or read, it has no texts, or no
            two labels.
    """
    length = tokenizer.length if max_length is None else max_length
    columns: dict[str, Any] = {"text_column": text_column, "label_column": label_column}
    folder = sources.local_folder(name)
    place = sources.contents(folder) if folder else [name]
    known = [FORMAT, *place, columns, tokenizer.digest, tokenizer.rules, length]
    digest = hashlib.blake2b(json.dumps(known).encode(), digest_size=8).hexdigest()
    read: Callable[..., RawTexts] = partial(_read, tokenizer=tokenizer, length=length, **columns)

    def build() -> RawTexts:
        from rich.console import Console

        with Console(stderr=True).status(f"reading {name}"):
            if folder:
                return read(str(folder), None)
            revision = sources.newest_revision(name, name)
            raw = read(name, revision)
            return replace(raw, notes=(f"{name} at revision {revision}", *raw.notes))

    raw = cache.fetch(f"{readable(Path(place[0]).name)}-{digest}", RawTexts, build)
    train, held_out = hold_out(raw.train, validation, seed=seed, stream=VALIDATION)
    return TextData(name, train, held_out, raw.test, raw.names, raw.notes, raw.train.digest())


def _read(
    path: str,
    revision: str | None,
    *,
    tokenizer: Tokenizer,
    length: int | None,
    text_column: str | None,
    label_column: str | None,
) -> RawTexts:
    """Read and tokenise a set."""
    found, features, left_out = tables.open_set(path, revision, "texts", EXPECTED)
    labels = tables.column(
        "label", path, features, tables.LABEL_COLUMNS, label_column, "ClassLabel"
    )
    others = {name: feature for name, feature in features.items() if name != labels}
    texts = tables.column("text", path, others, TEXT_COLUMNS, text_column, "string")
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
        for number, (text, _) in enumerate(rows, start=1):
            if not isinstance(text, str):
                raise SubspanError(
                    f"{path} must have a text in the column {texts!r} of every row, got "
                    f"{type(text).__name__} in row {number} of {part}: name the right column with "
                    "--text-column, or leave that row out"
                )
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
    return RawTexts(train_part, test_part, names, notes)
