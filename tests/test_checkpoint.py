import copy
import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from torch import nn

import subspan
from subspan import SubspaceModel, SubspanError, checkpoint
from subspan.layers import factorize
from subspan.subspace.parameters import digest_tensors
from tests.forks import python_code
from tests.nets import COMPARTMENTS, DIM, NETS, batch, build, scatter, wrap

every_net = pytest.mark.parametrize("name", NETS)


def trained(name, compartments="global", **options):
    model = scatter(wrap(name, compartments, **options))
    model(batch(name))  # BatchNorm has seen a batch
    return model.eval()


# ---- there and back ------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("compartments", COMPARTMENTS, ids=str)
def test_what_is_loaded_is_what_was_saved(name, compartments, tmp_path):
    model, x, file = trained(name, compartments), batch(name), tmp_path / "m.safetensors"
    size = subspan.save(model, file)
    assert size == file.stat().st_size
    for net in (build(name), lambda: build(name)):
        loaded = subspan.load(file, net).eval()
        assert torch.equal(loaded(x), model(x))
        assert loaded.compartments == model.compartments
        assert loaded.recipe == model.recipe
        state = model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"projection": "sparse", "s": "sqrt_d", "seed": (1 << 64) - 1},
        {"projection": "fastfood", "targets": ["conv", "norm"], "exclude": "norm.bias"},
        {"train_fully": "head"},
        {"train_fully": ["head", "norm"], "targets": "conv", "allocation": "size"},
    ],
)
def test_every_option_is_in_the_file(options, tmp_path):
    model, file = trained("cnn", **options), tmp_path / "m.safetensors"
    subspan.save(model, file, extra={"note": "ä", "table": {10: 1, 9: [None, 0.1]}})
    loaded = subspan.load(file, build("cnn")).eval()
    assert torch.equal(loaded(batch("cnn")), model(batch("cnn")))
    assert loaded.recipe == model.recipe
    found = checkpoint.inspect(file)
    assert found["extra"] == {"note": "ä", "table": {"10": 1, "9": [None, 0.1]}}
    assert found["bytes"] == file.stat().st_size
    assert found["tensors"]["coordinates"] == [DIM]
    assert {n for n in found["tensors"] if n.startswith("body.head")} == {
        f"body.{n}" for n in model.fully_trained() if n.startswith("head")
    }


def test_a_head_that_is_trained_fully_may_start_from_anything(tmp_path):
    """The file brings it: a fresh one has other initial weights each time."""
    model = trained("cnn", train_fully="head")
    subspan.save(model, tmp_path / "m")
    net = build("cnn")
    net.head.reset_parameters()
    loaded = subspan.load(tmp_path / "m", net).eval()
    assert torch.equal(loaded(batch("cnn")), model(batch("cnn")))


def test_the_order_of_rules_survives(tmp_path):
    """Sorted JSON would put ".*" first, which takes everything."""
    rules = {"weight": 7, ".*": 5}
    model = SubspaceModel(build("mlp"), compartments=rules)
    subspan.save(scatter(model), tmp_path / "m")
    assert [part.dim for part in subspan.load(tmp_path / "m", build("mlp")).compartments] == [7, 5]


def test_only_buffers_that_changed_are_stored(tmp_path):
    model = SubspaceModel(build("cnn"), DIM)
    subspan.save(model, tmp_path / "m")
    assert checkpoint.inspect(tmp_path / "m")["tensors"] == {"coordinates": [DIM]}
    model(batch("cnn"))
    subspan.save(model, tmp_path / "m")
    assert checkpoint.inspect(tmp_path / "m")["tensors"] == {
        "coordinates": [DIM],
        "body.norm.running_mean": [4],
        "body.norm.running_var": [4],
        "body.norm.num_batches_tracked": [],
    }


def test_names_of_the_network_do_not_meet_ours(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.coordinates = nn.Parameter(torch.ones(2))
            self.body = nn.Linear(2, 2)
            self.register_buffer("fingerprint", torch.ones(1))

        def forward(self, x):
            return self.fingerprint * self.body(x * self.coordinates)

    net = Net()
    plain = copy.deepcopy(net)
    model = scatter(SubspaceModel(net, 3, train_fully="coordinates"))
    subspan.save(model, tmp_path / "m")
    loaded = subspan.load(tmp_path / "m", plain)
    assert torch.equal(loaded(torch.ones(1, 2)), model(torch.ones(1, 2)))


@every_net
def test_ordinary_networks_are_stored_whole(name, tmp_path):
    net, file = scatter(build(name)).eval(), tmp_path / "m.safetensors"
    subspan.save(net, file)
    found = checkpoint.inspect(file)
    assert (found["kind"], found["weights"]) == ("full", sum(p.numel() for p in net.parameters()))
    other = build(name)
    loaded = subspan.load(file, other).eval()
    assert loaded is other
    assert torch.equal(loaded(batch(name)), net(batch(name)))
    if name == "tied":
        assert "output.weight" not in found["tensors"]
        assert loaded.output.weight is loaded.embedding.weight


def test_restore_puts_tensors_into_a_living_model(tmp_path):
    for name in ("cnn", "tied"):
        for model in (trained(name, train_fully=".*bias"), scatter(build(name)).eval()):
            y = model(batch(name))
            subspan.save(model, tmp_path / "m")
            scatter(model)
            assert not torch.equal(model(batch(name)), y)
            checkpoint.restore(model, checkpoint.read(tmp_path / "m")[1])
            assert torch.equal(model(batch(name)), y)


# ---- from a seed ---------------------------------------------------------------------------------


class LeNet(nn.Sequential):
    """61,706 weights."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )


class Deep(nn.Sequential):
    """Twenty layers with names as long as they get."""

    def __init__(self):
        super().__init__()
        for i in range(20):
            self.add_module(f"backbone_block_{i:02}_projection", nn.Linear(16, 16))


@pytest.mark.parametrize(("d", "projection"), [(1, "hash"), (3554, "hash"), (30, "sparse")])
def test_a_drawn_network_is_a_seed_and_d_numbers(d, projection, tmp_path):
    model = SubspaceModel.from_seed(LeNet, d, init_seed=5, projection=projection, seed=1 << 63)
    assert subspan.save(scatter(model), tmp_path / "m") <= 4 * d + 2048
    for net in (LeNet, LeNet()):  # only the architecture counts
        loaded = subspan.load(tmp_path / "m", net)
        assert loaded.init_seed == 5
        assert all(map(torch.equal, loaded.weights().values(), model.weights().values()))


@pytest.mark.parametrize(
    "compartments", ["layer", "tensor", "uniform:40", {".*_0._.*": 30, ".*": 30}]
)
def test_compartments_do_not_make_files_grow(compartments, tmp_path):
    dim = None if isinstance(compartments, dict) else 60
    model = SubspaceModel.from_seed(Deep, dim, compartments=compartments)
    assert subspan.save(scatter(model), tmp_path / "m") <= 4 * 60 + 2048


CODE = """
import torch, subspan
from subspan.layers import factorize
from subspan.subspace.parameters import digest_tensors
from tests.nets import COMPARTMENTS, DIM, NETS, batch, build, scatter, wrap
torch.set_num_threads({threads})
for name in NETS:
    model = subspan.load(name, build(name)).eval()
    with torch.no_grad():
        print(name, digest_tensors(model.weights()), digest_tensors({{"": model(batch(name))}}))
"""


@pytest.mark.heavy
def test_another_process_with_other_threads_restores_every_bit(tmp_path):
    here = []
    for name in NETS:
        model = trained(name)
        subspan.save(model, tmp_path / name)
        with torch.no_grad():
            logits = digest_tensors({"": model(batch(name))})
            here.append(f"{name} {digest_tensors(model.weights())} {logits}")
    run = python_code(CODE.format(threads=1 if torch.get_num_threads() > 1 else 2), tmp_path)
    assert run.stdout.splitlines() == here


# ---- the file ------------------------------------------------------------------------------------


def test_one_sorted_metadata_key_and_the_same_bytes_each_time(tmp_path):
    model = trained("cnn", "layer", train_fully="head")
    files = [tmp_path / name for name in "ab"]
    for file in files:
        subspan.save(model, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    with safe_open(files[0], framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["subspan"])
    assert list(metadata) == ["subspan"]
    assert metadata["subspan"] == json.dumps(header, sort_keys=True, separators=(",", ":"))
    assert list(header) == [
        "digest",
        "extra",
        "fingerprint",
        "format",
        "init_seed",
        "kind",
        "layout",
        "parameters",
        "recipe",
        "weights",
    ]
    assert (header["format"], header["kind"], header["init_seed"]) == (1, "subspace", None)


GOLDEN = {
    "digest": "35354be55e7d76e0d651660e4b0f3a9c",
    "extra": {},
    "fingerprint": "3ef095088b3557fc6f80a750ed9e24b0",
    "format": 1,
    "init_seed": 3,
    "kind": "subspace",
    "layout": "f281062db8914bdd696055b0ea52c807",
    "recipe": {
        "allocation": "sqrt",
        "compartments": "global",
        "dim": 3,
        "exclude": None,
        "projection": "hash",
        "seed": 4,
        "targets": None,
        "train_fully": None,
    },
    "weights": 8,
}


def test_a_golden_header(tmp_path):
    """A file of today must be readable for ever: none of these digests may change."""
    model = SubspaceModel.from_seed(lambda: nn.Linear(3, 2), 3, init_seed=3, seed=4)
    with torch.no_grad():
        model.coordinates["global"].copy_(torch.tensor([1.0, -0.5, 0.25]))
    subspan.save(model, tmp_path / "m")
    header, tensors = checkpoint.read(tmp_path / "m")
    assert header | {"digest": checkpoint.file.digest(header, tensors)} == GOLDEN


# ---- what cannot be saved ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("wrapped", [torch.compile, nn.Sequential, nn.DataParallel])
def test_a_model_inside_another_module_is_not_saved_as_something_else(wrapped, tmp_path):
    with pytest.raises(SubspanError, match=r"a SubspaceModel lies inside this .*: save that one"):
        subspan.save(wrapped(trained("mlp")), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "extra",
    [{"a": torch.ones(1)}, {"a": {1, 2}}, {"a": b""}, {(1, 2): 3}, {"a": [{1: 2, "1": 3}]}],
)
def test_extra_that_is_no_json_is_refused(extra, tmp_path):
    with pytest.raises(SubspanError, match="extra must hold JSON values"):
        subspan.save(trained("mlp"), tmp_path / "m", extra=extra)
    assert not list(tmp_path.iterdir())


def test_a_tensor_with_the_name_of_safetensors_header_is_refused(tmp_path):
    """The file could not be read."""
    net = build("mlp")
    net.register_parameter("__metadata__", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(SubspanError, match="a tensor cannot be called __metadata__ in a file"):
        subspan.save(factorize(net, rank=2), tmp_path / "m")


def test_any_text_can_be_extra(tmp_path):
    text = '\udcff \0 " \\ \u2028 é 日本'
    subspan.save(trained("mlp"), tmp_path / "m", extra={text: text})
    assert checkpoint.inspect(tmp_path / "m")["extra"] == {text: text}


def test_tensors_that_share_memory_are_saved(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight.data = net[0].weight.data  # two parameters, one memory
    subspan.save(net, tmp_path / "m")
    assert len(checkpoint.inspect(tmp_path / "m")["tensors"]) == 4


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "m"):
        with pytest.raises(SubspanError, match="cannot be a file: give a file name in a folder"):
            subspan.save(trained("mlp"), path)


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(call, error, tmp_path, monkeypatch):
    file = tmp_path / "m"
    subspan.save(trained("mlp"), file)
    before = file.read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        subspan.save(trained("cnn"), file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(type(error)):
        subspan.save(trained("cnn"), tmp_path / "new")
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A real one: the process may not write files of more than 400 bytes."""
    resource = pytest.importorskip("resource")
    subspan.save(SubspaceModel(nn.Linear(1, 1, bias=False), 1), tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            subspan.save(trained("mlp"), tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "m").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_network_that_was_unwrapped_after_training(tmp_path):
    """Its buffers are no longer those of before; the file has them all."""
    model = trained("cnn")
    subspan.save(model, tmp_path / "m")
    x, want = batch("cnn"), model(batch("cnn"))
    net = model.unwrap()
    loaded = subspan.load(tmp_path / "m", net).eval()
    assert torch.equal(loaded(x), want)
    subspan.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "m").read_bytes()
    assert torch.equal(subspan.load(tmp_path / "again", build("cnn")).eval()(x), want)

    some = SubspaceModel(build("cnn"), DIM)
    with torch.no_grad():
        some.body.norm.running_mean.add_(1)
    subspan.save(some, tmp_path / "some")
    other = build("cnn")
    other.norm.running_var.mul_(2)
    with pytest.raises(SubspanError, match=r"a buffer is not \(norm.running_var or another\)"):
        subspan.load(tmp_path / "some", other)
    assert isinstance(other.conv.weight, torch.nn.Parameter)
    assert other.conv.weight.requires_grad


# ---- dtypes --------------------------------------------------------------------------------------


def test_a_model_that_was_converted_for_its_training_comes_back_exactly(tmp_path):
    model = wrap("mlp").double()
    for w in model.coordinates.values():
        nn.init.normal_(w)
    y = model(batch("mlp", torch.float64))
    for bits in (None, 20):
        subspan.save(model, tmp_path / "m", bits=bits)
        kept = checkpoint.read(tmp_path / "m")[1]["coordinates"]
        loaded = subspan.load(tmp_path / "m", build("mlp"))
        assert torch.equal(loaded.coordinates["global"], kept)
        assert kept.dtype == torch.float64
        torch.testing.assert_close(
            loaded.double()(batch("mlp", torch.float64)), y, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("part", ["coordinates", "head", "network"])
def test_numbers_that_the_network_would_round_are_refused(part, tmp_path):
    """By every way into a network; what fits is taken whatever its dtype."""

    def make():
        return build("mlp") if part == "network" else wrap("mlp", train_fully="2")

    model = scatter(make())
    subspan.save(model, tmp_path / "m")
    tensors, state = checkpoint.read(tmp_path / "m")[1], model.state_dict()
    other = make()
    if part == "head":
        other.body[2].bfloat16()
    else:
        other.bfloat16()
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    ways = [lambda: checkpoint.restore(other, tensors)]
    if part != "network":
        ways.append(lambda: other.load_state_dict(state))
        ways.append(lambda: other.body.load_state_dict(model.body.state_dict()))
    for load in ways:
        with pytest.raises(SubspanError, match=r"is float32 in .* and bfloat16 in the network"):
            load()
        assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    subspan.save(model, tmp_path / "m")
    checkpoint.restore(other, checkpoint.read(tmp_path / "m")[1])
    for name, p in other.named_parameters():
        assert torch.equal(
            p.float(),
            model.get_parameter(name) if "coord" not in name else model.coordinates["global"],
        )


def test_a_file_is_not_rounded_into_a_network_of_another_dtype(tmp_path):
    model = scatter(build("mlp"))
    subspan.save(model, tmp_path / "m")
    net = build("mlp").bfloat16()
    with pytest.raises(SubspanError, match="is float32 in the file and bfloat16"):
        subspan.load(tmp_path / "m", net)
    subspan.save(net, tmp_path / "m")
    assert subspan.load(tmp_path / "m", build("mlp"))[0].weight.dtype == torch.float32
    subspan.save(scatter(factorize(build("mlp"), rank=2)), tmp_path / "m")
    head = build("mlp")
    head[2].half()
    for net in (build("mlp").bfloat16(), head):
        with pytest.raises(SubspanError, match=r"is float32 in the file and b?float16"):
            subspan.load(tmp_path / "m", net)
        assert type(net[0]) is type(net[2]) is nn.Linear
    wrapped = scatter(wrap("mlp", train_fully="2")).double()
    nn.init.normal_(wrapped.body[2].bias)
    subspan.save(wrapped, tmp_path / "m")
    net = build("mlp")
    with pytest.raises(SubspanError, match=r"2\.bias is float64 in the file and float32"):
        subspan.load(tmp_path / "m", net)
    assert type(net) is type(build("mlp"))


def test_weights_of_more_digits_than_the_network_has_are_not_rounded_to_coordinates():
    model = scatter(wrap("mlp"))
    other = SubspaceModel(build("mlp").bfloat16(), 12)
    for of in (lambda m: m, lambda m: m.body):
        with pytest.raises(SubspanError, match="weight is float32 in this state_dict and bfloat16"):
            of(other).load_state_dict(model.merge().state_dict())
    assert not other.coordinates["global"].any()
