"""A model as an ordinary LoRA, in the two files that PEFT and others load.

The format: ``adapter_model.safetensors`` and ``adapter_config.json`` as
``peft.PeftModel.save_pretrained`` writes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from subspan.adapters.factors import check_rank
from subspan.adapters.layers import refuse_peft
from subspan.adapters.names import find_stored, find_task, name_saved, name_targets, refuse_uncalled
from subspan.adapters.nearest import NearestLora, find_nearest
from subspan.errors import SubspanError
from subspan.files import write_together
from subspan.subspace.model import SubspaceModel
from subspan.subspace.sharded import refuse_whole
from subspan.subspace.structure import is_conv1d

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of the network inside of PEFT's


@dataclass(frozen=True)
class LoraExport:
    """The outcome of :func:`export_lora`; ``str`` of it is a table of errors.

    Args:
        bytes: size of both files together.
        rank: of the factors.
        errors: ‖Δ − s B A‖ / ‖Δ‖ of each layer by name, Δ being what training has made of its
            weight; 0.0 where A and B themselves were trained.
        error: the same of all layers together.
    """

    bytes: int
    rank: int
    errors: Mapping[str, float]
    error: float

    def __str__(self) -> str:
        if not self.error:
            return f"a LoRA of rank {self.rank}, exactly that of the model"
        width = max(map(len, [*self.errors, "all layers"]))
        rows = [*self.errors.items(), ("all layers", self.error)]
        head = f"{'layer':<{width}}  relative error of rank {self.rank}"
        return "\n".join([head, *(f"{name:<{width}}  {error:.3g}" for name, error in rows)])


@torch.no_grad()
def export_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    base: str | None = None,
) -> LoraExport:
    """Write a model as a LoRA that PEFT loads, always with the same bytes.

    Of a model of :func:`subspan.lora` the files hold A and B as they are, and
    ``PeftModel.from_pretrained(net, folder)`` computes what the model computes, bit for bit in
    float32. Of any other SubspaceModel they hold the nearest LoRA of a rank: for each linear layer
    the truncated singular value decomposition of θ − θ₀. Parameters that are trained fully (a head)
    are stored as ``modules_to_save``.

    Args:
        model: a :class:`~subspan.subspace.model.SubspaceModel`, or its network.
        folder: which is made if it is not there; files of the same names are replaced.
        rank: of the nearest LoRA, by default 8; a model of :func:`subspan.lora` has its own.
        base: the name or folder of the network without LoRA, for the configuration; by default
            what transformers knows of it.

    Returns:
        The size of the files, and how far the LoRA is from the model, layer by layer.

    Raises:
        SubspanError: for what a LoRA cannot say (moved embeddings, norms or biases, buffers),
            naming it; nothing is written then.
    """
    found = SubspaceModel.of(model)
    if found is None:
        raise SubspanError(
            f"expected a SubspaceModel, or its network, got an ordinary {type(model).__name__}"
        )
    refuse_whole(found.subspace, "exported")
    refuse_peft(found.body)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise SubspanError(f"{folder} is a file, and a LoRA is a folder of two: give another name")
    saved = name_saved(found)
    nearest = _factors(found, rank) if found.subspace.adapters else find_nearest(found, rank, saved)
    apart = found.subspace.reads.apart()
    for layer in nearest.factors:
        if f"{layer}.weight" in apart:
            raise refuse_uncalled("the network", layer)
    tensors = {
        f"{PREFIX}{layer}.lora_{letter}.weight": factor
        for layer, factors in nearest.factors.items()
        for letter, factor in zip("AB", factors, strict=True)
    }
    config = _describe(found, nearest, saved, base)
    for module in find_stored(found.body, saved, config["task_type"]):
        state = found.body.get_submodule(module).state_dict()
        tensors |= {f"{PREFIX}{module}.{name}": tensor for name, tensor in state.items()}
    copies = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save(copies, metadata={"format": "pt"})
    # An old configuration beside new factors would be another LoRA.
    size = write_together({folder / WEIGHTS: data, folder / CONFIG: text.encode()})
    return LoraExport(size, nearest.rank, nearest.errors, nearest.error)


def _factors(model: SubspaceModel, rank: int | None) -> NearestLora:
    """Return the factors of a model that has them; refuse another rank than theirs."""
    weights = model.subspace
    own = weights.lora["rank"]
    if rank is not None and check_rank(rank) != own:
        raise SubspanError(f"this model's LoRA has rank {own}, got rank={rank}: leave it out")
    thetas = weights.all()
    factors = {
        adapter.layer: (thetas[adapter.factors[0]], thetas[adapter.factors[1]])
        for adapter in weights.adapters.values()
    }
    return NearestLora(factors, own, weights.lora.get("alpha", own), dict.fromkeys(factors, 0.0), 0)


def _describe(
    model: SubspaceModel, lora: NearestLora, saved: list[str], base: str | None
) -> dict[str, Any]:
    """Return the configuration, with the fields that say something else than their absence."""
    layers, net = list(lora.factors), model.body
    task = find_task(net, layers)
    conv1d = [is_conv1d(net.get_submodule(name)) for name in layers]
    name = base or getattr(getattr(net, "config", None), "_name_or_path", None) or None
    return {
        "base_model_name_or_path": name,
        "bias": "none",
        "fan_in_fan_out": all(conv1d),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": name_targets(net, layers, saved, task),
        "task_type": task,
        "use_dora": False,
        "use_rslora": False,
    }
