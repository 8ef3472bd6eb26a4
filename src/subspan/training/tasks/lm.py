"""Causal language modelling: a decoder of Transformers, the next token, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspan.errors import SubspanError
from subspan.training import pretrained
from subspan.training.config import Option, Training
from subspan.training.data import blocks
from subspan.training.score import Score
from subspan.training.tasks import Part, TaskKind, in_eval, register
from subspan.training.tasks.text import TEXT_COLUMN, TaskOfTransformers, limit, require, takes

BLOCK = 128  # tokens of a block, where none are asked for and the network takes as many
LOGITS = 2**24  # numbers that the network may give at a time in evaluation
ROUNDING = 1e-5  # of the largest score: how much one may change by a token after it


class LanguageModelling(TaskOfTransformers):
    """Blocks of a text, and a decoder that tells each token from those before it."""

    data: blocks.BlockData

    @property
    def score(self) -> Score:  # type: ignore[override]
        """Perplexity, whose zero is that of a network that takes all tokens for equally likely."""
        return Score(
            "perplexity", higher_is_better=False, zero=float(self.tokenizer.size), percent=False
        )

    def build(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Load the decoder."""
        return _build(self.net, self.seed)

    def batch(self, index: Tensor) -> Tensor:
        """Select blocks, int64 (n, block)."""
        return self.data.train.tokens[index].long()

    def loss(self, net: nn.Module, batch: Tensor) -> Tensor:
        """Return the mean cross entropy of all tokens but the first of each block, in nats."""
        scores = net(input_ids=batch).logits[:, :-1]
        return cross_entropy(scores.flatten(0, 1).float(), batch[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, net: nn.Module, part: Part) -> tuple[float, float]:
        """Return the mean cross entropy in nats a token, and its exponential."""
        tokens: Tensor = getattr(self.data, part).tokens
        at_once = max(1, LOGITS // (tokens.shape[1] * self.tokenizer.size))
        loss = sum(
            len(some) * float(self.loss(net, some.long())) for some in tokens.split(at_once)
        ) / len(tokens)
        return loss, math.exp(loss) if loss < 700 else math.inf

    def describe(self) -> dict[str, Any]:
        """Return what the tokens depend on beside the text."""
        return {"block": self.data.train.tokens.shape[1], "tokenizer": self.tokenizer.digest}

    def sizes(self) -> dict[str, int]:
        """Return the number of test tokens."""
        return {"tokens": self.data.test.tokens.numel()}

    @torch.no_grad()
    def check(self, net: nn.Module) -> None:
        """Send the block with the last token of the vocabulary through the network.

        And once more with another token at its end, by which no score before it may change.
        """
        train = self.data.train.tokens
        row = int(train.max(dim=1).values.argmax())
        block = train[row : row + 1].long()
        other = block.clone()
        other[:, -1] = (block[:, -1] + 1) % (block.max() + 1)
        tokens = f"a block of {train.shape[1]} tokens up to number {int(train.max())}"
        with takes(self.net, tokens, "a smaller --block"), in_eval(net):
            scores, others = (net(input_ids=one).logits for one in (block, other))
        if scores.shape[:2] != (1, train.shape[1]):
            raise SubspanError(
                f"{self.net} must give scores for each token of a block, got {tuple(scores.shape)}"
            )
        change = (scores - others)[:, :-1].abs().max()
        if change > ROUNDING * scores.abs().max():
            raise SubspanError(
                f"{self.net} sees the tokens that it is to tell, as an encoder does, and its "
                "perplexity would mean nothing: give a decoder"
            )


def _build(net: str, seed: int) -> tuple[nn.Module, tuple[str, ...]]:
    return pretrained.network(net, "AutoModelForCausalLM", seed, use_cache=False)


class _LanguageModel(TaskKind):
    """Text files and sets of texts by name, decoders of Transformers by name."""

    head = ""
    options = (
        TEXT_COLUMN,
        Option(
            "block",
            int | None,
            f"tokens of a sample; null are {BLOCK}, or as many as the network takes",
        ),
    )

    def load(self, training: Training, seed: int) -> LanguageModelling:
        net, name = require(training, self.name)
        tokenizer = pretrained.tokenizer(net)
        block = limit(tokenizer, net, training.task_options.get("block"), "block", least=2)
        if "block" not in training.task_options:
            block = BLOCK if block is None else min(BLOCK, block)
        assert block is not None
        options = training.task_options | {"block": block}
        data = blocks.load(name, tokenizer, validation=training.validation, seed=seed, **options)
        return LanguageModelling(data, net, tokenizer, seed)

    def network(self, extra: Mapping[str, Any]) -> Callable[[], nn.Module]:
        return lambda: _build(extra["net"], extra["seed"])[0]


register(_LanguageModel("lm", "language modelling by a decoder of Transformers: perplexity"))
