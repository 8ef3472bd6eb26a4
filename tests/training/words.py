"""A tiny BERT that is to say whether a sentence has the word 7, for tests of fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspan.training.tasks import Part, Task

SIZES = {"train": 192, "validation": 64, "test": 64}
HEAD = 16 * 2 + 2


class Words(Task):
    """Sentences of 8 of 20 words."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.words = {
            part: torch.randint(1, 20, (size, 8), generator=generator)
            for part, size in SIZES.items()
        }

    def network(self) -> nn.Module:
        return bert()

    def size(self) -> int:
        return SIZES["train"]

    def batch(self, index: Tensor) -> Tensor:
        return self.words["train"][index]

    def loss(self, net: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(net(input_ids=batch).logits, (batch == 7).any(dim=1).long())

    @torch.no_grad()
    def evaluate(self, net: nn.Module, part: Part) -> tuple[float, float]:
        words = self.words[part]
        right = net(input_ids=words).logits.argmax(dim=1) == (words == 7).any(dim=1)
        return float(self.loss(net, words)), float(right.float().mean())


def bert() -> nn.Module:
    """BERT of 2 layers of width 16."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 32, "vocab_size": 20, "max_position_embeddings": 8}
    return BertForSequenceClassification(BertConfig(**sizes, **more))


def words(seed: int) -> Words:
    return Words(seed)
