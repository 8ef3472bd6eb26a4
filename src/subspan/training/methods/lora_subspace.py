"""A subspace over LoRA's factors: W + (α/r) B A with (A, B) = θ₀ + P w (:func:`subspan.lora`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from subspan.adapters import lora
from subspan.subspace.model import SubspaceModel
from subspan.training.methods import RATE_OF_HEAD, TRAIN_FULLY, Method, Option
from subspan.training.methods.by_peft import parse_whole
from subspan.training.methods.head import name_head
from subspan.training.methods.subspace import PATTERNS


class LoRASubspace(Method):
    """All factors through d coordinates; exports as an ordinary LoRA."""

    axis = "dim"
    trains_head = True
    options = (
        Option("dim", int | str, "d, the coordinates in all"),
        Option("rank", int, "r, the rank of the factors (8)"),
        Option("alpha", float, "α of the scale α/r of their product (r)"),
        Option("layers", PATTERNS, "linear layers that get factors (all-linear)"),
        TRAIN_FULLY,
        RATE_OF_HEAD,
    )

    def wrap(self, net: nn.Module, seed: int, options: Mapping[str, Any]) -> SubspaceModel:
        """Put factors into the network, and the network into the subspace."""
        own = {key: options[key] for key in ("rank", "alpha") if key in options}
        if "layers" in options:
            own["targets"] = options["layers"]
        head = name_head(net, options.get("train_fully", "head"))
        dim = parse_whole(self.name, "dim", options)
        return lora(net, dim, train_fully=head, seed=seed, **own)

    def head(self, model: nn.Module, options: Mapping[str, Any]) -> list[nn.Parameter]:
        """Return what is trained fully."""
        assert isinstance(model, SubspaceModel)
        return list(model.fully_trained().values())

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return rates that were good for MiniLM at 2,000 numbers."""
        return (1.5e-2, 3e-2, 6e-2)


LoRASubspace("lora-subspace", "θ₀ + P w of LoRA's factors, which exports as a LoRA")
