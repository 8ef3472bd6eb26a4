"""Products of sums of fixed matrices (ProdSumNet, Wu 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from subspan.counts import count
from subspan.errors import SubspanError
from subspan.lab.methods import Method, Option
from subspan.layers import product_of_sums


class ProductsOfSums(Method):
    """Layers W = Πᵢ Σⱼ aᵢⱼ Mᵢⱼ in place of linear and convolutional ones."""

    axis = "p"
    options = (
        Option("p", int, "atoms of a sum: of each layer, or whatever --factors call p, as in p: p"),
        Option("atoms", str, "kind of the atoms where there are no --factors (hash)"),
        Option(
            "factors", dict[str, list[Any]],
            "{pattern of layers: [factor, …]}, a factor a kind or {kind: …, inner: …, p: …}; "
            "layers that no pattern fits stay as they are",
        ),
        Option("bias", bool | int, "whether biases are trained, or through how many numbers each"),
        Option("scale", str, "variance of the first weights: he, glorot or lecun"),
    )  # fmt: skip

    def wrap(self, net: nn.Module, seed: int, options: Mapping[str, Any]) -> nn.Module:
        """Put products of sums in the layers' places."""
        rules = options.get("factors")
        if rules is None:
            if "p" not in options:
                raise SubspanError(
                    f"method {self.name!r} needs --p, the number of atoms of each layer, or "
                    "--factors"
                )
            rules = {".*": [{"kind": options.get("atoms", "hash"), "p": "p"}]}
        elif "atoms" in options:
            raise SubspanError("give --atoms, which all layers get, or --factors, not both")
        p = _number(options["p"]) if "p" in options else None
        filled = {
            pattern: [_filled(factor, p) for factor in factors]
            for pattern, factors in rules.items()
        }
        more = {"init": options["scale"]} if "scale" in options else {}
        return product_of_sums(net, filled, bias=options.get("bias"), seed=seed, **more)

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Far above Adam's 1e-3 for weights: coefficients begin at 1, whatever they multiply."""
        return (0.01, 0.03, 0.1)

    def counts(self, model: nn.Module) -> dict[str, Any]:
        """Coefficients, biases, and the layers that stayed."""
        found = count(model)
        return {
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "stored_parameters": found.stored,
            "weights": found.dense,
        }


def _number(p: Any) -> int:
    try:
        return int(p)
    except ValueError:
        raise SubspanError(f"p must be a number of atoms, got {p!r}") from None


def _filled(factor: Any, p: int | None) -> Any:
    """A factor with the number in the place of the word: of atoms (p: p), say, or inner: p."""
    if not isinstance(factor, Mapping) or "p" not in factor.values():
        return factor
    if p is None:
        raise SubspanError(f"a factor says p, but no --p is given: {dict(factor)}")
    return {key: p if value == "p" else value for key, value in factor.items()}


ProductsOfSums("prodsum", "layers that are products of sums of fixed matrices (Wu 2018)")
