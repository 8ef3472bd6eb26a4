"""Adapters of Hugging Face's PEFT as methods, to hold ours against.

LoRA (Hu et al. 2022) is W + (α/r) B A, with A (r, n) drawn as usual and B (m, r) zero. Uni-LoRA
(Li et al. 2025, arXiv:2506.00799) has all factors of LoRA from one vector. VeRA (Kopiczko et al.
2024) is W + diag(b) B diag(d) A, with A and B random and shared.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.subspace.targets import find_linears
from subspan.training.methods import RATE_OF_HEAD, TRAIN_FULLY, Option
from subspan.training.methods.head import FineTuning

LAYERS = Option(
    "layers",
    str | list[str] | None,
    "linear layers that get factors, as query or [query,value], or attention, mlp, all-linear; "
    "by default those that PEFT takes in this architecture, or else all but the head",
)


class PEFTMethod(FineTuning):
    """A method of PEFT."""

    trains_head = True
    options: tuple[Option, ...] = (LAYERS, TRAIN_FULLY, RATE_OF_HEAD)

    @abstractmethod
    def config(self, peft: Any, seed: int, options: Mapping[str, Any]) -> Any:
        """Return PEFT's configuration, without the layers."""

    def adapt(
        self, net: nn.Module, seed: int, options: Mapping[str, Any], head: list[nn.Parameter]
    ) -> None:
        """Put PEFT's layers in place; what they draw comes from the seed."""
        if importlib.util.find_spec("peft") is None:
            raise SubspanError(
                f"method {self.name!r} is PEFT's: pip install 'subspan[peft]' brings it"
            )
        peft = importlib.import_module("peft")
        config = self.config(peft, seed, options)
        # A pattern: by a name PEFT would take other layers, too, whose names end so.
        layers = find_layers(net, options.get("layers"), head)
        config.target_modules = "|".join(map(re.escape, layers))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in old words
            torch.manual_seed(seed)
            try:
                peft.get_peft_model(net, config)  # the layers know all that they need
            except (ValueError, TypeError, NotImplementedError) as error:
                raise SubspanError(f"PEFT refuses {self.name} here: {error}") from None

    def merge(self, model: nn.Module) -> nn.Module:
        """Return the network with the products of the factors added to its weights."""
        tuners = importlib.import_module("peft.tuners.tuners_utils")
        for name, module in list(model.named_modules()):
            if isinstance(module, tuners.BaseTunerLayer):
                module.merge()
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, module.get_base_layer())
        return model


def find_layers(
    net: nn.Module, patterns: str | list[str] | None, head: list[nn.Parameter]
) -> list[str]:
    """Return the names of the linear layers that get factors, one at least; never the head's."""
    inside = {id(p) for p in head}
    found = [
        name
        for name in find_linears(net, patterns or usual_layers(net))
        if not any(id(p) in inside for p in net.get_submodule(name).parameters())
    ]
    if not found:
        raise SubspanError("no linear layer beside the head can get factors: name other layers")
    return found


def usual_layers(net: nn.Module) -> str | list[str]:
    """Return the layers that PEFT's LoRA takes in an architecture that it knows."""
    known = importlib.import_module("peft.utils.constants")
    architecture = getattr(getattr(net, "config", None), "model_type", None)
    table: Mapping[str, list[str]] = known.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return table.get(str(architecture), "all-linear")


def parse_whole(
    method: str, name: str, options: Mapping[str, Any], usual: int | None = None
) -> int:
    """Return an option that is a positive integer; refuse anything else, and none at all."""
    value = options.get(name, usual)
    if value is None:
        raise SubspanError(f"method {method!r} needs --{name}")
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        raise SubspanError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


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


class VeRA(PEFTMethod):
    """Two vectors for each layer: r numbers, and one for each output."""

    axis = "rank"
    options = (Option("rank", int, "r, the rank of the factors"), *PEFTMethod.options)

    def config(self, peft: Any, seed: int, options: Mapping[str, Any]) -> Any:
        """Return the configuration."""
        return peft.VeraConfig(r=parse_whole(self.name, "rank", options), projection_prng_key=seed)

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return rates that were good for MiniLM at rank 256."""
        return (3e-3, 1e-2, 3e-2)


LoRA("lora", "W + (α/r) B A by PEFT (Hu 2022)")
UniLoRA("unilora", "LoRA's factors from one vector of d numbers by PEFT (Li 2025)")
VeRA("vera", "W + diag(b) B diag(d) A, A and B random, by PEFT (Kopiczko 2024)")
