import torch

from subspan import SubspaceModel
from subspan.subspace.summary import TensorSummary
from tests.nets import build


def raw(**options):
    net = build("raw")
    net.gain.requires_grad_(False)
    return SubspaceModel(net, train_fully="linear.bias", **options)


def test_rows_say_what_becomes_of_each_tensor():
    summary = raw(dim=7, compartments="layer").summary()
    assert summary.rows == (
        TensorSummary("scale", (3, 4), 12, "scale", 3),
        TensorSummary("gain", (), 1, "frozen", 0),
        TensorSummary("linear.weight", (4, 4), 16, "linear", 4),
        TensorSummary("linear.bias", (4,), 4, "fully trained", 4),
    )
    assert (summary.coordinates, summary.weights, summary.trainable) == (7, 33, 11)


def test_tensors_of_one_compartment_share_its_coordinates():
    summary = raw(dim=7).summary()
    assert [(r.compartment, r.coordinates) for r in summary.rows if r.compartment == "global"] == [
        ("global", 7),
        ("global", 7),
    ]
    assert summary.trainable == 11


def test_a_tensor_in_several_compartments_has_the_coordinates_of_all():
    first, second, *_ = raw(dim=[1, 2, 3, 4], compartments="uniform:4").summary().rows
    assert (first.compartment, first.coordinates) == ("uniform.0, uniform.1", 3)
    assert second.compartment == "frozen"


def test_counts_are_those_of_the_parameters():
    for name in ("cnn", "tied", "encoder"):
        net = build(name)
        weights = sum(p.numel() for p in net.parameters())
        model = SubspaceModel(net, 12)
        summary = model.summary()
        assert summary.weights == weights
        assert summary.trainable == sum(p.numel() for p in model.parameters()) == 12


def test_the_line_is_that_of_peft(capsys):
    raw(dim=7).print_trainable_parameters()
    line = "trainable params: 11 || all params: 33 || trainable%: 33.3333"
    assert capsys.readouterr().out == line + "\n"
    assert raw(dim=7).summary().line() == line


def test_the_table_can_be_read():
    net = torch.nn.Linear(2000, 30)
    assert str(SubspaceModel(net, 1500).summary()) == (
        "tensor  shape    weights  compartment  coordinates\n"
        "──────────────────────────────────────────────────\n"
        "weight  30×2000   60,000  global             1,500\n"
        "bias    30            30  global             1,500\n"
        "trainable params: 1,500 || all params: 60,030 || trainable%: 2.4988\n"
        "tensors of one compartment share its coordinates"
    )
    assert "\ngain           scalar        1  frozen                   0\n" in str(
        raw(dim=7).summary()
    )
