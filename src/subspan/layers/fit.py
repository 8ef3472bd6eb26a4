"""Coefficients that make a product of sums as near to given matrices as it can be.

Source: Wu, "ProdSumNet", arXiv 1809.02209, 2018, sections on training in stages and on the inverse
problem. With all other factors held, W is linear in one factor's coefficients: alternating least
squares, each solved by conjugate gradients on its normal equations, which needs the product of the
factors and its adjoint only, never a matrix of atoms.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from subspan.errors import SubspanError
from subspan.layers.product_of_sums import ProductOfSums, ProductOfSumsLinear
from subspan.layers.rebuild import succeed
from subspan.linalg import conjugate_gradients
from subspan.subspace.changes import note_replaced

# Of torch.optim: averages or sums of squared gradients.
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def approximate(
    layer: ProductOfSums, target: Tensor, *, sweeps: int = 20, tolerance: float = 1e-6
) -> float:
    """Set a layer's coefficients so that ‖W − target‖ (Frobenius) is least, from where they are.

    Args:
        layer: with f = identity in all factors with coefficients; its bias stays.
        target: (n, m), or in the shape of the layer's weight.
        sweeps: over all factors, at most; one suffices where one factor has coefficients.
        tolerance: relative change of the error at which to stop.

    Returns:
        ‖W − target‖ / ‖target‖.

    Raises:
        SubspanError: for another shape, a target that is not finite, or another f.
    """
    if target.dim() < 2 or target.flatten(1).shape != layer.shape:
        raise SubspanError(
            f"the layer's weight is {layer.shape[0]} × {layer.shape[1]}, the target "
            f"{' × '.join(map(str, target.shape))}"
        )
    target = target.detach().flatten(1).double()
    if not bool(torch.isfinite(target).all()):
        raise SubspanError("the target is not finite")
    _check_linear(layer)
    # Projections, too, are drawn as in float32; coefficients are found also where they are frozen.
    twin = copy.deepcopy(layer).double().requires_grad_()
    names = [n for n, _ in twin.named_parameters() if n != "bias"]
    norm = float(target.norm()) or 1.0
    error = float((twin.matrix.detach() - target).norm()) / norm
    for _ in range(sweeps):
        before = error
        for name in names:
            _solve(twin.get_parameter(name), lambda: twin.matrix, target)
        error = float((twin.matrix.detach() - target).norm()) / norm
        if len(names) == 1 or before - error <= tolerance * before:
            break
    with torch.no_grad():
        for name in names:
            layer.get_parameter(name).copy_(twin.get_parameter(name))
    return error


def _solve(a: nn.Parameter, value: Callable[[], Tensor], target: Tensor) -> None:
    """Solve least squares in coefficients that a value is linear in, from where they are."""

    def image(x: Tensor) -> Tensor:
        a.data = x
        return value().detach()

    def adjoint(y: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad((value() * y).sum(), a)
        return gradient

    a.data = conjugate_gradients(
        image, adjoint, a.data, target, tolerance=1e-12, steps=4 * a.numel()
    )


def grow(layer: ProductOfSums, factors: Sequence[Any], *, sweeps: int = 20) -> ProductOfSums:
    """Return a larger product of sums that computes nearly what a layer does.

    Each factor becomes as near to the old one as it can be: the same, where the old atoms are still
    there (a greater p of the same kind) or lie in the span of the new ones (``hash``: a multiple of
    p). With a greater inner size the factor on the left gets columns of zeros, and that on the
    right rows that are free. Where the product has changed nevertheless, alternating least squares
    then bring the weight as near as they can.

    Args:
        layer: trained so far.
        factors: of the new one, as of :class:`ProductOfSums`; as many as the layer has.
        sweeps: of the least squares.

    Returns:
        The new layer, with the hooks, attributes and flags of the old one, which keeps its values;
        handles of hooks remove them from both. An optimizer that goes on with the old one alone,
        without :func:`carry_over`, is refused.

    Raises:
        SubspanError: if the new one is smaller in any factor, or cannot be; or for a hook on a
            coefficient or a ``state_dict``, which would be lost.
    """
    new = layer.rebuild(layer, layer.recipe | {"factors": factors})
    assert isinstance(new, ProductOfSums)
    _check_larger(layer, new)
    succeed(type(layer).__name__, layer, new)
    for i in range(len(new.sums)):
        if new.trained[i]:
            now = new.values(i)
            now.data.copy_(_refine(layer, new, i, layer.values(i), now))
    if layer.bias is not None and new.bias is not None:
        new.bias.data.copy_(layer.bias)
    target = layer.matrix.detach()
    if float((new.matrix.detach() - target).norm()) > 1e-6 * float(target.norm()):
        approximate(new, target, sweeps=sweeps)
    note_replaced(layer, new)
    return new


def _check_larger(layer: ProductOfSums, new: ProductOfSums) -> None:
    if len(new.sums) != len(layer.sums):
        raise SubspanError(
            f"a stage keeps the number of factors, {len(layer.sums)}, got {len(new.sums)}"
        )
    for i, (old, now) in enumerate(zip(layer.sums, new.sums, strict=True), start=1):
        if now.p < old.p:
            raise SubspanError(
                f"factor {i} would have {now.p} coefficients, fewer than the {old.p} of the stage "
                "before"
            )
        if now.n < old.n or now.m < old.m:
            raise SubspanError(
                f"factor {i} would be {now.n} × {now.m}, smaller than the {old.n} × {old.m} of the "
                "stage before"
            )
    for one in (layer, new):
        _check_linear(one)


def _check_linear(layer: ProductOfSums) -> None:
    for factor in layer.factors:
        if (f := factor.get("f", "identity")) != "identity":
            raise SubspanError(f"least squares need f: identity in all factors, got {f!r}")


def _refine(layer: ProductOfSums, new: ProductOfSums, i: int, a: Tensor, start: Tensor) -> Tensor:
    """Coefficients of factor i of ``new`` that make it as near as can be to that of ``layer``.

    The old one has any coefficients ``a``, in which the result is linear; ``start`` are those that
    only matter in rows that the old factor does not have.
    """
    old, wide = (copy.deepcopy(one).double().requires_grad_() for one in (layer, new))
    before, now = old.values(i), wide.values(i)
    before.data = a.detach().double()
    now.data = start.detach().double()
    (rows, columns), (n, m) = ((s.n, s.m) for s in (old.sums[i], wide.sums[i]))
    if (rows, columns) == (n, m):
        # Exact at once if the old atoms are the first of the new ones.
        kept = before.detach() * (old.scales[i] / wide.scales[i])
        now.data = F.pad(kept, (0, len(now) - len(kept)))
    assert isinstance(now, nn.Parameter)
    _solve(now, lambda: wide.factor(i)[:rows], F.pad(old.factor(i).detach(), (0, m - columns)))
    return now.detach()


def carry_over(optimizer: Optimizer, layer: ProductOfSums, new: ProductOfSums) -> None:
    """Let an optimizer go on with a layer that has grown: its parameters, and their moments.

    Moments are spread as :func:`grow` spreads coefficients, a' = T a. With G the gradient of W,
    that of the coefficients of atoms M that are about orthogonal, of the norm e, is g = MᵀG, and
    the least G that explains it is M g / e². So the new ones' is g' = (e'/e)² T g: where a new atom
    stands for an old one the same but for a constant, zero where it stands for none. Squares are
    averaged instead, (e'/e)² T v / T 1, and where that says nothing, they are the mean of all.

    Args:
        optimizer: of the old layer's parameters, changed in place.
        layer: the old one.
        new: of :func:`grow`.

    Raises:
        SubspanError: if the old layer is trained, and the optimizer has none of its parameters.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {id(p) for p in layer.parameters() if p.requires_grad}
    if trained and trained.isdisjoint(held):
        raise SubspanError(
            "the optimizer has no parameter of this layer: give the layer before it grew, and the "
            "optimizer that trained it"
        )
    for name, before in layer.named_parameters(recurse=False):
        now = new.get_parameter(name).requires_grad_(before.requires_grad)
        for group in optimizer.param_groups:
            group["params"] = [now if p is before else p for p in group["params"]]
        state = optimizer.state.pop(before, None)
        if state is None:
            continue
        optimizer.state[now] = state
        if name != "bias":
            _spread(state, layer, new, int(name.removeprefix("a")))


def _spread(state: dict[str, Any], layer: ProductOfSums, new: ProductOfSums, i: int) -> None:
    """Spread the moments of factor i."""
    old, now = layer.sums[i], new.sums[i]
    norms = (new.scales[i] / layer.scales[i]) ** 2 * (now.energy / now.p) / (old.energy / old.p)
    zero = torch.zeros_like(new.values(i))
    ones = _refine(layer, new, i, torch.ones_like(layer.values(i)), zero)
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != (old.p,):
            continue
        spread = _refine(layer, new, i, value, zero)
        if key in SECOND_MOMENTS:
            low, high = value.double().aminmax()
            mean = spread / ones
            in_range = (mean - mean.clamp(low, high)).abs() <= 1e-6 * high
            spread = torch.where(in_range, mean.clamp(low, high), value.double().mean())
        state[key] = (norms * spread).to(value.dtype)


def fit(
    matrices: Sequence[Tensor],
    candidates: Sequence[Sequence[Any]],
    *,
    measure: Literal["mean", "maximum"] = "mean",
    seed: int = 0,
    sweeps: int = 20,
) -> tuple[list[ProductOfSumsLinear], dict[str, Any]]:
    """Find the coefficients with which factors come nearest to trained matrices.

    Args:
        matrices: all (n, m).
        candidates: lists of factors to choose from; every matrix has coefficients of its own, and
            all share the atoms of the one that is chosen.
        measure: of the relative Frobenius errors of all matrices: "mean" or "maximum".
        seed: of random atoms.
        sweeps: of alternating least squares.

    Returns:
        A layer for every matrix; and a report: ``factors`` chosen, ``errors`` of the matrices,
        and ``tried``, the measure of every candidate.

    Raises:
        SubspanError: for matrices of different shapes, none at all, or an unknown measure.
    """
    measures: dict[str, Callable[[list[float]], float]] = {"mean": statistics.fmean, "maximum": max}
    if measure not in measures:
        raise SubspanError(f"measure must be mean or maximum, got {measure!r}")
    if not matrices or not candidates:
        raise SubspanError("fit needs one matrix and one list of factors at least")
    shapes = {tuple(matrix.shape) for matrix in matrices}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise SubspanError(f"matrices must be of one shape n × m, got {sorted(shapes)}")
    n, m = next(iter(shapes))
    fits = []
    for factors in candidates:
        layers, errors = [], []
        for matrix in matrices:
            layer = ProductOfSumsLinear(m, n, factors, bias=False, seed=seed, dtype=matrix.dtype)
            errors.append(approximate(layer, matrix, sweeps=sweeps))
            layers.append(layer)
        fits.append((measures[measure](errors), layers, errors))
    _, layers, errors = min(fits, key=lambda fitted: fitted[0])
    report = {"factors": layers[0].recipe["factors"], "errors": errors}
    return layers, report | {"tried": [value for value, _, _ in fits]}
