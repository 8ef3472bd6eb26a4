"""The settings of ``subspan bench``: what it measures, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from subspan.bench import candidates
from subspan.bench.part import find_part
from subspan.errors import SubspanError, unknown
from subspan.training.config import check_different
from subspan.training.schema import check_fields


@dataclass(frozen=True)
class Bench:
    """The settings of a benchmark.

    Args:
        parts: what to measure, see below.
        methods: projections to measure, see below; null measures all.
        sizes: D by d for products and memory, as 61706x1000,472610x4500.
        nets: networks whose training steps are timed.
        dim: d of the training steps.
        width: units of the five hidden layers of lowrank, and of the layer of sums.
        ranks: of the layers of lowrank.
        batch_size: images in a step.
        blocks: the network of blocks: how many, their width and their hidden width; 1x16x64 is
            tiny.
        batches: vectors in a step of blocks; each is measured.
        decoder: weights of the decoder of transformer, which has as many and few more: 1e9.
        dtype: of the decoder's weights, float32 or bfloat16.
        tokens: in a step of the decoder.
        large_dim: d of blocks and transformer.
        seconds: to spend on each timing; at least five rounds are made.
        device: auto, cpu or cuda; auto is the GPU where there is one.
    """

    parts: tuple[str, ...] = ("products", "steps", "memory", "optimizers", "lowrank", "sums")
    methods: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ("61706x1000",)
    nets: tuple[str, ...] = ("lenet", "mlp")
    dim: int = 1000
    width: int = 1024
    ranks: tuple[int, ...] = (8, 32, 128)
    batch_size: int = 128
    blocks: str = "24x1024x4096"
    batches: tuple[int, ...] = (64, 256)
    decoder: int = 20_000_000
    dtype: str = "float32"
    tokens: int = 32
    large_dim: int = 10_000
    seconds: float = 1.0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("parts", "sizes", "nets", "ranks", "batches"):
            if not getattr(self, name):
                raise SubspanError(f"{name} is empty: give at least one, or leave it out")
        for name in ("parts", "methods", "sizes", "nets", "ranks", "batches"):
            check_different(name, [str(value) for value in getattr(self, name)])
        named = [find_part(name) for name in self.parts]
        for rank in self.ranks:
            if not 1 <= rank <= self.width:
                raise SubspanError(f"ranks must be in [1, {self.width}], the width, got {rank}")
        for name in ("dim", "width", "batch_size", "large_dim", "seconds"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise SubspanError(f"{name} must be positive, and finite, got {value}")
        for batch in self.batches:
            if batch <= 0:
                raise SubspanError(f"batches must be positive, got {batch}")
        candidates.select(self.methods)
        for out_dim, in_dim in self.pairs():
            candidates.make("hash", out_dim, in_dim)  # refuses what does not fit
        _ = self.block_sizes, self.torch_device
        for each in named:
            each.check(self)

    def pairs(self) -> list[tuple[int, int]]:
        """Return the sizes as numbers, D and d."""
        found = []
        for size in self.sizes:
            numbers = _numbers(size)
            if len(numbers) != 2:
                raise SubspanError(f"a size is D by d, as in 61706x1000, got {size!r}")
            found.append((numbers[0], numbers[1]))
        return found

    @property
    def block_sizes(self) -> tuple[int, int, int]:
        """The number of blocks, their width and their hidden width."""
        numbers = _numbers(self.blocks)
        if len(numbers) != 3 or min(numbers) < 1:
            raise SubspanError(
                "blocks are a number, a width and a hidden width, as in 24x1024x4096 (24 blocks "
                f"1024 → 4096 → 1024), got {self.blocks!r}"
            )
        return numbers[0], numbers[1], numbers[2]

    @property
    def candidates(self) -> list[str]:
        """The projections to measure, and the stored matrix that they are compared with."""
        return candidates.select(self.methods or candidates.names())

    @property
    def torch_device(self) -> torch.device:
        """The device, as PyTorch has it."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device not in ("cpu", "cuda"):
            raise unknown("device", self.device, ("auto", "cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SubspanError("there is no CUDA device here: use --device cpu")
        return torch.device(self.device)


def _numbers(text: str) -> list[int]:
    """Read numbers between which there is an x; none if the text is anything else."""
    words = text.replace("_", "").split("x")
    return [int(word) for word in words] if all(map(str.isdecimal, words)) else []
