"""Factored layers in place of ordinary ones: which, how well, inside what, and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from subspan import SubspaceModel, SubspanError
from subspan.layers import LowRank, LowRankConv2d, LowRankLinear, factorize, merge
from subspan.layers.watched import Tangents
from tests.nets import batch, build

KINDS = ["mlp", "cnn", "encoder"]


def ranks(net):
    return {name: m.rank for name, m in net.named_modules() if isinstance(m, LowRank)}


def output(net, kind):
    out = net.eval()(batch(kind))
    return out.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_the_energy_is_the_same_network(kind):
    net = build(kind)
    expected = output(copy.deepcopy(net), kind)
    torch.testing.assert_close(output(factorize(net, energy=1.0), kind), expected)
    for factors in (True, False):
        plain = merge(copy.deepcopy(net), factors=factors)
        assert not ranks(plain)
        ours = {
            type(m).__name__ for m in plain.modules() if type(m).__module__.startswith("subspan")
        }
        assert ours == ({"Attention"} if factors and kind == "encoder" else set())
        torch.testing.assert_close(output(plain, kind), expected)
    shapes = {name: p.shape for name, p in merge(net).named_parameters()}
    assert shapes == {name: p.shape for name, p in build(kind).named_parameters()}


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_energy_is_the_share_of_the_squared_norm_that_stays(energy):
    dense = build("mlp", torch.float64)
    net = factorize(copy.deepcopy(dense), energy=energy)
    for name, r in ranks(net).items():
        W, ours = dense.get_submodule(name).weight, net.get_submodule(name).weight
        assert (ours.detach().square().sum() / W.detach().square().sum()) >= energy - 1e-12
        values = torch.linalg.svdvals(W.detach()).square()
        if r > 1:
            assert values[: r - 1].sum() < energy * values.sum()
        torch.testing.assert_close((W - ours).norm() ** 2, values[r:].sum())


def test_ratio_is_the_share_of_numbers_that_stays():
    net = factorize(build("mlp"), ratio=0.5)
    assert ranks(net) == {"0": 2, "2": 1}  # 2 (16 + 8) ≤ 64, 1 (4 + 16) ≤ 32
    assert ranks(factorize(build("mlp"), ratio=1e-6)) == {"0": 1, "2": 1}


def test_ranks_by_pattern():
    net = factorize(build("mlp"), rank={"0": 5, ".*": 2})
    assert ranks(net) == {"0": 5, "2": 2}


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_random_factors_have_the_norm_of_the_weight(kind):
    dense = build(kind)
    torch.manual_seed(0)
    net = factorize(copy.deepcopy(dense), rank=3, init="random")
    for name in ranks(net):
        layer = net.get_submodule(name)
        norm = dense.get_submodule(name).weight.detach().norm()
        torch.testing.assert_close(layer.weight.detach().norm(), norm)
        for U in (layer.U.detach(), layer.V.detach()):
            torch.testing.assert_close(U.T @ U, torch.eye(3))
        assert torch.equal(layer.bias, dense.get_submodule(name).bias)


def test_what_is_chosen():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 6)
            self.tied = nn.Linear(6, 7)
            self.tied.weight = self.embedding.weight
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)
            self.conv = nn.Conv2d(4, 4, 3)
            self.a = self.b = nn.Linear(6, 6)
            self.own = type("Own", (nn.Linear,), {})(6, 6)
            self.frozen = nn.Linear(6, 6).requires_grad_(False)

    net = factorize(Net(), rank=2)
    assert set(ranks(net)) == {"conv", "a", "frozen"}
    assert net.a is net.b
    assert not any(p.requires_grad for p in net.frozen.parameters())
    assert set(ranks(factorize(Net(), rank=2, targets=["a"]))) == {"a"}
    assert set(ranks(factorize(Net(), rank=2, targets=iter(["a"])))) == {"a"}
    assert set(ranks(factorize(Net(), rank=2, exclude="a"))) == {"conv", "frozen"}
    assert set(ranks(factorize(Net(), rank=2, exclude="b"))) == {"conv", "frozen"}
    with pytest.raises(
        SubspanError, match="'tied' cannot be replaced, since something else shares its weight"
    ):
        factorize(Net(), rank=2, targets="tied")
    with pytest.raises(SubspanError, match=r"'grouped' cannot be .* convolution with groups=2"):
        factorize(Net(), rank=2, targets="grouped")


def test_one_layer_alone_is_returned():
    dense = nn.Linear(6, 5)
    layer = factorize(dense, energy=1.0)
    assert isinstance(layer, LowRankLinear)
    torch.testing.assert_close(layer.weight, dense.weight.detach())
    assert type(merge(layer)) is nn.Linear


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolutions_keep_their_geometry(mode):
    padding = "valid" if mode == "zeros" else (1, 2)
    dense = nn.Conv2d(3, 8, (3, 5), (2, 1), padding, 2, padding_mode=mode)
    layer = factorize(copy.deepcopy(dense), energy=1.0)
    assert isinstance(layer, LowRankConv2d)
    x = torch.randn(2, 3, 12, 14)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(merge(layer, factors=True)(x), dense(x))


# ---- attention -----------------------------------------------------------------------------------


def attention(**options):
    torch.manual_seed(0)
    net = nn.MultiheadAttention(8, 2, **options)
    nn.init.normal_(net.in_proj_bias) if net.in_proj_bias is not None else None
    return net


MASKS = {
    "none": {},
    "keys": {"key_padding_mask": torch.tensor([[False, False, False, True]] * 3)},
    "pairs": {"attn_mask": torch.ones(4, 4).triu(1).bool()},
    "added": {"attn_mask": torch.randn(4, 4, generator=torch.Generator().manual_seed(3))},
    "by head": {"attn_mask": torch.ones(6, 4, 4).triu(1).bool()},
    "both": {
        "attn_mask": torch.ones(4, 4).triu(1).bool(),
        "key_padding_mask": torch.tensor([[False, False, False, True]] * 3),
    },
    "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(4), "is_causal": True},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_computes_the_same(masks, batch_first, need_weights):
    dense = attention(batch_first=batch_first)
    net = factorize(copy.deepcopy(dense), energy=1.0)
    x = torch.randn(3, 4, 8)
    x = x if batch_first else x.transpose(0, 1)
    options = MASKS[masks] | {"need_weights": need_weights}
    (out, weights), (expected, theirs) = net(x, x, x, **options), dense(x, x, x, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, theirs)


def test_attention_of_one_sequence_and_of_other_sizes():
    dense = attention(kdim=5, vdim=6, bias=False)
    net = factorize(copy.deepcopy(dense), energy=1.0)
    q, k, v = torch.randn(4, 8), torch.randn(7, 5), torch.randn(7, 6)
    for average in (True, False):
        found = net(q, k, v, average_attn_weights=average)
        torch.testing.assert_close(found, dense(q, k, v, average_attn_weights=average))
    back = merge(net)
    assert type(back) is nn.MultiheadAttention
    torch.testing.assert_close(back(q, k, v), dense(q, k, v))


def test_attention_says_of_itself_what_the_original_does():
    dense = attention(kdim=5, vdim=6, dropout=0.1, batch_first=True)
    net = factorize(copy.deepcopy(dense), rank=2)
    weights = dense._parameters.keys() | {"_qkv_same_embed_dim"}
    for name in (vars(dense) | dense._parameters).keys() - vars(nn.Module()).keys() - weights:
        assert getattr(net, name) == getattr(dense, name), name
    assert net.bias_k is net.bias_v is net.in_proj_bias is None


def test_dropout_of_attention():
    net = factorize(attention(dropout=0.5), energy=1.0)
    x = torch.randn(4, 3, 8)
    assert not torch.equal(net(x, x, x)[0], net(x, x, x)[0])
    assert torch.equal(net.eval()(x, x, x)[0], net(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the dense encoder
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("training", [True, False])
def test_transformers_go_on_working(kind, training):
    torch.manual_seed(0)
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        net, inputs = nn.TransformerEncoder(layer, 2), (torch.randn(3, 4, 8),)
        padded = torch.zeros(3, 4, dtype=torch.bool)
        padded[1, 3] = True
        options = {"src_key_padding_mask": padded}
    else:
        layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        net, inputs = nn.TransformerDecoder(layer, 2), (torch.randn(3, 4, 8), torch.randn(3, 5, 8))
        options = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(4)}
    factored = factorize(copy.deepcopy(net), energy=1.0)
    with torch.no_grad():
        expected, found = (n.train(training)(*inputs, **options) for n in (net, factored))
    real = torch.ones(3, 4, dtype=torch.bool)
    if kind == "encoder":
        real = ~options["src_key_padding_mask"]
    torch.testing.assert_close(found[real], expected[real])
    partly = factorize(copy.deepcopy(net), energy=1.0, targets="linear1")
    with torch.no_grad():
        torch.testing.assert_close(partly.train(training)(*inputs, **options)[real], expected[real])


def test_attention_that_cannot_be_split():
    with pytest.raises(SubspanError, match="there is no layer to factorise"):
        factorize(attention(add_zero_attn=True), rank=2)


# ---- what others make of it ----------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factors", [True, False])
def test_a_merged_network_can_be_exported(kind, factors):
    net = factorize(build(kind), rank=3)
    expected = output(net, kind)
    program = torch.export.export(merge(net, factors=factors).eval(), (batch(kind),))
    torch.testing.assert_close(program.module()(batch(kind)), expected)


def test_a_subspace_of_the_factors():
    """A composition (as in Uni-LoRA) that needs nothing of its own."""
    model = SubspaceModel(factorize(build("mlp"), rank=3), 12)
    model(batch("mlp")).square().sum().backward()
    assert sum(p.numel() for p in model.parameters()) == 12
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>")  # of Dynamo
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_factored_layers_compile(kind):
    net = factorize(build(kind), rank=3)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch(kind)), net(batch(kind)))
    held = [Tangents(layer) for layer in net.modules() if isinstance(layer, LowRank)]
    torch.testing.assert_close(compiled(batch(kind)), net(batch(kind)))
    assert held


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of rank, ratio and energy, got none"),
        ({"rank": 2, "ratio": 0.1}, "give one of rank, ratio and energy, got rank and ratio"),
        ({"ratio": 0.0}, r"ratio must be a share in \(0, 1\], got 0.0"),
        ({"energy": 1.5}, r"energy must be a share in \(0, 1\], got 1.5"),
        ({"rank": 5}, r"layer '2' is 4 × 16: its rank must be an integer in \[1, 4\], got 5"),
        ({"rank": 0}, r"its rank must be an integer in \[1, 8\], got 0"),
        ({"rank": 2.0}, "its rank must be an integer"),
        ({"rank": True}, "its rank must be an integer"),
        ({"rank": {"0": 2}}, "rank says nothing of layer '2'"),
        ({"rank": 2, "init": "sdv"}, "unknown init 'sdv': did you mean svd"),
        ({"energy": 0.5, "init": "random"}, "energy is read off the weight"),
        ({"rank": 2, "targets": "3"}, r"in targets \(it matches no layer\) '3'"),
        ({"rank": 2, "exclude": ".*"}, "there is no layer to factorise"),
    ],
)
def test_requests_that_make_no_sense(options, message):
    net = build("mlp")
    with pytest.raises(SubspanError, match=message):
        factorize(net, **options)
    assert not ranks(net)


def test_nothing_to_factorise_or_to_merge():
    with pytest.raises(SubspanError, match=r"no layer to factorise: .*the network has none"):
        factorize(nn.Sequential(nn.ReLU()), rank=2)
    with pytest.raises(SubspanError, match="no factored layer to merge"):
        merge(build("mlp"))


def test_presets_choose_layers():
    def encoder():
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Linear(8, 2))

    def replaced(**options):
        return {n for n, m in factorize(encoder(), rank=2, **options).named_modules()
                if isinstance(m, LowRankLinear)}  # fmt: skip

    start = "0.layers.0."
    attention = {f"{start}self_attn.{part}_proj" for part in "qkv"} | {f"{start}self_attn.out_proj"}
    mlp = {f"{start}linear1", f"{start}linear2"}
    assert replaced(targets="attention") == attention
    assert replaced(targets="mlp") == mlp
    assert replaced(targets="all-linear") == attention | mlp == replaced(exclude="head")
    with pytest.raises(SubspanError, match="has no module that is called attention"):
        factorize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), rank=1, targets="attention")
