"""LoRA (Hu et al. 2022) by PEFT: W + (α/r) B A, with A (r, n) drawn as usual and B (m, r) zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subspan.training.methods import Option
from subspan.training.methods.by_peft import PEFTMethod, parse_whole


class LoRA(PEFTMethod):
    """Two factors beside the weight of each layer."""

    axis = "rank"
    options = (
        Option("rank", int, "r, the rank of the factors"),
        Option("alpha", float, "α of the scale α/r of their product (r)"),
        *PEFTMethod.options,
    )

    def config(self, peft: Any, seed: int, options: Mapping[str, Any]) -> Any:
        """Return the configuration."""
        rank = parse_whole(self.name, "rank", options)
        return peft.LoraConfig(r=rank, lora_alpha=options.get("alpha", rank))

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return rates that were good for MiniLM at ranks from 1 to 8."""
        return (1e-3, 3e-3, 1e-2)


LoRA("lora", "W + (α/r) B A by PEFT (Hu 2022)")
