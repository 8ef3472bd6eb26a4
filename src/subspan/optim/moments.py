"""Momentum and Adam for factors: slopes from gradients, and moments that follow the bases.

Running means of the gradients of K, S and L are those of one tangent vector at W,

    B = k Vᵀ + U lᵀ − U (Uᵀ k) Vᵀ        k = B V,  l = Bᵀ U,  s = Uᵀ B V = Uᵀ k

and move with W by projection to its new tangent space: k' = B V', l' = Bᵀ U', s' = U'ᵀ B V'. At
full rank nothing is lost. A running mean of squares has no such rule; ours mixes columns with the
weights (VᵀV')², exact for a permutation with signs, and gives new directions the mean of their row,
since a zero there would be an enormous step. For the same reason a mean that is divided by such
squares must keep to its rows: it turns with its basis, k' = k VᵀV', and takes nothing from B's
other part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from subspan.errors import SubspanError, unknown
from subspan.optim.factored import wide
from subspan.optim.integrators import USV

FIRST, SECOND, STEP = "exp_avg", "exp_avg_sq", "step"


def sgd(state: dict[str, Any], gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return the gradient, or with momentum μ its running sum m ← μ m + g."""
    if not group["momentum"]:
        return gradient
    before = state.get(FIRST)
    state[FIRST] = gradient.clone() if before is None else before * group["momentum"] + gradient
    return state[FIRST]


def adam(state: dict[str, Any], gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return m̂ / (√v̂ + ε) of means of g and g² (Kingma and Ba, ICLR 2015, algorithm 1)."""
    if gradient.is_complex():  # each is two numbers, as for Adam of PyTorch
        parts = _each(torch.view_as_real, state)
        slope = adam(parts, torch.view_as_real(gradient.resolve_conj()), group)
        state.update(_each(torch.view_as_complex, parts))
        return torch.view_as_complex(slope)
    first, second = group["betas"]
    if FIRST not in state:
        state[FIRST], state[SECOND] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state[STEP] = 0  # gradients that these means have seen: a batch may leave out a layer
    state[STEP] += 1
    t = state[STEP]
    state[FIRST] = state[FIRST].lerp(gradient, 1 - first)
    state[SECOND] = state[SECOND].lerp(gradient.square(), 1 - second)
    v = state[SECOND] / (1 - second**t)
    return state[FIRST] / (1 - first**t) / (v.sqrt() + group["eps"])


def _each(view: Callable[[Tensor], Tensor], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with a view of each tensor."""
    return {key: view(v) if isinstance(v, Tensor) else v for key, v in state.items()}


def as_wide(p: Tensor, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among a parameter's moments, in the type in which its step is computed."""
    moments = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    return {key: value.to(p.device, wide(p)) for key, value in moments.items()}


def widen(state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Bring moments to the type that parameters have by now, which may have been converted."""
    for p, values in state.items():
        if FIRST in values and values[FIRST].dtype is not p.dtype:
            values.update(as_wide(p, values))


def refuse_other_shapes(moments: Iterable[tuple[Tensor, Mapping[str, Any]]], remedy: str) -> None:
    """Refuse moments of parameters that have other shapes."""
    for p, values in moments:
        for value in values.values():
            if isinstance(value, Tensor) and value.shape != p.shape:
                raise SubspanError(
                    f"a parameter has the shape {list(p.shape)} now, and its moments have "
                    f"{list(value.shape)}: {remedy}"
                )


BASES = {"sgd": sgd, "adam": adam}
SETTINGS: dict[str, dict[str, Any]] = {  # by base, with what they usually are
    "sgd": {"momentum": 0.0},
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8},
}


def settings_of(base: str, **given: Any) -> dict[str, Any]:
    """Return those of the settings of all bases that this base has, which schedulers may change.

    An unknown base is refused, and so is another one's setting that is not what it usually is.
    """
    if base not in BASES:
        raise unknown("base", base, BASES)
    for other in SETTINGS.keys() - {base}:
        for name, usual in SETTINGS[other].items():
            if given[name] != usual:
                raise SubspanError(f"base {base!r} has no {name}, got {given[name]}: leave it out")
    return {name: given[name] for name in SETTINGS[base]}


def turn_core(core: dict[str, Any], old: USV, new: USV) -> None:
    """Bring the moments of S from old bases to new ones; what lies outside the new ones is lost."""
    if FIRST not in core:
        return
    left, right = old.U.T @ new.U, old.V.T @ new.V
    core[FIRST] = left.T @ core[FIRST] @ right
    if SECOND in core:
        core[SECOND] = _mixed(_mixed(core[SECOND], right).T, left).T.contiguous()


def transport(
    states: tuple[dict[str, Any], dict[str, Any], dict[str, Any]], old: USV, new: USV
) -> None:
    """Bring the moments of K and L, and the mean of S with them, from old bases to new ones."""
    of_k, of_s, of_l = states
    if FIRST not in of_k:
        return
    left, right = old.U.T @ new.U, old.V.T @ new.V
    k, l = of_k[FIRST], of_l[FIRST]  # noqa: E741
    of_k[FIRST], of_l[FIRST] = k @ right, l @ left
    if SECOND not in of_k:
        core = old.U.T @ k
        of_k[FIRST] += old.U @ (l.T @ new.V - core @ right)
        of_l[FIRST] += old.V @ (k.T @ new.U - core.T @ left)
        of_s[FIRST] = new.U.T @ of_k[FIRST]
    if SECOND in of_k:
        of_k[SECOND] = _mixed(of_k[SECOND], right)
        of_l[SECOND] = _mixed(of_l[SECOND], left)


def _mixed(v: Tensor, turn: Tensor) -> Tensor:
    """Return the running squares (n, r) in a basis V as those in V', with VᵀV' (r, r')."""
    weights = turn.square()
    missing = (1 - weights.sum(dim=0)).clamp(min=0)  # of each new column
    return v @ weights + v.mean(dim=1, keepdim=True) * missing
