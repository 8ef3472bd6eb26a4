"""Ways to train a large network, each in a process of its own that takes turns with the others.

``full`` trains all weights with Adam. ``frozen`` trains nothing: a forward pass, and a backward
pass to the input, with frozen weights. That is the least that training through few numbers can
cost, and what LoRA holds beside its own matrices. ``subspan`` trains d coordinates (hash, Adam),
and ``subspan, checkpointed`` does so with activation checkpointing of every block. ``lora`` trains
LoRA matrices of rank 8 on every matrix that the others reach, with PEFT where that is installed.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from subspan.bench.part import Measurement
from subspan.bench.resident import Beyond, resident
from subspan.bench.settings import Bench
from subspan.bench.subprocess import SteppedProcess
from subspan.bench.timing import ROUNDS, rounds_in, spread
from subspan.errors import SubspanError
from subspan.subspace.model import SubspaceModel

VARIANTS = ("full", "frozen", "subspan", "subspan, checkpointed", "lora")
FULL, FROZEN, SUBSPAN, CHECKPOINTED, LORA = VARIANTS
RANK = 8  # of LoRA, PEFT's own default
CHANGE = 1e-4  # of a weight in a step
LORA_RATE = 1e-3
# Vectors of D that a process holds between steps, and the most while it makes one: a guess that
# decides whether processes may live side by side, and whether training all weights is tried.
HELD = {FULL: 4, FROZEN: 1, SUBSPAN: 1.5, CHECKPOINTED: 1.5, LORA: 1}
MORE = 2


@dataclass
class Problem:
    """A network, and its loss on a batch that stays the same."""

    net: nn.Module
    # Of the network, and of whether the gradient shall reach the input, as it must where nothing
    # else is trained.
    loss: Callable[[nn.Module, bool], Tensor]
    matrices: tuple[type[nn.Module], ...] = (nn.Linear,)  # the kinds of layers that LoRA adapts


def prepare(problem: Problem, variant: str, dim: int) -> tuple[Callable[[], float], int]:
    """Make the step of a variant, which returns the loss before it; and count what is trained."""
    net, optimizer = problem.net, None
    weights = sum(p.numel() for p in net.parameters())
    if variant == FULL:
        optimizer = torch.optim.Adam(net.parameters(), lr=CHANGE)
    elif variant == FROZEN:
        net.requires_grad_(False)
    elif variant in (SUBSPAN, CHECKPOINTED):
        net = SubspaceModel(net, dim)
        # Columns have norm 1, so that a weight moves by √(d/D) of what a coordinate does.
        optimizer = torch.optim.Adam(net.parameters(), lr=CHANGE * math.sqrt(weights / dim))
    else:
        net = add_lora(net, problem.matrices)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], LORA_RATE)

    def step() -> float:
        if optimizer is not None:
            optimizer.zero_grad()
        loss = problem.loss(net, variant == FROZEN)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss.item()

    return step, sum(p.numel() for p in net.parameters() if p.requires_grad)


def add_lora(net: nn.Module, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    """Put PEFT's LoRA on every layer of these kinds; nothing else is trained then."""
    peft = importlib.import_module("peft")
    names = [name for name, module in net.named_modules() if isinstance(module, kinds)]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, bias="none")
    adapted: nn.Module = peft.inject_adapter_in_model(config, net)
    return adapted


def steps(
    module: str, variant: str, dim: int, device: str, *arguments: Any
) -> Iterator[dict[str, Any]]:
    """Make a step whenever the next value is asked for, and say what the steps so far took.

    A small network of the same kind makes a step before: it compiles kernels, starts threads and
    loads what is loaded on first use. The first step of the large one counts in the peak, which
    begins where θ₀ is there and nothing else, and not in the times.

    Args:
        module: of a part; its function ``problem(large, checkpointed, device, *arguments)`` makes
            the :class:`Problem`, in full size or small.
        variant: how to train.
        dim: d of the subspace.
        device: where.
        arguments: of the part's.

    Yields:
        ``seconds`` and ``loss`` of this step, ``peak_bytes`` and ``sampled_bytes`` beyond θ₀ until
        now; ``numbers`` that are trained, ``weights``, ``weight_bytes`` of θ₀,
        ``largest_bytes`` of its largest tensor, and ``library_bytes``, resident before θ₀ was.
    """
    place = torch.device(device)

    def make(large: bool) -> Problem:
        function = importlib.import_module(module).problem
        problem: Problem = function(large, variant == CHECKPOINTED, place, *arguments)
        return problem

    torch.manual_seed(0)
    small = make(False)
    prepare(small, variant, min(dim, 100))[0]()
    del small
    gc.collect()
    libraries = resident(place)
    torch.manual_seed(0)
    problem = make(True)
    sizes = [p.numel() * p.element_size() for p in problem.net.parameters()]
    facts = {
        "weights": sum(p.numel() for p in problem.net.parameters()),
        "weight_bytes": sum(sizes),
        "largest_bytes": max(sizes),
        "library_bytes": libraries,
    }
    beyond = Beyond(place)
    with beyond.watching():
        step, numbers = prepare(problem, variant, dim)
    while True:
        start = time.perf_counter()
        with beyond.watching():
            loss = step()
            if place.type == "cuda":
                torch.cuda.synchronize(place)
        yield facts | {
            "seconds": time.perf_counter() - start,
            "loss": loss,
            "numbers": numbers,
            "peak_bytes": beyond.peak,
            "sampled_bytes": beyond.sampled,
        }


def measure(
    module: str,
    arguments: Sequence[Any],
    settings: Bench,
    weight_bytes: int,
    allocator: Mapping[str, str],
) -> list[Measurement]:
    """Measure every variant, in turns of a step if all fit into half the memory.

    The arguments are those of the module's function ``problem`` after the first three, see
    :func:`steps`. The settings have d of the subspace, the device, and the seconds to spend on each
    variant: five steps at least, after the first. ``weight_bytes`` are those of θ₀, and
    ``allocator`` has environment variables of glibc's malloc.

    Return rows with ``projection`` (the variant) and what :func:`steps` says of the last step, with
    ``step`` (the timing) instead of ``seconds`` and ``losses`` (the first, the last) instead of
    ``loss``; or ``skipped``, a reason.
    """
    rows: dict[str, Measurement] = {variant: {"projection": variant} for variant in VARIANTS}
    available = psutil.virtual_memory().available
    possible = []
    for variant in VARIANTS:
        needed = (HELD[FULL] + 0.5 if variant == FULL else 1) * weight_bytes  # θ₀ at the least
        room = (0.8 if variant == FULL else 1) * available
        if variant == LORA and importlib.util.find_spec("peft") is None:
            rows[variant]["skipped"] = "not installed: pip install 'subspan[peft]'"
        elif needed > room:
            rows[variant]["skipped"] = f"needs {needed / 1e9:,.1f} of {available / 1e9:,.1f} GB"
        else:
            possible.append(variant)
    together = (sum(HELD[variant] for variant in possible) + MORE) * weight_bytes

    def start(variant: str) -> SteppedProcess:
        how = (module, variant, settings.large_dim, str(settings.torch_device), *arguments)
        return SteppedProcess(steps, *how, allocator=allocator)

    groups = [possible] if together < available / 2 else [[variant] for variant in possible]
    for group in groups:
        for variant, row in _take_turns(start, group, settings.seconds).items():
            rows[variant] |= row
    return list(rows.values())


def _take_turns(
    start: Callable[[str], SteppedProcess], variants: Sequence[str], seconds: float
) -> dict[str, Measurement]:
    """Let a worker for each variant make steps in an order that changes; skip those that fail."""
    steps_of: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    workers: dict[str, SteppedProcess] = {}
    failed: dict[str, Measurement] = {}

    def turn(variant: str) -> None:
        try:
            steps_of[variant].append(workers[variant].turn())
        except SubspanError as error:
            failed[variant] = {"skipped": str(error)}
            del workers[variant]

    with ExitStack() as stack:
        for variant in variants:
            workers[variant] = stack.enter_context(start(variant))
            turn(variant)
        least = ROUNDS[0]
        shuffle, rounds, made = random.Random(0).shuffle, least, 0
        while workers and made < rounds:
            order = list(workers)
            shuffle(order)
            for variant in order:
                turn(variant)
            made += 1
            if made == least:
                a_round = sum(steps_of[variant][-1]["seconds"] for variant in workers)
                rounds = rounds_in(seconds * len(workers), a_round)
    return {variant: _row(steps_of[variant]) for variant in workers} | failed


def _row(steps: Sequence[dict[str, Any]]) -> Measurement:
    """Sum up the steps of a variant; the first one's time does not count."""
    first, last = steps[0], steps[-1]
    facts = {key: last[key] for key in last if key not in ("seconds", "loss")}
    times = spread([step["seconds"] for step in steps[1:]])
    return facts | {"step": times, "losses": [first["loss"], last["loss"]]}
