"""Parameters as an optimizer is given them: names, and what can be moved along random vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

from torch import Tensor

from subspan.errors import SubspanError
from subspan.layers.factors import Factor
from subspan.subspace.computed import Computed
from subspan.subspace.dtensors import is_shard


def named_tensors(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """Return the parameters of every group by name; by running numbers where they have none."""
    named: list[dict[str, Tensor]] = []
    number = 0
    for group in groups:
        names = group.get("param_names") or [str(number + i) for i in range(len(group["params"]))]
        number += len(names)
        named.append(dict(zip(names, group["params"], strict=True)))
    names = [name for group in named for name in group]
    if len(set(names)) < len(names):  # of two networks
        return [{f"{n}/{name}": t for name, t in g.items()} for n, g in enumerate(named)]
    return named


def named_pairs(given: Any) -> list[tuple[str, Tensor]]:
    """Return parameters that DLRT is given later, which are no factors, in pairs with names."""
    params = [given] if isinstance(given, Tensor) else list(given)
    pairs = [p if isinstance(p, tuple) else (str(number), p) for number, p in enumerate(params)]
    if any(isinstance(p, Factor) for _, p in pairs):
        raise SubspanError(
            "a factored layer cannot be added later, for U, S and V do not move alone: make a new "
            "optimizer when all that is to be trained requires a gradient"
        )
    return pairs


def leave_frozen(group: dict[str, Any], number: int) -> list[tuple[str, Tensor]]:
    """Keep in a group only the tensors that require a gradient, one at least, and their names.

    The others are returned, with what errors call them.
    """
    trained = [tensor.requires_grad for tensor in group["params"]]
    name = "{}" if "param_names" in group else f"parameter {{}} of group {number}"
    named = named_tensors([group])[0].items()
    frozen = [(name.format(own), tensor) for own, tensor in named if not tensor.requires_grad]
    if not any(trained):
        raise SubspanError(
            f"there is nothing to train in group {number} of the parameters: no tensor in it "
            "requires a gradient"
        )
    for key in {"params", "param_names"} & set(group):
        group[key] = list(compress(group[key], trained))
    return frozen


def refuse_unfrozen(
    left_out: Sequence[tuple[str, Tensor]], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a step that would leave out what was frozen at first and is to be trained by now."""
    unfrozen = [(name, tensor) for name, tensor in left_out if tensor.requires_grad]
    given = {id(p) for group in groups for p in group["params"]} if unfrozen else set()
    for name, tensor in unfrozen:
        if id(tensor) not in given:
            raise SubspanError(
                f"{name} was frozen when the optimizer was made and has been unfrozen since, but "
                "no step would move it: make a new optimizer, or freeze it again"
            )


def refuse_untouchable(params: Sequence[Any]) -> None:
    """Refuse tensors that no step can move, alone or in pairs with a name."""
    for given in params:
        tensor = given[-1] if isinstance(given, tuple) and given else given
        if is_shard(tensor):
            raise SubspanError(
                f"a parameter of shape {list(tensor.shape)} is spread over processes, and a step "
                "needs it whole: give DistributedDataParallel or workers= the whole network, or "
                "train it with fully_shard in a SubspaceModel"
            )
        if isinstance(tensor, Computed):
            raise SubspanError(
                f"{tensor.weight_name} is computed from coordinates: give the coordinates, which "
                "are among parameters() of the SubspaceModel"
            )


def refuse_immovable(name: str, tensor: Tensor) -> None:
    """Refuse a tensor to which P c cannot be added."""
    if not tensor.is_floating_point():
        raise SubspanError(f"{name} is {tensor.dtype} and P c is real: leave it out")
    if tensor.dtype.itemsize < 2:
        raise SubspanError(
            f"{name} is {tensor.dtype}, in which PyTorch adds nothing up: leave it out, or convert "
            "it before"
        )
    if _overlaps(tensor):
        raise SubspanError(
            f"entries of {name} share memory (it is expanded), and cannot move on their own: give "
            "the tensor that it was expanded from, or a clone() of it"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Return whether two entries may lie in one place, as those of an expanded tensor do."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False
