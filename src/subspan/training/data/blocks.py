"""Text as blocks of tokens, for language models: a file, or a column of a set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspan.errors import SubspanError
from subspan.files import expanded
from subspan.training.data import cache, parts, sources, tables
from subspan.training.data.order import VALIDATION, hold_out
from subspan.training.data.tensors import Raw, Tensors
from subspan.training.pretrained import Tokenizer

FORMAT = 3  # of the cached tokens: a change of what tokenising gives must change it
BOM = "\ufeff"  # which some editors put before a text, and which is no part of it
EXPECTED = (
    "a text file, or a folder of text, parquet, CSV or JSON files with a column of texts, or "
    "another layout that datasets.load_dataset knows"
)


@dataclass(frozen=True, eq=False)
class TextBlocks(Tensors):
    """Consecutive pieces of a text."""

    tokens: Tensor  # int32 (N, block)

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, index: Tensor) -> TextBlocks:
        """Return the blocks at ``index`` (int64), in that order."""
        return TextBlocks(self.tokens[index])


@dataclass(frozen=True, eq=False)
class RawBlocks(Raw):
    """The content of a source of text: its whole training part, and the test part."""

    train: TextBlocks
    test: TextBlocks


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockData(RawBlocks):
    """A text in blocks, ready to train on: ``validation`` is no part of ``train`` any more."""

    name: str
    validation: TextBlocks


def load(
    name: str,
    tokenizer: Tokenizer,
    *,
    block: int,
    validation: float,
    seed: int,
    text_column: str | None = None,
) -> BlockData:
    """Load a text in blocks of so many tokens; the arguments are as of :func:`texts.load`.

    The name may be a file of UTF-8, too. Texts of a set become one, with the token that ends a text
    between them. What is left at the end of a part and fills no block is left out. A text without a
    test part gives its last sixth for one.

    Raises:
        SubspanError: there is no such text, or it has too few tokens.
    """

    def read(path: str, *, revision: str | None = None) -> RawBlocks:
        texts, left_out = _read_set(path, revision, text_column)
        raw = _cut(name, texts, tokenizer=tokenizer, block=block)
        return replace(raw, notes=(*raw.notes, *left_out))

    def read_file() -> RawBlocks:
        return _cut(name, {"train": [_read_text(file)]}, tokenizer=tokenizer, block=block)

    file = expanded(name)
    place: list[Any]
    read_it: Callable[[], RawBlocks]
    if file.is_file():
        stat = file.stat()
        place, read_it = [str(file.resolve()), stat.st_size, stat.st_mtime_ns], read_file
    else:
        place, read_it = sources.find(name, name, read)
    identity = [*place, text_column, tokenizer.digest, tokenizer.rules, block]
    raw = cache.fetch_set(name, FORMAT, identity, RawBlocks, read_it)
    train, held_out = hold_out(raw.train, validation, seed=seed, stream=VALIDATION)
    return BlockData(**vars(raw) | {"train": train}, name=name, validation=held_out)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SubspanError(f"{file} is no text in UTF-8 ({error}): save it as UTF-8") from None


def _read_set(
    path: str, revision: str | None, text_column: str | None
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Read the texts of each part; and notes, on files that are no part of the set."""
    found, features, left_out = tables.open_set(path, revision, "text", EXPECTED)
    column = tables.column("text", path, features, text_column)
    texts: dict[str, list[str]] = {}
    for part, rows in found.items():
        with tables.readable(path, "text", EXPECTED):
            values = [row[column] for row in rows.select_columns([column])]
        tables.check_texts(path, part, column, values)
        texts[part] = values
    return texts, left_out


def _cut(name: str, texts: dict[str, list[str]], *, tokenizer: Tokenizer, block: int) -> RawBlocks:
    """Tokenise, and cut the training part and the test part into blocks."""
    train, test, notes = parts.choose(name, list(texts), "blocks")
    blocks = _blocks(texts[train], tokenizer, block)
    if test is not None:
        held = _blocks(texts[test], tokenizer, block)
    else:
        rest = len(blocks) - round(len(blocks) / 6)
        blocks, held = TextBlocks(blocks.tokens[:rest]), TextBlocks(blocks.tokens[rest:])
        notes = ("no test part: the last sixth of the text serves as it",)
    if len(blocks) < 2 or not len(held):
        raise SubspanError(
            f"{name} must have text for two blocks of {block} tokens to train on and one for the "
            f"test, got {len(blocks)} and {len(held)}: give more text, or a smaller --block"
        )
    return RawBlocks(blocks, held, notes=notes)


def _blocks(texts: Iterable[str], tokenizer: Tokenizer, block: int) -> TextBlocks:
    tokens: list[int] = []
    whole = [text.removeprefix(BOM) for text in texts]
    for number, ids in enumerate(tokenizer.tokens(whole)):
        if number and tokenizer.end is not None:
            tokens.append(tokenizer.end)
        tokens += ids
    count = len(tokens) // block
    return TextBlocks(torch.tensor(tokens[: count * block], dtype=torch.int32).view(count, block))
