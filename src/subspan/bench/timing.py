"""Times that can be compared on a noisy machine: interleaved, warmed up, medians with their spread.

Candidates take turns, so that whatever else the machine does meets all of them alike: a ratio of
medians of one set of rounds is worth far more than either median. A turn is a series of calls, as
in a training loop, of which the first quarter does not count: it finds in the caches what the
candidate before left there, and threads asleep. The order changes from round to round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

ROUNDS = (5, 1000)  # at least, at most
CALLS = 4  # in a turn, or as many as fill
TURN = 0.02  # seconds
COPIED = 256 * 2**20  # bytes, which fit into no cache

Quartiles = dict[str, float]  # median, low, high (quartiles) in seconds; calls


def interleaved(
    candidates: Mapping[str, Callable[[], object]], seconds: float, device: torch.device
) -> dict[str, Quartiles]:
    """Time functions, by name, in turns; return the median and the quartiles in seconds.

    About so many seconds are spent on each: never fewer than 5 rounds, nor more than 1,000. An
    accelerator is waited for after each call.
    """

    def once(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for function in candidates.values():  # compiles, fills caches
        once(function)
    lasts = {name: max(once(function), 1e-6) for name, function in candidates.items()}
    calls = {name: max(CALLS, round(TURN / last)) for name, last in lasts.items()}
    a_round = sum(calls[name] * lasts[name] for name in candidates)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds_in(seconds * len(candidates), a_round)):
        shuffle(order)
        for name in order:
            turn = [once(candidates[name]) for _ in range(calls[name])]
            times[name] += turn[len(turn) // 4 :]
    return {name: spread(measured) for name, measured in times.items()}


def rounds_in(seconds: float, a_round: float) -> int:
    """Return how many rounds of so many seconds fill a time, within :data:`ROUNDS`."""
    least, most = ROUNDS
    return max(least, min(most, int(seconds / max(a_round, 1e-9))))


def spread(seconds: list[float]) -> Quartiles:
    """Return the median and the quartiles of some calls."""
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high, "calls": len(seconds)}


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes per second that this machine reads and writes in a plain copy of :data:`COPIED`."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, seconds, device)["copy"]
    return 2 * COPIED / timing["median"]
