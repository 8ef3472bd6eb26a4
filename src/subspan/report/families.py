"""The four ideas of how a network gets by with fewer numbers, and the methods of each."""

from __future__ import annotations

from dataclasses import dataclass

from subspan.training.methods import methods


@dataclass(frozen=True)
class Family:
    """One idea of how a network gets by with fewer numbers, and what is told of it."""

    title: str  # of its section
    text: str  # one sentence
    modules: tuple[str, ...]  # where its methods are, under :mod:`subspan.training.methods`
    part: str  # of a benchmark
    prefix: str  # how the names of its experiments begin


FAMILIES = (
    Family(
        "Fixed random subspaces",
        "θ = θ₀ + P w: a seed gives the projection P, and only the d numbers w are trained.",
        modules=("subspace", "hash", "lora_subspace"),
        part="products",
        prefix="li-",
    ),
    Family(
        "Random bases that are drawn anew",
        "Each step moves the weights along d random directions of its own (RBD), or always along "
        "the same ones (FPD), or along those that evaluations alone have measured (NES).",
        modules=("random_bases",),
        part="optimizers",
        prefix="gressmann-",
    ),
    Family(
        "Low rank from the start",
        "Every layer is U S Vᵀ, and its rank adapts while it is trained (DLRT).",
        modules=("dlrt",),
        part="lowrank",
        prefix="dlrt-",
    ),
    Family(
        "Products of sums",
        "Every layer is Π Σ aⱼ Mⱼ with fixed matrices Mⱼ, and only the numbers a are trained.",
        modules=("prodsum",),
        part="sums",
        prefix="prodsumnet-",
    ),
)
OTHERS = Family("Other experiments", "", modules=(), part="", prefix="")


def family_of(method: str) -> Family:
    """Return the family of a method by its name, ``OTHERS`` where it has none or is unknown."""
    if method not in methods():
        return OTHERS
    home = type(methods()[method]).__module__.rpartition(".")[2]
    return next((family for family in FAMILIES if home in family.modules), OTHERS)
