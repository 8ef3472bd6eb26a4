"""The laws of every layer of fewer numbers. A law is a function of one case.

A :class:`Case` says how a network with the layer is made, and what its ordinary counterpart is.
tests/layers/test_laws.py enrols every layer by one row; a layer of somebody else is held to them by

    for law in (*layer_laws.LAWS, *layer_laws.COSTLY):
        law(Case(...))

``COSTLY`` laws see the layer as a whole and not its kind of atoms.
"""

from __future__ import annotations

import copy
import math
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import subspan
from subspan import SubspaceModel, SubspanError, checkpoint
from subspan.layers import merge
from tests.nets import scatter

Law = Callable[["Case"], None]
LAWS: list[Law] = []
COSTLY: list[Law] = []

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
Weights = Mapping[str, Tensor]


class Net(nn.Module):
    """A network of one layer, in the way that networks hold and call layers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@dataclass(frozen=True)
class Case:
    """A layer, inside a network of which it is ``net.layer``.

    Args:
        name: for people.
        host: makes the ordinary network in whose place of ``layer`` it comes; of a layer that takes
            no other one's place, the network that has it already.
        into: puts it there; None of a layer that takes no other one's place.
        sample: the shape of one input.
        weights: parameters of the counterpart as functions of the layer's, by name in ``layer``.
        reference: makes the counterpart; by default :func:`subspan.layers.merge` does.
        shapes: what may stand before the shape of a sample, besides a batch.
        own: attributes of the layer that a call may change, since they only save time.
    """

    name: str
    host: Callable[[], nn.Module]
    into: Callable[[nn.Module], nn.Module] | None
    sample: tuple[int, ...]
    weights: Callable[[Any], dict[str, Tensor | None]]
    reference: Callable[[Any], nn.Module] | None = None
    shapes: tuple[tuple[int, ...], ...] = ((), (1,), (0,))
    own: tuple[str, ...] = ("_plans",)

    def net(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """A network with the layer, in training mode, with values that a training could have."""
        torch.manual_seed(seed)
        net = self.host()
        net = net if self.into is None else self.into(net)
        scatter(net, 0.5 + seed)
        return net.to(dtype)

    def dense(self, net: nn.Module) -> nn.Module:
        """The same network with the ordinary layer."""
        net = copy.deepcopy(net)
        if self.reference is None:
            return merge(net)
        net.layer = self.reference(net.layer)
        return net

    def x(self, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (4,)) -> Tensor:
        """Inputs, the same ones in every precision."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(*shape, *self.sample, generator=generator, dtype=torch.float64).to(dtype)

    def of_weights(self, net: Any) -> dict[str, Tensor]:
        """The counterpart's parameters as functions of the layer's."""
        found = self.weights(net.layer)
        return {f"layer.{name}": tensor for name, tensor in found.items() if tensor is not None}


def law(function: Law) -> Law:
    """Enrol a law that holds for every kind of atoms."""
    LAWS.append(function)
    return function


def costly(function: Law) -> Law:
    """Enrol a law that is run once for every class and way of a layer."""
    COSTLY.append(function)
    return function


def assert_near(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Whether shapes and types agree, and numbers do in terms of the greatest of them."""
    assert_all_near([found], [expected], tolerance)


def assert_all_near(
    found: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float | None = None
) -> None:
    """The same of several tensors that are parts of one: some may be zero but for rounding."""
    found, expected = list(found), list(expected)
    sizes = [float(t.detach().abs().max()) for t in expected if t.numel()]
    assert all(map(math.isfinite, sizes))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        allowed = (TOLERANCES[other.dtype] if tolerance is None else tolerance) * max(
            sizes, default=0
        )
        assert bool(((one.detach().double() - other.detach().double()).abs() <= allowed).all())


def loss_of(y: Tensor) -> Tensor:
    """A smooth function with a different slope at every output."""
    slopes = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return (y.sin() * slopes).sum()


def parameters(net: nn.Module) -> dict[str, Tensor]:
    """Values by name, as ``torch.func`` takes them."""
    return {name: p.detach().as_subclass(Tensor) for name, p in net.named_parameters()}


def gradients(y: Tensor, net: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the gradients of a loss in the input and all parameters of a network."""
    return list(torch.autograd.grad(loss_of(y), [x, *net.parameters()], allow_unused=True))


# ---- the layer is its ordinary counterpart -------------------------------------------------------


@law
def outputs_are_those_of_the_ordinary_layer(case: Case) -> None:
    """In both precisions."""
    for dtype in (torch.float64, torch.float32):
        net, x = case.net(dtype), case.x(dtype)
        assert_near(net(x), case.dense(net)(x))


@law
def the_weight_is_that_of_the_ordinary_layer(case: Case) -> None:
    """Every parameter, in its shape, as a function of the layer's parameters."""
    net = case.net()
    own, expected = case.of_weights(net), dict(case.dense(net).named_parameters())
    assert own.keys() == expected.keys()
    for name, tensor in own.items():
        assert_near(tensor, expected[name])
        assert tensor.requires_grad


@law
def gradients_are_pulled_back_through_the_weight(case: Case) -> None:
    """By autograd from the ordinary layer's, of the input and all parameters; second ones, too."""
    net, x = case.net(), case.x().requires_grad_()
    dense = case.dense(net)
    found = gradients(net(x), net, x)
    y = functional_call(dense, case.of_weights(net), (x,))
    expected = gradients(y, net, x)
    assert_all_near(found, expected)

    def penalised(y: Tensor) -> list[Tensor]:
        inner = [x, *net.parameters()]
        first = torch.autograd.grad(loss_of(y), inner, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inner))  # type: ignore[arg-type]

    y = functional_call(dense, case.of_weights(net), (x,))
    assert_all_near(penalised(net(x)), penalised(y), 1e-9)


@law
def inputs_of_every_shape_are_taken(case: Case) -> None:
    """Inputs that the ordinary layer takes: without a batch, none at all, more dimensions."""
    net = case.net()
    dense = case.dense(net)
    for shape in case.shapes:
        x = case.x(shape=shape)
        y, expected = net(x), dense(x)
        assert_near(y, expected)
        loss_of(y).backward()


@law
def inputs_of_another_size_are_refused(case: Case) -> None:
    """Nothing is cut off, filled up or spread."""
    net = case.net()
    at = {1: -1, 2: -1, 3: -3}[len(case.sample)]  # features or channels
    for size in (case.sample[at] + 1, case.sample[at] - 1, 1):
        if size == case.sample[at] or size < 1:
            continue
        shape = list(case.sample)
        shape[at] = size
        with pytest.raises((SubspanError, RuntimeError, AssertionError)):
            net(torch.ones(2, *shape, dtype=torch.float64))


@law
def strides_do_not_matter(case: Case) -> None:
    """Neither those of the input nor a memory format; the output lies as the ordinary one's."""
    net, x = case.net(), case.x()
    y, dense = net(x), case.dense(net)
    before = x.clone()
    inputs = [x.new_zeros(*x.shape, 2).copy_(x.unsqueeze(-1).expand(*x.shape, 2))[..., 1]]
    if x.dim() == 4:
        inputs.append(x.contiguous(memory_format=torch.channels_last))
    for other in (x, *inputs):
        assert_near(net(other), y)
        for layout in (torch.contiguous_format, torch.channels_last)[: x.dim() - 2]:
            expected = dense(other).is_contiguous(memory_format=layout)
            assert net(other).is_contiguous(memory_format=layout) or not expected
    assert torch.equal(x, before)


# ---- precisions and devices ----------------------------------------------------------------------


@law
def a_precision_is_that_of_the_parameters(case: Case) -> None:
    """The layer can be moved to any, there and back, and computes about the same."""
    exact = case.net(torch.float32)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        net = copy.deepcopy(exact).to(dtype)
        x = case.x(dtype).requires_grad_()
        y = net(x)
        assert y.dtype == dtype
        expected = exact(x.detach().float()).to(dtype)
        assert_near(y, expected, max(TOLERANCES[dtype], 2e-6))
        loss_of(y).backward()
        for p in (x, *net.parameters()):
            assert p.grad is None or p.grad.dtype == dtype
        back = net.to(torch.float32)  # nothing that the parameters do not hold has been rounded
        back.load_state_dict(exact.state_dict())
        x = case.x(torch.float32)
        assert torch.equal(back(x), exact(x))


@law
def autocast_gives_the_type_that_it_gives_ordinary_layers(case: Case) -> None:
    """16 bits of float32, and float64 stays; gradients have the parameters' type."""
    for dtype in (torch.float32, torch.float64):
        net, x = case.net(dtype), case.x(dtype)
        dense, exact = case.dense(net), net(x)
        for half in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", half):
                y = net(x)
                assert y.dtype == (half if dtype == torch.float32 else dtype)
                if case.reference is None:
                    assert y.dtype == dense(x).dtype
                loss = loss_of(y.to(dtype))
            assert_near(y.to(dtype), exact, TOLERANCES[half])
            for p, g in zip(
                net.parameters(), torch.autograd.grad(loss, [*net.parameters()]), strict=True
            ):
                assert g.dtype == p.dtype
                assert g.isfinite().all()


@law
def autocast_rounds_no_weight(case: Case) -> None:
    """Weights that are read, and an ordinary layer made, have the precision of the parameters."""
    net = case.net(torch.float32)
    own, dense = case.of_weights(net), case.dense(net)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(case.of_weights(net), own, rtol=0, atol=0)
        found = case.dense(net).state_dict()
    torch.testing.assert_close(found, dense.state_dict(), rtol=0, atol=0)


@law
def a_network_made_without_values_is_filled_from_a_state(case: Case) -> None:
    """A layer that leaves the meta device makes again whatever no state holds."""
    net, x = case.net(torch.float32), case.x(torch.float32)
    empty = copy.deepcopy(net).to("meta")
    assert empty(x.to("meta")).is_meta
    assigned, moved = copy.deepcopy(empty), copy.deepcopy(empty)
    for filled in (empty, copy.deepcopy(net)):  # of the other one the memory is new
        filled.to_empty(device="cpu").load_state_dict(net.state_dict())
        assert torch.equal(filled(x), net(x))
    for other in (assigned, moved):
        other.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(assigned(x), net(x))
    assert torch.equal(moved.double()(x.double()), copy.deepcopy(net).double()(x.double()))


# ---- copies and files ----------------------------------------------------------------------------


@law
def copies_are_equal_and_independent(case: Case) -> None:
    """By ``deepcopy`` and by ``pickle``, before and after a call."""
    net, x = case.net(), case.x()
    for copied in (copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))):
        twin = copied(net)
        y = net(x)
        assert torch.equal(twin(x), y)
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(1)
        assert not torch.equal(twin(x), y)
        assert torch.equal(net(x), y)
        assert torch.equal(copied(net)(x), y)


@law
def a_state_is_all_that_a_fresh_layer_needs(case: Case) -> None:
    """``state_dict`` of one into another of the same arguments, which had other values."""
    net, x = case.net(), case.x()
    fresh = case.net(seed=1)
    assert not torch.equal(fresh(x), net(x))
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))
    assert torch.equal(case.dense(fresh)(x), case.dense(net)(x))


@law
def a_state_of_the_ordinary_layer_is_refused(case: Case) -> None:
    """With ``strict=False`` PyTorch would leave it out without a word."""
    if case.into is None:
        return
    net = case.net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(SubspanError, match=r"weight of this state_dict is that of an ordinary"):
        net.load_state_dict(case.host().state_dict(), strict=False)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@law
def a_file_holds_what_is_counted(case: Case) -> None:
    """A file has as many numbers as ``count`` says, and they are the same bits when loaded."""
    net, x = case.net(torch.float32), case.x(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        subspan.save(net, path)
        _, tensors = checkpoint.read(path)
        counts = subspan.count(net)
        assert counts.stored == sum(t.numel() for t in tensors.values())
        if case.reference is None:
            assert counts.dense == sum(p.numel() for p in case.dense(net).parameters())
        torch.manual_seed(5)
        back = subspan.load(path, case.host())
    assert [*back.state_dict()] == [*net.state_dict()]
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name])
    assert_near(back(x), net(x))


# ---- a module like any other ---------------------------------------------------------------------


@law
def a_call_changes_nothing(case: Case) -> None:
    """Neither parameters, buffers, attributes nor the random numbers' generator."""
    net, x = case.net(), case.x()

    def seen() -> Iterator[Any]:
        yield {n: t.detach().clone() for n, t in (*net.named_parameters(), *net.named_buffers())}
        for module in net.modules():
            yield {
                name: value
                for name, value in vars(module).items()
                if name not in case.own and not name.startswith(("_parameters", "_buffers"))
            }
        yield torch.get_rng_state()

    before = [*seen()]
    loss_of(net(x)).backward()
    after = [*seen()]
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name])
    for one, other in zip(before[1:-1], after[1:-1], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, int | float | str | bool | tuple | type(None)):
                assert value == other[name], name
    assert torch.equal(before[-1], after[-1])


@costly
def what_is_frozen_stays_frozen(case: Case) -> None:
    """By what takes an ordinary layer's place, in copies and precisions, and in what merges."""
    host = case.host().requires_grad_(False)
    net = host if case.into is None else case.into(host)
    for twin in (net, copy.deepcopy(net), copy.deepcopy(net).double(), case.dense(net)):
        assert [*twin.parameters()]
        assert not any(p.requires_grad for p in twin.parameters())
    x = case.x(torch.float32).requires_grad_()
    before = {name: p.clone() for name, p in net.named_parameters()}
    net(x).sum().backward()
    assert x.grad is not None
    for name, p in net.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])


@law
def transforms_of_functions_are_right(case: Case) -> None:
    """``torch.func``: derivatives in both directions, of one sample and of many, and ensembles."""
    net, x = case.net(), case.x()
    values, y = parameters(net), net(x)

    def run(values: Weights, x: Tensor) -> Tensor:
        out: Tensor = functional_call(net, dict(values), (x,))
        return out

    def loss(values: Weights, one: Tensor) -> Tensor:
        return loss_of(run(values, one.unsqueeze(0)))

    assert_near(run(values, x), y)
    expected = torch.autograd.grad(loss_of(y), [*net.parameters()])
    assert_all_near(grad(lambda v: loss_of(run(v, x)))(values).values(), expected)
    assert_near(vmap(lambda one: run(values, one.unsqueeze(0)).squeeze(0))(x), y)
    with warnings.catch_warnings():  # a rule that PyTorch lacks, and is slow without
        warnings.filterwarnings("ignore", "There is a performance drop")
        each = vmap(grad(loss), in_dims=(None, 0))(values, x)
    for i, one in enumerate(x):
        assert_all_near([g[i] for g in each.values()], grad(loss)(values, one).values())
    twice = {name: torch.stack([v, 2 * v]) for name, v in values.items()}
    both = vmap(run, in_dims=(0, None))(twice, x)
    for i in range(2):
        assert_near(both[i], run({name: v[i] for name, v in twice.items()}, x))
    direction = {name: torch.randn_like(v) for name, v in values.items()}
    with warnings.catch_warnings():  # of what PyTorch imports for it
        warnings.simplefilter("ignore", DeprecationWarning)
        _, forwards = jvp(lambda v: run(v, x), (values,), (direction,))
    _, backwards = torch.autograd.functional.jvp(  # by two backward passes
        lambda *v: run(dict(zip(values, v, strict=True)), x),
        tuple(values.values()),
        tuple(direction.values()),
    )
    assert_near(forwards, backwards)


@law
def a_subspace_begins_where_the_layer_is(case: Case) -> None:
    """Inside a SubspaceModel it computes the same, and all coordinates get the right gradient."""
    net, x = case.net(), case.x()
    y = net(x)
    expected = torch.autograd.grad(loss_of(y), [*net.parameters()])
    model = SubspaceModel(net, 3, projection="gaussian")
    assert_near(model(x), y)
    loss_of(model(x)).backward()
    flat = torch.cat([g.flatten() for g in expected])
    (part,) = model.compartments
    (w,) = model.coordinates.values()
    P = subspan.projection(
        "gaussian", out_dim=part.weights, in_dim=part.dim, seed=model.recipe["seed"]
    ).dense()
    assert w.grad is not None
    assert_near(w.grad.double(), flat @ P, 1e-5)


# ---- taking another layer's place ----------------------------------------------------------------


def nothing(*_: Any) -> None:
    """Do nothing, as a hook of any kind may."""


def everything(net: nn.Module) -> tuple[Any, ...]:
    """Which modules, parameters and hooks a network has, with copies of all values."""
    modules = [(name, id(module)) for name, module in net.named_modules()]
    tensors = [(name, id(p), p.requires_grad) for name, p in net.named_parameters()]
    state = {name: t.clone() for name, t in net.state_dict().items()}
    return modules, tensors, [sorted(vars(m)) for m in net.modules()], state


def assert_untouched(net: nn.Module, before: tuple[Any, ...]) -> None:
    """Whether a network is as it was, with the same objects and values."""
    after = everything(net)
    assert after[:3] == before[:3]
    assert after[3].keys() == before[3].keys()
    assert all(torch.equal(t, before[3][name]) for name, t in after[3].items())


@costly
def hooks_and_attributes_move_with_the_layer(case: Case) -> None:
    """There and back, with their flags; a handle removes a hook from wherever it has moved to."""
    if case.into is None:
        return
    net, calls = case.host().double(), []
    layer = net.layer
    assert isinstance(layer, nn.Module)

    def hook(kind: str) -> Callable[..., None]:
        return lambda module, *rest: calls.append((kind, module))

    handles = [
        layer.register_forward_pre_hook(hook("pre"), with_kwargs=True),
        layer.register_forward_hook(hook("forward"), with_kwargs=True, always_call=True),
        layer.register_full_backward_pre_hook(hook("backward pre")),
        layer.register_full_backward_hook(hook("backward")),
    ]
    layer.tag = {"who": "I"}
    layer.eval()
    kinds = ["pre", "forward", "backward pre", "backward"]
    for step in (lambda net: net, case.into, merge):
        net = step(net)
        assert net.layer.tag == {"who": "I"}
        assert not net.layer.training
        assert net.training
        calls.clear()
        net(case.x().requires_grad_()).sum().backward()
        assert sorted(kind for kind, _ in calls) == sorted(kinds)
        assert all(module is net.layer for _, module in calls)
    for handle in handles:
        handle.remove()
    calls.clear()
    net(case.x().requires_grad_()).sum().backward()
    assert not calls


@costly
def hooks_that_would_be_lost_are_refused(case: Case) -> None:
    """By name, and the network is untouched: those on a state or a weight, in both directions."""
    if case.into is None:
        return

    def on_every(net: nn.Module) -> Iterator[tuple[str, Any]]:
        layer = net.layer
        assert isinstance(layer, nn.Module)
        p = next(layer.parameters(recurse=False), None)
        yield "state_dict hook", lambda: layer.register_state_dict_post_hook(nothing)
        yield "state_dict pre-hook", lambda: layer.register_state_dict_pre_hook(nothing)
        yield "load_state_dict pre-hook", lambda: layer.register_load_state_dict_pre_hook(nothing)
        yield "load_state_dict post-hook", lambda: layer.register_load_state_dict_post_hook(nothing)
        yield "backward hook", lambda: layer.register_backward_hook(nothing)
        if p is not None:
            yield "hook on its", lambda: p.register_hook(nothing)
            yield (
                "post-accumulate-grad hook on its",
                lambda: p.register_post_accumulate_grad_hook(nothing),
            )

    for net, replace in ((case.host(), case.into), (case.net(), merge)):
        for kind, register in on_every(net):
            handle = register()
            before = everything_but_hooks(net)
            with pytest.raises(SubspanError, match=rf"^layer '.*' has a {kind}") as raised:
                replace(net)
            assert "layer" in str(raised.value)
            handle.remove()
            assert_untouched(net, before)
            if kind == "backward hook":  # a flag that PyTorch does not take back
                net.layer._is_full_backward_hook = None


def everything_but_hooks(net: nn.Module) -> tuple[Any, ...]:
    """Do as :func:`everything`, without calling the hooks of a state."""
    kept = []
    for module in net.modules():
        for registry in ("_state_dict_hooks", "_state_dict_pre_hooks"):
            kept.append((vars(module)[registry], dict(vars(module)[registry])))
            vars(module)[registry].clear()
    found = everything(net)
    for registry, content in kept:
        registry.update(content)
    return found


@costly
def names_that_the_new_layer_needs_are_refused(case: Case) -> None:
    """A user's attribute is not dropped in favour of the layer's own."""
    if case.into is None:
        return
    net = case.host()
    assert isinstance(net.layer, nn.Module)
    needed = set(dir(case.net().layer)) - set(dir(net.layer))
    name = min(name for name in needed if not name.startswith("_"))
    vars(net.layer)[name] = 3
    before = everything(net)
    with pytest.raises(SubspanError, match=f"'layer' has the attribute '{name}', a name that"):
        case.into(net)
    assert_untouched(net, before)


# ---- compilers -----------------------------------------------------------------------------------


@costly
def compilers_take_it_in_one_graph(case: Case) -> None:
    """With the same output and gradients."""
    torch.compiler.reset()
    net, x = case.net(torch.float32), case.x(torch.float32).requires_grad_()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), net(x)
    assert_near(y, expected)
    assert_all_near(gradients(y, net, x), gradients(expected, net, x), 1e-4)


@costly
def the_ordinary_layer_can_be_exported(case: Case) -> None:
    """A program that holds nothing of ours."""
    net, x = case.net(torch.float32), case.x(torch.float32)
    program = torch.export.export(case.dense(net).eval(), (x,))
    assert not any("subspan" in str(node.target) for node in program.graph.nodes)
    assert_near(program.module()(x), net.eval()(x))


@costly
def it_can_be_exported_with_any_batch(case: Case) -> None:
    """A program of the layer itself, which computes the same for a batch that it did not see."""
    net, x = case.net(torch.float32).eval(), case.x(torch.float32)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    for size in (4, 7):
        x = case.x(torch.float32, (size,))
        assert_near(program.module()(x), net(x))
