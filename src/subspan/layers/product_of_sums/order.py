"""In which order a product of factors is formed: the one with the fewest multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from subspan.layers.atoms import Sum


@dataclass(frozen=True)
class Plan:
    """A way to form an interval of the chain F₁ … F_k x."""

    cost: int  # multiply-adds
    text: str  # what is done, in parentheses; a factor with a dot acts without its matrix
    # "matrix" of one factor, "vectors" (x itself), "product" of two intervals, "apply" one factor
    # to what stands on its right, "apply_t" to what stands on its left.
    way: str
    vectors: bool = False  # whether x is in the interval
    at: int = -1  # the factor, of those that act or are a matrix
    left: Plan | None = None  # the plan of the left part
    right: Plan | None = None  # of the right one

    def __str__(self) -> str:
        """Say what is done, and how much that is."""
        return f"{self.text}: {self.cost:,} multiply-adds"


def plan_product(sums: Sequence[Sum], batch: int | None, offset: int = 0) -> Plan:
    """Find the cheapest order for the product of F₁ … F_k, and of ``batch`` vectors on its right.

    None is for W alone. The first of these factors is number ``offset`` of the layer's.
    """
    k = len(sums)
    sizes = [s.n for s in sums] + [sums[-1].m] + ([] if batch is None else [batch])
    last = k - (batch is None)
    best: dict[tuple[int, int], Plan] = {
        (i, i): Plan(s.matrix_cost, s.kind, "matrix", at=i + offset) for i, s in enumerate(sums)
    }
    best[k, k] = Plan(0, "x", "vectors", vectors=True)
    for length in range(1, last + 1):
        for i in range(last + 1 - length):
            j = i + length
            ways = []
            for cut in range(i, j):
                left, right = best[i, cut], best[cut + 1, j]
                cost = sizes[i] * sizes[cut + 1] * sizes[j + 1] + left.cost + right.cost
                text = f"({left.text} {right.text})"
                ways.append(Plan(cost, text, "product", right.vectors, left=left, right=right))
            right = best[i + 1, j]
            # What is empty meets matrices only: transforms of nothing are an error.
            if (per_vector := sums[i].apply_cost) is not None and (batch != 0 or not right.vectors):
                cost = per_vector * sizes[j + 1] + right.cost
                text = f"({sums[i].kind}· {right.text})"
                ways.append(Plan(cost, text, "apply", right.vectors, i + offset, right=right))
            if j < k and (per_vector := sums[j].apply_cost) is not None:
                left = best[i, j - 1]
                cost = per_vector * sizes[i] + left.cost
                text = f"({left.text} ·{sums[j].kind})"
                ways.append(Plan(cost, text, "apply_t", False, j + offset, left=left))
            best[i, j] = ways[0]
            for plan in ways:  # a loop, since torch.compile takes no min with a key
                if plan.cost < best[i, j].cost:
                    best[i, j] = plan
    return best[0, last]


def example_size(size: int) -> int:
    """Return a size, or the example of one that torch.export leaves open: every order is right."""
    if isinstance(size, torch.SymInt):
        example = size.node.hint
        return 1 if example is None else int(example)
    return size
