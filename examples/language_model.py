"""A task of your own: a language model of characters, on any text file.

    subspan train --task examples.language_model:task --data LICENSE --dim 2000
    subspan sweep --task examples.language_model:task --data LICENSE --dims 100,300,1000,3000,10000

The score is bits per character, of which fewer are better. The intrinsic dimension is the least d
that makes 90 % of the way from knowing nothing, log2 of the alphabet's size, to what all weights
reach.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspan.training.score import Score
from subspan.training.tasks import Part, Task

CONTEXT = 12  # characters that the next one is told from


class Characters(Task):
    """The next character of a text, from those before it (Bengio 2003).

    The first 80 % of the text are for training; then come 10 % for choices, and 10 % for the test.
    """

    def __init__(self, text: str) -> None:
        alphabet = sorted(set(text))
        self.letters = len(alphabet)
        ids = torch.tensor([alphabet.index(character) for character in text])
        windows = ids.unfold(0, CONTEXT + 1, 1)  # (positions, context and the next)
        self.train, self.validation, self.test = windows.split(
            [len(windows) - 2 * (len(windows) // 10), *[len(windows) // 10] * 2]
        )
        zero = math.log2(self.letters)
        self.score = Score("bits per character", higher_is_better=False, zero=zero, percent=False)

    def network(self) -> nn.Module:
        """From ids (N, CONTEXT) to logits (N, letters)."""
        return nn.Sequential(
            nn.Embedding(self.letters, 16),
            nn.Flatten(),
            nn.Linear(16 * CONTEXT, 128),
            nn.ReLU(),
            nn.Linear(128, self.letters),
        )

    def size(self) -> int:
        """Positions in the training part."""
        return len(self.train)

    def batch(self, index: Tensor) -> Tensor:
        """Windows of the text, (n, CONTEXT + 1)."""
        return self.train[index]

    def loss(self, net: nn.Module, batch: Tensor) -> Tensor:
        """Mean cross entropy, in nats."""
        return cross_entropy(net(batch[:, :-1]), batch[:, -1])

    @torch.no_grad()
    def evaluate(self, net: nn.Module, part: Part) -> tuple[float, float]:
        """The same in nats and in bits."""
        nats = float(self.loss(net, getattr(self, part)))
        return nats, nats / math.log(2)


def task(data: str = "LICENSE") -> Characters:
    """Of the file --data."""
    return Characters(Path(data).read_text(encoding="utf-8"))
