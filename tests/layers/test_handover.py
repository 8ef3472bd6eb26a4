"""Layers that cannot be replaced, and what people have put on those that can."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils import parametrizations, prune

from subspan import SubspaceModel, SubspanError, save
from subspan.layers import (
    LowRank,
    LowRankLinear,
    ProductOfSums,
    ProductOfSumsLinear,
    factorize,
    grow,
    merge,
    product_of_sums,
)
from subspan.layers.handover import used_elsewhere
from subspan.layers.rebuild import rebuild_layers
from subspan.optim import RandomBases
from tests.layer_laws import assert_untouched, everything, nothing

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
SUMS = {".*": [{"kind": "free", "inner": 2}, "free"]}
RULE = {"0": [{"kind": "rank1", "p": 4}]}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def factored(net):
    return {n for n, m in net.named_modules() if isinstance(m, LowRank | ProductOfSums)}


def by(change):
    """The network with something done to its first layer."""
    made = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PyTorch calls deprecated
        made[0] = change(made[0]) or made[0]
    return made


def weight_norm(layer):
    return nn.utils.weight_norm(layer)


def own_forward(layer):
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) * 2


def other_shape(layer):
    layer.weight = nn.Parameter(torch.randn(16, 9))


def of_inputs(layer):
    return nn.LazyLinear(16)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


OBSTACLES = {
    "weight_norm": (weight_norm, "something else computes its weight"),
    "spectral_norm": (lambda m: nn.utils.spectral_norm(m), "something else computes its weight"),
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "else computes its weight"),
    "prune bias": (lambda m: prune.l1_unstructured(m, "bias", 0.5), "else computes its bias"),
    "parametrized weight_norm": (parametrizations.weight_norm, "its class, .*Parametrized"),
    "orthogonal": (parametrizations.orthogonal, "its class, .*ParametrizedLinear"),
    "a class derived": (lambda m: Doubled(8, 16), "its class, .*Doubled, is no ordinary"),
    "lazy": (of_inputs, "its class, .*LazyLinear"),
    "on meta": (lambda m: m.to("meta"), "its weight has no values yet"),
    "a method of its own": (own_forward, "its method 'forward' was replaced"),
    "compiled": (lambda m: m.compile(backend="eager"), "it was compiled"),
    "another shape": (other_shape, r"has shape \(16, 9\), expected \(16, 8\)"),
    "complex": (lambda m: m.to(torch.complex64), "its weight is torch.complex64"),
    "sparse": (
        lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().to_sparse())),
        "its weight is no ordinary tensor",
    ),
    "a buffer": (lambda m: m.register_buffer("mask", torch.ones(2)), "it holds 'mask'"),
    "a part": (lambda m: m.add_module("lora", nn.ReLU()), "it holds 'lora'"),
    "no weight": (lambda m: m.register_parameter("weight", None), "it has no weight"),
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_a_layer_that_is_not_what_it_seems_is_refused_by_name_or_left_alone(kind):
    change, why = OBSTACLES[kind]
    broken = by(change)
    before = [id(m) for m in broken.modules()]
    for replace in (
        lambda: factorize(broken, rank=2, targets="0"),
        lambda: factorize(broken, rank=2, targets=".*"),
        lambda: product_of_sums(broken, RULE),
        lambda: rebuild_layers(broken, {LowRank: {"2": 2, "0": 2}}),
        lambda: rebuild_layers(broken, {ProductOfSums: {"0": {}}}),
    ):
        with pytest.raises(SubspanError, match=f"^layer '0' cannot be replaced, since .*{why}"):
            replace()
        assert [id(m) for m in broken.modules()] == before
    assert factored(factorize(broken, rank=2)) == {"2"}
    assert id(broken[0]) == before[1]


@pytest.mark.parametrize("change", [weight_norm, lambda m: nn.utils.spectral_norm(m)])
def test_a_stale_weight_is_never_read(change):
    made, same = by(change), by(change)
    state = {name: torch.rand_like(t) for name, t in made.state_dict().items()}
    for one in (made, same):
        one.load_state_dict(state)
    factorize(made.eval(), energy=1.0)
    torch.testing.assert_close(made(X), same.eval()(X))


@pytest.mark.parametrize("remove", [nn.utils.remove_weight_norm, prune.remove])
def test_what_is_an_ordinary_layer_again_is_replaced(remove):
    if remove is prune.remove:
        made = by(lambda m: prune.l1_unstructured(m, "weight", 0.5))
        prune.remove(made[0], "weight")
    else:
        made = by(weight_norm)
        remove(made[0])
    expected = made(X)
    assert factored(factorize(made, energy=1.0)) == {"0", "2"}
    torch.testing.assert_close(made(X), expected)


@pytest.mark.filterwarnings("ignore")  # of what PyTorch calls deprecated
@pytest.mark.parametrize("kind", ["script", "trace", "quantised"])
def test_modules_that_are_no_layers_of_ours(kind):
    made = net()
    if kind == "script":
        made[0] = torch.jit.script(made[0])
    elif kind == "trace":
        made[0] = torch.jit.trace(made[0], X)
    else:
        made[0] = torch.ao.quantization.quantize_dynamic(nn.Sequential(made[0]))[0]
    module, expected = made[0], made(X)
    with pytest.raises(SubspanError, match=r"^layer '0' in targets is a .*: expected an nn.Linear"):
        factorize(made, rank=2, targets="0")
    with pytest.raises(SubspanError, match=r"^layer '0' in targets is a"):
        product_of_sums(made, RULE)
    assert factored(factorize(made, energy=1.0)) == {"2"}
    assert made[0] is module
    torch.testing.assert_close(made(X), expected)


def test_layers_inside_a_subspace_are_left_to_it():
    made = net()
    model = SubspaceModel(made, 5)
    with torch.no_grad():
        for w in model.coordinates.values():
            w.normal_()
    expected = model(X)
    with pytest.raises(SubspanError):
        factorize(made, rank=2)
    with pytest.raises(SubspanError):
        factorize(made, rank=2, targets="0")
    assert torch.equal(model(X), expected)
    whole = product_of_sums(net(), SUMS)
    model = SubspaceModel(whole, 5)
    with torch.no_grad():
        for w in model.coordinates.values():
            w.normal_()
    expected = model(X)
    with pytest.raises(SubspanError, match=r"^layer '.*' cannot be merged"):
        merge(whole)
    assert torch.equal(model(X), expected)
    torch.testing.assert_close(merge(model.merge())(X), expected)


# ---- what something else uses, too ---------------------------------------------------------------


def tied_bias(made):
    made.append(nn.Linear(4, 4))
    made[3].bias = made[2].bias


def view(made):
    """The whole of a weight is a part of another parameter."""
    flat = nn.Parameter(torch.randn(200))
    made.register_parameter("flat", flat)
    made[2].weight = nn.Parameter(flat.detach()[10:74].view(4, 16))


def buffer(made):
    made.register_buffer("copy", made[2].weight.detach()[:2])


def in_a_list(made):
    made.mine = [made[2]]


def in_a_mapping(made):
    made.mine = {"head": (made[2].weight,)}


def unregistered(made):
    vars(made)["head"] = made[2]


def a_bound_method(made):
    made.mine = made[2].forward


def a_function_with_arguments(made):
    made.mine = functools.partial(torch.utils.checkpoint.checkpoint, made[2], use_reentrant=False)


def a_closure(made):
    layer = made[2]
    made.mine = {"head": lambda x: layer(x)}


def a_default_value(made):
    made.mine = lambda x, layer=made[2]: layer(x)


def a_default_value_by_name(made):
    made[1].register_forward_hook(lambda module, args, out, *, layer=made[2]: out + layer.bias[0])


def an_object(made):
    made.mine = SimpleNamespace(head=made[2])


def a_hook_elsewhere(made):
    layer = made[2]
    made[1].register_forward_hook(lambda module, args, out: out @ layer.weight.T @ layer.weight)


def compiled(made):
    made[2] = torch.compile(made[2], backend="eager")


@pytest.mark.parametrize(
    "share",
    [
        tied_bias,
        view,
        buffer,
        in_a_list,
        in_a_mapping,
        a_bound_method,
        a_function_with_arguments,
        a_closure,
        a_default_value,
        a_default_value_by_name,
        an_object,
        a_hook_elsewhere,
        unregistered,
        compiled,
    ],
)
def test_a_layer_that_something_else_uses_is_refused_or_left_alone(share):
    made = net()
    share(made)
    name = "2._orig_mod" if share is compiled else "2"
    before = everything(made)
    with pytest.raises(SubspanError, match=f"^layer '{name}' cannot be replaced, since"):
        factorize(made, rank=2, targets=name)
    assert_untouched(made, before)
    assert factored(factorize(made, rank=2)) == {"0"}
    assert id(made.get_submodule(name)) in {id(m) for m in made.modules()}


def test_parts_of_one_memory_that_do_not_overlap_are_no_hindrance():
    made, flat = net(), torch.randn(200)
    made[0].weight = nn.Parameter(flat[:128].view(16, 8))
    made[2].weight = nn.Parameter(flat[128:192].view(4, 16))
    assert used_elsewhere(made) == {}
    assert factored(factorize(made, rank=2)) == {"0", "2"}


def test_a_factor_that_two_layers_share_is_not_merged():
    made = nn.Sequential(LowRankLinear(6, 6, 2), LowRankLinear(6, 6, 2))
    made[1].U = made[0].U
    before = everything(made)
    with pytest.raises(
        SubspanError, match="'0' cannot be merged, since something else shares its U"
    ):
        merge(made)
    assert_untouched(made, before)


def test_a_factor_that_something_computes_is_not_merged():
    made = nn.Sequential(LowRankLinear(6, 6, 2), ProductOfSumsLinear(6, 6, ["free"]))
    prune.l1_unstructured(made[1], "a0", 0.5)
    before = everything(made)
    with pytest.raises(SubspanError, match=r"'1' cannot be merged, since something .* its a0"):
        merge(made)
    assert_untouched(made, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: factorize(net, rank=2),
        lambda net: factorize(net, rank=2, targets="0"),
        lambda net: product_of_sums(net, SUMS),
        lambda net: merge(factorize(net, rank=2)),
    ],
)
@pytest.mark.parametrize("kind", [torch.optim.Adam, lambda params: RandomBases(params, 5)])
@pytest.mark.parametrize("begun", [False, True])
def test_an_optimizer_of_the_layers_of_before_is_refused(change, kind, begun):
    """It would go on with them, and nothing would be trained, whatever gradients they have left."""
    network, other = net(), net()
    optimizer, unchanged = kind(network.parameters()), kind(other.parameters())
    if begun:
        network(X).square().sum().backward()
        optimizer.step()
    network = change(network)
    before = [p.detach().clone() for p in network.parameters()]
    for each in (network, other):
        each(X).square().sum().backward()
    with pytest.raises(SubspanError, match="a layer that another one has taken the place of"):
        optimizer.step()
    assert all(map(torch.equal, before, network.parameters()))
    unchanged.step()
    if kind is torch.optim.Adam:
        held = {id(p) for p in optimizer.param_groups[0]["params"]}
        new = [p for p in network.parameters() if id(p) not in held]
        optimizer.add_param_group({"params": new})
        optimizer.step()
        assert not any(map(torch.equal, before, network.parameters()))


def test_a_layer_under_two_names_stays_one():
    made = net()
    made.append(made[0])
    calls = []
    made[0].register_forward_hook(lambda *_: calls.append(1))
    factorize(made, rank=2)
    assert made[3] is made[0]
    made[0](X)
    assert calls == [1]
    merge(made, factors=True)
    assert made[3] is made[0]
    assert type(made[0]) is nn.Sequential
    made[3](X)
    assert calls == [1, 1]


# ---- attention -----------------------------------------------------------------------------------


def attention(**more):
    torch.manual_seed(0)
    return nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True, **more))


class OwnAttention(nn.MultiheadAttention):
    pass


def shared_attention():
    made = nn.Sequential(nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2))
    made[1].in_proj_weight = made[0].in_proj_weight
    return made


def normed_attention(parameter):
    made = attention()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(made[0].get_submodule(parameter[0]), parameter[1])
    return made


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Sequential(OwnAttention(8, 2)), "the class of its attention, .*OwnAttention"),
        (lambda: attention(add_bias_kv=True), "add_bias_kv or add_zero_attn"),
        (lambda: attention(add_zero_attn=True), "add_bias_kv or add_zero_attn"),
        (shared_attention, "shares its in_proj_weight"),
        (lambda: normed_attention(("", "in_proj_weight")), "else computes its in_proj_weight"),
        (lambda: normed_attention(("out_proj", "weight")), "else computes its weight"),
    ],
)
def test_attention_that_is_not_what_it_seems(make, why):
    made = make()
    before = everything(made)
    with pytest.raises(SubspanError, match=f"'0.v_proj' cannot be replaced, since .*{why}"):
        factorize(made, rank=2, targets="v_proj")
    with pytest.raises(SubspanError, match=f"there is no layer to factorise.*{why}"):
        factorize(made, rank=2)
    assert_untouched(made, before)


def test_hooks_of_attention():
    made, calls = attention(), []
    made[0].register_forward_hook(lambda *_: calls.append(1))
    made[0].tag = "mine"
    factorize(made, rank=2, targets=["q_proj", "out_proj"])
    x = X[None]
    made[0](x, x, x)
    assert calls == [1]
    merge(made, factors=True)  # stays an attention in parts
    made[0](x, x, x)
    assert (calls, made[0].tag) == ([1, 1], "mine")


@pytest.mark.parametrize(
    ("register", "kind"),
    [
        (
            lambda m: m.out_proj.register_forward_hook(nothing),
            "^layer .0.out_proj. has a hook of a layer that is not called",
        ),
        (
            lambda m: m.in_proj_weight.register_hook(nothing),
            "^layer '0' has a hook on its in_proj_weight",
        ),
        (
            lambda m: m.out_proj.bias.register_hook(nothing),
            "^layer '0.out_proj' has a hook on its bias",
        ),
    ],
)
def test_hooks_of_attention_that_would_be_lost_or_begin_to_run(register, kind):
    made = attention()
    register(made[0])
    before = everything(made)
    with pytest.raises(SubspanError, match=kind):
        factorize(made, rank=2)
    assert_untouched(made, before)


def test_flags_of_attention():
    made = attention()
    made[0].in_proj_weight.requires_grad_(False)
    made[0].out_proj.bias.requires_grad_(False)
    made[0].in_proj_weight.no_decay = True
    made[0].out_proj.tag = 5
    factorize(made, rank=2, targets=["k_proj", "out_proj"])
    assert {n for n, p in made[0].named_parameters() if not p.requires_grad} == {
        "q_proj.weight",
        "k_proj.U",
        "k_proj.S",
        "k_proj.V",
        "v_proj.weight",
        "out_proj.bias",
    }
    assert made[0].out_proj.tag == 5
    assert made[0].k_proj.U.no_decay
    assert not hasattr(made[0].out_proj.U, "no_decay")
    merge(made)
    frozen = {n for n, p in made[0].named_parameters() if not p.requires_grad}
    assert frozen == {"in_proj_weight", "out_proj.bias"}
    assert made[0].in_proj_weight.no_decay
    assert made[0].out_proj.tag == 5


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.q_proj.register_forward_hook(nothing), "has a hook of a layer that is not"),
        (lambda m: setattr(m.q_proj, "tag", 1), "no q_proj for its attribute 'tag'"),
        (lambda m: m.v_proj.requires_grad_(False), "only some of them are frozen"),
        (lambda m: setattr(m.v_proj, "bias", None), "only some of its projections have a bias"),
        (lambda m: setattr(m, "mine", m.q_proj), "it holds 'mine'"),
        (lambda m: nn.utils.weight_norm(m.q_proj), "something else computes its weight"),
        (lambda m: m.register_state_dict_post_hook(nothing), "has a state_dict hook"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_attention_in_parts_that_cannot_be_whole_again(change, why):
    made = factorize(attention(), rank=2, targets="k_proj")
    change(made[0])
    modules = [(name, id(m)) for name, m in made.named_modules()]
    with pytest.raises(SubspanError, match=why):
        merge(made)
    assert [(name, id(m)) for name, m in made.named_modules()] == modules


@pytest.mark.parametrize(
    ("shapes", "options", "why"),
    [
        (((4, 8), (2, 4, 8), (2, 4, 8)), {}, "must all have 3 dimensions, or 2"),
        (((2, 2, 4, 8),) * 3, {}, "must all have 3 dimensions, or 2"),
        (((3, 4, 8), (1, 4, 8), (1, 4, 8)), {}, "must agree in batch and length"),
        (((3, 4, 8), (3, 5, 8), (3, 1, 8)), {}, "must agree in batch and length"),
        (((4, 8), (5, 8), (1, 8)), {}, "must agree in batch and length"),
        (((3, 4, 8),) * 3, {"attn_mask": torch.zeros(1, 4)}, "attn_mask must have shape"),
        (((3, 4, 8),) * 3, {"attn_mask": torch.zeros(2, 4, 4)}, "attn_mask must have shape"),
        (((3, 4, 8),) * 3, {"key_padding_mask": torch.zeros(1, 4)}, "key_padding_mask must"),
    ],
)
def test_inputs_that_attention_would_spread_are_refused(shapes, options, why):
    dense = attention()
    inputs = [torch.ones(shape) for shape in shapes]
    with pytest.raises((RuntimeError, AssertionError)):
        dense[0](*inputs, **options)
    with pytest.raises(SubspanError, match=why):
        factorize(dense, rank=2)[0](*inputs, **options)


# ---- flags, attributes, and layers that grow -----------------------------------------------------


def marked():
    """Copies of a Parameter do not have its attributes, so that each use needs a new network."""
    made = net()
    made[0].weight.requires_grad_(False)
    made[0].weight.no_decay = True
    made[2].bias.requires_grad_(False)
    made[2].bias.rate = 3
    return made


@pytest.mark.parametrize(
    "made",
    [
        lambda: factorize(marked(), rank=2),
        lambda: merge(factorize(marked(), rank=2)),
        lambda: merge(factorize(marked(), rank=2), factors=True),
        lambda: product_of_sums(marked(), SUMS),
        lambda: merge(product_of_sums(marked(), SUMS)),
    ],
)
def test_flags_and_attributes_of_parameters(made):
    for name, p in made().named_parameters():
        first, bias = name.startswith("0"), name.endswith("bias")
        assert p.requires_grad == (first == bias)
        assert vars(p).get("no_decay", False) == (first and not bias)
        assert vars(p).get("rate", 0) == (3 if bias and not first else 0)


def test_layers_are_excluded_from_products_of_sums():
    made = by(weight_norm)
    product_of_sums(made, {".*": [{"kind": "rank1", "p": 4}]}, exclude="0")
    assert factored(made) == {"2"}


def test_a_layer_that_grows_keeps_what_was_put_on_it():
    layer, calls = ProductOfSumsLinear(8, 4, [{"kind": "hash", "p": 4, "inner": 4}, "free"]), []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    layer.tag = "mine"
    layer.a1.requires_grad_(False)
    layer.a1.no_decay = True
    layer.eval()
    larger = grow(layer, [{"kind": "hash", "p": 8, "inner": 4}, "free"])
    assert larger.tag == "mine"
    assert not larger.training
    assert (larger.a0.requires_grad, larger.a1.requires_grad) == (True, False)
    torch.testing.assert_close(larger(X), layer(X))
    assert calls == [1, 1]
    handle.remove()
    larger(X)
    assert calls == [1, 1]
    layer.a0.register_hook(nothing)
    with pytest.raises(SubspanError, match="has a hook on its a0"):
        grow(layer, [{"kind": "hash", "p": 8, "inner": 4}, "free"])


def test_the_layers_of_a_file_keep_what_was_put_on_those_they_replace(tmp_path):
    from subspan import load

    saved = product_of_sums(net(), RULE, seed=3)
    save(saved, tmp_path / "net.safetensors")
    for other in (net(), product_of_sums(net(), RULE, seed=4)):
        calls = []
        other[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        back = load(tmp_path / "net.safetensors", other)
        assert torch.equal(back(X), saved(X))
        assert calls == [1]
    other = net()
    other[0].weight.register_hook(nothing)
    before = everything(other)
    with pytest.raises(SubspanError, match="'0' has a hook on its weight"):
        load(tmp_path / "net.safetensors", other)
    assert_untouched(other, before)


@pytest.mark.parametrize("rank", [0, 9, 2.0, True])
def test_ranks_of_a_file_that_cannot_be(rank):
    made = factorize(net(), rank=2, targets="2")
    before = everything(made)
    for name in ("0", "2"):
        with pytest.raises(
            SubspanError, match=rf"^layer '{name}': the rank of .* must be an integer in"
        ):
            rebuild_layers(made, {LowRank: {"2" if name == "0" else "0": 3, name: rank}})
        assert_untouched(made, before)


def test_a_weight_that_is_not_finite():
    made = net()
    with torch.no_grad():
        made[2].weight[0, 0] = torch.nan
    with pytest.raises(SubspanError, match="the weight of layer '2' is not finite"):
        factorize(made, rank=2)
    assert not factored(made)


class Doubling(LowRankLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_class_derived_from_ours_is_not_merged():
    made = nn.Sequential(Doubling(6, 6, 2), LowRankLinear(6, 6, 2))
    before = everything(made)
    with pytest.raises(SubspanError, match=r"'0' cannot be merged, since its class, .*Doubling"):
        merge(made)
    assert_untouched(made, before)


def test_a_hook_on_a_factor_is_not_lost_by_merging():
    made = nn.Sequential(LowRankLinear(6, 6, 2))
    made[0].U.register_hook(lambda grad: None)
    before = everything(made)
    with pytest.raises(SubspanError, match=r"'0'.*hook on its U"):
        merge(made)
    assert_untouched(made, before)
