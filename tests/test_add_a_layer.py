"""The example in docs/add-a-layer.md: a type of layers from outside, held to every law."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import subspan
from subspan import SubspaceModel, SubspanError, checkpoint
from subspan.cli import main
from subspan.layers import factorize, merge, protocol
from subspan.training import nets, own
from tests import layer_laws
from tests.layer_laws import Case, Net
from tests.nets import scatter

PAGE = Path(__file__).parents[1] / "docs" / "add-a-layer.md"
X = torch.randn(3, 6)


@pytest.fixture(scope="module", autouse=True)
def _example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The page's first block of Python as a module of its own, and gone again afterwards."""
    folder = tmp_path_factory.mktemp("example")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (folder / "scaled.py").write_text(blocks[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        importlib.import_module("scaled")
        yield
    forget()


def forget() -> None:
    """Undo the import of the module."""
    del protocol._types["scaled"], sys.modules["scaled"]


def scale(net: nn.Module, **more: Any) -> Any:
    scaled: Any = importlib.import_module("scaled")
    net = scaled.scale(net, seed=3, **more)
    scatter(net, 0.5)
    return net


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))


CASE = Case(
    "scaled",
    lambda: Net(nn.Linear(7, 5)),
    lambda net: scale(net),
    (7,),
    lambda layer: {"weight": layer.weight, "bias": layer.bias},
    shapes=((), (1,), (0,), (3, 2)),
)


@pytest.mark.parametrize("law", [*layer_laws.LAWS, *layer_laws.COSTLY])
def test_the_example_obeys(law: layer_laws.Law) -> None:
    law(CASE)


@pytest.mark.parametrize("beside", ["alone", "low rank"])
def test_a_file_holds_it_and_gives_it_back(beside: str, tmp_path: Path) -> None:
    net = scale(plain(), targets="0")
    if beside == "low rank":
        factorize(net, rank=2, targets="2")
    size = subspan.save(net, tmp_path / "net")
    header = checkpoint.inspect(tmp_path / "net")
    assert header["kind"] == "layers"
    assert header["layers"] == {"scaled": {"module": "scaled", "recipes": {"0": {"seed": 3}}}}
    assert header["ranks"] == ({"2": 2} if beside == "low rank" else {})
    assert header["tensors"].keys() >= {"0.s", "0.t", "0.bias"}
    assert header["weights"] == 6 * 8 + 8 + 8 * 5
    assert subspan.save(net, tmp_path / "again") == size
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()
    for other in (plain(), scale(plain(), targets="0")):
        back = subspan.load(tmp_path / "net", other)
        assert torch.equal(back(X), net(X))
        torch.testing.assert_close(merge(back)(X), net(X))


def test_another_recipe_is_taken_with_the_hooks_of_the_layer(tmp_path: Path) -> None:
    net = scale(plain(), targets="0")
    subspan.save(net, tmp_path / "net")
    scaled: Any = importlib.import_module("scaled")
    other, calls = scaled.scale(plain(), seed=4, targets="0"), []
    other[0].register_forward_hook(lambda *_: calls.append(1))
    back: Any = subspan.load(tmp_path / "net", other)
    assert back[0].seed == 3
    assert torch.equal(back(X), net(X))
    assert calls == [1]


def test_a_layer_of_the_same_recipe_stays(tmp_path: Path) -> None:
    """Whoever holds it, or its parameters, goes on with what was loaded."""
    net = scale(plain(), targets="0")
    subspan.save(net, tmp_path / "net")
    layer = net[0]
    assert subspan.load(tmp_path / "net", net) is net
    assert net[0] is layer


def test_its_numbers_are_counted() -> None:
    net = scale(plain())
    counts = subspan.count(net)
    assert (counts.dense, counts.inference, counts.stored) == (96, 8 + 6 + 8 + 5 + 8, 35)
    summary = SubspaceModel(net, 4).summary()
    assert (summary.weights, summary.trainable) == (35, 4)


def test_a_type_that_is_not_imported_is_named_with_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(own.IMPORTS, "")
    torch.manual_seed(0)
    extra = {"net": "mlp-4", "data": "digits", "image_shape": [1, 8, 8], "classes": 10, "seed": 0}
    net = scale(nets.build("mlp-4", (1, 8, 8), 10))
    file, out = tmp_path / "net.safetensors", tmp_path / "out.safetensors"
    subspan.save(net, file, extra=extra)
    forget()
    assert checkpoint.inspect(file)["layers"]["scaled"]["module"] == "scaled"
    other = nets.build("mlp-4", (1, 8, 8), 10)
    before = [id(m) for m in other.modules()]
    with pytest.raises(SubspanError, match=r"type 'scaled', .*: import scaled first, .*--import"):
        subspan.load(file, other)
    assert [id(m) for m in other.modules()] == before
    assert "scaled" not in sys.modules
    assert main(["export", str(file), str(out)]) == 2
    assert "import scaled first" in capsys.readouterr().err
    assert not out.exists()
    assert main(["inspect", str(file)]) in (None, 0)
    assert main(["export", "--import", "scaled", str(file), str(out)]) in (None, 0)
    dense = safetensors.torch.load_file(out)
    assert dense.keys() == other.state_dict().keys()
    other.load_state_dict(dense)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(other(x), net(x))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda layers: layers["scaled"].update(recipes={"0": {"gain": 3}}), "is no recipe of"),
        (lambda layers: layers["scaled"].update(recipes={"0": 3}), "is no recipe of"),
        (lambda layers: layers["scaled"].update(recipes={"1": {"seed": 3}}), "has no layer '1'"),
        (lambda layers: layers["scaled"].pop("recipes"), "has no recipes of"),
        (lambda layers: layers.update(scaled=3), "has no recipes of"),
    ],
)
def test_a_header_that_was_made_up_is_refused(edit: Any, message: str, tmp_path: Path) -> None:
    subspan.save(scale(plain(), targets="0"), tmp_path / "net")
    header, tensors = checkpoint.read(tmp_path / "net")
    edit(header["layers"])
    header["digest"] = checkpoint.file.digest(header, tensors)
    metadata = {checkpoint.file.KEY: json.dumps(header)}
    (tmp_path / "net").write_bytes(safetensors.torch.save(tensors, metadata))
    net = plain()
    with pytest.raises(SubspanError, match=message):
        subspan.load(tmp_path / "net", net)
    assert type(net[0]) is nn.Linear


def test_two_types_of_one_name_are_an_error() -> None:
    with pytest.raises(TypeError, match="a type of layers named 'lowrank' is registered already"):
        type("Another", (protocol.Compressed,), {}, type_name="lowrank")


def test_what_it_cannot_replace_is_refused_by_the_layer_itself() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(SubspanError, match="type 'scaled' cannot take the place"):
        scale(net)
    assert type(net[0]) is nn.Conv2d


def test_the_table_names_every_required_member() -> None:
    listed = set(re.findall(r"^\| `(\w+)=?` \|", PAGE.read_text(), re.MULTILINE))
    assert listed == {"type_name", "replaces", "shape", *protocol.Compressed.__abstractmethods__}
