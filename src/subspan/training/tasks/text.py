"""Texts and networks of Transformers: their classification, by cross entropy and accuracy."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspan.errors import SubspanError
from subspan.training import pretrained
from subspan.training.config import Option, Training
from subspan.training.data import blocks, texts
from subspan.training.data.cache import digest
from subspan.training.tasks import Task, TaskKind, in_eval, register
from subspan.training.tasks.classes import LABEL_COLUMN, ClassTask

TOKENS = 8192  # of texts that are evaluated at a time
GROUPS = 4  # of like length that a batch is divided into
TEXT_COLUMN = Option(
    "text_column",
    str | None,
    "the column of the texts; null finds it by the columns' types and usual names",
)


class TaskOfTransformers(Task):
    """Texts, and a network of Transformers by its name or folder.

    The seed is of the weights that the network's file lacks, as of a head.
    """

    data: texts.TextData | blocks.BlockData

    def __init__(self, data: Any, net: str, tokenizer: pretrained.Tokenizer, seed: int) -> None:
        self.data, self.net, self.tokenizer, self.seed = data, net, tokenizer, seed
        self.notes = data.notes

    @abstractmethod
    def build(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Load the network, and notes on what of it is drawn."""

    def network(self) -> nn.Module:
        """Load the network."""
        net, notes = self.build()
        self.notes = (*self.data.notes, *notes)
        return net

    def size(self) -> int:
        """Return the number of training texts, or of their blocks."""
        return len(self.data.train)

    def as_trained(self, extra: Mapping[str, Any], path: str) -> Self:
        """Refuse a tokenizer that makes other tokens: results would not compare."""
        if self.tokenizer.digest != extra["tokenizer"]:
            raise SubspanError(
                f"the tokenizer of {self.net} is another than in the training of {path}: bring "
                "back the one of that training"
            )
        return self


def build(net: str, classes: int, pad: int, seed: int) -> tuple[nn.Module, tuple[str, ...]]:
    """Load a network with a head for so many classes, and notes on what of it is drawn."""
    return pretrained.network(
        net,
        "AutoModelForSequenceClassification",
        seed,
        num_labels=classes,
        pad_token_id=pad,
        use_cache=False,
    )


class TextClassification(TaskOfTransformers, ClassTask):
    """Texts of some classes."""

    data: texts.TextData

    def build(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Load the network with a head for the classes."""
        return build(self.net, len(self.data.names), self.tokenizer.pad, self.seed)

    def batch(self, index: Tensor) -> list[texts.Batch]:
        """Select texts, in groups of like length: one group would be half padding."""
        train = self.data.train
        order = index[train.lengths[index].argsort(stable=True)]
        return [train.batch(group, self.tokenizer.pad) for group in order.chunk(GROUPS)]

    def loss(self, net: nn.Module, batch: list[texts.Batch]) -> Tensor:
        """Return the mean cross entropy over all groups."""
        scores = torch.cat([_scores(net, group) for group in batch])
        return cross_entropy(scores, torch.cat([group.labels for group in batch]))

    def judge(self, net: nn.Module, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield scores and labels of all texts of a part."""
        some: texts.Texts = getattr(self.data, part)
        for index in some.by_length(TOKENS):
            batch = some.batch(index, self.tokenizer.pad)
            yield _scores(net, batch), batch.labels

    def describe(self) -> dict[str, Any]:
        """Return what the network and its tokens depend on beside the base, and which texts."""
        return {
            "classes": len(self.data.names),
            "names": digest(json.dumps(self.data.names)),
            "pad": self.tokenizer.pad,
            "tokenizer": self.tokenizer.digest,
            "samples": self.data.digest,
        }

    def as_trained(self, extra: Mapping[str, Any], path: str) -> Self:
        """Refuse texts of other classes, or a tokenizer that makes other tokens of them."""
        if self.describe()["names"] != extra["names"]:
            raise SubspanError(
                f"{self.data.name} has other classes ({', '.join(self.data.names[:5])}) than the "
                f"texts that {path} was trained on, and they are numbered in the order of their "
                "names: name them alike"
            )
        return super().as_trained(extra, path)

    def sizes(self) -> dict[str, int]:
        """Return the number of test texts."""
        return {"texts": len(self.data.test)}

    @torch.no_grad()
    def check(self, net: nn.Module) -> None:
        """Send the longest text through the network, with the last token of all, at its end."""
        train, pad = self.data.train, self.tokenizer.pad
        parts = [part for part in (train, self.data.validation, self.data.test) if len(part)]
        most = max(pad, *(int(part.tokens.max()) for part in parts))
        longest = train.batch(train.lengths.argmax()[None], pad)
        longest.tokens[0, -1] = most
        tokens = f"a text of {int(train.lengths.max())} tokens up to number {most}"
        with takes(self.net, tokens, "fewer as --max-length"), in_eval(net):
            scores = _scores(net, longest)
        if tuple(scores.shape) != (1, len(self.data.names)):
            raise SubspanError(
                f"{self.net} must give one score per class, shape (1, {len(self.data.names)}), "
                f"got {tuple(scores.shape)}"
            )


def _scores(net: nn.Module, batch: texts.Batch) -> Tensor:
    scores: Tensor = net(input_ids=batch.tokens, attention_mask=batch.mask).logits
    return scores


def require(training: Training, task: str) -> tuple[str, str]:
    """Return the network and the data of a task that has no others by default."""
    if not training.net or not training.data:
        missing = "--data" if training.net else "--net"
        what = {
            "--data": "a folder, or the name of a set",
            "--net": "a network of Transformers by its name or folder, as minilm",
        }[missing]
        raise SubspanError(f"task {task} needs {missing}: give {what}")
    return training.net, training.data


@contextmanager
def takes(net: str, tokens: str, remedy: str) -> Iterator[None]:
    """Say that a network does not take these tokens, in words, where it raises anything."""
    try:
        yield
    except Exception as error:  # of Transformers' many networks it may be any
        raise SubspanError(
            f"{net} does not take {tokens}: {error}: give {remedy}, or the tokenizer of the network"
        ) from error


def limit(
    tokenizer: pretrained.Tokenizer, net: str, asked: int | None, option: str, least: int = 1
) -> int | None:
    """Return how many tokens a network is to get; refuse more than it takes, and too few."""
    most = tokenizer.length
    if asked is not None and (asked < least or (most is not None and asked > most)):
        bound = f" and at most {most}, the positions of {net}" if most is not None else ""
        raise SubspanError(f"--{option} must be at least {least}{bound}, got {asked}")
    return most if asked is None else asked


class _Text(TaskKind):
    """Sets of labelled texts by name, networks of Transformers by name."""

    head = "head"

    options = (
        TEXT_COLUMN,
        LABEL_COLUMN,
        Option(
            "max_length",
            int | None,
            "tokens of a text that are kept; null are as many as the network takes",
        ),
    )

    def load(self, training: Training, seed: int) -> TextClassification:
        net, name = require(training, self.name)
        tokenizer = pretrained.tokenizer(net)
        asked = training.task_options.get("max_length")
        length = limit(tokenizer, net, asked, "max-length")
        options = training.task_options | {"max_length": length}
        data = texts.load(name, tokenizer, validation=training.validation, seed=seed, **options)
        return TextClassification(data, net, tokenizer, seed)

    def network(self, extra: Mapping[str, Any]) -> Callable[[], nn.Module]:
        return lambda: build(extra["net"], extra["classes"], extra["pad"], extra["seed"])[0]


register(_Text("text", "the classification of texts by a network of Transformers"))
