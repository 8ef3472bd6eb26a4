"""Wrapping a network: which of its weights are trained, and through which projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from subspan import families
from subspan.errors import SubspanError, unknown
from subspan.subspace import parameters
from subspan.subspace.adapted import find_adapters
from subspan.subspace.blocks import digest_layout
from subspan.subspace.compartments import listed, partition, select
from subspan.subspace.dtensors import refuse_sharded
from subspan.subspace.handle import Handle
from subspan.subspace.links import LINK, check_network
from subspan.subspace.quantised import QuantisedTensor
from subspan.subspace.quantised_layers import find_foreign, refuse_converted
from subspan.subspace.targets import Presets
from subspan.subspace.weights import Weights


def prepare(
    net: nn.Module, recipe: Mapping[str, Any], padding: str, options: dict[str, Any]
) -> Weights:
    """Find out what is trained, and through which projections; the network is left as it is.

    The recipe has the other arguments of :class:`~subspan.subspace.model.SubspaceModel` by name,
    whose refusals these are.
    """
    if padding not in ("keep", "train"):
        raise unknown("padding", padding, ("keep", "train"))
    check_ordinary(net)
    refuse_sharded(net)
    patterns = {name: listed(recipe[name]) for name in ("targets", "exclude", "train_fully")}
    dim, rules, seed = recipe["dim"], recipe["compartments"], recipe["seed"]
    places = parameters.find_slots(net)
    names = parameters.find_aliases(places)
    tensors = {name: net.get_parameter(name) for name in names}
    packed, foreign = parameters.find_quantised(net, places), find_foreign(net)
    shapes = {name: packed.get(name, tensor).shape for name, tensor in tensors.items()}
    presets = Presets(net, parameters.with_foreign(names, foreign), shapes)
    fully = select(names, patterns["train_fully"], "train_fully", presets=presets)
    chosen = patterns["targets"], patterns["exclude"]
    sizes = parameters.select_trainable(tensors, names, *chosen, fully, packed, foreign, presets)
    parameters.check_trainable(net, places, set(sizes), fully, packed)
    for name in (name for name in sizes if name in packed):
        refuse_converted(net, name, packed[name])
    parts = partition(sizes, names, dim, rules, recipe["allocation"], presets)
    family = recipe["projection"]
    projections = tuple(
        families.projection(
            family, out_dim=part.weights, in_dim=part.dim, seed=seed, stream=k, **options
        )
        for k, part in enumerate(parts)
    )
    base: dict[str, Tensor | QuantisedTensor] = {
        name: packed.get(name, tensor) for name, tensor in tensors.items() if name not in fully
    }
    inside = [slot for slot in places if slot.tensor in sizes]
    kept = parameters.find_padding(net, inside) if padding == "keep" else {}
    adapters = find_adapters(net)
    # Readers of these get W + s B A; quantised ones stay as their library has made them.
    inside += [slot for slot in places if slot.tensor in adapters and slot.tensor not in packed]
    own = options | ({"padding": "keep"} if kept else {})
    scalings = {adapter.scaling for adapter in adapters.values()}  # one for all
    # Of the room above, for θ₀ + P w may be coefficients, which mean nothing without these.
    fixed = {
        name: made
        for name, module in net.named_modules()
        if (made := getattr(module, "fixed_matrices", None)) is not None
    }
    meaning = own | ({"scaling": scalings.pop()} if scalings else {})
    meaning |= {"fixed_matrices": fixed} if fixed else {}
    # Pairs keep their order as JSON: the first that matches counts.
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    as_json = {
        "dim": list(dim) if isinstance(dim, Sequence) else dim,
        "compartments": rules if isinstance(rules, str) else [list(pair) for pair in pairs],
    }
    digest = parameters.digest_tensors({**base, **parameters.saved_buffers(net)})
    return Weights(
        root=net,
        compartments=parts,
        projections=projections,
        slots=inside,
        requires_grad={name: tensor.requires_grad for name, tensor in tensors.items()},
        fully=sorted(fully),
        kept=kept,
        fingerprint=digest + digest_layout(parts, family, seed, meaning),
        packed={name: weight.kind for name, weight in packed.items()},
        adapters=adapters,
        meaning=meaning,
        recipe={**own, **recipe, **patterns, **as_json},
    )


def check_ordinary(net: Any) -> None:
    """Refuse what is no network, or has a part that is in a subspace already."""
    if isinstance(net, Handle):
        raise SubspanError("the network is a SubspaceModel already: merge or unwrap it first")
    check_network(net)
    for name, module in net.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise SubspanError(
                f"{name or 'the network'} is what DistributedDataParallel has made of one, which "
                "would not average the gradients of coordinates: wrap the network first, and then "
                "DistributedDataParallel(model)"
            )
        if isinstance(module, Handle) or LINK in vars(module):
            raise SubspanError(
                f"{name or 'the network'} is in a subspace already: merge or unwrap that "
                "SubspaceModel first"
            )
    if "_orig_mod" in net._modules:
        raise SubspanError(
            "the network is what torch.compile has made of one, which has no parameters of its "
            "own: wrap the network first, and then torch.compile(model)"
        )
