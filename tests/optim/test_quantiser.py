"""Training with rounded coordinates: in any loop, exactly, and to be gone on with."""

import copy
import math

import pytest
import torch
from torch.optim import SGD, Adam

import subspan
from subspan import SubspaceModel, SubspanError, checkpoint
from subspan.coding import coded_bits, round_to_levels
from subspan.optim import Quantiser
from tests.nets import batch, build

DIM = 60


def begin(bits=2.0, after=0, optimizer=Adam, lr=0.1, **options):
    model = SubspaceModel(build("mlp"), DIM, **options)
    made = optimizer(model.parameters(), lr)
    return model, made, Quantiser(model, made, bits, after)


def run(model, optimizer, steps):
    x = batch("mlp")
    target = torch.arange(20.0).reshape(5, 4).sin()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def coordinates(model):
    return torch.cat([w.detach() for w in model.coordinates.values()])


@pytest.mark.parametrize("optimizer", [Adam, SGD])
@pytest.mark.parametrize("options", [{}, {"compartments": "layer"}], ids=["global", "layer"])
def test_what_the_loss_sees_is_on_the_grid_and_within_the_bits(optimizer, options):
    model, made, quantiser = begin(optimizer=optimizer, **options)
    for _ in range(12):
        run(model, made, 1)
        w, step = coordinates(model), quantiser.step
        levels = round_to_levels(w, step)
        assert torch.equal(w, torch.from_numpy(levels).float() * step)
        assert coded_bits(levels) <= 2.0 * DIM
        assert levels.any()


def test_the_optimizer_moves_the_exact_coordinates():
    """The step of plain gradient descent from w, with the gradient at the rounded ones."""
    model, made, _ = begin(optimizer=SGD, lr=0.5)
    run(model, made, 3)
    (w,) = model.coordinates.values()
    exact = made.state[w]["exact"].clone()
    assert not torch.equal(exact, w)
    run(model, made, 1)
    expected = exact - 0.5 * w.grad
    assert torch.equal(made.state[w]["exact"], expected)
    assert (w - expected).abs().max() <= made.state[w]["quantiser_step"] / 2


def test_training_repairs_what_rounding_did():
    model, made, _ = begin(bits=3, after=100)
    run(model, made, 101)
    rounded = run(model, made, 1)
    for step in range(100):
        made.param_groups[0]["lr"] = 0.05 * (1 - step / 100)
        run(model, made, 1)
    assert run(model, made, 1) < 0.5 * rounded


def test_the_file_is_the_trained_model(tmp_path):
    model, made, quantiser = begin(bits=3)
    run(model, made, 10)
    file = tmp_path / "m.subspan"
    subspan.save(model, file, bits=3)
    loaded = subspan.load(file, build("mlp"))
    assert torch.equal(coordinates(loaded), coordinates(model))
    assert torch.equal(loaded(batch("mlp")), model(batch("mlp")))
    assert checkpoint.inspect(file)["quantiser"]["step"] == quantiser.step
    assert checkpoint.inspect(file)["bytes_of_parts"]["coordinates"] <= math.ceil(3 * DIM / 8) + 5


def test_it_begins_after_so_many_steps_and_can_be_removed():
    model, made, quantiser = begin(after=3)
    plain = SubspaceModel(build("mlp"), DIM)
    run(plain, Adam(plain.parameters(), 0.1), 3)
    run(model, made, 3)
    assert quantiser.step is None
    assert torch.equal(coordinates(model), coordinates(plain))
    run(model, made, 1)
    assert quantiser.step
    quantiser.remove()
    before = quantiser.step
    run(model, made, 1)
    assert not torch.equal(coordinates(model) / before, (coordinates(model) / before).round())


@pytest.mark.parametrize("done", [2, 5])
def test_it_goes_on_from_the_optimizers_state(done):
    model, made, _ = begin(after=4)
    run(model, made, done)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(made.state_dict())
    run(model, made, 6)
    again, theirs, _ = begin(after=4)
    again.load_state_dict(weights)
    theirs.load_state_dict(state)
    run(again, theirs, 6)
    assert torch.equal(coordinates(again), coordinates(model))


@pytest.mark.parametrize(
    ("bits", "after", "said"),
    [(0, 0, "bits must be"), (math.inf, 0, "bits must"), (2, -1, "after")],
)
def test_bad_arguments_are_refused(bits, after, said):
    with pytest.raises(SubspanError, match=said):
        begin(bits, after)


def test_an_optimizer_of_other_parameters_is_refused():
    model = SubspaceModel(build("mlp"), DIM, compartments="layer")
    with pytest.raises(SubspanError, match="all coordinates"):
        Quantiser(model, Adam(list(model.parameters())[:1]), 2)


def test_a_step_with_a_closure_is_refused():
    model, made, _ = begin()
    with pytest.raises(SubspanError, match="closure"):
        made.step(lambda: model(batch("mlp")).sum())
    assert not coordinates(model).any()
