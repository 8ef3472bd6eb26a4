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

from subspan.bench.apart import Worker
from subspan.bench.resident import Beyond, resident
from subspan.bench.timing import ROUNDS, spread
from subspan.errors import SubspanError
from subspan.subspace.model import SubspaceModel

FULL, FROZEN, SUBSPAN, CHECKPOINTED, LORA = (
    "full",
    "frozen",
    "subspan",
    "subspan, checkpointed",
    "lora",
)
RANK = 8  # of LoRA, PEFT's own default
CHANGE = 1e-4  # of a weight in a step
LORA_RATE = 1e-3
# Vectors of D that a process holds between steps, and the most while it makes one: a guess that
# decides whether processes may live side by side, and whether training all weights is tried.
HELD = {FULL: 4, FROZEN: 1, SUBSPAN: 1.5, CHECKPOINTED: 1.5, LORA: 1}
MORE = 2


@dataclass
class Problem:
    """A network, and its loss on a batch that stays the same.

    ``loss`` is told whether the gradient shall reach the input, as it does where nothing else is
    trained. ``matrices`` are the kinds of layers that LoRA adapts.
    """

    net: nn.Module
    loss: Callable[[nn.Module, bool], Tensor]
    matrices: tuple[type[nn.Module], ...] = (nn.Linear,)


def training(problem: Problem, variant: str, dim: int) -> tuple[Callable[[], float], int]:
    """A function that makes one step and returns the loss before it; how many numbers it trains."""
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
        net = with_lora(net, problem.matrices)
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


def with_lora(net: nn.Module, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    """The network with PEFT's LoRA on every layer of these kinds, nothing else being trained."""
    peft = importlib.import_module("peft")
    names = [name for name, module in net.named_modules() if isinstance(module, kinds)]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, bias="none")
    adapted: nn.Module = peft.inject_adapter_in_model(config, net)
    return adapted


def steps(
    make: Callable[[bool], Problem], variant: str, dim: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Make a step whenever the next value is asked for, and say what the steps so far took.

    A small network of the same kind makes a step before: it compiles kernels, starts threads and
    loads what is loaded on first use. The first step of the large one counts in the peak, which
    begins where θ₀ is there and nothing else, and not in the times.

    Args:
        make: the problem, in full size or small.
        variant: how to train.
        dim: d of the subspace.
        device: where.

    Yields:
        ``seconds`` and ``loss`` of this step, ``peak_bytes`` and ``sampled_bytes`` beyond θ₀ until
        now; ``numbers`` that are trained, ``weights``, ``weight_bytes`` of θ₀,
        ``largest_bytes`` of its largest tensor, and ``library_bytes``, resident before θ₀ was.
    """
    torch.manual_seed(0)
    small = make(False)
    training(small, variant, min(dim, 100))[0]()
    del small
    gc.collect()
    libraries = resident(device)
    torch.manual_seed(0)
    problem = make(True)
    sizes = [p.numel() * p.element_size() for p in problem.net.parameters()]
    facts = {
        "weights": sum(p.numel() for p in problem.net.parameters()),
        "weight_bytes": sum(sizes),
        "largest_bytes": max(sizes),
        "library_bytes": libraries,
    }
    beyond = Beyond(device)
    with beyond.watching():
        step, numbers = training(problem, variant, dim)
    while True:
        start = time.perf_counter()
        with beyond.watching():
            loss = step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        yield facts | {
            "seconds": time.perf_counter() - start,
            "loss": loss,
            "numbers": numbers,
            "peak_bytes": beyond.peak,
            "sampled_bytes": beyond.sampled,
        }


def measure(
    function: Callable[..., Iterator[dict[str, Any]]],
    arguments: Sequence[Any],
    variants: Sequence[str],
    weight_bytes: int,
    seconds: float,
    allocator: Mapping[str, str],
) -> list[dict[str, Any]]:
    """A row for every variant, measured in turns of a step if all fit into half the memory.

    Args:
        function: a generator as :func:`steps`, of a module's top level.
        arguments: its own, after the variant.
        variants: what to compare.
        weight_bytes: of θ₀.
        seconds: to spend on each; five steps at least, after the first.
        allocator: environment variables of glibc's malloc.

    Returns:
        Rows with ``projection`` (the variant) and what :func:`steps` says of the last step, with
        ``step`` (the timing) instead of ``seconds`` and ``losses`` (the first, the last) instead of
        ``loss``; or ``skipped``, a reason.
    """
    rows = {variant: {"projection": variant} for variant in variants}
    there = psutil.virtual_memory().available
    possible = []
    for variant in variants:
        needed = (HELD[variant] + 0.5) * weight_bytes
        if variant == LORA and importlib.util.find_spec("peft") is None:
            rows[variant]["skipped"] = "not installed: pip install 'subspan[peft]'"
        elif variant == FULL and needed > 0.8 * there:
            rows[variant]["skipped"] = f"needs {needed / 1e9:.1f} of {there / 1e9:.1f} GB"
        else:
            possible.append(variant)
    all_of_them = (sum(HELD[variant] for variant in possible) + MORE) * weight_bytes
    groups = [possible] if all_of_them < there / 2 else [[variant] for variant in possible]
    for group in groups:
        for variant, found in _in_turns(function, arguments, group, seconds, allocator).items():
            rows[variant] |= found
    return list(rows.values())


def _in_turns(
    function: Callable[..., Iterator[dict[str, Any]]],
    arguments: Sequence[Any],
    variants: Sequence[str],
    seconds: float,
    allocator: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    firsts: dict[str, float] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}

        def turn(variant: str) -> None:
            try:
                value = workers[variant].turn()
            except SubspanError as error:
                found[variant] = {"skipped": str(error)}
                del workers[variant]
                return
            loss, took = value.pop("loss"), value.pop("seconds")
            if variant in firsts:
                times.setdefault(variant, []).append(took)
                value["step"] = spread(times[variant])
            firsts.setdefault(variant, loss)
            found[variant] = value | {"losses": [firsts[variant], loss]}

        for variant in variants:
            worker = Worker(function, variant, *arguments, allocator=allocator)
            workers[variant] = stack.enter_context(worker)
            turn(variant)
        least, most = ROUNDS
        shuffle, rounds, done = random.Random(0).shuffle, least, 0
        while workers and done < rounds:
            order = list(workers)
            shuffle(order)
            for variant in order:
                turn(variant)
            done += 1
            if done == least:
                a_round = sum(times[variant][-1] for variant in workers)
                rounds = max(least, min(most, int(seconds * len(workers) / max(a_round, 1e-9))))
    return found
