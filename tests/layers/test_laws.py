"""Every layer of fewer numbers, with every kind of atoms, held to every law."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import subspan
from subspan.layers import SpectralFilters, factorize, product_of_sums, recipes
from subspan.layers.atoms import cosines, kinds
from tests import layer_laws
from tests.layer_laws import Case, Net

LINEAR_SHAPES = ((), (1,), (0,), (2, 0), (3, 2))


# ---- low rank ------------------------------------------------------------------------------------


def of_lowrank(layer: Any) -> dict[str, Tensor | None]:
    return {"weight": layer.weight, "bias": layer.bias}


def lowrank_linear(name: str, **more: Any) -> Case:
    return Case(
        f"lowrank-linear-{name}",
        lambda: Net(nn.Linear(7, 5, **more)),
        lambda net: factorize(net, rank=3),
        (7,),
        of_lowrank,
        shapes=LINEAR_SHAPES,
    )


def lowrank_conv(name: str, **more: Any) -> Case:
    options = {"kernel_size": 3} | more
    return Case(
        f"lowrank-conv-{name}",
        lambda: Net(nn.Conv2d(3, 8, **options)),
        lambda net: factorize(net, rank=4),
        (3, 9, 8),
        of_lowrank,
    )


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "strides": {"stride": (2, 1), "padding": 1, "bias": False},
    "same": {"padding": "same"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": "same", "padding_mode": "reflect", "dilation": 2},
    "dilated": {"dilation": 2, "padding": (2, 1), "kernel_size": (1, 3)},
}


# ---- products of sums ----------------------------------------------------------------------------


def of_sums(layer: Any) -> dict[str, Tensor | None]:
    return {"weight": layer.weight, "bias": layer.full_bias()}


def sums_linear(name: str, n: int, m: int, factors: list[Any], *, acting: bool = False) -> Case:
    """``acting``: its factors are never made a matrix where they can act without."""

    def into(net: nn.Module) -> nn.Module:
        net = product_of_sums(net, {"layer": factors}, seed=3)
        for s in net.layer.sums if acting else ():
            if s.apply_cost is not None:
                s.matrix_cost, s.apply_cost = 1 << 40, 1
        return net

    return Case(
        f"sums-{name}", lambda: Net(nn.Linear(m, n)), into, (m,), of_sums, shapes=LINEAR_SHAPES
    )


def sums_conv(name: str, factors: list[Any], bias: Any = None, **more: Any) -> Case:
    options = {"kernel_size": 3} | more
    return Case(
        f"sums-conv-{name}",
        lambda: Net(nn.Conv2d(3, 8, **options)),
        lambda net: product_of_sums(net, {"layer": factors}, bias=bias),
        (3, 9, 8),
        of_sums,
    )


GIVEN = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(4))
KINDS: dict[str, tuple[int, int, list[Any]]] = {
    "block-circulant": (6, 16, [{"kind": "block-circulant", "block": 2}]),
    "circulant": (8, 8, [{"kind": "circulant", "f": "tanh"}]),
    "convolution": (36, 24, [{"kind": "convolution", "height": 3, "width": 4}]),
    "dct": (6, 16, [{"kind": "free", "inner": 5}, "dct"]),
    "diagonal": (8, 8, ["diagonal", {"kind": "rank1", "p": 5}]),
    "displacement": (6, 6, [{"kind": "displacement", "rank": 2}]),
    "free": (6, 10, ["free"]),
    "given": (6, 10, [{"kind": "given", "tensor": GIVEN}]),
    "hadamard": (6, 10, recipes.adaptive_fastfood(6, 10)),
    "hankel": (6, 10, ["hankel"]),
    "identity": (6, 10, [{"kind": "identity", "inner": 8}, {"kind": "free"}]),
    "kronecker-left": (6, 10, recipes.kronecker_fc(6, 10, 2, 5, 3)),
    "kronecker-right": (6, 10, [{"kind": "kronecker-right", "identity": 2}]),
    "permutation": (8, 8, ["diagonal", "permutation", "circulant"]),
    "rank1": (6, 10, [{"kind": "rank1", "p": 7, "f": "sin"}]),
    "subsample": (6, 10, [{"kind": "free", "inner": 5}, "subsample"]),
    "toeplitz": (6, 10, ["toeplitz"]),
    "gaussian": (6, 10, recipes.random_projection(4)),
}
KINDS |= {
    kind: (6, 10, [{"kind": kind, "p": 5}]) for kind in subspan.projections() if kind not in KINDS
}
# Beside a factor with a matrix, so that they act from both sides: on x, and on that matrix for W.
ACTING: dict[str, tuple[int, int, list[Any]]] = {
    kind: (5, m, [{"kind": "free", "inner": n}, {"kind": kind, **options}])
    for kind, n, m, options in [
        ("block-circulant", 6, 8, {"block": 2}),
        ("circulant", 7, 7, {}),
        ("dct", 5, 16, {}),
        ("convolution", 12, 24, {"height": 3, "width": 4}),
        ("diagonal", 6, 6, {}),
        ("displacement", 6, 6, {"rank": 2}),
        ("hadamard", 8, 8, {}),
        ("hankel", 6, 9, {}),
        ("identity", 6, 9, {}),
        ("kronecker-left", 6, 9, {"identity": 3}),
        ("kronecker-right", 12, 9, {"identity": 3, "terms": 2}),
        ("permutation", 7, 7, {}),
        ("rank1", 6, 9, {"p": 4}),
        ("subsample", 5, 9, {}),
        ("toeplitz", 6, 9, {}),
    ]
}


# ---- the others ----------------------------------------------------------------------------------


class Spectrum(nn.Module):
    """SpectralFilters by transforms as matrices; the filters are its parameters."""

    def __init__(self, layer: SpectralFilters) -> None:
        super().__init__()
        self.size, self.out_size = layer.size, layer.out_size
        self.filters, self.bias = (
            nn.Parameter(t.detach().clone(), p.requires_grad)
            for t, p in ((layer.filters, layer.a), (layer.bias, layer.bias))
        )

    def forward(self, x: Tensor) -> Tensor:
        (a, b), (c, d) = self.size, self.out_size
        rows, columns, back, across = (cosines(side).to(self.filters) for side in (a, b, c, d))
        into = torch.einsum("uh,vw->uvhw", rows[:c], columns[:d])
        out = torch.einsum("uh,vw->uvhw", back, across) * math.sqrt(c * d / (a * b))
        kernel = torch.einsum("uvhw,ocuv,uvij->ocijhw", out, self.filters, into)
        return torch.einsum("ocijhw,...cij->...ohw", kernel, x) + self.bias[:, None, None]


def spectral(name: str, **more: Any) -> Case:
    """It takes no other layer's place, and a file has it like any layer of PyTorch's."""
    return Case(
        f"spectral-{name}",
        lambda: Net(SpectralFilters(2, 3, (6, 5), 4, **more)),
        None,
        (2, 6, 5),
        lambda layer: {"filters": layer.filters, "bias": layer.bias},
        Spectrum,
        shapes=((), (1,), (0,), (3, 2)),
    )


class SelfAttention(Net):
    def __init__(self, **more: Any) -> None:
        super().__init__(nn.MultiheadAttention(8, 2, batch_first=True, **more))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, x, x)[0]
        return out


def of_attention(layer: Any) -> dict[str, Tensor | None]:
    parts = [layer.q_proj, layer.k_proj, layer.v_proj]
    found = {
        "in_proj_weight": torch.cat([part.weight for part in parts]),
        "out_proj.weight": layer.out_proj.weight,
    }
    if layer.out_proj.bias is not None:
        found["in_proj_bias"] = torch.cat([bias_of(part) for part in parts])
        found["out_proj.bias"] = bias_of(layer.out_proj)
    return found


def bias_of(layer: Any) -> Tensor:
    bias: Tensor = layer.full_bias() if hasattr(layer, "full_bias") else layer.bias
    return bias


def attention(name: str, into: Callable[[nn.Module], nn.Module], **more: Any) -> Case:
    return Case(f"attention-{name}", lambda: SelfAttention(**more), into, (5, 8), of_attention)


PROJECTIONS = ".*_proj"
WHOLE = [  # one for each class, and way to compute
    lowrank_linear("plain"),
    lowrank_linear("no-bias", bias=False),
    *(lowrank_conv(name, **options) for name, options in GEOMETRIES.items()),
    sums_linear("fastfood", 5, 7, recipes.adaptive_fastfood(5, 7)),
    sums_linear("fastfood-acting", 5, 7, recipes.adaptive_fastfood(5, 7), acting=True),
    sums_linear("projected", 6, 10, [{"kind": "hash", "p": 5}]),
    sums_conv("two", [{"kind": "free", "inner": 2}, {"kind": "gaussian", "p": 6}]),
    sums_conv("one", [{"kind": "rank1", "p": 2}], stride=2, padding=1),
    sums_conv("same", [{"kind": "free", "inner": 20}, {"kind": "hash", "p": 9}], padding="same"),
    sums_conv(
        "circular", ["diagonal", {"kind": "hash", "p": 9}], padding=1, padding_mode="circular"
    ),
    sums_conv("dilated", [{"kind": "free", "inner": 2}, "toeplitz"], bias=3, dilation=2),
    spectral("smooth", support=3),
    spectral("reduced", out_size=4),
    attention("lowrank", lambda net: factorize(net, rank=3)),
    attention("no-bias", lambda net: factorize(net, rank=3), bias=False),
    attention("sums", lambda net: product_of_sums(net, {PROJECTIONS: recipes.hashed(5)})),
    attention(
        "mixed", lambda net: factorize(product_of_sums(net, {"q_proj": recipes.hashed(5)}), rank=3)
    ),
]
ATOMS = [
    *(sums_linear(kind, *shape) for kind, shape in KINDS.items()),
    *(sums_linear(f"{kind}-acting", *shape, acting=True) for kind, shape in ACTING.items()),
]


COMPILING = (
    layer_laws.compilers_take_it_in_one_graph,
    layer_laws.the_ordinary_layer_can_be_exported,
    layer_laws.it_can_be_exported_with_any_batch,
)
# Compilers see one class after another: of each, and of each way to pad, one is quick.
QUICK = {
    *("lowrank-linear-plain", "lowrank-conv-plain", "lowrank-conv-circular", "attention-mixed"),
    *("sums-fastfood-acting", "sums-projected", "sums-conv-two", "sums-conv-circular"),
    "spectral-smooth",
}


def marks(law: layer_laws.Law, case: Case) -> tuple[Any, ...]:
    if law not in COMPILING:
        return ()
    return (pytest.mark.heavy, *(() if case.name in QUICK else (pytest.mark.slow,)))


def cases(of: list[Case], held_to: list[layer_laws.Law]) -> list[Any]:
    return [
        pytest.param(
            law,
            case,
            id=f"{law.__name__}-{case.name}",
            marks=marks(law, case),
        )
        for case in of
        for law in held_to
    ]


@pytest.mark.parametrize(("law", "case"), cases([*WHOLE, *ATOMS], layer_laws.LAWS))
def test_law(law: layer_laws.Law, case: Case) -> None:
    law(case)


@pytest.mark.parametrize(("law", "case"), cases(WHOLE, layer_laws.COSTLY))
def test_costly_law(law: layer_laws.Law, case: Case) -> None:
    law(case)


def test_every_kind_of_atoms_is_enrolled() -> None:
    enrolled = {
        factor if isinstance(factor, str) else factor["kind"]
        for shapes in (KINDS, ACTING)
        for _, _, factors in shapes.values()
        for factor in factors
    }
    assert enrolled == set(kinds())
