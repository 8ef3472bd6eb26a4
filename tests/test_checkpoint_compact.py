"""Compact files: the same model in few bytes, everywhere the same bits, or a sentence."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import subspan
from subspan import SubspaceModel, SubspanError, checkpoint, coding
from subspan.checkpoint import compact
from subspan.coding.packing import varint
from tests.golden.compact import FILES, PATH, golden_model
from tests.nets import COMPARTMENTS, MLP, NETS, batch, build, scatter, wrap
from tests.reference import decode_compact


@pytest.fixture
def saved(tmp_path):
    """A file of coordinates at 4 bits around a θ₀ from a seed, and what was loaded from it."""
    model, file = golden_model(), tmp_path / "m.subspan"
    subspan.save(model, file, bits=4)
    return file, subspan.load(file, MLP)


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("compartments", COMPARTMENTS, ids=str)
def test_what_is_loaded_has_the_recipe_and_rounded_coordinates(name, compartments, tmp_path):
    model, file = scatter(wrap(name, compartments)), tmp_path / "m.subspan"
    assert subspan.save(model, file, bits=8) == file.stat().st_size
    loaded = subspan.load(file, build(name)).eval()
    step = checkpoint.inspect(file)["quantiser"]["step"]
    assert (loaded.recipe, loaded.compartments) == (model.recipe, model.compartments)
    assert loaded.changed_buffers().keys() == model.changed_buffers().keys()
    for key, w in model.coordinates.items():
        assert (loaded.coordinates[key] - w).abs().max() <= step / 2 * 1.001
        levels = loaded.coordinates[key] / step
        assert torch.equal(levels, levels.round())
    again = tmp_path / "again.subspan"
    subspan.save(loaded, again, bits=8)
    assert again.read_bytes() == file.read_bytes()


def test_what_is_trained_fully_and_buffers_are_exact(tmp_path):
    model, file = scatter(wrap("cnn", train_fully="head")), tmp_path / "m.subspan"
    subspan.save(model, file, bits=3, extra={"mean": [0.25, 1 / 3], "von": "mir"})
    loaded, found = subspan.load(file, build("cnn")), checkpoint.inspect(file)
    for name, tensor in {**model.fully_trained(), **model.changed_buffers()}.items():
        assert torch.equal(loaded.body.state_dict()[name], tensor)
    assert found["extra"] == {"mean": [0.25, 1 / 3], "von": "mir"}
    assert found["bytes_of_parts"]["other tensors"] > 4 * 580


def test_coordinates_in_float64_stay_float64(tmp_path):
    model, file = scatter(wrap("mlp", dtype=torch.float64)), tmp_path / "m.subspan"
    subspan.save(model, file, bits=8)
    assert checkpoint.read(file)[1]["coordinates"].dtype == torch.float64
    net = build("mlp", torch.float64)
    assert subspan.load(file, net)(batch("mlp", torch.float64)).dtype == torch.float64


def test_a_net_from_a_seed_needs_the_coordinates_and_fifty_bytes(saved):
    file, loaded = saved
    found = checkpoint.inspect(file)
    assert loaded.init_seed == 5
    assert found["bytes"] == sum(found["bytes_of_parts"].values()) == file.stat().st_size
    assert found["bytes"] - found["bytes_of_parts"]["coordinates"] < 50
    assert found["quantiser"]["bits"] < 4 + 8 * 5 / 60


def test_an_ordinary_file_says_where_its_bytes_are(tmp_path):
    file = tmp_path / "m.safetensors"
    subspan.save(scatter(wrap("cnn", train_fully="head")), file)
    found = checkpoint.inspect(file)
    assert found["bytes"] == sum(found["bytes_of_parts"].values())
    assert found["bytes_of_parts"]["coordinates"] == 4 * 12
    assert "quantiser" not in found


def test_fewer_bits_than_the_grid_takes_round_anew(saved, tmp_path):
    _, loaded = saved
    subspan.save(loaded, tmp_path / "fewer.subspan", bits=2)
    found = checkpoint.inspect(tmp_path / "fewer.subspan")
    assert found["quantiser"]["step"] > checkpoint.inspect(saved[0])["quantiser"]["step"]


# ---- the format ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_golden_files(name, tmp_path):
    """A stored model is for ever: the committed bytes decode to the committed numbers."""
    golden = json.loads(PATH.read_text())[name]
    file = tmp_path / "m.subspan"
    file.write_bytes(bytes.fromhex(golden["file"]))
    header, tensors = checkpoint.read(file)
    assert header == golden["header"]
    step, levels = float.fromhex(golden["step"]), golden["levels"]
    assert tensors["coordinates"].tolist() == [step * level for level in levels]
    assert decode_compact(file.read_bytes()) == (step, levels)
    FILES[name](file)
    assert file.read_bytes().hex() == golden["file"]


# ---- refusals ------------------------------------------------------------------------------------


def refused(file, said):
    for read in (checkpoint.inspect, lambda path: subspan.load(path, MLP)):
        with pytest.raises(SubspanError, match=said) as error:
            read(file)
        assert "\n" not in str(error.value)


def test_every_damaged_byte_is_noticed(saved, tmp_path):
    file, _ = saved
    data = file.read_bytes()
    for place in range(4, len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(SubspanError, match="damaged or edited"):
            checkpoint.read(file)


@pytest.mark.parametrize("size", [0, 3, 4, 7, 20, -1])
def test_a_file_that_was_cut_short_is_refused(saved, size):
    file, _ = saved
    file.write_bytes(file.read_bytes()[:size])
    refused(file, "damaged")


def test_bytes_after_the_end_are_refused(saved):
    file, _ = saved
    file.write_bytes(file.read_bytes() + b"\0")
    refused(file, "damaged or edited")


def test_a_later_coder_is_refused_by_name(saved):
    file, _ = saved
    data = bytearray(file.read_bytes())
    data[3] = 2
    file.write_bytes(data)
    refused(file, "coder of version 2, this version of subspan reads up to 1: upgrade")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [(4, 99, "template 99, which a later version has"), (13, 0xFE, "does not know")],
)
def test_what_another_version_might_write_is_refused(saved, place, value, said):
    file, _ = saved
    body = bytearray(file.read_bytes()[: -compact.DIGEST])
    body[place] = value
    file.write_bytes(bytes(body) + compact._digest(bytes(body)))
    refused(file, said)


def forge(patch=None, tensors=(), number=1000, step=0x3F80, version=1):
    """A file whose digest is right, whatever else is not: a patch on template 0, and what follows.

    With no argument it is that of 1,000 coordinates, which are all zero.
    """
    kept = [coding.pack(value) for tensor in tensors for value in tensor]
    body = (
        compact.MAGIC + bytes([version, 0]) + bytes(8) + coding.pack({} if patch is None else patch)
    )
    body += varint(len(tensors)) + b"".join(kept) + varint(number) + struct.pack("<H", step)
    body += coding.encode_levels(np.zeros(1000, np.int64))
    return body + compact._digest(body)


def dims(dim):
    return {"recipe": {"dim": dim}}


FORGED = {
    "a number": ({"number": 1 << 40}, "1099511627776 coordinates, and its recipe has others"),
    "no number": ({"number": 0, "patch": dims(0)}, "it has 0 coordinates"),
    "both numbers": (
        {"number": 1 << 40, "patch": dims(1 << 40)},
        "bytes cannot hold 1099511627776",
    ),
    "a long number": ({"patch": {"weights": 1 << 20000}}, "too large a number"),
    "many dims": ({"patch": dims([500, 400])}, "1000 coordinates, and its recipe has others"),
    "a text": ({"patch": dims("1000")}, "1000 coordinates, and its recipe has others"),
    "no object": ({"patch": 5}, "the patch of its header is of the type int"),
    "no recipe": ({"patch": {"recipe": compact.ABSENT}}, "'recipe'"),
    "no key": ({"patch": {"extra": {"a": [compact.ABSENT]}}}, "not JSON serializable"),
    "a format": ({"patch": {"format": 7}}, "has format 7, this version of subspan reads up to 1"),
    "a version": ({"version": 0}, "coder of version 0"),
    "a step": ({"step": 0x7FC0}, "its step is nan"),
    "no step": ({"step": 0}, "its step is 0"),
    "a digest": ({"patch": {"parameters": "0" * 32}}, "fingerprint is '00000000'"),
    "a size": ({"tensors": [("a", "float32", [1 << 40])]}, "it ends too early"),
    "sizes": ({"tensors": [("a", "float32", [1 << 40, 1 << 40])]}, "is not what subspan saves"),
    "a large size": ({"tensors": [("a", "float32", [1 << 90])]}, "is not what subspan saves"),
    "below zero": ({"tensors": [("a", "float32", [-1])]}, "is not what subspan saves"),
    "no dtype": ({"tensors": [("a", "object", [1])]}, "is not what subspan saves"),
    "no name": ({"tensors": [(5, "uint8", [1])]}, "5 is no name of a tensor"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_a_forger_might_write_is_refused_at_once(name, tmp_path):
    forged, said = FORGED[name]
    (tmp_path / "m.subspan").write_bytes(forge())
    assert checkpoint.inspect(tmp_path / "m.subspan")["quantiser"]["levels"] == 1
    (tmp_path / "m.subspan").write_bytes(forge(**forged))
    refused(tmp_path / "m.subspan", said)


def test_another_network_is_refused(saved):
    file, _ = saved
    with pytest.raises(SubspanError, match="212 weights, this one has 401"):
        subspan.load(file, lambda: nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 1)))
    model = SubspaceModel(build("mlp"), 12)
    subspan.save(scatter(model), file, bits=4)
    with pytest.raises(SubspanError, match="other initial weights"):
        subspan.load(file, MLP)
    net = build("mlp")
    net[0].bias.requires_grad_(False)
    with pytest.raises(SubspanError, match="frozen"):
        subspan.load(file, net)


@pytest.mark.parametrize(
    ("net", "bits", "said"),
    [
        (MLP(), 2, "bits quantises coordinates, and this network has none"),
        (wrap("mlp"), 0, "bits must be a positive number"),
        (wrap("mlp"), float("nan"), "bits must be a positive number"),
        (scatter(wrap("mlp")), 0.01, "every coordinate becomes zero"),
    ],
)
def test_what_cannot_be_saved_is_refused_with_nothing_written(net, bits, said, tmp_path):
    with pytest.raises(SubspanError, match=said):
        subspan.save(net, tmp_path / "m.subspan", bits=bits)
    assert not list(Path(tmp_path).iterdir())


def nested(depth):
    inner = {}
    for _ in range(depth):
        inner = {"a": [inner]}
    return inner


CIRCLE = {}
CIRCLE["a"] = CIRCLE


@pytest.mark.parametrize(
    ("extra", "bits", "said"),
    [
        ({"c": "\ud800"}, 3, "cannot hold this extra: .*surrogates not allowed; save without bits"),
        (nested(51), 3, "it is nested more than 100 deep; save without bits"),
        (nested(450), 3, "nested more than 100 deep|must hold JSON values"),
        (nested(1000), None, "extra must hold JSON values: maximum recursion depth"),
        (CIRCLE, None, "extra must hold JSON values: Circular reference"),
        ([1], 3, "extra must be a dict of JSON values, got list"),
    ],
    ids=["surrogate", "deep", "deeper", "deepest", "circle", "list"],
)
def test_an_extra_that_no_file_holds_is_refused_with_nothing_written(extra, bits, said, tmp_path):
    model = scatter(wrap("mlp"))
    with pytest.raises(SubspanError, match=said):
        subspan.save(model, tmp_path / "m.subspan", bits=bits, extra=extra)
    assert not list(tmp_path.iterdir())


def test_an_extra_in_a_hundred_levels_comes_back(tmp_path):
    model, file = scatter(wrap("mlp")), tmp_path / "m.subspan"
    subspan.save(model, file, bits=3, extra=nested(49))
    assert checkpoint.inspect(file)["extra"] == nested(49)


@pytest.mark.parametrize("name", ["golf", "photos"])
def test_a_chosen_network_has_a_template_that_a_bound_pays_for(name, tmp_path):
    FILES[name](tmp_path / "m.subspan")
    assert checkpoint.inspect(tmp_path / "m.subspan")["template"] in compact.CHOSEN


def test_no_template_knows_the_data():
    """A reader fills in nothing that comes from a training set: no byte would pay for it."""
    for template in compact.TEMPLATES:
        assert not {"mean", "std"} & template.get("extra", {}).keys()
