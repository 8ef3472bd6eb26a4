"""A sentence encoder of MiniLM's size, of random weights, behind the images of the other networks.

``subspan bench --parts optimizers --nets subspan.bench.minilm:encoder``
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError

WORDS = 32  # in a sentence


class Encoder(nn.Module):
    """A BERT of 6 layers of width 384, 22.7 million weights, that reads pixels as words.

    The first 32 pixels of an image of normals are as many words, each as likely as any other.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        self.vocabulary: int = config.vocab_size
        self.bert = transformers.BertModel(config)
        self.head = nn.Linear(config.hidden_size, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(images, classes)."""
        share = torch.special.ndtr(images.flatten(1)[:, :WORDS])
        words = (share * self.vocabulary).long().clamp(max=self.vocabulary - 1)
        scores: Tensor = self.head(self.bert(input_ids=words).pooler_output)
        return scores


def encoder(classes: int = 10) -> nn.Module:
    """Make the encoder with a layer of classes, which needs Hugging Face's transformers."""
    if importlib.util.find_spec("transformers") is None:
        raise SubspanError("an encoder needs Hugging Face's transformers: pip install transformers")
    return Encoder(classes)
