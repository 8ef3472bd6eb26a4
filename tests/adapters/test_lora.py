"""A subspace over LoRA factors: W + s B A with (A, B) = θ₀ + P w, in a network as it was."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import subspan
from subspan import SubspaceModel, SubspanError
from subspan.subspace import formed
from subspan.subspace.adapted import FACTORS
from tests.adapters.networks import LORA, WORDS, Block, block, lora, products
from tests.nets import scatter
from tests.reference import Numbers


def test_the_network_is_at_first_what_it_was():
    net = block()
    before = net(WORDS)
    subspan.lora(net, 10, **LORA)
    assert torch.equal(net(WORDS), before)


def test_the_function_is_that_of_w_plus_s_b_a():
    model, plain = lora(), block()
    with torch.no_grad():
        for name, product in products(model).items():
            plain.get_submodule(name).weight += product
        plain.head.load_state_dict(model.body.head.state_dict())
    assert all(product.norm() > 0.1 for product in products(model).values())
    torch.testing.assert_close(model(WORDS), plain(WORDS))


def test_factors_at_zero_coordinates_come_from_the_seed_alone():
    one, again, other = (subspan.lora(block(), 10, **LORA, seed=seed) for seed in (0, 0, 1))
    thetas = [model.subspace.all() for model in (one, again, other)]
    a, b = "up." + FACTORS[0], "up." + FACTORS[1]
    assert torch.equal(thetas[0][a], thetas[1][a])
    assert not torch.equal(thetas[0][a], thetas[2][a])
    assert not thetas[0][b].any()
    assert thetas[0][a].abs().max() <= 1 / math.sqrt(8)


def test_factors_at_zero_coordinates_are_those_of_the_format():
    """By docs/format.md alone: uniforms of domain 17, the number of the layer as their column."""
    thetas = subspan.lora(block(), 10, **LORA, seed=2**33 + 5).subspace.all()
    numbers = Numbers(2**33 + 5, domain=17)
    for column, (layer, m) in enumerate((("up", 8), ("down", 12))):
        width = np.float32(math.sqrt(1 / m))
        wanted = [
            np.float32(2 * numbers.uniform(n, column) - 1) * width for n in range(LORA["rank"] * m)
        ]
        a = thetas[f"{layer}.{FACTORS[0]}"].detach()
        assert a.shape == (LORA["rank"], m)
        assert a.flatten().tolist() == list(map(float, wanted))


def test_patterns_may_be_any_iterable():
    options = {"targets": ["up", "down"], "exclude": ["down"], "train_fully": ["head"]}
    want = subspan.lora(block(), 10, rank=2, **options)
    model = subspan.lora(block(), 10, rank=2, **{n: (p for p in o) for n, o in options.items()})
    assert model.fully_trained().keys() == want.fully_trained().keys()
    assert (model.recipe, model.subspace.lora) == (want.recipe, want.subspace.lora)


def test_layers_keep_class_names_and_hooks():
    net = block()
    seen = []
    net.up.register_forward_hook(lambda *_: seen.append(1))
    names = list(net.state_dict())
    model = subspan.lora(net, 10, **LORA)
    assert type(net) == Block  # noqa: E721 (as programs ask)
    assert type(net.up) == nn.Linear  # noqa: E721
    assert isinstance(net.up, nn.Linear)
    net(WORDS)
    assert seen
    net.up(input=torch.ones(1, 8))  # as nn.Linear calls it
    plain = model.unwrap()
    assert plain is net
    assert type(net.up) is nn.Linear
    assert list(net.state_dict()) == names
    assert all(p.requires_grad for p in net.parameters())
    before = block().state_dict()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_weight_reads_as_the_product():
    model = lora()
    merged = model.merge()
    assert torch.equal(model.body.up.weight, merged.up.weight)
    assert torch.equal(model.weights()["up.weight"], merged.up.weight)
    assert model.weights().keys() == dict(merged.named_parameters()).keys() - {
        "head.weight",
        "head.bias",
    }
    (w,) = model.coordinates.values()
    (gradient,) = torch.autograd.grad(model.body.up.weight.square().sum(), w)
    assert gradient.norm() > 0
    with pytest.raises(SubspanError, match="would be lost"):
        model.body.up.weight.data.zero_()
    stored = dict(model.body.named_parameters())["up.weight"]
    with pytest.raises(SubspanError, match=r"up\.weight among parameters\(\) is θ₀"):
        stored.norm()


def test_autocast_does_not_round_the_product():
    model = lora()
    merged = model.merge().state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.body.up.weight, merged["up.weight"])
        torch.testing.assert_close(model.merge().state_dict(), merged, rtol=0, atol=0)


@pytest.mark.heavy
def test_a_reader_of_weights_inside_of_a_call_gets_the_product():
    class Reads(Block):
        def forward(self, x):
            return self.head(self.up(self.words(x)).mean(1)[:, :8]) + self.up.weight.sum()

    net = Reads()
    model = subspan.lora(net, 10, **LORA)
    scatter(model)
    torch.testing.assert_close(model(WORDS), model.merge()(WORDS))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(WORDS), model(WORDS))


def test_merge_has_the_order_and_the_bits_of_pefts():
    model = lora()
    merged = model.merge()
    for name, product in products(model).items():
        want = block().get_submodule(name).weight.data
        want += product  # as peft/tuners/lora/layer.py does
        assert torch.equal(merged.get_submodule(name).weight, want)
    assert not [name for name in merged.state_dict() if "subspan" in name]


def test_training_moves_factors_and_head_and_nothing_else():
    net = block()
    model = subspan.lora(net, 10, **LORA)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    first = None
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(WORDS), torch.tensor([0, 1, 2]))
        first = first or float(loss.detach())
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * first
    trained = model.merge()
    moved = {
        name
        for name, p in trained.named_parameters()
        if not torch.equal(p, block().get_parameter(name))
    }
    assert moved == {"up.weight", "down.weight", "head.weight", "head.bias"}


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_models_of_their_own(twin):
    model = lora()
    before, other = model(WORDS), twin(model)
    assert torch.equal(other(WORDS), before)
    scatter(other)
    assert not torch.equal(other(WORDS), before)
    assert torch.equal(model(WORDS), before)
    other.unwrap()
    assert torch.equal(model(WORDS), before)


@pytest.mark.heavy
def test_compiled_without_a_break():
    model = lora()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted = model(WORDS)
    got = compiled(WORDS)
    torch.testing.assert_close(got, wanted)
    (w,) = model.coordinates.values()
    for out in (wanted, got):
        out.sum().backward()
    once = torch.autograd.grad(model(WORDS).sum(), w)[0]
    torch.testing.assert_close(w.grad, 2 * once)


def test_autocast_and_16_bits_have_factors_in_float32():
    model = lora(torch.bfloat16)
    assert {t.dtype for n, t in model.subspace.all().items()} == {torch.float32}
    assert model(WORDS).dtype == torch.bfloat16
    model(WORDS).float().sum().backward()
    whole = lora()
    with torch.autocast("cpu", torch.bfloat16):
        out = whole(WORDS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), whole(WORDS), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    class Checkpointed(Block):
        def forward(self, x):
            x = self.words(x).requires_grad_()
            x = checkpoint(lambda x: self.norm(self.up(x)).relu(), x, use_reentrant=reentrant)
            return self.head(self.down(x).mean(1))

    net = Checkpointed()
    net.load_state_dict(block().state_dict())
    model, ordinary = subspan.lora(net, 10, **LORA), lora()
    model.load_state_dict(ordinary.state_dict())
    gradients = []
    for one in (model, ordinary):
        one(WORDS).sum().backward()
        gradients.append(next(iter(one.coordinates.values())).grad)
    torch.testing.assert_close(*gradients)


def test_a_large_network_forms_factors_when_they_are_read(monkeypatch):
    ordinary = lora()
    out = ordinary(WORDS)
    out.sum().backward()
    monkeypatch.setattr(formed, "KEPT", 1 << 4)
    model = lora()
    assert model.subspace.large
    again = model(WORDS)
    again.sum().backward()
    assert torch.equal(again, out)
    for one, other in zip(model.parameters(), ordinary.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_vmap_over_coordinates_is_one_call_for_many_variants():
    model = lora()
    (w,) = model.coordinates.values()
    many = torch.stack([w.detach(), torch.zeros_like(w), 2 * w.detach()])
    name = next(n for n, _ in model.named_parameters())

    def run(w):
        return torch.func.functional_call(model, {name: w}, (WORDS,))

    together = torch.vmap(run)(many)
    alone = torch.stack([run(one) for one in many])
    torch.testing.assert_close(together, alone)


def test_at_base_has_no_lora():
    model, plain = lora(), block()
    plain.head.load_state_dict(model.body.head.state_dict())
    with model.at_base():
        assert torch.equal(model(WORDS), plain(WORDS))
        assert torch.equal(model.body.up.weight, plain.up.weight)
        assert torch.equal(model.merge()(WORDS), plain(WORDS))
    assert not torch.allclose(model(WORDS), plain(WORDS))


def test_a_functional_call_with_a_weight_runs_with_that_weight():
    model = lora()
    weight = torch.randn(12, 8)
    got = torch.func.functional_call(model.body.up, {"weight": weight}, (torch.ones(1, 8),))
    torch.testing.assert_close(got, weight.sum(1)[None] + model.body.up.bias)


def test_compartments_and_other_projections():
    model = subspan.lora(block(), None, **LORA, compartments={"up": 5, "down": 3})
    assert [part.dim for part in model.compartments] == [5, 3]
    model = subspan.lora(block(), 12, **LORA, projection="rademacher", compartments="layer")
    scatter(model)
    torch.testing.assert_close(model(WORDS), model.merge()(WORDS))


def test_counts_are_of_the_network_without_factors():
    model, weights = lora(), sum(p.numel() for p in block().parameters())
    assert subspan.count(model).dense == model.summary().weights == weights
    assert model.summary().trainable == 10 + 27
    assert "up." + FACTORS[0] in str(model.summary())


# ---- other programs ------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")  # PyTorch has many of its own
def test_exported_and_traced_programs_compute_the_same():
    model = lora().eval()
    want = model(WORDS)
    for net, strict in itertools.product((model, model.body), (True, False)):
        program = torch.export.export(net, (WORDS,), strict=strict)
        torch.testing.assert_close(program.module()(WORDS), want)
    traced = torch.jit.trace(model.body, (WORDS,))
    torch.testing.assert_close(traced(WORDS), want)
    assert torch.equal(model(WORDS), want)


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_has_the_merged_function(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = lora().eval()
    program = torch.onnx.export(model, (WORDS,), dynamo=True, verbose=False)
    program.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (given,) = session.get_inputs()
    (found,) = session.run(None, {given.name: WORDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(WORDS), rtol=1e-4, atol=1e-5)


# ---- states --------------------------------------------------------------------------------------


def test_a_state_is_coordinates_and_loads():
    model = lora()
    state = model.state_dict()
    assert not [name for name in state if "up.weight" in name or FACTORS[0] in name]
    other = subspan.lora(block(), 10, **LORA)
    other.load_state_dict(state)
    assert torch.equal(other(WORDS), model(WORDS))
    with pytest.raises(SubspanError, match="initial weights"):
        subspan.lora(block(), 10, **LORA, seed=1).load_state_dict(state)
    with pytest.raises(SubspanError, match="the projection or its compartments"):
        subspan.lora(block(), 10, **LORA | {"alpha": 4}).load_state_dict(state)


def test_a_part_has_the_weights_of_an_ordinary_part():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = block()

        def forward(self, x):
            return self.body(x)

    net = Outer()
    model = subspan.lora(net, 10, **LORA)
    scatter(model)
    merged = model.merge()
    state, plain = net.body.state_dict(), block()
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    assert torch.equal(plain(WORDS), merged(WORDS))
    assert [n for n, _ in net.body.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert torch.equal(dict(net.body.named_parameters())["up.weight"], merged.body.up.weight)


# ---- refusals ------------------------------------------------------------------------------------


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def tied():
    net = block()
    net.down = nn.Linear(11, 8, bias=False)
    net.down.weight = nn.Parameter(torch.zeros(8, 11))
    net.up.weight = net.words.weight = nn.Parameter(torch.zeros(11, 8))
    return net


def with_own_forward():
    net = block()
    net.up = Own(8, 12)
    return net


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (block, {"rank": 0}, "rank must be an integer of at least 1, got 0"),
        (block, {"rank": 2.0}, "rank must be an integer of at least 1, got 2.0"),
        (block, {"rank": 9}, r"rank 9 is more than up can have.*12 × 8.*at most 8"),
        (block, {"alpha": 0}, "alpha must be a positive number, got 0"),
        (block, {"alpha": math.nan}, "alpha must be a positive number"),
        (block, {"targets": "words"}, "matches no"),
        (block, {"targets": ["up", "nothing"]}, "nothing"),
        (block, {"exclude": ["nothing"]}, "nothing"),
        (block, {"targets": ["up"], "exclude": ["up"]}, "no layer is left for LoRA"),
        (block, {"train_fully": ["nothing"]}, "nothing"),
        (block, {"dim": 10**6}, "at most the number of weights, 80"),
        (block, {"s": 3}, "hash"),
        (tied, {"targets": ["up"]}, "up.weight is tied to words.weight"),
        (with_own_forward, {}, "up is a Own with a forward of its own"),
        (lambda: SubspaceModel(block(), 10), {}, "merge or unwrap it first"),
        (lambda: SubspaceModel(block(), 10).body, {}, "in a subspace already"),
        (lambda: 3, {}, "must be a torch.nn.Module"),
        (lambda: nn.Linear(8, 8), {"targets": ".*", "train_fully": None}, "network itself is a"),
    ],
)
def test_refusals_leave_the_network_as_it_was(make, options, says):
    net = make()
    known = {} if not isinstance(net, nn.Module) else vars(net) | dict(net.named_modules())
    options = {"dim": 10} | LORA | options
    with pytest.raises(SubspanError, match=says):
        subspan.lora(net, **options)
    if isinstance(net, nn.Module):
        assert vars(net) | dict(net.named_modules()) == known
        assert not [name for name, _ in net.named_parameters() if name.endswith(FACTORS)]


def test_attention_that_reads_the_weight_of_its_projection_is_refused():
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(SubspanError, match="matches no linear layer"):
        subspan.lora(net, 10, rank=2, targets=["out_proj"])
    model = subspan.lora(net, 10, rank=2, targets=["linear1", "linear2"]).eval()
    scatter(model)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():  # PyTorch's fast path reads the weights of both layers
        torch.testing.assert_close(model(x), model.merge()(x))


def test_wishes_of_a_layer_are_those_of_its_factors():
    model = lora()
    dict(model.body.named_parameters())["up.weight"].requires_grad = False
    with pytest.raises(SubspanError, match="was set to False"):
        model(WORDS)


def test_a_changed_base_is_noticed(tmp_path):
    model = lora()
    with torch.no_grad():
        dict(model.body.named_parameters())["up.weight"].mul_(2)
    with pytest.raises(SubspanError, match=r"θ₀ of up\.weight was changed"):
        subspan.save(model, tmp_path / "m.safetensors")


def test_from_a_seed_the_file_needs_no_weights(tmp_path):
    model = subspan.lora(Block, 10, **LORA, init_seed=4)
    scatter(model)
    subspan.save(model, tmp_path / "m.safetensors")
    assert torch.equal(subspan.load(tmp_path / "m.safetensors", Block)(WORDS), model(WORDS))
