"""Networks whose weights bitsandbytes or torchao keep quantised, trained in a subspace."""

import copy
import gc
import hashlib
import pickle
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import subspan
from subspan import SubspaceModel, SubspanError, count
from subspan.checkpoint import inspect
from subspan.subspace import formed, quantised
from tests.nets import scatter

BITSANDBYTES = ("nf4", "nf4-plain", "fp4", "int8")
TORCHAO = ("torchao-int8", "torchao-int4")
KINDS = BITSANDBYTES + TORCHAO
KIND_NAMES = {
    "nf4": "bitsandbytes-nf4",
    "nf4-plain": "bitsandbytes-nf4",
    "fp4": "bitsandbytes-fp4",
    "int8": "bitsandbytes-int8",
    "torchao-int8": "torchao-Int8Tensor",
    "torchao-int4": "torchao-IntxUnpackedToInt8Tensor",
}
NEEDS_BITSANDBYTES = "bitsandbytes is not installed: pip install bitsandbytes (43 MB)"
NEEDS_TORCHAO = "torchao is not installed: pip install torchao (4 MB)"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Net(nn.Module):
    """An embedding, two layers that will be quantised, and a norm."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 64, dtype=dtype)
        self.fc = nn.Linear(64, 96, dtype=dtype)
        self.norm = nn.LayerNorm(96, dtype=dtype)
        self.out = nn.Linear(96, 32, bias=False, dtype=dtype)

    def forward(self, x):
        return self.out(self.norm(self.fc(self.words(x))).relu())


def quantise(net, kind, names=("fc", "out")):
    """Quantise layers of a network in place."""
    if kind in TORCHAO:
        configs = pytest.importorskip("torchao.quantization", reason=NEEDS_TORCHAO)
        config = (
            configs.Int8WeightOnlyConfig()
            if kind == "torchao-int8"
            else configs.IntxWeightOnlyConfig(torch.int4)
        )
        configs.quantize_(net, config, filter_fn=lambda _, path: path in names)
        return net
    bnb = pytest.importorskip("bitsandbytes", reason=NEEDS_BITSANDBYTES)
    for name in names:
        layer = net.get_submodule(name)
        sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(
                *sizes, bias, quant_type=kind[:3], compress_statistics=kind == "nf4"
            )
        new.load_state_dict(layer.state_dict())
        net.set_submodule(name, new.to(layer.weight.dtype))
    return net.to("cpu")


def network(kind, dtype=torch.float32):
    return quantise(Net(dtype), kind)


def dense_weight(layer, kind):
    """The library's own dequantised weight."""
    if kind in TORCHAO:
        return layer.weight.dequantize()
    import bitsandbytes as bnb

    if kind == "int8":
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales)
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def dense(kind, dtype=torch.float32):
    """An ordinary network with the dequantised weights."""
    packed, net = network(kind, dtype), Net(dtype)
    with torch.no_grad():
        for name in ("fc", "out"):
            net.get_submodule(name).weight.copy_(dense_weight(packed.get_submodule(name), kind))
    return net


def bytes_of(net):
    """Everything that quantised weights are made of."""
    parts = {}
    for name, module in net.named_modules():
        if name in ("fc", "out"):
            found = quantised.read_quantised(module, "weight")
            parts |= {f"{name}.{part}": tensor.clone() for part, tensor in found.parts.items()}
    return parts


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


X = torch.arange(11)


def wrapped(kind, dtype=torch.float32, **options):
    return scatter(SubspaceModel(network(kind, dtype), 20, **options))


# ---- the function and its gradient ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_the_dequantised_one_in_a_subspace(kind):
    model, plain = wrapped(kind), SubspaceModel(dense(kind), 20)
    plain.load_state_dict({**model.state_dict(), "fingerprint": plain.fingerprint})
    out, want = model(X), plain(X)
    assert torch.allclose(out, want, atol=1e-5)
    for loss in (out, want):
        loss.square().sum().backward()
    (w,), (v,) = model.parameters(), plain.parameters()
    assert torch.allclose(w.grad, v.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.coordinates["global"].zero_()
    assert torch.allclose(model(X), dense(kind)(X), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_inputs_of_a_layer_through_its_weight(kind):
    model = wrapped(kind)
    x = torch.randn(3, 64, requires_grad=True)
    model.body.fc(x).sum().backward()
    assert torch.allclose(x.grad, model.body.fc.weight.sum(0).expand(3, 64), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_those_of_float32_rounded_once(kind, dtype):
    model = wrapped(kind, dtype)
    base = dense_weight(network(kind, dtype).fc, kind)
    (row,) = (row for row in model.summary().rows if row.tensor == "fc.weight")
    start = Net().words.weight.numel()
    w = model.coordinates["global"].detach()
    along = model.projections[0].matvec(w, rows=range(start, start + row.weights)).view(96, 64)
    want = (base.float() + along).to(dtype)
    x = torch.eye(64, dtype=dtype)
    with torch.no_grad():
        model.body.fc._parameters["bias"].data.zero_()
        bias = model.body.fc.bias
        # In a call of the network, as the layer's forward reads it.
        seen = []
        model.body.fc.register_forward_hook(lambda m, args, out: seen.append(m.forward(x)))
        model(X)
    assert torch.equal((seen[0] - 0).T, (functional.linear(x, want, bias)).T)
    assert model(X).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind):
    model = SubspaceModel(network(kind), 60)
    before, target = bytes_of(model.body), torch.randn(11, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        loss = (model(X) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert same(bytes_of(model.body), before)


def test_a_layer_computes_in_its_own_precision_or_in_that_of_autocast():
    model = wrapped("nf4")
    model.body.fc.compute_dtype = torch.bfloat16
    x = torch.randn(3, 64)
    want = functional.linear(
        x.bfloat16(), model.body.fc.weight.bfloat16(), model.body.fc.bias.bfloat16()
    )
    out = model.body.fc(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, want.float())
    model.body.fc.compute_dtype = None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.body.fc(x), want.float())


# ---- what it costs -------------------------------------------------------------------------------


def dense_tensors():
    return [
        t
        for t in gc.get_objects()
        if type(t) is torch.Tensor and t.is_floating_point() and t.shape in ((96, 64), (32, 96))
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dense_copy_is_kept_of_a_large_network(kind, dtype, monkeypatch):
    monkeypatch.setattr(formed, "KEPT", 0)
    model = wrapped(kind, dtype)
    seen, made = [], quantised.QuantisedTensor.dense

    def watched(self):
        out = made(self)
        seen.append(weakref.ref(out))
        return out

    monkeypatch.setattr(quantised.QuantisedTensor, "dense", watched)
    gc.freeze()  # what was there before is not gone over again
    kept = sum(t.nbytes for t in bytes_of(model.body).values())
    assert kept < (96 * 64 + 96 * 32) * 1.2  # a byte each at most, and scales
    before = {id(t) for t in dense_tensors()}
    out = model(X)
    gc.collect()
    forward = len(seen)
    assert forward >= 2
    assert all(alive() is None for alive in seen)
    assert not [t for t in dense_tensors() if id(t) not in before]
    out.sum().backward()
    assert len(seen) > forward  # again in the backward pass
    want = wrapped(kind, dtype)
    want(X).sum().backward()
    (w,), (v,) = model.parameters(), want.parameters()
    assert torch.allclose(w.grad, v.grad, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_changes_between_forward_and_backward_is_an_error(kind, monkeypatch):
    monkeypatch.setattr(formed, "KEPT", 0)
    model = wrapped(kind)
    out = model(X)
    next(iter(quantised.read_quantised(model.body.out, "weight").parts.values())).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        out.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", ["tensor", "uniform:3", "layer"])
def test_weights_are_counted_and_not_bytes(kind, rules):
    model = wrapped(kind, compartments=rules)
    rows = {row.tensor: row for row in model.summary().rows}
    assert rows["fc.weight"].shape == (96, 64)
    assert rows["out.weight"].weights == 96 * 32
    total = sum(p.numel() for p in Net().parameters())
    assert sum(part.weights for part in model.compartments) == total
    assert model.summary().weights == count(model).dense == count(network(kind)).dense == total
    assert torch.allclose(model(X), model.merge()(X), atol=1e-5)


# ---- files and copies ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_loaded_into_a_freshly_quantised_network(kind, tmp_path):
    model, path = wrapped(kind), tmp_path / "model.safetensors"
    model(X)
    subspan.save(model, path)
    assert inspect(path)["quantised"] == {KIND_NAMES[kind]: 2}
    assert torch.equal(subspan.load(path, network(kind))(X), model(X))
    with pytest.raises(SubspanError, match=f"2 of {KIND_NAMES[kind]}.*no quantised tensors"):
        subspan.load(path, Net())
    other = network(kind)
    next(iter(quantised.read_quantised(other.fc, "weight").parts.values())).add_(1)
    with pytest.raises(SubspanError, match="other initial weights"):
        subspan.load(path, other)
    scales = network(kind)
    list(quantised.read_quantised(scales.fc, "weight").parts.values())[1].mul_(2)
    with pytest.raises(SubspanError, match="other initial weights"):
        subspan.load(path, scales)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_is_as_the_format_says(kind):
    def tensors_digest(tensors):
        text = hashlib.sha256()
        for name, tensor in tensors.items():
            text.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            text.update(
                tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        return text.hexdigest()[:32]

    net = network(kind)
    sha = hashlib.sha256()
    for name, parameter in net.named_parameters():
        layer = net.get_submodule(name.rpartition(".")[0])
        if name not in ("fc.weight", "out.weight"):
            sha.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            sha.update(parameter.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
            continue
        shape = (96, 64) if name == "fc.weight" else (32, 96)
        text, parts = KIND_NAMES[kind], {}
        if kind in TORCHAO:
            parts = {n: getattr(parameter, n) for n in ("qdata", "scale", "zero_point")}
        elif kind == "int8":
            parts = {"packed": parameter.data, "scales": parameter.SCB}
        else:
            state = parameter.quant_state
            text += " blocks of 64"
            parts = {"packed": parameter.data, "absmax": state.absmax, "code": state.code}
            if kind == "nf4":
                text += ", nested blocks of 256"
                parts |= {"offset": state.offset, "nested.absmax": state.state2.absmax}
                parts["nested.code"] = state.state2.code
        sha.update(f"{name} torch.float32 {shape}\n{text}\n".encode())
        parts = {f"{name}.{part}": t for part, t in parts.items() if t is not None}
        sha.update(tensors_digest(parts).encode())
        assert layer is not None
    assert SubspaceModel(net, 20).base_fingerprint == sha.hexdigest()[:32]


@pytest.mark.parametrize("kind", KINDS)
def test_states_have_coordinates_and_parts_have_dense_weights(kind):
    model = wrapped(kind)
    model(X)
    assert list(model.state_dict()) == ["coordinates.global", "fingerprint"]
    assert list(model.body.state_dict()) == ["subspan_global", "subspan_fingerprint"]
    state = model.body.fc.state_dict()
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], model.body.fc.weight)
    other = SubspaceModel(network(kind), 20)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    other = SubspaceModel(network(kind), 20)
    other.body.load_state_dict(model.merge().state_dict())  # as coordinates
    assert torch.allclose(other(X), model(X), atol=1e-5)
    with pytest.raises(SubspanError, match="is quantised in this state_dict"):
        other.body.load_state_dict(network(kind).state_dict(), strict=False)


@pytest.mark.parametrize("kind", KINDS)
def test_unwrap_gives_the_quantised_network_back(kind):
    net = network(kind)
    before, parameter, was = bytes_of(net), net.fc.weight, type(net.fc.weight)
    flags, attributes = vars(net.fc).keys(), dict(vars(net.fc))
    out = net(X)
    model = wrapped(kind)
    model = scatter(SubspaceModel(net, 20))
    model(X).sum().backward()
    assert model.unwrap() is net
    assert net.fc.weight is parameter
    assert type(parameter) is was
    assert not {"home", "kind"} & vars(parameter).keys()
    assert same(bytes_of(net), before)
    assert vars(net.fc).keys() == flags
    assert vars(net.fc)["training"] == attributes["training"]
    assert torch.equal(net(X), out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_makes_ordinary_layers(kind, dtype):
    model = wrapped(kind, dtype)
    merged = model.merge()
    for layer in (merged.fc, merged.out):
        assert type(layer) is nn.Linear
        assert type(layer.weight) is nn.Parameter
        assert layer.weight.dtype == dtype
        assert vars(layer).keys() == vars(nn.Linear(2, 2)).keys()
        assert not layer._load_state_dict_pre_hooks
    assert torch.allclose(merged(X).float(), model(X).float(), atol=1e-5)
    assert torch.equal(merged.fc.weight, model.body.fc.weight.to(dtype))
    assert torch.equal(pickle.loads(pickle.dumps(merged))(X), merged(X))
    scatter(SubspaceModel(merged, 20, targets=[".*"]))(X).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    model = wrapped(kind)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    with torch.no_grad():
        twin.coordinates["global"].add_(1)
        next(iter(quantised.read_quantised(twin.body.fc, "weight").parts.values())).add_(1)
    assert torch.equal(model(X), wrapped(kind)(X))
    assert not torch.equal(twin(X), model(X))
    if kind in BITSANDBYTES:  # torchao's networks cannot be pickled
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(X), model(X))
        twin.state_dict()
        assert same(bytes_of(twin.body), bytes_of(model.body))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("through", ["handle", "network"])
def test_an_average_leaves_packed_numbers_alone(kind, through):
    """A moving average of equal integers is computed in float32, and cut to integers again."""
    model = wrapped(kind)
    net = model if through == "handle" else model.body
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        averaged.update_parameters(net)
    assert torch.equal(averaged(X), model(X))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_of_the_base_alone(kind):
    model, parameter = wrapped(kind), network(kind).fc.weight
    base = model.body.get_parameter("fc.weight")
    assert type(base.detach().clone()) is type(parameter.detach().clone()) or kind in BITSANDBYTES
    twin = copy.deepcopy(base)
    assert isinstance(twin, subspan.subspace.theta0.Base)
    assert twin.home[1] == "fc.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_moving_and_converting(kind):
    model = wrapped(kind)
    out = model(X)
    assert torch.equal(model.cpu().to("cpu").float()(X), out)
    model.state_dict()
    assert isinstance(model.body.fc._parameters["weight"], subspan.subspace.theta0.Base)
    if kind in BITSANDBYTES:
        assert torch.allclose(model.bfloat16()(X).float(), out, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_the_base_is_noticed(kind):
    model = wrapped(kind)
    model(X)
    model.state_dict()
    next(iter(quantised.read_quantised(model.body.fc, "weight").parts.values())).add_(1)
    with pytest.raises(SubspanError, match=r"θ₀ of fc\.weight was changed"):
        model.state_dict()


# ---- other programs ------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(
    "kind",  # one of each library's ways to keep numbers; the others go the same way
    [
        pytest.param(k, marks=() if k in ("nf4", "int8", "torchao-int4") else pytest.mark.slow)
        for k in KINDS
    ],
)
def test_compilers_and_exporters(kind):
    model = wrapped(kind)
    out = model(X)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(X), out, atol=1e-5)
    compiled(X).sum().backward()
    torch.compiler.reset()
    exported = torch.export.export(model, (X,)).module()
    assert torch.allclose(exported(X), out, atol=1e-5)
    assert torch.allclose(torch.jit.trace(model, (X,))(X), out, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_calls(kind):
    model = wrapped(kind)
    zero = {"subspan_global": torch.zeros(20)}
    out = torch.func.functional_call(model.body, zero, (X,))
    assert torch.allclose(out, dense(kind)(X), atol=1e-5)
    every = {name: p.detach() for name, p in model.body.named_parameters()}
    assert torch.equal(torch.func.functional_call(model.body, every, (X,)), model(X))
    head = torch.func.functional_call(
        model.body.out, {"weight": torch.ones(32, 96)}, torch.ones(96)
    )
    assert torch.equal(head, torch.full((32,), 96.0))


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_transformers(kind, tmp_path):
    from tests.pretrained import llama, transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    llama(vocab_size=50, num_key_value_heads=2, **sizes).save_pretrained(tmp_path / "base")
    network(kind)  # skips where the library is missing
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        how = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "int8":
        how = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load = transformers.LlamaForCausalLM.from_pretrained
    net = load(tmp_path / "base", quantization_config=how, device_map="cpu")
    model = scatter(SubspaceModel(net, 50)).eval()
    ids = torch.randint(50, (2, 7))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    (grad,) = (w.grad.clone() for w in model.parameters())
    model.gradient_checkpointing_enable()
    model.train().zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert torch.allclose(model.coordinates["global"].grad, grad, atol=1e-6)
    with pytest.raises(SubspanError, match="save_pretrained would call dense weights quantised"):
        model.save_pretrained(tmp_path / "wrapped")
    merged = model.eval().merge()
    assert getattr(merged.config, "quantization_config", None) is None
    assert not getattr(merged, "is_quantized", False)
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert torch.allclose(again(input_ids=ids).logits, out.logits, atol=1e-5)
    assert net.is_quantized  # as it was


# ---- what is trained, and what is refused --------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_layers_that_are_not_trained_stay_as_they_are(kind, tmp_path):
    net = network(kind).eval()
    cls, classes = type(net.fc), type(net.fc.weight)
    model = scatter(SubspaceModel(net, 20, targets=["out.weight", "norm"]))
    assert type(net.fc) is cls
    assert type(net.fc.weight) is classes
    with torch.no_grad():
        out = model(X)
    model.state_dict()  # bitsandbytes has not packed it anew meanwhile
    assert model.weights()["fc.weight"].shape == (96, 64)
    merged = model.merge()
    assert type(merged.fc) is cls
    assert type(merged.out) is nn.Linear
    assert torch.allclose(merged(X), out, atol=1e-2)
    subspan.save(model, tmp_path / "model.safetensors")
    again = subspan.load(tmp_path / "model.safetensors", network(kind)).eval()
    assert torch.equal(again(X), out)
    before = vars(net.fc).get("support_avx512bf16_for_cpu")
    model.unwrap()
    if kind in ("nf4", "fp4"):
        import bitsandbytes as bnb

        assert not before
        assert net.fc.support_avx512bf16_for_cpu == bnb.functional.has_avx512bf16()
    with pytest.raises(SubspanError, match=r"fc\.weight is quantised .*cannot be trained direc"):
        SubspaceModel(network(kind), 20, train_fully="fc")
    with pytest.raises(SubspanError, match=r"is quantised .*save state_dict"):
        subspan.save(network(kind), tmp_path / "full.safetensors")
    with pytest.raises(SubspanError, match=r"is quantised .*initial weights cannot be drawn"):
        SubspaceModel.from_seed(lambda: network(kind), 20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", ["network", "handle"])
def test_states_go_without_quantised_layers_that_are_not_trained(kind, through):
    """Neither their numbers, nor the scales that bitsandbytes has beside them."""
    options = {"targets": ["out.weight", "norm"], "train_fully": "fc.bias"}
    model, other = wrapped(kind, **options), SubspaceModel(network(kind), 20, **options)
    ours, theirs = (m if through == "handle" else m.body for m in (model, other))
    state = ours.state_dict()
    assert sum(value.numel() for value in state.values()) == 20 + 96 + 32
    theirs.load_state_dict(state)
    assert torch.equal(other(X), model(X))
    assert same(bytes_of(other.body), bytes_of(model.body))


def test_flags_say_nothing_of_weights_that_cannot_require_a_gradient():
    net = network("nf4").requires_grad_(False)
    assert [row.tensor for row in SubspaceModel(net, 20).summary().rows if row.coordinates] == [
        "fc.weight",
        "out.weight",
    ]


def test_layers_that_bitsandbytes_has_not_quantised_are_refused():
    bnb = pytest.importorskip("bitsandbytes", reason=NEEDS_BITSANDBYTES)
    with pytest.raises(SubspanError, match=r"0\.weight is not quantised yet.*net\.to\('cpu'\)"):
        SubspaceModel(nn.Sequential(bnb.nn.Linear4bit(64, 64)), 20)
    layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    with pytest.raises(SubspanError, match="is not quantised yet"):
        SubspaceModel(nn.Sequential(layer), 20)
    with pytest.raises(SubspanError, match="has_fp16_weights=False"):
        SubspaceModel(nn.Sequential(bnb.nn.Linear8bitLt(64, 64)), 20)
    embedding = bnb.nn.Embedding4bit(64, 64).to("cpu")
    net = nn.Sequential(embedding, nn.Linear(64, 4))
    with pytest.raises(SubspanError, match="0 is a Embedding4bit of bitsandbytes, whose"):
        SubspaceModel(net, 20)


def test_weights_that_bitsandbytes_packed_for_the_processor_are_refused():
    net = network("nf4").eval()
    net.fc.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(SubspanError, match=r"fc\.weight was packed anew.*before it runs"):
        SubspaceModel(net, 20)


def test_torchao_that_quantises_activations_is_refused():
    configs = pytest.importorskip("torchao.quantization", reason=NEEDS_TORCHAO)
    net = Net()
    configs.quantize_(net, configs.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(SubspanError, match=r"fc\.weight quantises activations, too"):
        SubspaceModel(net, 20)
    SubspaceModel(net, 20, exclude=["fc", "out"])(X)


@pytest.mark.parametrize("names", [["fc"], ["out"]])  # one has a bias
@pytest.mark.parametrize(("was", "now"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_torchao_of_a_network_that_was_converted_is_refused(names, was, now):
    dtype, kind = getattr(torch, now), "torchao-int8"
    net = quantise(Net(getattr(torch, was)), kind, names).to(dtype)
    with pytest.raises(SubspanError, match=rf"\.weight was quantised by torchao as {was} and its"):
        SubspaceModel(net, 20)
    SubspaceModel(net, 20, exclude=names)(X)
    SubspaceModel(quantise(Net(dtype), kind, names), 20)(X)
    follows = quantise(Net(getattr(torch, was)), "torchao-int4", names).to(dtype)
    want = follows(X)
    torch.testing.assert_close(SubspaceModel(follows, 20)(X), want, rtol=0.05, atol=0.05)


class GPTQ(nn.Module):
    """A layer as GPTQ and AWQ have it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 16, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 16))

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], 16)


def awq():
    module = types.ModuleType("awq.modules.linear")
    cls = type("WQLinear_GEMM", (GPTQ,), {"__module__": module.__name__})
    return cls()


@pytest.mark.parametrize("layer", [GPTQ, awq])
def test_gptq_awq_and_the_like_are_refused_by_name(layer):
    layer = layer()
    net = nn.Sequential(nn.Linear(8, 64), layer, nn.Linear(16, 4))
    names, cls = list(net.state_dict()), type(layer).__name__
    match = f"1 is a {cls} .*(GPTQ|AWQ).*cannot dequantise: leave it out .targets= or exclude="
    for options in ({}, {"targets": ["0", "1"]}, {"targets": ".*"}):
        with pytest.raises(SubspanError, match=match):
            SubspaceModel(net, 20, **options)
    assert list(net.state_dict()) == names
    assert type(net[0]) is nn.Linear
    for options in ({"exclude": "1"}, {"targets": ["0", "2"]}):
        model = SubspaceModel(net, 20, **options)
        assert model(torch.ones(2, 8)).shape == (2, 4)
        assert type(net[1]) is type(layer)
        model.unwrap()


def test_offloaded_networks_are_refused():
    hooks = pytest.importorskip("accelerate.hooks")
    net = Net()
    hooks.add_hook_to_module(net.fc, hooks.AlignDevicesHook("cpu", offload=True))
    with pytest.raises(SubspanError, match=r"fc\.weight is offloaded.*without offloading"):
        SubspaceModel(net, 20)


class CopiesItself(nn.Linear):
    """A layer that copies its attributes one by one."""

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin


def test_a_layer_may_copy_itself():
    configs = pytest.importorskip("torchao.quantization", reason=NEEDS_TORCHAO)
    net = nn.Sequential(CopiesItself(64, 32))
    configs.quantize_(net, configs.Int8WeightOnlyConfig())
    model = scatter(SubspaceModel(net, 20))
    twin, x = copy.deepcopy(model), torch.randn(3, 64)
    assert isinstance(twin.body[0]._parameters["weight"], subspan.subspace.theta0.Base)
    assert torch.equal(twin(x), model(x))
