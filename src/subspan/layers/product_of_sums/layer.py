"""Layers whose weight is a product of sums."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from subspan.distributed import as_number
from subspan.errors import SubspanError, unknown
from subspan.families import projection
from subspan.layers.atoms.dense import Projected
from subspan.layers.derived import DerivedBuffers
from subspan.layers.product_of_sums.factors import GAINS, STREAMS, chain, function, parse_factor
from subspan.layers.product_of_sums.order import Plan, plan_product
from subspan.layers.protocol import Compressed
from subspan.precision import full_precision
from subspan.subspace.callers import group_of_new_ddp


class ProductOfSums(DerivedBuffers, Compressed, type_name="product-of-sums"):
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
        self,
        n: int,
        m: int,
        factors: Sequence[Any],
        bias: bool | int,
        seed: int,
        stream: int,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if init not in GAINS:
            raise unknown("init", init, GAINS)
        if not 0 <= stream < 1 << 18:
            raise SubspanError(f"stream must be in [0, 2^18), got {stream!r}")
        self.shape, self.seed, self.stream, self.init = (n, m), seed, stream, init
        self.factors = [parse_factor(factor) for factor in factors]
        first = stream * STREAMS
        with torch.device("cpu"):  # numbers, even where a network is made without any
            self.sums = chain(n, m, self.factors, seed, first)
        self._functions = [function(factor.get("f", "identity")) for factor in self.factors]
        self._plans: dict[int | None, Any] = {}
        like = torch.empty(0, device=device, dtype=dtype)
        self.trained = [
            s.p > 0 and not factor.get("fixed")
            for s, factor in zip(self.sums, self.factors, strict=True)
        ]
        for i, s in enumerate(self.sums):
            if self.trained[i]:
                self.register_parameter(f"a{i}", nn.Parameter(like.new_empty(s.p)))
        given = [f"fixed{i}_0" for i, s in enumerate(self.sums) if s.kind == "given"]
        made = self.register_derived(like, persistent=given)
        self._constants = [
            [name for name in made if name.startswith(f"fixed{i}_")] for i in range(len(self.sums))
        ]
        self._bias_of = None
        if bias is False:
            self.register_parameter("bias", None)
        else:
            if bias is not True:
                self._bias_of = projection(
                    "hash", out_dim=n, in_dim=bias, seed=seed, stream=first + STREAMS - 1
                )
            self.bias = nn.Parameter(like.new_zeros(n if bias is True else bias))
        self.scales = self._scales()
        self.reset_parameters()

    def _scales(self) -> list[float]:
        """Return each factor's constant: with standard normal a, W has the variance of ``init``.

        Inner factors keep the variance of what comes in, ‖F‖² = n in expectation; the first with
        coefficients brings in the gain, and makes up for fixed factors that do not keep it. Exact
        where f is the identity.
        """
        gain = GAINS[self.init](*self.shape)
        for s, trained in zip(self.sums, self.trained, strict=True):
            if not trained:
                gain /= s.energy / s.n
        scales = []
        for s, trained in zip(self.sums, self.trained, strict=True):
            scales.append(math.sqrt(gain * s.n / s.energy) if trained else 1.0)
            gain = 1.0 if trained else gain
        return scales

    def derive(self) -> dict[str, Tensor]:
        """Make the constants of all factors, and the coefficients of those that are fixed, ones."""
        made = {}
        for i, s in enumerate(self.sums):
            if not self.trained[i]:
                made[f"a{i}"] = torch.ones(s.p)
            made |= {f"fixed{i}_{j}": constant for j, constant in enumerate(s.constants())}
        return made

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
            written = {key: value for key, value in factor.items() if key != "tensor"}
            of_tensor = {"shape": [s.p, s.n, s.m], "energy": s.energy} if s.kind == "given" else {}
            factors.append(written | of_tensor)
        return {
            "factors": factors,
            "bias": bias,
            "seed": self.seed,
            "stream": self.stream,
            "init": self.init,
        }

    @property
    def fixed_matrices(self) -> dict[str, Any]:
        """The recipe of the fixed matrices, without which the coefficients mean nothing."""
        drawn = any(self._constants) or any(isinstance(s, Projected) for s in self.sums)
        # A state has given matrices, but not by how much the layer multiplies them.
        options = [
            {"energy": s.energy} if s.kind == "given" else dict(s.options) for s in self.sums
        ]
        return {
            "kinds": [s.kind for s in self.sums],
            "shapes": [[s.n, s.m] for s in self.sums],
            "options": options,
            "f": [str(factor.get("f", "identity")) for factor in self.factors],
            "init": self.init,
            "seed and stream": [self.seed, self.stream] if drawn or self._bias_of else None,
        }

    @property
    def meaning(self) -> dict[str, Any]:
        """The recipe of the fixed matrices, and the shape of a kernel."""
        return super().meaning | self.fixed_matrices

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters; to DDP, if all processes have the same fixed matrices.

        Raises:
            SubspanError: if not, for it would average numbers that mean different weights.
        """
        if not torch.compiler.is_compiling():
            group = group_of_new_ddp(sys._getframe(1))
            if group is not None:
                self._compare_processes(group)
        yield from super().named_parameters(*args, **kwargs)

    def _compare_processes(self, group: dist.ProcessGroup) -> None:
        device = next(self.buffers(), self.values(0)).device
        own = torch.tensor([as_number(self.meaning)], device=device)
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, own, group)
        if any(each != every[0] for each in every):
            raise SubspanError(
                f"a {type(self).__name__} has other fixed matrices in some processes of "
                "DistributedDataParallel, which would average their coefficients as if they were "
                "of the same: give product_of_sums the same seed and rules everywhere"
            )

    @property
    def matrix(self) -> Tensor:
        """W as a matrix, (n, m), made at each call."""
        with full_precision(self.values(0).device):
            return self._form(plan_product(self.sums, None), None)

    def factor(self, i: int) -> Tensor:
        """F of factor i as a matrix."""
        with full_precision(self.values(i).device):
            return self._form(plan_product(self.sums[i : i + 1], None, i), None)

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """W in the shape of the ordinary layer's."""

    def full_bias(self) -> Tensor | None:
        """(n,), or None."""
        return self.bias if self._bias_of is None else self._bias_of.matvec(self.bias)

    def coefficients(self, i: int) -> Tensor:
        """Return c f(a) of factor i, by which its atoms are multiplied; 1 of a fixed one."""
        a = self.values(i)
        return self.scales[i] * self._functions[i](a) if self.trained[i] else a

    def values(self, i: int) -> Tensor:
        """Return the numbers of factor i, (p,): a parameter a; of a fixed one, ones."""
        return getattr(self, f"a{i}") if self.trained[i] else self.derived(f"a{i}")

    def _form(self, plan: Plan, x: Tensor | None) -> Tensor:
        """An interval of the chain: a matrix; with x in it rows, (B, n) for n × B."""
        if plan.way == "vectors":
            assert x is not None
            return x
        if plan.way == "product":
            assert plan.left is not None
            assert plan.right is not None
            left, right = self._form(plan.left, x), self._form(plan.right, x)
            return F.linear(right, left) if plan.right.vectors else left @ right
        s, a = self.sums[plan.at], self.coefficients(plan.at)
        constants = [self.derived(name) for name in self._constants[plan.at]]
        if plan.way == "matrix":
            return s.matrix(a, *constants)
        if plan.way == "apply_t":
            assert plan.left is not None
            return s.apply_t(self._form(plan.left, x), a, *constants)
        assert plan.right is not None
        y = self._form(plan.right, x)
        return s.apply(y, a, *constants) if plan.right.vectors else s.apply(y.T, a, *constants).T

    def describe_factors(self) -> str:
        """Return the factors in a line, as the layer is printed."""
        parts = [f"{s.kind} {s.n}×{s.m} of {s.p}" for s in self.sums]
        return f"W = {' · '.join(parts)}, bias={self.recipe['bias']}"
