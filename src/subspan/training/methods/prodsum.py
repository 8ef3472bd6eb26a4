"""Products of sums of fixed matrices (ProdSumNet, Wu 2018)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from subspan.errors import SubspanError
from subspan.layers import ProductOfSums, carry_over, grow, product_of_sums, recipes
from subspan.layers.product_of_sums import parse_factor
from subspan.layers.replace import exchange
from subspan.subspace.compartments import matches
from subspan.training.config import Run, split
from subspan.training.methods import Method, Option
from subspan.training.records import Epoch

Rule = list[dict[str, Any]] | Callable[[int, int], list[dict[str, Any]]]


class ProductsOfSums(Method):
    """Layers W = Πᵢ Σⱼ aᵢⱼ Mᵢⱼ in place of linear and convolutional ones; perhaps in stages."""

    axis = "p"
    options = (
        Option("p", int, "the number of atoms of a sum, or whatever --factors call p, as in p: p"),
        Option(
            "stages",
            list[int] | str,
            "in place of --p: begin with the first number of atoms, as 100,400,1600, and go on "
            "from what is learnt with the next one when the accuracy has stopped rising, or when "
            "the stage has had its share of the epochs",
        ),
        Option("plateau", int, "epochs without a better validation accuracy that end a stage (2)"),
        Option("atoms", str, "the kind of the atoms where there are no --factors (hash)"),
        Option(
            "factors",
            dict[str, list[Any] | dict[str, Any]],
            "{pattern of layers: [factor, …]}, a factor a kind or {kind: …, inner: …, p: …}; or "
            "{pattern: {recipe: …}}, as low_rank or kronecker_fc, with its options; layers that no "
            "pattern fits stay as they are",
        ),
        Option("bias", bool | int, "whether biases are trained, or through how many numbers each"),
        Option("scale", str, "the variance of the first weights: he, glorot or lecun"),
    )

    def wrap(self, net: nn.Module, seed: int, options: Mapping[str, Any]) -> nn.Module:
        """Put products of sums in the layers' places, those of the first stage."""
        first, *later = _stages(options)
        more = {"init": options["scale"]} if "scale" in options else {}

        def replace(net: nn.Module, p: int | None) -> nn.Module:
            rules = _rules(options, p)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # of the first coefficients
                return product_of_sums(net, rules, bias=options.get("bias"), seed=seed, **more)

        for p in later:  # what cannot be is said before the first one is trained
            replace(copy.deepcopy(net), p)
        return replace(net, first)

    def optimizer(self, model: nn.Module, run: Run, *rest: Any, **more: Any) -> Optimizer:
        """Make an ordinary optimizer; each stage must get an epoch."""
        stages = len(_stages(run.options))
        if run.training.epochs < stages:
            raise SubspanError(
                f"{stages} stages need {stages} epochs at least, got {run.training.epochs}"
            )
        return super().optimizer(model, run, *rest, **more)

    def after_epoch(
        self, model: nn.Module, optimizer: Optimizer, run: Run, history: list[Epoch]
    ) -> nn.Module | None:
        """Begin the next stage, if this one is over."""
        stages = _stages(run.options)
        stage = _stage(model, run.options)
        if stage + 1 == len(stages):
            return None
        now = history[-1].trainable_parameters
        own = [row.val_loss for row in history if row.trainable_parameters == now]
        waited = len(own) - 1 - own.index(min(own))
        share = math.ceil(run.training.epochs * (stage + 1) / len(stages))
        if waited < run.options.get("plateau", 2) and len(history) < share:
            return None
        rules = _rules(run.options, stages[stage + 1])
        for name, layer in _layers(model).items():
            larger = grow(layer, _factors(rules, name, layer))
            carry_over(optimizer, layer, larger)
            model = exchange(model, {id(layer): larger})
        return model

    def ready(self, model: nn.Module, optimizer: Optimizer, run: Run, last: bool) -> bool:
        """Return whether the last stage is reached, which is what was asked for."""
        return _stage(model, run.options) + 1 == len(_stages(run.options))

    def diagnose(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Count the coefficients of the current stage."""
        return {"trainable_parameters": self.counts(model)["trainable_parameters"]}

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return rates far above 1e-3, for coefficients begin at 1, whatever they multiply."""
        return (0.01, 0.03, 0.1)


def _layers(model: nn.Module) -> dict[str, ProductOfSums]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ProductOfSums)}


def _stages(options: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the values of p, one after the other; only None if nothing is called p."""
    if "stages" not in options:
        if "plateau" in options:
            raise SubspanError("--plateau ends a stage: give --stages, too")
        return (_number(options["p"]) if "p" in options else None,)
    if "p" in options:
        raise SubspanError("give --p, or --stages, which begin with it, not both")
    plateau = options.get("plateau", 1)
    if plateau < 1:
        raise SubspanError(f"plateau must be at least 1 epoch, got {plateau}")
    stages = tuple(map(_number, split(options["stages"], "stages")))
    for before, after in itertools.pairwise(stages):
        if after <= before:
            raise SubspanError(f"stages must grow, got {after} atoms after {before}")
    return stages


def _stage(model: nn.Module, options: Mapping[str, Any]) -> int:
    """Find the stage that a model is in: its layers know their factors."""
    layers = _layers(model)
    for stage, p in enumerate(stages := _stages(options)):
        rules = _rules(options, p)
        if all(m.recipe["factors"] == _factors(rules, name, m) for name, m in layers.items()):
            return stage
    return len(stages) - 1


def _factors(rules: Mapping[str, Rule], name: str, layer: ProductOfSums) -> list[dict[str, Any]]:
    """Return the factors of a layer."""
    found = next(rule for pattern, rule in rules.items() if matches(pattern, name))
    return found(*layer.shape) if callable(found) else found


def _rules(options: Mapping[str, Any], p: int | None) -> dict[str, Rule]:
    """Return factors, or functions that make them, by patterns of layers."""
    rules = options.get("factors")
    if rules is None:
        if p is None:
            raise SubspanError(
                "method 'prodsum' needs --p, the number of atoms of each layer, --stages or "
                "--factors"
            )
        return {".*": [{"kind": options.get("atoms", "hash"), "p": p}]}
    if "atoms" in options:
        raise SubspanError("give --atoms, which all layers get, or --factors, not both")
    parts = [
        part for rule in rules.values() for part in ([rule] if isinstance(rule, dict) else rule)
    ]
    if "stages" in options and not any(isinstance(f, dict) and "p" in f.values() for f in parts):
        raise SubspanError("no factor says p, as in p: p, so that --stages change nothing")
    return {
        pattern: _recipe(_filled(rule, p))
        if isinstance(rule, dict)
        else [_filled(parse_factor(factor), p) for factor in rule]
        for pattern, rule in rules.items()
    }


def _recipe(rule: Mapping[str, Any]) -> Callable[[int, int], list[dict[str, Any]]]:
    if not isinstance(rule.get("recipe"), str):
        raise SubspanError(
            "factors of a layer are a list, or a recipe as {recipe: low_rank, rank: 4}, got "
            f"{rule}"
        )
    return recipes.recipe(rule["recipe"], **{k: v for k, v in rule.items() if k != "recipe"})


def _number(p: Any) -> int:
    try:
        return int(p)
    except ValueError:
        raise SubspanError(f"p must be a number of atoms, got {p!r}") from None


def _filled(written: dict[str, Any], p: int | None) -> dict[str, Any]:
    """Put a number in the place of its word, in atoms (p: p) or inner: p, for example."""
    if "p" not in written.values():
        return written
    if p is None:
        raise SubspanError(f"a factor says p, but no --p or --stages is given: {written}")
    return {key: p if value == "p" else value for key, value in written.items()}


ProductsOfSums("prodsum", "layers that are products of sums of fixed matrices (Wu 2018)")
