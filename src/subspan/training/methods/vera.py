"""VeRA (Kopiczko et al. 2024) by PEFT: W + diag(b) B diag(d) A, with A and B random and shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subspan.training.methods import Option
from subspan.training.methods.by_peft import PEFTMethod, parse_whole


class VeRA(PEFTMethod):
    """Two vectors for each layer: r numbers, and one for each output."""

    axis = "rank"
    options = (
        Option("rank", int, "r, the rank of the factors"),
        *PEFTMethod.options,
    )

    def config(self, peft: Any, seed: int, options: Mapping[str, Any]) -> Any:
        """Return the configuration."""
        return peft.VeraConfig(r=parse_whole(self.name, "rank", options), projection_prng_key=seed)

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return rates that were good for MiniLM at rank 256."""
        return (3e-3, 1e-2, 3e-2)


VeRA("vera", "W + diag(b) B diag(d) A, A and B random, by PEFT (Kopiczko 2024)")
