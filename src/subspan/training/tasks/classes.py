"""Tasks whose samples have classes: mean cross entropy, and the share that is told rightly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspan.training.config import Option
from subspan.training.tasks import Part, Task

LABEL_COLUMN = Option(
    "label_column", str | None, "the column of the labels; null finds it likewise"
)


class ClassTask(Task):
    """Samples of some classes."""

    @abstractmethod
    def judge(self, net: nn.Module, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield scores, (n, classes), and labels, (n,), of all samples of a part, in batches.

        The network is in eval mode; the part is "train", "validation" or "test".
        """

    @torch.no_grad()
    def evaluate(self, net: nn.Module, part: Part) -> tuple[float, float]:
        """Return the mean cross entropy, and accuracy as a fraction."""
        loss, correct, count = self._sum(net, part)
        return loss / count, correct / count

    @torch.no_grad()
    def count_mistakes(self, net: nn.Module) -> tuple[int, int]:
        """Count the samples, of training and validation part, that a network tells wrongly."""
        sums = [self._sum(net, part) for part in ("train", "validation")]
        return sum(count - correct for _, correct, count in sums), sum(n for *_, n in sums)

    def _sum(self, net: nn.Module, part: str) -> tuple[float, int, int]:
        """Return the sum of losses, the number of samples told rightly, and that of all samples."""
        loss, correct, count = 0.0, 0, 0
        for scores, labels in self.judge(net, part):
            loss += float(cross_entropy(scores.float(), labels, reduction="sum"))
            correct += int((scores.argmax(dim=1) == labels).sum())
            count += len(labels)
        return loss, correct, count
