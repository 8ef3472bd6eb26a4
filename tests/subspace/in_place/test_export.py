"""Exported programs, ONNX and traces of a network in a subspace, with a batch of any size."""

import io

import pytest
import torch
from torch import nn

import subspan
from subspan import SubspaceModel
from tests.nets import COMPARTMENTS, batch, scatter, wrap

WAYS = ("handle", "network", "merged")
# Every network by its handle, and one in every way: what else there is takes minutes.
QUICK = {("mlp", way) for way in WAYS} | {(name, "handle") for name in ("cnn", "raw", "encoder")}
# ONNX is made of such a program: a merged network, and larger ones, add nothing of ours.
QUICK_ONNX = QUICK - {("mlp", "merged"), ("cnn", "handle"), ("encoder", "handle")}


def cases(quick):
    return [
        pytest.param(name, way, marks=() if (name, way) in quick else pytest.mark.slow)
        for name in ("mlp", "cnn", "raw", "encoder")
        for way in WAYS
    ]


# PyTorch and ONNX have many warnings of their own.
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]


def net_of(model: SubspaceModel, way: str) -> nn.Module:
    return {"handle": model, "network": model.body, "merged": model.merge()}[way]


@pytest.mark.parametrize(("name", "way"), cases(QUICK))
def test_an_exported_program(name, way):
    model, x = scatter(wrap(name)).eval(), batch(name)
    want, size = model(x), {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(net_of(model, way), (x,), dynamic_shapes=(size,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for run in (program.module(), torch.export.load(file).module()):
        torch.testing.assert_close(run(x), want)
        torch.testing.assert_close(run(x[:2]), want[:2])
    if way != "merged":  # the program has coordinates, and is one of them
        coordinates = [p for key, p in program.state_dict.items() if "subspan_global" in key]
        assert [w.shape for w in coordinates] == [(12,)]
    assert torch.equal(model(x), want)


PENALTIES = {
    "all parameters": lambda net: sum(p.square().sum() for p in net.parameters()),
    "those of a part": lambda net: sum(p.square().sum() for p in net[0].parameters()),
    "a layer's own": lambda net: sum(p.sum() for p in net[0].parameters(recurse=False)),
    "by name": lambda net: dict(net.named_parameters(prefix="a"))["a.0.weight"].sum(),
    "one parameter": lambda net: net.get_parameter("0.weight").sum(),
    "one of a part": lambda net: net[0].get_parameter("weight").sum(),
}


class Penalised(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + PENALTIES[self.penalty](self)


class Around(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) + PENALTIES[self.net.penalty](self.net)


@pytest.mark.parametrize(("lora", "strict"), [(False, False), (True, True)])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_parameters_that_a_forward_asks_for_are_weights_in_an_exported_program(
    penalty, lora, strict
):
    torch.manual_seed(0)
    net, x = Penalised(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 4)
    net.penalty = penalty
    model = subspan.lora(net, 12, rank=2, targets=[".*"]) if lora else SubspaceModel(net, 12)
    around = Around(scatter(model).body).eval()
    program = torch.export.export(around, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), Around(model.merge())(x))


@pytest.mark.parametrize("compartments", COMPARTMENTS, ids=str)
def test_any_name_of_a_compartment_can_be_exported(compartments):
    model, x = scatter(wrap("mlp", compartments)).eval(), batch("mlp")
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(("name", "way"), cases(QUICK_ONNX))
def test_onnx(name, way, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    compartments = "uniform:3" if name == "mlp" else "global"
    model, x = scatter(wrap(name, compartments)).eval(), batch(name)
    want = model(x)
    program = torch.onnx.export(
        net_of(model, way),
        (x,),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    program.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (given,) = session.get_inputs()
    for rows in (x, x[:2]):
        (found,) = session.run(None, {given.name: rows.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), want[: len(rows)], rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), want)
    model.train()(x).sum().backward()
    assert model.coordinates[next(iter(model.coordinates))].grad.any()


@pytest.mark.parametrize("way", WAYS)
def test_a_trace_runs_and_is_saved(way):
    model, x = scatter(wrap("mlp")).eval(), batch("mlp")
    traced, file = torch.jit.trace(net_of(model, way), (x,)), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for run in (traced, torch.jit.load(file)):
        torch.testing.assert_close(run(x), model(x))
        torch.testing.assert_close(run(x[:2]), model(x[:2]))
