"""Uni-LoRA (Li et al. 2025, arXiv:2506.00799) by PEFT: all factors of LoRA from one vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subspan.errors import SubspanError
from subspan.training.methods import Option
from subspan.training.methods.by_peft import PEFTMethod, parse_whole


class UniLoRA(PEFTMethod):
    """Every entry of every factor is an entry of one vector of d numbers, times a scale."""

    axis = "dim"
    options = (
        Option("dim", int | str, "d, the length of the vector"),
        Option("rank", int, "r, the rank of the factors (4)"),
        *PEFTMethod.options,
    )

    def config(self, peft: Any, seed: int, options: Mapping[str, Any]) -> Any:
        """Return the configuration."""
        if not hasattr(peft, "UniLoraConfig"):
            raise SubspanError(
                f"PEFT {peft.__version__} has no Uni-LoRA: pip install --upgrade peft"
            )
        return peft.UniLoraConfig(
            theta_d_length=parse_whole(self.name, "dim", options),
            r=parse_whole(self.name, "rank", options, 4),
            proj_seed=seed,
        )

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return rates that were good for MiniLM at 1,000 numbers."""
        return (1e-2, 3e-2, 1e-1)


UniLoRA("unilora", "LoRA's factors from one vector of d numbers by PEFT (Li 2025)")
