"""Names in PEFT's configuration: which modules have a LoRA, which are stored whole, which task."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection

from torch import nn

from subspan.errors import SubspanError
from subspan.subspace.model import SubspaceModel
from subspan.subspace.parameters import find_aliases, find_slots

# What PEFT calls the tasks, by the ends of the names of transformers' classes, and the heads that
# it stores whole for each, whether it is told to or not.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
}
# What PEFT puts into a layer that has a LoRA.
_OWN: tuple[str, ...] = ("base_layer", "lora_A", "lora_A.default", "lora_B", "lora_B.default")
_OWN += ("lora_dropout", "lora_dropout.default", "lora_embedding_A", "lora_embedding_B")
_OWN += ("lora_magnitude_vector",)
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
# Layers that PEFT takes for the experts that transformers has put into one tensor, or that it
# refuses, by the type of the network or of one that has experts like it.
_TAKEN = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj",)),
}
# Layers whose weight a network of a type reads without calling them, by the ends of their names.
_READ = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), "dt_proj"),
    **dict.fromkeys(("wav2vec2", "wav2vec2-bert", "wav2vec2-conformer", "wavlm"), "kernel"),
    **dict.fromkeys(("unispeech-sat", "data2vec-audio"), "kernel"),
    **dict.fromkeys(("detr", "conditional_detr"), "bbox_attention.k_proj"),
}


def name_saved(model: SubspaceModel) -> list[str]:
    """Name the modules that are stored whole, since they are trained fully.

    A name is as short as it can be: that of a part of which all is trained fully, unless PEFT would
    take other modules for it.

    Raises:
        SubspanError: for parameters and buffers that no such module holds alone.
    """
    net, fully = model.body, set(model.subspace.fully)
    adapted = [adapter.layer for adapter in model.subspace.adapters.values()]
    tied = find_aliases(find_slots(net))
    names, direct = set[str](), set[str]()
    for name in fully:
        module = name.rpartition(".")[0]
        if not module or len(tied[name]) > 1:
            why = "is tied to " + tied[name][1] if module else "belongs to the network itself"
            raise SubspanError(
                f"{name} was trained fully and {why}, which PEFT's modules_to_save cannot say: "
                "write the network of merge()"
            )
        direct.add(module)
        while "." in module and _all_fully(net, module.rpartition(".")[0], fully):
            module = module.rpartition(".")[0]
        if inside := [layer for layer in adapted if f"{layer}.".startswith(f"{module}.")]:
            raise SubspanError(
                f"{name} was trained fully beside the LoRA of {inside[0]}, and PEFT has one or the "
                "other of a module: write the network of merge()"
            )
        names.add(module)
    if _clash(net, adapted, names, None)[0]:
        names = direct
    for name in model.changed_buffers():
        if not any(name.startswith(f"{module}.") for module in names):
            raise SubspanError(
                f"buffer {name} was changed by training, which a LoRA cannot say: write the "
                "network of merge()"
            )
    return sorted(names)


def find_stored(net: nn.Module, saved: Collection[str], task: str | None) -> list[str]:
    """Name all modules that PEFT stores whole: whose names end so, or as the head of a task."""
    ends = (*saved, *_HEADS.get(task or "", ()))
    return [name for name, _ in net.named_modules() if name and name.endswith(ends)]


def _clash(
    net: nn.Module, layers: Collection[str], saved: Collection[str], task: str | None
) -> tuple[str, str]:
    """Return a module that PEFT would store whole, and what is in it or around it and cannot be.

    That is a layer that has a LoRA, or another module that is stored; two empty texts for none.
    """
    stored, ends = find_stored(net, saved, task), (*saved, *_HEADS.get(task or "", ()))
    stored += [f"{name}.{own}" for name in layers for own in _OWN if own.endswith(ends)]
    for module in stored:
        for name in layers:
            if f"{name}.".startswith(f"{module}.") or module.startswith(f"{name}."):
                return module, name
        for name in stored:
            if name.startswith(f"{module}."):
                return module, name
    return "", ""


def _all_fully(net: nn.Module, module: str, fully: Collection[str]) -> bool:
    inside = [name for name, _ in net.get_submodule(module).named_parameters()]
    return all(f"{module}.{name}" in fully for name in inside)


def name_targets(
    net: nn.Module, layers: Collection[str], saved: Collection[str], task: str | None
) -> list[str] | str:
    """Name layers so that PEFT finds these and no others: by their last names if it can be.

    A list selects modules by their names or the end of them after a dot; a text is a regular
    expression that matches the whole name. ``saved`` are the modules that are stored whole.

    Raises:
        SubspanError: if PEFT would store a layer whole that has a LoRA, or a part of what it stores
            whole once more, or takes a layer for something else.
    """
    _refuse_taken(net, layers)
    module, other = _clash(net, layers, saved, task)
    saved = (*saved, *_HEADS.get(task or "", ()))
    if module:
        end = next(repr(name) for name in saved if module.endswith(name))
        end += "" if module == other else f" ({module})"
        raise SubspanError(
            f"PEFT takes every module whose name ends with {end} for one that is stored whole, so "
            f"that {other} cannot have a LoRA: exclude it"
            if other in layers
            else f"PEFT takes every module whose name ends with {end} for one that is stored "
            f"whole, so that it cannot store {other} in it, too: write the network of merge()"
        )
    every = [
        name
        for name, _ in net.named_modules()
        if name and not any(f".{module}." in f".{name}." for module in saved)  # as PEFT has it
    ]
    for names in ({name.rpartition(".")[2] for name in layers}, set(layers)):
        ends = tuple(f".{name}" for name in names)
        if {n for n in every if n in names or n.endswith(ends)} == set(layers):
            return sorted(names)
    return "|".join(map(re.escape, sorted(layers)))


def _refuse_taken(net: nn.Module, layers: Collection[str]) -> None:
    """Refuse layers that PEFT takes for something else."""
    kind: str = getattr(getattr(net, "config", None), "model_type", "")
    library = sys.modules.get("transformers.conversion_mapping")  # where PEFT looks, too
    like = getattr(library, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind, kind)
    for layer in layers:
        if (name := layer.rpartition(".")[2]) in _TAKEN.get(like, ()):
            raise SubspanError(
                f"PEFT takes layers that are called {name!r} in a network of the type {kind!r} for "
                f"others, or refuses them, so that {layer} cannot have a LoRA: exclude it, or "
                "write the network of merge()"
            )
        if kind in _READ and f".{layer}".endswith(f".{_READ[kind]}"):
            raise refuse_uncalled(f"a network of the type {kind!r}", layer)


def refuse_uncalled(network: str, layer: str) -> SubspanError:
    """Make the refusal of a layer whose weight a network reads without calling it."""
    return SubspanError(
        f"{network} reads the weight of {layer} and does not call the layer, so that PEFT would "
        "leave its LoRA out: exclude it, or write the network of merge()"
    )


def find_task(net: nn.Module, layers: Collection[str]) -> str | None:
    """Return PEFT's word for what a network of transformers is for.

    None stands for any network, for one with a LoRA in a head that PEFT would store whole, and for
    one that generates text from sounds or images, to which PEFT's word would give texts.
    """
    kind = type(net).__name__
    task = next((task for end, task in _TASKS.items() if kind.endswith(end)), None)
    if task is None or not type(net).__module__.startswith("transformers."):
        return None
    config, reads = getattr(net, "config", None), getattr(net, "main_input_name", "input_ids")
    text = reads == "input_ids" and getattr(config, "is_encoder_decoder", False)
    if (task == "SEQ_2_SEQ_LM" and not text) or _clash(net, layers, (), task)[0]:
        return None
    return task
