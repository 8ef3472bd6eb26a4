"""What generating P costs: products, training steps and memory, against stored matrices and Adam.

Every number is measured in one run of one machine, in turns with what it is compared with, so that
the ratios mean something where the times do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from subspan.bench import (
    blocks,
    candidates,
    laboratory,
    lowrank,
    memory,
    optimizers,
    products,
    steps,
    sums,
    transformer,
)
from subspan.bench.timing import copy_bandwidth
from subspan.errors import SubspanError, unknown
from subspan.training import machine, nets, records

FILE = "bench.json"
USUAL = ("products", "steps", "memory", "optimizers", "lowrank", "sums")
PARTS = (*USUAL, "laboratory", "blocks", "transformer")


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Args:
        parts: of "products" (P w and Pᵀ g), "steps" (of training in a fixed subspace), "memory"
            (their peaks), "optimizers" (steps in bases that are redrawn), "lowrank" (layers of low
            rank against dense ones: steps, inference, memory), "sums" (products of sums: a layer,
            LeNet) and, only if they are named, "laboratory" (epochs of ``subspan train`` against
            those of a bare loop), "blocks" and "transformer" (memory and steps of a large network
            of blocks, and of a decoder).
        methods: families, and stored-dense, stored-coo, stored-csr, stored-csc; empty for all.
        sizes: D by d for products and memory, "61706x1000".
        nets: networks whose training steps are timed.
        dim: d of the training steps.
        width: units of the five hidden layers of "lowrank", and of the layer of "sums".
        ranks: of the layers of "lowrank".
        batch_size: images in a step.
        blocks: the network of "blocks": how many, their width and their hidden width.
        batches: vectors in a step of "blocks"; each is measured.
        decoder: weights of the decoder of "transformer", which has at least so many.
        dtype: of the decoder, "float32" or "bfloat16".
        tokens: in a step of the decoder.
        large_dim: d of "blocks" and "transformer".
        seconds: to spend on each timing; at least five rounds are made.
        device: "cpu", "cuda"; "auto" for the GPU where there is one.
    """

    parts: tuple[str, ...] = USUAL
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
        for part in self.parts:
            if part not in PARTS:
                raise unknown("part", part, PARTS)
        for rank in self.ranks:
            if not 1 <= rank <= self.width:
                raise SubspanError(f"ranks must be in [1, {self.width}], the width, got {rank}")
        for name in ("dim", "width", "batch_size", "large_dim", "seconds"):
            if getattr(self, name) <= 0:
                raise SubspanError(f"{name} must be positive, got {getattr(self, name)}")
        for batch in self.batches:
            if batch <= 0:
                raise SubspanError(f"batches must be positive, got {batch}")
        candidates.chosen(self.methods)
        for out_dim, in_dim in self.pairs():
            candidates.make("hash", out_dim, in_dim)  # refuses what does not fit
        for net in self.nets if {"steps", "optimizers", "laboratory"} & set(self.parts) else ():
            candidates.make("hash", nets.weights(net, steps.SHAPE), self.dim)
        blocks.parsed(self.blocks)
        if "blocks" in self.parts:
            candidates.make("hash", blocks.weights(self.blocks), self.large_dim)
        if "transformer" in self.parts:
            transformer.check(self.decoder, self.dtype, self.tokens)
            candidates.make("hash", transformer.weights(self.decoder), self.large_dim)
        _ = self.place

    def pairs(self) -> list[tuple[int, int]]:
        """Sizes as numbers."""
        found = []
        for size in self.sizes:
            out_dim, times, in_dim = size.replace("_", "").partition("x")
            if not (times and out_dim.isdecimal() and in_dim.isdecimal()):
                raise SubspanError(f"a size is D by d, as in 61706x1000, got {size!r}")
            found.append((int(out_dim), int(in_dim)))
        return found

    @property
    def place(self) -> torch.device:
        """The device."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device not in ("cpu", "cuda"):
            raise unknown("device", self.device, ("auto", "cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SubspanError("there is no CUDA device here: use --device cpu")
        return torch.device(self.device)


def bench(
    settings: Bench,
    out: Path,
    *,
    overwrite: bool = False,
    done: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure, and write ``bench.json`` after every part.

    Parts that a run of the same configuration has finished before are not repeated.

    Args:
        settings: what to measure.
        out: a folder.
        overwrite: measure again, and replace what is there.
        done: is told what is done.

    Returns:
        The content of ``bench.json``.

    Raises:
        SubspanError: for a folder of something else, or a measurement that fails.
    """
    config = asdict(settings)
    record = records.claim(out, FILE, config, overwrite=overwrite)
    if overwrite:
        record = None
    out.mkdir(parents=True, exist_ok=True)
    device, methods = settings.place, candidates.chosen(settings.methods or candidates.names())
    if record is None:
        record = {
            "format": records.FORMAT,
            "status": "running",
            "config": config,
            "machine": {
                "device": machine.device_name(device),
                "versions": machine.versions(),
                "copy_bytes_per_second": copy_bandwidth(device, settings.seconds),
            },
        }
        done("copy bandwidth")
    measures: dict[str, Callable[[], Sequence[Any]]] = {
        "products": lambda: products.measure(
            methods, settings.pairs(), settings.seconds, device, done
        ),
        "steps": lambda: steps.measure(
            methods,
            settings.nets,
            settings.dim,
            settings.batch_size,
            settings.seconds,
            device,
            done,
        ),
        "memory": lambda: memory.measure(methods, settings.pairs(), device, done),
        "optimizers": lambda: optimizers.measure(
            methods,
            settings.nets,
            settings.dim,
            settings.batch_size,
            settings.seconds,
            device,
            done,
        ),
        "lowrank": lambda: lowrank.measure(
            settings.width, settings.ranks, settings.batch_size, settings.seconds, device, done
        ),
        "sums": lambda: sums.measure(
            settings.width, settings.batch_size, settings.seconds, device, done
        ),
        "laboratory": lambda: laboratory.measure(
            settings.nets, settings.dim, settings.batch_size, settings.seconds, device, done
        ),
        "blocks": lambda: blocks.measure(
            settings.blocks, settings.batches, settings.large_dim, settings.seconds, device, done
        ),
        "transformer": lambda: transformer.measure(
            settings.decoder,
            settings.dtype,
            settings.tokens,
            settings.large_dim,
            settings.seconds,
            device,
            done,
        ),
    }
    for part in PARTS:
        if part in settings.parts and part not in record:
            record[part] = measures[part]()
            records.write_json(out / FILE, record)
    record["status"] = "complete"
    records.write_json(out / FILE, record)
    return record


def total(settings: Bench) -> int:
    """How often ``done`` will be told something, if nothing was measured before."""
    sizes, nets = len(settings.sizes), len(settings.nets)
    counts = {
        "products": sizes,
        "steps": nets,
        "memory": sizes,
        "optimizers": nets,
        "lowrank": 1,
        "sums": 2,
        "laboratory": nets * len(laboratory.METHODS),
        "transformer": 1,
        "blocks": len(settings.batches) * len(blocks.allocators(settings.place)),
    }
    return 1 + sum(counts[part] for part in settings.parts)
