"""Names beside the points of a picture, each where it covers least."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

Place = tuple[float, float]
# Where a name may stand: so many points to the right of its own and above it, the nearest first.
_PLACES = [
    far * np.array(side)
    for far in (4.5, 8, 13)
    for side in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]
_ACROSS, _UP = {1: "left", 0: "center", -1: "right"}, {1: "bottom", 0: "center", -1: "top"}
# What it costs to cover a point, and a text, where a place of a line costs 1; and what a place
# costs more than the one before it.
_POINT, _TEXT, _FARTHER = 20.0, 50.0, 0.3
_STEP = 3.0  # pixels between the places of a line that a name should not cover


def place_names(
    axes: Axes,
    names: Sequence[tuple[str, Place]],
    points: Sequence[Place],
    lines: Sequence[Sequence[Place]],
    **style: Any,
) -> list[Annotation]:
    """Write names beside their points, one after the other, each where it covers least.

    Places are in the units of the axes, whose limits and scales are set; the figure must have been
    drawn, so that they are final. Names must not cover the points, and should not cover the lines;
    a line of one place is a point that matters less. Return the texts, which have the style.
    """
    pixels = axes.transData.transform
    places = [pixels(np.array(points)), *(_along(pixels(np.array(line))) for line in lines)]
    busy = np.concatenate(places)
    weights = np.repeat([_POINT] + [1.0] * len(lines), [len(some) for some in places])
    taken: list[Bbox] = []
    texts = []
    unit = axes.figure.dpi / 72
    for name, at in names:
        text = axes.annotate(name, at, (0, 0), textcoords="offset points", va="bottom", **style)
        text.set_in_layout(False)
        size = np.array(text.get_window_extent().size)
        corners = [unit * place + size * (np.sign(place) - 1) / 2 for place in _PLACES]
        boxes = [Bbox([start, start + size]) for start in pixels(at) + np.array(corners)]
        costs = [_cost(box, axes.bbox, busy, weights, taken) for box in boxes]
        best = int(np.argmin(costs + _FARTHER * np.arange(len(costs))))
        # Aligned at its point: letters are not as wide in every resolution.
        x, y = (int(np.sign(d)) for d in _PLACES[best])
        text.set(position=tuple(_PLACES[best]), ha=_ACROSS[x], va=_UP[y])
        texts.append(text)
        taken.append(boxes[best])
    return texts


def _along(corners: np.ndarray) -> np.ndarray:
    """Return places along a line, (n, 2), in pixels."""
    parts = [corners[-1:]]
    for a, b in itertools.pairwise(corners):
        steps = max(1, round(float(np.linalg.norm(b - a)) / _STEP))
        parts.append(a + np.arange(steps)[:, None] / steps * (b - a))
    return np.concatenate(parts)


def _cost(
    box: Bbox, frame: Bbox, busy: np.ndarray, weights: np.ndarray, taken: Sequence[Bbox]
) -> float:
    """Return how much a text covers: other texts count most, and leaving the frame."""
    low, high = np.array(box.min), np.array(box.max)
    covered = weights @ ((busy > low - 2) & (busy < high + 2)).all(axis=1)
    beyond = (*(np.array(frame.min) - low), *(high - np.array(frame.max)))
    outside = sum(max(0.0, float(pixels)) for pixels in beyond)
    return float(covered) + _TEXT * sum(box.overlaps(other) for other in taken) + outside
