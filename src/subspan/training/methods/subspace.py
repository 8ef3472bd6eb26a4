"""Fixed random subspaces, θ = θ₀ + P w (Li 2018, Minut 2023): a method per family of P."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor, nn
from torch.optim import Optimizer

from subspan.errors import SubspanError
from subspan.families import Projection, projections
from subspan.families.hash import Hash
from subspan.optim.quantiser import Quantiser, all_fixed, quantiser_of
from subspan.subspace.model import SubspaceModel
from subspan.training.config import Run
from subspan.training.methods import RATE_OF_HEAD, TRAIN_FULLY, Method, Option

QUANTISED = 0.5  # of the steps, the last ones, are those in which coordinates are rounded
PATTERNS = str | list[str] | None

COMMON = (
    Option("dim", int | str, "d, the coordinates in all; or 600+250: those of each compartment"),
    Option(
        "compartments",
        str | dict[str, int],
        "global | layer | tensor | uniform:k, or {pattern: dimension}",
    ),
    Option("allocation", str, "how d is divided: by the sqrt of compartments' sizes, equal, size"),
    Option("targets", PATTERNS, "parameters to train, as fc1 or [fc1,fc2]; the others keep θ₀"),
    Option("exclude", PATTERNS, "parameters that keep θ₀, likewise"),
    TRAIN_FULLY,
    RATE_OF_HEAD,
    Option(
        "bits",
        float,
        "the bits that a coordinate takes on average, as 2 or 2.5: they are rounded in the last "
        f"{QUANTISED:.0%} of the steps, and model.subspan is a file of so many",
    ),
)

# Minut's matrices that are kept, as methods of their own, so that a sweep may hold several of them
# against what is generated: a full one of signs, sparse ones of ⌈D/√d⌉ nonzeros in every column.
STORED = {
    "stored-dense": {"of": "rademacher", "layout": "dense"},
    "stored-coo": {"of": "sparse2full", "layout": "coo"},
    "stored-csr": {"of": "sparse2full", "layout": "csr"},
    "stored-csc": {"of": "sparse2full", "layout": "csc"},
}


class Subspace(Method):
    """A :class:`SubspaceModel` with one family of projections, some of whose options may be set."""

    axis = "dim"

    def __init__(self, family: type[Projection], name: str = "", **preset: Any) -> None:
        first_line = (family.__doc__ or "").partition("\n")[0]
        plain = re.sub(r":\w+:|`", "", first_line)  # a terminal shows no markup
        if preset:
            plain = "a stored matrix " + ", ".join(
                f"{key} {value}" for key, value in preset.items()
            )
        super().__init__(name or family.family, f"θ₀ + P w: {plain}")
        self.preset = {"projection": family.family} | preset
        self.options = COMMON + tuple(o for o in options_of(family) if o.name not in preset)

    def wrap(self, net: nn.Module, seed: int, options: Mapping[str, Any]) -> SubspaceModel:
        """Put the network into the subspace."""
        dims = parse_dims(self.name, options)
        own = ("dim", "head_lr", "bits")
        given = {key: value for key, value in options.items() if key not in own}
        return SubspaceModel(net, dims, seed=seed, **self.preset, **given)

    def optimizer(
        self, model: nn.Module, run: Run, out: Path, extra: Mapping[str, Any], **rest: Any
    ) -> Optimizer:
        """Return the optimizer; it rounds coordinates if they are to have so many bits."""
        optimizer = super().optimizer(model, run, out, extra, **rest)
        if (bits := self.bits(run.options)) is not None:
            assert isinstance(model, SubspaceModel)
            if run.training.patience is not None:
                raise SubspanError(
                    "--bits rounds coordinates until the last step: leave --patience out"
                )
            steps = math.ceil(QUANTISED * rest["steps"])
            Quantiser(model, optimizer, bits, steps, after=rest["steps"] - steps)
        return optimizer

    def step(
        self, optimizer: Optimizer, loss: Callable[[], Tensor], backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Make one step; one that fp16's scaler leaves out is counted by the quantiser, too."""
        value = super().step(optimizer, loss, backward)
        skipped = getattr(optimizer, "step_was_skipped", False)
        if skipped and (quantiser := quantiser_of(optimizer)) is not None:
            quantiser.skipped()
        return value

    def bits(self, options: Mapping[str, Any]) -> float | None:
        """Return the bits that a coordinate may take in a compact file."""
        return options.get("bits")

    def ready(self, model: nn.Module, optimizer: Optimizer, run: Run, last: bool) -> bool:
        """Return whether all coordinates are rounded, if they are to be."""
        return self.bits(run.options) is None or all_fixed(optimizer)

    def head(self, model: nn.Module, options: Mapping[str, Any]) -> list[nn.Parameter]:
        """Return what is trained fully."""
        assert isinstance(model, SubspaceModel)
        return list(model.fully_trained().values())

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return rates around 3/√d, or 2/√d for fine-tuning, so that steps have one length.

        Adam's first steps change every coordinate by lr and θ, with columns of norm 1, by lr·√d.
        Whoever says what of a network is trained fully fine-tunes a pretrained one, which is near
        its goal.
        """
        dims = parse_dims(self.name, options) or list(options["compartments"].values())
        d = dims if isinstance(dims, int) else sum(dims)
        lengths = (1, 2, 4) if "train_fully" in options else (1, 3, 9)
        return tuple(float(f"{length / math.sqrt(max(d, 1)):.2g}") for length in lengths)


def options_of(family: type[Projection]) -> list[Option]:
    """Make options of a family's own arguments, each explained as in the family's docstring."""
    kinds, shared = get_type_hints(family), {field.name for field in fields(Projection)}
    return [
        Option(field.name, kinds[field.name], _said_of(field.name, family))
        for field in fields(family)
        if field.init and field.name not in shared
    ]


def _said_of(argument: str, family: type) -> str:
    """Find the help of an argument in the "Args:" of a class, or of one that it derives from."""
    for cls in family.__mro__:
        pattern = rf"^ *{argument}: (.*?)(?=\n\n|\n *\w+: |\Z)"
        if found := re.search(pattern, cls.__doc__ or "", re.DOTALL | re.MULTILINE):
            return " ".join(found[1].split()).rstrip(".")
    return f"of {family.family}"  # type: ignore[attr-defined]


def parse_dims(name: str, options: Mapping[str, Any]) -> int | list[int] | None:
    """Parse the option ``dim``: 750 → 750, "600+250" → [600, 250]; None if rules give it."""
    if "dim" not in options:
        if isinstance(options.get("compartments"), Mapping):
            return None
        raise SubspanError(f"method {name!r} needs --dim, the number of coordinates")
    text = str(options["dim"])
    try:
        dims = [int(part) for part in text.split("+")]
    except ValueError:
        dims = []
    if not dims or min(dims) < 1:
        raise SubspanError(
            "dim must be a positive integer, or a sum such as 600+250 of those of the "
            f"compartments, got {options['dim']!r}"
        )
    return dims if "+" in text else dims[0]


def add_families() -> None:
    """Make a method of every family that has none; those of a notebook come at any time."""
    for name, family in projections().items():
        if family is not Hash and name not in _of_families:
            _of_families[name] = Subspace(family)


_of_families: dict[str, Subspace] = {}
add_families()
for _name, _preset in STORED.items():
    Subspace(projections()["stored"], _name, **_preset)
