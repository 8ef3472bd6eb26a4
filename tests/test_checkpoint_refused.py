"""A file that is not right is refused with one sentence, and the network stays as it was."""

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn

import subspan
from subspan import SubspaceModel, SubspanError, checkpoint
from subspan.checkpoint.compact import to_compact
from subspan.layers import ProductOfSumsLinear, factorize
from tests.nets import DIM, NETS, batch, build, scatter, wrap


def save(path, name="mlp", **options):
    """A checkpoint of a model that moved; its header and tensors."""
    model = scatter(wrap(name, **options))
    subspan.save(model, path)
    return checkpoint.read(path)


def snapshot(net):
    return {
        name: (p, p.detach().clone(), p.requires_grad, type(p))
        for name, p in net.named_parameters()
    }, copy.deepcopy(net.state_dict())


def assert_untouched(net, before):
    parameters, state = before
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert list(parameters) == [name for name, _ in net.named_parameters()]
    for name, (parameter, value, requires_grad, kind) in parameters.items():
        found = net.get_parameter(name)
        assert found is parameter
        assert torch.equal(found, value)
        assert (found.requires_grad, type(found)) == (requires_grad, kind)


def write(path, header, tensors, *, digest=True):
    """A file by hand: what a careful forger, or a future version, might write."""
    header = dict(header)
    header.pop("digest", None)
    if digest:
        header["digest"] = checkpoint.file.digest(header, tensors)
    text = json.dumps(header, sort_keys=True)
    safetensors.torch.save_file(tensors, path, metadata={"subspan": text})


# ---- damage and other files ----------------------------------------------------------------------


DAMAGED = "damaged|no subspan checkpoint|format"


def damaged(path, net, match=DAMAGED):
    before = snapshot(net)
    with pytest.raises(SubspanError, match=match):
        subspan.load(path, net)
    assert_untouched(net, before)


def all_damaged(folder, files):
    """Load many contents of a file into one network, which after all of them is as before."""
    net, path = build("mlp"), folder / "file"
    before = snapshot(net)
    for content in files:
        path.write_bytes(content)
        with pytest.raises(SubspanError, match=DAMAGED):
            subspan.load(path, net)
    assert_untouched(net, before)


def test_a_file_that_was_cut_anywhere_is_refused(tmp_path):
    save(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    all_damaged(tmp_path, [*(data[:length] for length in range(len(data))), data + b"\0"])


def test_a_file_with_any_byte_changed_is_refused(tmp_path):
    save(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    all_damaged(
        tmp_path,
        [
            data[:place] + bytes([byte ^ mask]) + data[place + 1 :]
            for mask in (0x01, 0x20, 0xFF)
            for place, byte in enumerate(data)
        ],
    )


def test_other_files_are_refused(tmp_path):
    net = build("mlp")
    (tmp_path / "text").write_text("once upon a time\n" * 50)
    (tmp_path / "empty").touch()
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "theirs")
    safetensors.torch.save_file(
        {"a": torch.ones(2)}, tmp_path / "tagged", metadata={"format": "pt"}
    )
    torch.save({"a": 1}, tmp_path / "pickle")
    for name in ("text", "empty", "pickle"):
        damaged(tmp_path / name, net, match="damaged or no safetensors file")
    for name in ("theirs", "tagged"):
        damaged(tmp_path / name, net, match="is no subspan checkpoint: it has no 'subspan' key")
    for path in (tmp_path, tmp_path / "missing", ""):
        damaged(path, net, match="is not a file: expected a checkpoint")
    deep = "[" * 100_000
    for text in (
        deep,
        '{"format": true}',
        "no json",
        "[]",
        "3",
        "{}",
        '{"format": "1"}',
        '{"format": 2}',
        '{"format": 1.5}',
    ):
        metadata = {"subspan": text}
        safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "odd", metadata=metadata)
        damaged(tmp_path / "odd", net)


def test_a_newer_format_is_refused(tmp_path):
    header, tensors = save(tmp_path / "m")
    write(tmp_path / "m", header | {"format": 2}, tensors)
    damaged(
        tmp_path / "m", build("mlp"), match="has format 2, this version of subspan reads up to 1"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"twist": 3}, "has 'twist' in its header, which this version of subspan does not know"),
        ({"kind": "mixture"}, "is of the kind 'mixture', which this version"),
    ],
)
def test_what_a_later_version_adds_is_refused(change, said, tmp_path):
    """It would be another network without what the field says."""
    header, tensors = save(tmp_path / "m")
    write(tmp_path / "m", header | change, tensors)
    damaged(tmp_path / "m", build("mlp"), match=said)
    if "kind" not in change:
        (tmp_path / "m").write_bytes(to_compact(header | change, tensors, 3))
        damaged(tmp_path / "m", build("mlp"), match=said)


# ---- another network -----------------------------------------------------------------------------


def edited(net, edit):
    edit(net)
    return net


OTHERS = {
    "another value": lambda: edited(build("cnn"), lambda n: n.conv.bias.data.add_(1e-6)),
    "another buffer": lambda: edited(build("cnn"), lambda n: n.norm.running_var.add_(1)),
    "another dtype": lambda: build("cnn", torch.float64),
    "another name": lambda: nn.Sequential(build("cnn")),
    "another shape": lambda: edited(
        build("cnn"), lambda n: setattr(n.conv, "weight", nn.Parameter(n.conv.weight.data.flip(-1)))
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_base_is_refused(other, tmp_path):
    save(tmp_path / "m", "cnn", train_fully="head")
    net = OTHERS[other]()
    net.get_submodule("0.head" if other == "another name" else "head").requires_grad_(False)
    damaged(tmp_path / "m", net, match="was trained from other initial weights")


def test_a_network_of_another_size_is_refused(tmp_path):
    save(tmp_path / "m", "cnn")
    damaged(tmp_path / "m", build("mlp"), match="is of a network of 628 weights, this one has 212")


def test_other_frozen_parameters_are_refused(tmp_path):
    """P would meet other weights, and the result be noise."""
    net = build("mlp")
    net[0].weight.requires_grad_(False)
    subspan.save(scatter(SubspaceModel(net, DIM)), tmp_path / "m")
    damaged(tmp_path / "m", build("mlp"), match="with other parameters frozen")


@pytest.mark.parametrize("name", ["cnn", "lstm", "raw"])
def test_a_network_to_be_drawn_anew_is_untouched_if_it_does_not_fit(name, tmp_path):
    model = SubspaceModel.from_seed(NETS[name], DIM, init_seed=2)
    subspan.save(model, tmp_path / "m")
    header, tensors = checkpoint.read(tmp_path / "m")
    write(tmp_path / "m", header | {"fingerprint": "0" * 32}, tensors)
    net = build(name)
    damaged(tmp_path / "m", net, match="other initial weights")
    assert torch.equal(net.eval()(batch(name)), build(name).eval()(batch(name)))


def test_a_whole_network_of_other_shapes_is_refused(tmp_path):
    subspan.save(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), tmp_path / "m")
    for net in (
        nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)),
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)),
    ):
        if sum(p.numel() for p in net.parameters()) != 58:
            net[0].bias = nn.Parameter(torch.ones(58 - 54 + 4))
        damaged(tmp_path / "m", net, match="of another network|is of a network of")


def test_what_is_given_must_make_a_network(tmp_path):
    save(tmp_path / "plain")
    subspan.save(SubspaceModel.from_seed(NETS["mlp"], 3), tmp_path / "drawn")
    for name in ("plain", "drawn"):
        with pytest.raises(SubspanError, match="expected a function"):
            subspan.load(tmp_path / name, lambda: 3)
    with pytest.raises(SubspanError):
        subspan.load(tmp_path / "plain", SubspaceModel(build("mlp"), 3))
    with pytest.raises(SubspanError, match="no values yet"):
        subspan.load(tmp_path / "plain", nn.LazyLinear(3))


# ---- forgeries: the digest is right, the content is not ------------------------------------------

RECIPES = [
    {"projection": "nothing"},
    {"projection": []},
    {"unknown": 3},
    {"s": 4},
    {"net": 1},
    {"dim": "12"},
    {"dim": 10**9},
    {"dim": [12, 1]},
    {"dim": None},
    {"seed": -1},
    {"seed": "a"},
    {"allocation": []},
    {"allocation": "x"},
    {"compartments": 5},
    {"compartments": [1]},
    {"compartments": [["(", 3]]},
    {"compartments": "uniform:9999999"},
    {"targets": 5},
    {"targets": [3]},
    {"targets": "x"},
    {"train_fully": {"a": 1}},
    {"exclude": ".*"},
    {"train_fully": ".*"},
]


@pytest.mark.parametrize("change", RECIPES, ids=str)
@pytest.mark.parametrize("drawn", [False, True])
def test_recipes_that_cannot_be_used_are_refused(change, drawn, tmp_path):
    if drawn:
        model = SubspaceModel.from_seed(NETS["lstm"], DIM)
    else:
        model = SubspaceModel(build("lstm"), DIM)
    subspan.save(model, tmp_path / "m")
    header, tensors = checkpoint.read(tmp_path / "m")
    write(tmp_path / "m", header | {"recipe": header["recipe"] | change}, tensors)
    damaged(tmp_path / "m", build("lstm"), match="does not fit this network: |other parameters")


def test_another_padding_row_is_refused(tmp_path):
    """Its θ would be another one, although θ₀ and the coordinates are the same."""

    def words(padding: int | None) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
        net[0].padding_idx = padding
        return net

    subspan.save(subspan.SubspaceModel(words(1), 5), tmp_path / "m")
    subspan.load(tmp_path / "m", words(1))
    for other in (2, None):
        net = words(other)
        with pytest.raises(SubspanError, match=r"another padding row of 0\.weight"):
            subspan.load(tmp_path / "m", net)
        assert subspan.SubspaceModel.of(net) is None


@pytest.mark.parametrize("bits", [None, 4])
def test_other_fixed_matrices_of_theta0_are_refused(bits, tmp_path):
    """Coefficients may be the same numbers and mean another weight."""

    def drawn(kind):
        torch.manual_seed(0)
        return nn.Sequential(ProductOfSumsLinear(12, 12, [{"kind": kind, "p": 30}]))

    model = SubspaceModel(drawn("rank1"), 5)
    with torch.no_grad():
        model.coordinates["global"].normal_()
    subspan.save(model, tmp_path / "m", bits=bits)
    subspan.load(tmp_path / "m", drawn("rank1"))
    with pytest.raises(SubspanError, match="around products of sums of other fixed matrices"):
        subspan.load(tmp_path / "m", drawn("gaussian"))
    SubspaceModel(drawn("rank1"), 5).load_state_dict(model.state_dict())
    with pytest.raises(SubspanError, match="compartments or the fixed matrices of layers"):
        SubspaceModel(drawn("gaussian"), 5).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"kind": None},
        {"kind": []},
        {"recipe": None},
        {"recipe": []},
        {"weights": "many"},
        {"init_seed": "a"},
        {"init_seed": -1},
        {"fingerprint": 3},
        {"fingerprint": "0" * 8, "parameters": "1" * 32},
        {"fingerprint": "z" * 32},
        {"fingerprint": ""},
        {"layout": "0" * 32},
        {"layout": None},
        {"extra": []},
        {"base": "a"},
        {"kept": 3},
        {"lora": []},
        {"quantised": 3},
        {"parameters": 3},
    ],
    ids=str,
)
def test_headers_that_cannot_be_used_are_refused(change, tmp_path):
    header, tensors = save(tmp_path / "m")
    write(tmp_path / "m", header | change, tensors)
    damaged(
        tmp_path / "m", build("mlp"), match="fields of its header|kind 'other'|other|seed|print is"
    )
    for field in ("kind", "recipe", "weights", "init_seed", "fingerprint", "layout", "extra"):
        write(tmp_path / "m", {k: v for k, v in header.items() if k != field}, tensors)
        damaged(tmp_path / "m", build("mlp"), match="fields of its header are wrong")
    write(tmp_path / "m", header, tensors, digest=False)
    damaged(tmp_path / "m", build("mlp"), match="its digest differs")


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"coordinates": torch.ones(11)},
        {"coordinates": torch.ones(13)},
        {"coordinates": torch.ones(12, 1)},
        {"coordinates": torch.ones(12), "body.head.weight": torch.ones(4, 144)},
        {"coordinates": torch.ones(12), "body.head.bias": torch.ones(1)},
        {"coordinates": torch.ones(12), "body.head.bias": torch.ones(4), "other": torch.ones(1)},
        {"coordinates": torch.ones(12), "body.head.bias": torch.ones(4)}
        | {"body.norm.running_var": torch.ones(1)},
    ],
    ids=lambda tensors: str({n: list(t.shape) for n, t in tensors.items()}),
)
def test_tensors_that_do_not_fit_are_refused(tensors, tmp_path):
    header, _ = save(tmp_path / "m", "cnn", train_fully="head.bias")
    write(tmp_path / "m", header, tensors)
    damaged(tmp_path / "m", build("cnn"), match="the checkpoint is of another network: ")
    model = scatter(wrap("cnn", train_fully="head.bias"))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(SubspanError, match=r"has shape .* in the file"):
        checkpoint.restore(model, tensors)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [{"0.U": torch.ones(3, 2)}, {"1.weight": torch.ones(3)}, {"other": torch.ones(1)}],
    ids=str,
)
def test_layers_are_those_of_before_if_tensors_do_not_fit(change, tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 4)))

    subspan.save(factorize(make(), rank=2), tmp_path / "m")
    header, tensors = checkpoint.read(tmp_path / "m")
    write(tmp_path / "m", header, tensors | change)
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    layers = dict(net.named_modules())
    damaged(tmp_path / "m", net, match="the checkpoint is of another network: ")
    assert dict(net.named_modules()) == layers
    net[0](torch.ones(8)).sum().backward()
    optimizer.step()  # of layers that have their places again


def test_factors_are_those_of_before_if_tensors_do_not_fit(tmp_path):
    """A network that has other ranks takes those of the file when all else is known to fit."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
    subspan.save(factorize(copy.deepcopy(net), rank=3), tmp_path / "m")
    header, tensors = checkpoint.read(tmp_path / "m")
    write(tmp_path / "m", header, tensors | {"1.running_mean": torch.ones(3)})
    factorize(net, rank=2)
    before = net[0].weight.clone()
    damaged(tmp_path / "m", net, match="the checkpoint is of another network: 1.running_mean")
    assert net[0].rank == 2
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("wrapped", [True, False])
def test_what_no_file_of_tensors_holds_is_not_left_out(wrapped, tmp_path):
    class Counts(nn.Linear):
        calls = None

        def get_extra_state(self):
            return self.calls

        def set_extra_state(self, state):
            self.calls = state

    net = nn.Sequential(Counts(4, 4))
    model = SubspaceModel(net, 3) if wrapped else net
    subspan.save(model, tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    net[0].calls = 3
    with pytest.raises(
        SubspanError, match=r"0 \(Counts\) has state of its own \(get_extra_state\)"
    ):
        subspan.save(model, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert model.state_dict()
