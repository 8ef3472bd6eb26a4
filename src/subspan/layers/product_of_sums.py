"""Layers whose weight is a product of sums of fixed matrices, W = Πᵢ Σⱼ fᵢ(aᵢⱼ) Mᵢⱼ.

Source: Wu, "ProdSumNet: reducing model parameters in deep neural networks via product-of-sums
matrix decompositions", arXiv 1809.02209, 2018. Only the coefficients a are trained and stored; the
fixed matrices come from the seed (:mod:`subspan.layers.atoms`).

A product F₁ F₂ … F_k x can be formed in many orders: all factors first, then x; x through one after
the other; or anything between. :func:`planned` finds the one with the fewest multiply-adds for the
batch at hand, by dynamic programming over the chain.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from subspan.errors import SubspanError, unknown
from subspan.families import projection
from subspan.layers.atoms import HALF, Sum, atoms
from subspan.layers.handover import hand_over, refuse_hooks
from subspan.layers.places import check, chosen, places, put, replaced
from subspan.layers.plain import Convolution, autocast_type, linear
from subspan.subspace.compartments import Patterns, matches


def identity(a: Tensor) -> Tensor:
    """Return the coefficients themselves; a lambda would not pickle."""
    return a


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity, "exp": torch.exp, "sin": torch.sin, "softplus": F.softplus,
    "square": torch.square, "tanh": torch.tanh,
}  # fmt: skip
GAINS = {  # variance of an output over that of an input, of a weight n × m
    "he": lambda n, m: 2.0,  # He 2015: 2/m for each entry
    "glorot": lambda n, m: 2 * m / (n + m),  # Glorot 2010
    "lecun": lambda n, m: 1.0,
}
STREAMS = 64  # of a layer: one for each factor, the last for its bias


# ---- which order ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A way to form an interval of the chain F₁ … F_k x.

    Attributes:
        cost: multiply-adds.
        text: what is done, in parentheses; a factor with a dot acts without its matrix.
        way: "matrix" of one factor, "vectors" (x itself), "product" of two intervals, "apply" one
            factor to what stands on its right, "apply_t" to what stands on its left.
        vectors: whether x is in the interval.
        at: the factor, of those that act or are a matrix.
        left: the plan of the left part.
        right: of the right one.
    """

    cost: int
    text: str
    way: str
    vectors: bool = False
    at: int = -1
    left: Plan | None = None
    right: Plan | None = None

    def __str__(self) -> str:
        """Say what is done, and how much that is."""
        return f"{self.text}: {self.cost:,} multiply-adds"


def planned(sums: Sequence[Sum], batch: int | None, offset: int = 0) -> Plan:
    """Find the cheapest order for the product of all factors, and of a batch if there is one.

    Args:
        sums: F₁ … F_k.
        batch: vectors on the right; None for the matrix W alone.
        offset: of the first of them among the layer's factors.
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
            if (own := sums[i].apply_cost) is not None and (batch != 0 or not right.vectors):
                cost, text = own * sizes[j + 1] + right.cost, f"({sums[i].kind}· {right.text})"
                ways.append(Plan(cost, text, "apply", right.vectors, i + offset, right=right))
            if j < k and (own := sums[j].apply_cost) is not None:
                left = best[i, j - 1]
                cost, text = own * sizes[i] + left.cost, f"({left.text} ·{sums[j].kind})"
                ways.append(Plan(cost, text, "apply_t", False, j + offset, left=left))
            best[i, j] = ways[0]
            for plan in ways:  # a loop, since torch.compile takes no min with a key
                if plan.cost < best[i, j].cost:
                    best[i, j] = plan
    return best[0, last]


def expected(size: int) -> int:
    """Return a size, or the example of one that torch.export leaves open: every order is right."""
    if isinstance(size, torch.SymInt):
        example = size.node.hint
        return 1 if example is None else int(example)
    return size


# ---- factors as people write them ----------------------------------------------------------------


def described(factor: Any) -> dict[str, Any]:
    """A factor as a mapping with its ``kind``, from a mapping, a name or a tensor.

    Raises:
        SubspanError: for anything else.
    """
    if isinstance(factor, str):
        return {"kind": factor}
    if isinstance(factor, Tensor):
        return {"kind": "given", "tensor": factor if factor.dim() == 3 else factor.unsqueeze(0)}
    if isinstance(factor, Mapping) and isinstance(factor.get("kind"), str):
        return dict(factor)
    raise SubspanError(
        f"a factor is a kind of atoms, as 'circulant', or a mapping, as {{'kind': 'rank1', 'p': 8, "
        f"'inner': 64}}, or a tensor; got {factor!r}"
    )


def chain(
    n: int, m: int, factors: Sequence[Mapping[str, Any]], seed: int, stream: int
) -> list[Sum]:
    """The factors of an n × m weight.

    ``inner`` of a factor is the number of its columns and of the next one's rows; without it a
    factor is square, and the last one has m columns.

    Raises:
        SubspanError: for factors that do not chain, and for what a kind cannot be.
    """
    if not factors:
        raise SubspanError("a product of sums needs one factor at least")
    if len(factors) >= STREAMS:
        raise SubspanError(f"a product has at most {STREAMS - 1} factors, got {len(factors)}")
    sums = []
    rows = n
    for i, factor in enumerate(factors):
        options = {k: v for k, v in factor.items() if k not in ("kind", "inner", "f", "fixed")}
        last = i == len(factors) - 1
        columns = factor.get("inner", m if last else rows)
        if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
            raise SubspanError(f"inner of factor {i + 1} must be a size >= 1, got {columns!r}")
        if last and columns != m:
            raise SubspanError(
                f"the factors of a {n} × {m} weight must end with {m} columns, got {columns}"
            )
        try:
            sums.append(
                atoms(factor["kind"], rows, columns, seed=seed, stream=stream + i, **options)
            )
        except SubspanError as error:
            shape = f"factor {i + 1} of {len(factors)}, {rows} × {columns}, of a {n} × {m} weight"
            raise SubspanError(f"{shape}: {error}") from None
        rows = columns
    return sums


def function(name: str) -> Callable[[Tensor], Tensor]:
    """A scalar function of coefficients: one of `FUNCTIONS`, or "package.module:name".

    Raises:
        SubspanError: if there is none.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    module, colon, attribute = str(name).partition(":")
    if not colon:
        raise unknown("function f", name, FUNCTIONS)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SubspanError(f"no function {name!r}: {error}") from None
    if not callable(found):
        raise SubspanError(f"{name!r} is no function")
    return found


# ---- layers --------------------------------------------------------------------------------------


class ProductOfSums(nn.Module, ABC):
    """A layer with the weight Πᵢ cᵢ Σⱼ fᵢ(aᵢⱼ) Mᵢⱼ, n × m.

    The constants cᵢ follow from the shapes and ``init``: with them coefficients are standard normal
    at first, whatever the atoms are, so that one learning rate suits all factors of all layers.

    Each factor is a kind of :func:`subspan.layers.atoms.kinds` by name, or a mapping of its
    ``kind`` and ``inner`` (its columns; see :func:`chain`), ``f`` (see :func:`function`), ``fixed``
    (coefficients that are 1 and stay), and the kind's own options.

    Attributes:
        sums: the atoms of F₁ … F_k.
        shape: n and m.
        trained: whether F₁ … F_k have coefficients that are trained.
        scales: c₁ … c_k; 1 of fixed factors.
        bias: (n,); or fewer numbers that a projection makes n of; or None.
    """

    def __init__(
        self, n: int, m: int, factors: Sequence[Any], bias: bool | int, seed: int, stream: int,
        init: str, device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        if init not in GAINS:
            raise unknown("init", init, GAINS)
        if not 0 <= stream < 1 << 18:
            raise SubspanError(f"stream must be in [0, 2^18), got {stream!r}")
        self.shape, self.seed, self.stream, self.init = (n, m), seed, stream, init
        self.factors = [described(factor) for factor in factors]
        first = stream * STREAMS
        with torch.device("cpu"):  # numbers, even where a network is made without any
            self.sums = chain(n, m, self.factors, seed, first)
        self._functions = [function(factor.get("f", "identity")) for factor in self.factors]
        self._plans: dict[int | None, Any] = {}
        self._constants: list[list[str]] = []
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.trained = [
            s.p > 0 and not factor.get("fixed")
            for s, factor in zip(self.sums, self.factors, strict=True)
        ]
        for i, s in enumerate(self.sums):
            if self.trained[i]:
                self.register_parameter(f"a{i}", nn.Parameter(torch.empty(s.p, **like)))
            else:
                self.register_buffer(f"a{i}", torch.ones(s.p, **like), persistent=False)
            constants = self._made(i)
            self._constants.append([f"fixed{i}_{j}" for j in range(len(constants))])
            for name, constant in zip(self._constants[i], constants, strict=True):
                # What a seed makes is in no file; what a user gives must be.
                self.register_buffer(name, constant, persistent=s.kind == "given")
        self._bias_of = None
        if bias is False:
            self.register_parameter("bias", None)
        else:
            if bias is not True:
                self._bias_of = projection(
                    "hash", out_dim=n, in_dim=bias, seed=seed, stream=first + STREAMS - 1
                )
            self.bias = nn.Parameter(torch.zeros(n if bias is True else bias, **like))
        self.scales = self._scales()
        self.reset_parameters()

    def _scales(self) -> list[float]:
        """The constant of each factor: with standard normal a, W keeps variance as ``init`` says.

        Inner factors keep the variance of what comes in, ‖F‖² = n in expectation; the first with
        coefficients brings in the gain, and makes up for fixed factors that do not keep it. Exact
        where f is the identity.
        """
        gain = GAINS[self.init](*self.shape)
        for s, own in zip(self.sums, self.trained, strict=True):
            if not own:
                gain /= s.energy / s.n
        scales = []
        for s, own in zip(self.sums, self.trained, strict=True):
            scales.append(math.sqrt(gain * s.n / s.energy) if own else 1.0)
            gain = 1.0 if own else gain
        return scales

    def _made(self, i: int) -> list[Tensor]:
        """Make the constants of factor i, where its coefficients are, and in their type."""
        with torch.device("cpu"):
            constants = self.sums[i].constants()
        a, copied = self.values(i), self.sums[i].kind == "given"
        return [
            c.to(a.device, a.dtype if c.is_floating_point() else None, copy=copied)
            for c in constants
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProductOfSums:
        """Move everything, and make again what no file holds, where that had been lost.

        On the meta device there are no values, and 16 bits hold half of each.
        """
        before = [self.values(i) for i in range(len(self.sums))]
        before = [torch.empty(0, dtype=a.dtype, device=a.device) for a in before]
        super()._apply(fn, recurse)
        for i, (old, s) in enumerate(zip(before, self.sums, strict=True)):
            now = self.values(i)
            widened = old.dtype in HALF and now.dtype not in HALF and s.kind != "given"
            if now.is_meta or not (old.is_meta or widened):
                continue
            if not self.trained[i]:
                now.fill_(1)
            for name, constant in zip(self._constants[i], self._made(i), strict=True):
                setattr(self, name, constant)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Standard normal coefficients, a bias of zero."""
        for name, p in self.named_parameters(recurse=False):
            nn.init.zeros_(p) if name == "bias" else nn.init.normal_(p)

    @property
    def recipe(self) -> dict[str, Any]:
        """JSON that, with the coefficients, says what the weight is."""
        bias = self._bias_of.in_dim if self._bias_of else self.bias is not None
        factors = []
        for factor, s in zip(self.factors, self.sums, strict=True):
            own = {key: value for key, value in factor.items() if key != "tensor"}
            given = {"shape": [s.p, s.n, s.m], "energy": s.energy} if s.kind == "given" else {}
            factors.append(own | given)
        return {
            "factors": factors, "bias": bias, "seed": self.seed, "stream": self.stream,
            "init": self.init,
        }  # fmt: skip

    @property
    def matrix(self) -> Tensor:
        """W as a matrix, (n, m), made at each call."""
        return self._formed(planned(self.sums, None), None)

    def factor(self, i: int) -> Tensor:
        """F of factor i as a matrix."""
        return self._formed(planned(self.sums[i : i + 1], None, i), None)

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """W in the shape of the ordinary layer's."""

    @abstractmethod
    def dense(self) -> nn.Module:
        """The ordinary layer with this weight."""

    @property
    def bias_length(self) -> int:
        """The length of the ordinary layer's bias: n, or 0 without one."""
        return 0 if self.bias is None else self.shape[0]

    def full_bias(self) -> Tensor | None:
        """(n,), or None."""
        return self.bias if self._bias_of is None else self._bias_of.matvec(self.bias)

    def coefficients(self, i: int) -> Tensor:
        """Return c f(a) of factor i, by which its atoms are multiplied; 1 of a fixed one."""
        a = self.values(i)
        return self.scales[i] * self._functions[i](a) if self.trained[i] else a

    def values(self, i: int) -> Tensor:
        """Return the numbers of factor i, (p,): a parameter a; of a fixed one, ones."""
        found: Tensor = getattr(self, f"a{i}")
        return found

    def _formed(self, plan: Plan, x: Tensor | None) -> Tensor:
        """An interval of the chain: a matrix; with x in it rows, (B, n) for n × B."""
        if plan.way == "vectors":
            assert x is not None
            return x
        if plan.way == "product":
            assert plan.left is not None
            assert plan.right is not None
            left, right = self._formed(plan.left, x), self._formed(plan.right, x)
            return F.linear(right, left) if plan.right.vectors else left @ right
        s, constants = self.sums[plan.at], [getattr(self, c) for c in self._constants[plan.at]]
        a = self.coefficients(plan.at)
        if plan.way == "matrix":
            return s.matrix(a, *constants)
        if plan.way == "apply_t":
            assert plan.left is not None
            return s.apply_t(self._formed(plan.left, x), a, *constants)
        assert plan.right is not None
        y = self._formed(plan.right, x)
        return s.apply(y, a, *constants) if plan.right.vectors else s.apply(y.T, a, *constants).T


class ProductOfSumsLinear(ProductOfSums):
    """``nn.Linear`` with a product of sums for its weight.

    Args:
        in_features: m.
        out_features: n.
        factors: of W, the leftmost first; see :class:`ProductOfSums`.
        bias: whether there is one; or how many numbers a projection makes one of.
        seed: of the fixed matrices, in [0, 2⁶⁴).
        stream: in [0, 2¹⁸); tells layers of one seed apart.
        init: "he", "glorot" or "lecun".
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        SubspanError: for factors that do not chain, or that cannot be.
    """

    def __init__(
        self, in_features: int, out_features: int, factors: Sequence[Any], bias: bool | int = True,
        *, seed: int = 0, stream: int = 0, init: str = "he",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.in_features, self.out_features = in_features, out_features
        super().__init__(
            out_features, in_features, factors, bias, seed, stream, init, device, dtype
        )

    def cost(self, batch: int) -> Plan:
        """Say how a batch is multiplied, and with how many multiply-adds: print it."""
        batch = expected(batch)
        if batch not in self._plans:
            self._plans[batch] = planned(self.sums, batch)
        found: Plan = self._plans[batch]
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(…, m) → (…, n)."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise SubspanError(
                f"expected inputs (…, {self.in_features}), got {tuple(x.shape)}: in_features is "
                f"{self.in_features}"
            )
        rows = x.reshape(-1, self.in_features)
        y = self._formed(self.cost(rows.shape[0]), rows).view(*x.shape[:-1], self.out_features)
        bias = self.full_bias()
        y = y if bias is None else y + bias
        return y.to(autocast_type(y))

    @property
    def weight(self) -> Tensor:
        """(n, m)."""
        return self.matrix

    def dense(self) -> nn.Linear:
        """``nn.Linear`` with this weight."""
        return linear(self.weight, self.full_bias())

    def extra_repr(self) -> str:
        """Sizes, and the factors."""
        return f"{self.in_features}, {self.out_features}, {_factors(self)}"


class ProductOfSumsConv2d(ProductOfSums, Convolution):
    """``nn.Conv2d`` with a product of sums for its kernel, out × (in·k²).

    The last factors make filters, and the first ones a 1×1 convolution of what these give, or all
    of them one kernel, whatever is cheapest for the number of places.

    Args:
        in_channels: of the input.
        out_channels: n.
        kernel_size: of the filters.
        factors: as of :class:`ProductOfSumsLinear`, with m = in_channels·k².
        stride: as in ``nn.Conv2d``.
        padding: as there.
        dilation: as there.
        bias: as of :class:`ProductOfSumsLinear`.
        padding_mode: as in ``nn.Conv2d``.
        seed: of the fixed matrices, in [0, 2⁶⁴).
        stream: in [0, 2¹⁸).
        init: "he", "glorot" or "lecun".
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        SubspanError: for factors that do not chain, or that cannot be.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        factors: Sequence[Any], stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1,
        bias: bool | int = True, padding_mode: str = "zeros",
        *, seed: int = 0, stream: int = 0, init: str = "he",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.place(in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode)
        m = in_channels * math.prod(self.kernel_size)
        super().__init__(out_channels, m, factors, bias, seed, stream, init, device, dtype)

    def cost(self, places: int) -> tuple[Plan | None, Plan]:
        """Say how so many places (batch × height × width of the output) are computed.

        Returns:
            The plan of the 1×1 convolution, or None, and that of the filters.
        """
        places = expected(places)
        if places not in self._plans:
            self._plans[places] = self._cheapest(places)
        found: tuple[Plan | None, Plan] = self._plans[places]
        return found

    def _cheapest(self, places: int) -> tuple[Plan | None, Plan]:
        """Try every factor as the first of the filters."""
        ways: list[tuple[int, Plan | None, Plan]] = []
        for cut in range(len(self.sums)):
            filters = planned(self.sums[cut:], None, cut)
            after = planned(self.sums[:cut], places) if cut else None
            cost = filters.cost + places * self.sums[cut].n * self.shape[1]
            ways.append((cost + (after.cost if after else 0), after, filters))
        best = ways[0]
        for way in ways:
            if way[0] < best[0]:
                best = way
        return best[1:]

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H', W'), also of one image without B."""
        if x.dim() == 3:
            return self._images(x.unsqueeze(0)).squeeze(0)
        if x.dim() != 4:
            raise SubspanError(f"expected images (B, in, H, W) or (in, H, W), got {tuple(x.shape)}")
        return self._images(x)

    def _images(self, x: Tensor) -> Tensor:
        x, padding = self.padded(x)
        if isinstance(padding, str):  # zeros that are as many on both sides
            raise AssertionError(padding)
        places = x.shape[0]
        geometry = (x.shape[-2:], padding, self.dilation, self.kernel_size, self.stride)
        for side, p, d, k, s in zip(*geometry, strict=True):
            places *= (side + 2 * p - d * (k - 1) - 1) // s + 1
        after, filters = self.cost(places)
        kernel = self._kernel(self._formed(filters, None))
        bias = self.full_bias()
        h = F.conv2d(
            x, kernel, bias if after is None else None, self.stride, padding, self.dilation
        )
        if after is None:
            return h
        rows = h.movedim(1, -1)
        y = self._formed(after, rows.reshape(-1, h.shape[1])).view(*rows.shape[:-1], self.shape[0])
        y = y if bias is None else y + bias
        y = y.to(autocast_type(y)).movedim(-1, 1)
        # Channels last now: as it came out of the convolution, for somebody may take a view of it.
        return y.contiguous() if h.is_contiguous() else y

    def _kernel(self, flat: Tensor) -> Tensor:
        return flat.reshape(-1, self.in_channels, *self.kernel_size)

    @property
    def weight(self) -> Tensor:
        """(out, in, k, k)."""
        return self._kernel(self.matrix)

    def dense(self) -> nn.Conv2d:
        """``nn.Conv2d`` with this kernel."""
        return self.ordinary(self.weight, self.full_bias())

    def extra_repr(self) -> str:
        """Sizes, and the factors."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, {_factors(self)}"
        )


def _factors(layer: ProductOfSums) -> str:
    parts = [f"{s.kind} {s.n}×{s.m} of {s.p}" for s in layer.sums]
    return f"W = {' · '.join(parts)}, bias={layer.recipe['bias']}"


def product_of_sums(
    net: nn.Module, rules: Mapping[str, Any], *, bias: bool | int | None = None, seed: int = 0,
    init: str = "he", exclude: Patterns = None,
) -> nn.Module:  # fmt: skip
    """Put products of sums in place of a network's linear and convolutional layers.

    Their weights begin anew, at random: what the layers had learnt is gone
    (:func:`subspan.layers.fit` goes the other way). Hooks, attributes, ``training`` and
    ``requires_grad`` stay.

    Args:
        net: changed in place.
        rules: {pattern: factors}, patterns of layers as of :class:`~subspan.SubspaceModel`; the
            first that fits a layer counts, and a layer that none fits stays. Factors are a list as
            of :class:`ProductOfSums`, or a function of n and m that gives one.
        bias: as of :class:`ProductOfSumsLinear`; None for what each layer has.
        seed: of the fixed matrices; every layer draws its own.
        init: "he", "glorot" or "lecun".
        exclude: patterns of layers to leave as they are.

    Returns:
        ``net``; or the new layer, if ``net`` itself is one that was replaced.

    Raises:
        SubspanError: for factors that do not fit a layer, which it names; for a layer that cannot
            be replaced, as of :func:`~subspan.layers.factorize`. The network is then untouched.
    """
    found = places(net)
    names = chosen(net, found, list(rules), exclude)
    new: dict[str, nn.Module] = {}
    for stream, name in enumerate(names):
        factors = next(value for pattern, value in rules.items() if matches(pattern, name))
        layer = found[name].plain
        n, m = layer.weight.flatten(1).shape
        has_bias = layer.bias is not None if bias is None else bias
        try:
            factors = factors(n, m) if callable(factors) else factors
            new[name] = remade(
                layer, {"factors": factors, "bias": has_bias, "seed": seed, "stream": stream,
                        "init": init},
            )  # fmt: skip
        except SubspanError as error:
            raise SubspanError(f"layer {name!r}: {error}") from None
    return put(net, found, new)


def product_of_sums_like(net: nn.Module, recipes: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Give exactly these layers these recipes, with any values: to be filled from a checkpoint.

    Args:
        net: changed in place; its layers are ordinary, or products of sums.
        recipes: of :attr:`ProductOfSums.recipe`, by the layers' full names.

    Raises:
        SubspanError: if the network is another one. It is then untouched.
    """
    found, modules = places(net), dict(net.named_modules())
    new: dict[str, nn.Module] = {}
    others: dict[int, nn.Module] = {}
    for name in recipes:
        if name not in found and not isinstance(modules.get(name), ProductOfSums):
            raise SubspanError(
                f"the network has no layer {name!r} that could be this product of sums"
            )
    check(found, [name for name in recipes if name in found])
    for name, recipe in recipes.items():
        there = modules.get(name)
        if name in found:
            new[name] = remade(found[name].plain, recipe)
        elif isinstance(there, ProductOfSums) and there.recipe != recipe:
            others[id(there)] = succeeded(name, there, remade(there, recipe))
    return replaced(put(net, found, new), others)


def succeeded(name: str, layer: ProductOfSums, new: ProductOfSums) -> ProductOfSums:
    """Give a product of sums the hooks, attributes and flags of the one whose place it will take.

    Raises:
        SubspanError: for a hook that it could not have.
    """
    refuse_hooks(name, layer)
    fresh = remade(layer, layer.recipe, device="meta")
    hand_over(name, layer, new, fresh)
    for i, trained in enumerate(layer.trained):
        if trained and i < len(new.trained) and new.trained[i]:
            new.get_parameter(f"a{i}").requires_grad_(layer.get_parameter(f"a{i}").requires_grad)
    return new


def registry(layer: ProductOfSums) -> tuple[list[str], list[str]]:
    """Name the parameters and the buffers that a product of sums registers by itself."""
    own = [f"a{i}" for i in range(len(layer.sums))]
    parameters = [name for name, trained in zip(own, layer.trained, strict=True) if trained]
    constants = [name for names in layer._constants for name in names]
    return [*parameters, "bias"], [*own, *constants]


def remade(
    layer: nn.Linear | nn.Conv2d | ProductOfSums, recipe: Mapping[str, Any],
    device: torch.device | str | None = None,
) -> ProductOfSums:  # fmt: skip
    """Make a recipe's product of sums, on its input as a layer lies, with first values."""
    like = layer.values(0) if isinstance(layer, ProductOfSums) else layer.weight
    options = dict(recipe) | {"device": device or like.device, "dtype": like.dtype}
    new: ProductOfSums
    if isinstance(layer, nn.Conv2d | ProductOfSumsConv2d):
        new = ProductOfSumsConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding, dilation=layer.dilation, padding_mode=layer.padding_mode,  # type: ignore[arg-type]
            **options,
        )  # fmt: skip
    else:
        new = ProductOfSumsLinear(layer.in_features, layer.out_features, **options)  # type: ignore[arg-type]
    return new.train(layer.training)
