"""Coefficients that make a product of sums as near to given matrices as it can be.

Source: Wu, "ProdSumNet", arXiv 1809.02209, 2018, sections on training in stages and on the inverse
problem. With all other factors held, W is linear in one factor's coefficients: alternating least
squares, each solved by conjugate gradients on its normal equations, which needs the product of the
factors and its adjoint only, never a matrix of atoms.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.layers.product_of_sums import ProductOfSums, ProductOfSumsLinear, remade


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
    target = target.detach().flatten(1).double()
    if target.shape != layer.shape:
        raise SubspanError(
            f"the layer's weight is {layer.shape[0]} × {layer.shape[1]}, the target "
            f"{target.shape[0]} × {target.shape[1]}"
        )
    if not bool(torch.isfinite(target).all()):
        raise SubspanError("the target is not finite")
    for factor in layer.factors:
        if factor.get("f", "identity") != "identity":
            raise SubspanError("least squares need f: identity in all factors")
    twin = copy.deepcopy(layer).double()  # projections, too, are drawn as in float32
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
    """Least squares in coefficients that a value is linear in, from where they are."""

    def image(x: Tensor) -> Tensor:
        a.data = x
        return value().detach()

    def adjoint(y: Tensor) -> Tensor:
        (found,) = torch.autograd.grad((value() * y).sum(), a)
        return found

    a.data = conjugate_gradients(image, adjoint, a.data, target)


def conjugate_gradients(
    image: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], x: Tensor,
    target: Tensor,
) -> Tensor:  # fmt: skip
    """Minimise ‖A x − target‖ by CGLS (Hestenes and Stiefel 1952), from x.

    Args:
        image: x ↦ A x.
        adjoint: y ↦ Aᵀ y.
        x: where to begin.
        target: what A x should be.
    """
    residual = target - image(x)
    slope = adjoint(residual)
    along, size = slope, slope.square().sum()
    least = 1e-24 * float(adjoint(target).square().sum())
    for _ in range(4 * x.numel()):
        if float(size) <= least:
            break
        moved = image(along)
        step = size / moved.square().sum()
        x = x + step * along
        residual = residual - step * moved
        slope = adjoint(residual)
        last, size = size, slope.square().sum()
        along = slope + size / last * along
    return x


def grow(layer: ProductOfSums, factors: Sequence[Any], *, sweeps: int = 20) -> ProductOfSums:
    """A larger product of sums that computes nearly what a layer does.

    Each factor becomes as near to the old one as it can be: the same, where the old atoms are still
    there (a greater p of the same kind) or lie in the span of the new ones (``hash``: a multiple of
    p). Elsewhere alternating least squares then bring the weight as near as they can.

    Args:
        layer: trained so far.
        factors: of the new one, as of :class:`ProductOfSums`; as many as the layer has.
        sweeps: of the least squares.

    Returns:
        The new layer; the old one is untouched.

    Raises:
        SubspanError: if the new one is smaller in any factor, or cannot be.
    """
    new = remade(layer, layer.recipe | {"factors": factors})
    if len(new.sums) != len(layer.sums):
        raise SubspanError(
            f"a stage keeps the number of factors, {len(layer.sums)}, got {len(new.sums)}"
        )
    for i, (old, now) in enumerate(zip(layer.sums, new.sums, strict=True)):
        if now.p < old.p:
            raise SubspanError(
                f"factor {i + 1} would have {now.p} coefficients, fewer than the {old.p} of the "
                "stage before"
            )
    # Factor by factor first: each new one as near to the old one as it can be.
    wide, twin = copy.deepcopy(new).double(), copy.deepcopy(layer).double()
    for i in range(len(new.sums)):
        a = wide._a(i)
        if isinstance(a, nn.Parameter):
            nn.init.zeros_(a)
            _solve(a, functools.partial(wide.factor, i), twin.factor(i).detach())
    with torch.no_grad():
        for name, p in new.named_parameters():
            if name != "bias":
                p.copy_(wide.get_parameter(name))
        if layer.bias is not None and new.bias is not None:
            new.bias.copy_(layer.bias)
    target = layer.matrix.detach()
    exact = float((new.matrix.detach() - target).norm()) <= 1e-6 * float(target.norm())
    if not exact:
        approximate(new, target, sweeps=sweeps)
    return new


def fit(
    matrices: Sequence[Tensor], candidates: Sequence[Sequence[Any]], *,
    measure: Literal["mean", "maximum"] = "mean", seed: int = 0, sweeps: int = 20,
) -> tuple[list[ProductOfSumsLinear], dict[str, Any]]:  # fmt: skip
    """The inverse problem: which factors, with which coefficients, best cover trained matrices.

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
    best: tuple[float, list[ProductOfSumsLinear], dict[str, Any]] | None = None
    tried = []
    for factors in candidates:
        layers, errors = [], []
        for matrix in matrices:
            layer = ProductOfSumsLinear(m, n, factors, bias=False, seed=seed, dtype=matrix.dtype)
            errors.append(approximate(layer, matrix, sweeps=sweeps))
            layers.append(layer)
        value = measures[measure](errors)
        tried.append(value)
        if best is None or value < best[0]:
            report = {"factors": layers[0].recipe["factors"], "errors": errors}
            best = value, layers, report
    assert best is not None
    return best[1], best[2] | {"tried": tried}
