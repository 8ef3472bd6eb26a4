"""Training that ends with rounded coordinates: in any loop, and to be gone on with."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.optim import SGD, Adam

import subspan
from subspan import SubspaceModel, SubspanError, checkpoint
from subspan.coding import choose_step, coded_bits, round_to_levels
from subspan.optim import Quantiser
from subspan.optim.quantiser import all_fixed
from tests.nets import batch, build

DIM = 60


def begin(bits=2.0, steps=8, after=0, optimizer=Adam, lr=0.1, **options):
    model = SubspaceModel(build("mlp"), DIM, **options)
    made = optimizer(model.parameters(), lr)
    return model, made, Quantiser(model, made, bits, steps, after)


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


def fixed(model, optimizer):
    """The coordinates that are fixed, NaN where they are free."""
    return optimizer.param_groups[0]["quantiser_fixed"]


@pytest.mark.parametrize("optimizer", [Adam, SGD])
@pytest.mark.parametrize("options", [{}, {"compartments": "layer"}], ids=["global", "layer"])
def test_coordinates_are_fixed_on_the_grid_one_after_the_other(optimizer, options):
    model, made, quantiser = begin(optimizer=optimizer, lr=0.01, **options)
    for done in range(1, 9):
        run(model, made, 1)
        w, step, held = coordinates(model), quantiser.step, ~fixed(model, made).isnan()
        assert held.sum() == math.ceil(DIM * (1 - (1 - done / 8) ** 2))
        levels = round_to_levels(w, step)
        on_grid = torch.from_numpy(levels).float() * step
        assert torch.equal(w[held], on_grid[held])
        assert bool(held.all()) == torch.equal(w, on_grid)  # free ones are where training left them
        assert coded_bits(levels) <= 2.0 * DIM
        assert levels.any()
        assert all_fixed(made) == bool(held.all()) == (done >= 7)  # the last 60/64 are all


def test_what_is_fixed_stays():
    model, made, quantiser = begin(bits=4, steps=20, after=60)
    run(model, made, 60)
    made.param_groups[0]["lr"] = 0.001
    step = None
    for _ in range(20):
        before = fixed(model, made) if step else torch.full((DIM,), math.nan)
        run(model, made, 1)
        now, w = fixed(model, made), coordinates(model)
        kept, free = ~before.isnan(), now.isnan()
        assert step in (None, quantiser.step)  # at this rate the coordinates keep their size
        step = quantiser.step
        assert torch.equal(now[kept], before[kept])
        assert torch.equal(w[~free], now[~free])
        assert before[~kept].numel() == 0 or (~free).sum() > kept.sum()
    run(model, made, 3)
    assert torch.equal(coordinates(model), now)


def test_a_step_that_moves_what_is_fixed_by_levels_is_undone():
    model, made, quantiser = begin(bits=4, steps=20, optimizer=SGD, lr=0.0)
    (w,) = model.coordinates.values()
    with torch.no_grad():
        w.copy_(torch.randn(DIM, generator=torch.Generator().manual_seed(0)))
    run(model, made, 5)
    before, step = fixed(model, made), quantiser.step
    held = ~before.isnan()
    made.param_groups[0]["lr"] = 1.0
    w.grad = torch.where(held, 3 * step, 0.0)
    made.step()
    assert quantiser.step == step
    assert 0 < held.sum() < DIM
    assert torch.equal(coordinates(model)[held], before[held])


def test_the_nearest_are_fixed_first():
    model, made, quantiser = begin(bits=4, steps=100, optimizer=SGD, lr=0.0)
    (w,) = model.coordinates.values()
    with torch.no_grad():
        w.copy_(torch.randn(DIM, generator=torch.Generator().manual_seed(0)))
    exact = coordinates(model).clone()
    run(model, made, 20)
    held = ~fixed(model, made).isnan()
    away = (exact / quantiser.step - (exact / quantiser.step).round()).abs()
    assert 0 < held.sum() < DIM
    assert away[held].max() <= away[~held].min()


def test_a_step_that_coordinates_outgrow_is_chosen_anew():
    model, made, quantiser = begin(bits=3, steps=20, lr=1e-4)
    run(model, made, 10)
    step, held = quantiser.step, int((~fixed(model, made).isnan()).sum())
    made.param_groups[0]["lr"] = 0.3
    run(model, made, 10)
    assert quantiser.step > step
    assert 0 < held < DIM
    assert all_fixed(made)
    levels = round_to_levels(coordinates(model), quantiser.step)
    assert torch.equal(coordinates(model), torch.from_numpy(levels).float() * quantiser.step)
    assert coded_bits(levels) <= 3 * DIM


def test_what_is_free_makes_up_for_what_is_fixed():
    """The loss after all have been fixed, against that of rounding them at once."""
    model, made, _ = begin(bits=2, after=100, steps=100)
    run(model, made, 100)
    at_once = copy.deepcopy(model)
    for w in at_once.coordinates.values():
        step = choose_step(w.detach(), 2)
        w.data = torch.from_numpy(round_to_levels(w, step)).float() * step
    for step in range(100):
        made.param_groups[0]["lr"] = 0.05 * (1 - step / 100)
        run(model, made, 1)
    assert all_fixed(made)
    assert run(model, made, 1) < 0.75 * run(at_once, SGD(at_once.parameters(), 0.0), 1)


def test_the_file_is_the_trained_model(tmp_path):
    model, made, quantiser = begin(bits=3, steps=10)
    run(model, made, 10)
    file = tmp_path / "m.subspan"
    subspan.save(model, file, bits=3)
    loaded = subspan.load(file, build("mlp"))
    assert torch.equal(coordinates(loaded), coordinates(model))
    assert torch.equal(loaded(batch("mlp")), model(batch("mlp")))
    assert checkpoint.inspect(file)["quantiser"]["step"] == quantiser.step
    assert checkpoint.inspect(file)["bytes_of_parts"]["coordinates"] <= math.ceil(3 * DIM / 8) + 5


def test_it_begins_after_so_many_steps_and_can_be_removed():
    model, made, quantiser = begin(after=3, steps=2)
    plain = SubspaceModel(build("mlp"), DIM)
    run(plain, Adam(plain.parameters(), 0.1), 3)
    run(model, made, 3)
    assert quantiser.step is None
    assert not all_fixed(made)
    assert torch.equal(coordinates(model), coordinates(plain))
    run(model, made, 2)
    assert all_fixed(made)
    before = coordinates(model)
    quantiser.remove()
    run(model, made, 1)
    assert not (coordinates(model) == before).any()
    Quantiser(model, made, 2.0, steps=3)
    run(model, made, 1)
    assert not all_fixed(made)
    run(model, made, 2)
    assert all_fixed(made)


@pytest.mark.parametrize("done", [2, 5, 9])
@pytest.mark.parametrize("optimizer", [Adam, SGD])
def test_it_goes_on_from_the_optimizers_state(done, optimizer):
    model, made, _ = begin(after=4, optimizer=optimizer)
    run(model, made, done)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(made.state_dict())
    run(model, made, 12 - done)
    for late in (False, True):  # made after the state was loaded
        again, theirs, quantiser = begin(after=4, optimizer=optimizer)
        if late:
            quantiser.remove()
        again.load_state_dict(weights)
        theirs.load_state_dict(copy.deepcopy(state))
        if late:
            Quantiser(again, theirs, 2.0, steps=8, after=4)
        run(again, theirs, 12 - done)
        assert all_fixed(theirs)
        assert torch.equal(coordinates(again), coordinates(model))


@pytest.mark.parametrize("how", ["copied", "made", "pickled"])
def test_a_copy_goes_on_with_a_quantiser_of_its_own(how):
    model, made, quantiser = begin(after=1)
    run(model, made, 4)
    if how == "pickled":
        again, theirs, _ = pickle.loads(pickle.dumps((model, made, quantiser)))
    elif how == "copied":
        again, theirs, _ = copy.deepcopy((model, made, quantiser))
    else:
        again, theirs = copy.deepcopy((model, made))
        before = coordinates(again).clone()
        with pytest.raises(SubspanError, match=r"a copy.*make one with the same arguments"):
            run(again, theirs, 1)
        assert torch.equal(coordinates(again), before)
        Quantiser(again, theirs, 2, steps=8, after=1)
    run(again, theirs, 5)
    run(model, made, 5)
    assert all_fixed(theirs)
    assert torch.equal(coordinates(again), coordinates(model))


def test_a_loaded_state_of_a_quantiser_needs_one():
    model, made, _ = begin(after=4)
    run(model, made, 2)
    again, theirs, quantiser = begin(after=4)
    quantiser.remove()
    copy.deepcopy(quantiser)  # of one that is no more at work
    theirs.load_state_dict(made.state_dict())
    with pytest.raises(SubspanError, match="has loaded that state"):
        run(again, theirs, 1)
    Quantiser(again, theirs, 2.0, steps=8, after=4).remove()
    run(again, theirs, 20)
    assert not all_fixed(theirs)


@pytest.mark.parametrize("late", [False, True], ids=["made before", "made after"])
def test_a_state_of_another_quantiser_is_refused(late):
    model, made, _ = begin(bits=3)
    run(model, made, 4)
    again, theirs, quantiser = begin(bits=2)
    if late:
        quantiser.remove()
    again.load_state_dict(model.state_dict())
    theirs.load_state_dict(made.state_dict())
    if late:
        quantiser = Quantiser(again, theirs, 2, steps=8)
    with pytest.raises(SubspanError, match="bits=3, steps=8 and after=0"):
        run(again, theirs, 1)
    assert torch.equal(coordinates(again), coordinates(model))
    quantiser.remove()
    Quantiser(again, theirs, 2, steps=3, after=1)
    run(again, theirs, 1)
    assert quantiser.step is None
    run(again, theirs, 3)
    assert all_fixed(theirs)


def test_it_begins_anew_with_a_state_of_before():
    model, made, _ = begin()
    state, weights = copy.deepcopy(made.state_dict()), copy.deepcopy(model.state_dict())
    for name in [name for name in state["param_groups"][0] if name.startswith("quantiser_")]:
        del state["param_groups"][0][name]
    run(model, made, 5)
    again, theirs, _ = begin()
    run(again, theirs, 3)
    again.load_state_dict(weights)
    theirs.load_state_dict(state)
    run(again, theirs, 5)
    assert torch.equal(coordinates(again), coordinates(model))


def test_weights_that_were_restored_without_the_optimizers_state_are_refused():
    model, made, quantiser = begin()
    run(model, made, 2)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(made.state_dict())
    run(model, made, 6)
    after = coordinates(model).clone()
    model.load_state_dict(weights)
    before = coordinates(model).clone()
    with pytest.raises(SubspanError, match="states of model and optimizer together"):
        run(model, made, 1)
    assert torch.equal(coordinates(model), before)
    made.load_state_dict(state)
    run(model, made, 6)
    assert torch.equal(coordinates(model), after)
    model.load_state_dict(weights)
    quantiser.remove()
    run(model, made, 1)
    assert not (coordinates(model) == before).any()


@pytest.mark.parametrize("first", ["no gradient", "frozen"])
def test_a_first_step_without_gradients_is_one(first):
    model, made, _ = begin(compartments="layer")
    if first == "no gradient":
        made.step()
    else:
        *_, last = model.coordinates.values()
        last.requires_grad_(False)
        run(model, made, 1)
        last.requires_grad_(True)
    run(model, made, 7)
    assert all_fixed(made)
    assert coordinates(model).any()


def test_steps_that_were_left_out_count():
    model, made, quantiser = begin(after=2)
    run(model, made, 2)
    quantiser.skipped()
    run(model, made, 3)
    for _ in range(4):
        quantiser.skipped()
    assert all_fixed(made)
    quantiser.remove()
    quantiser.skipped()
    run(model, made, 1)


def test_a_quantiser_removes_no_other():
    model, made, quantiser = begin()
    quantiser.remove()
    Quantiser(model, made, 2, steps=8)
    quantiser.remove()
    run(model, made, 8)
    assert all_fixed(made)


def test_the_network_and_accelerates_optimizer_are_taken():
    model = SubspaceModel(build("mlp"), DIM)
    made = Accelerator(cpu=True).prepare_optimizer(Adam(model.parameters(), 0.1))
    Quantiser(model.body, made, 2, steps=8)
    run(model, made, 8)
    assert all_fixed(made)


@pytest.mark.parametrize(
    ("bits", "steps", "after", "said"),
    [
        (0, 1, 0, "bits must be"),
        (math.inf, 1, 0, "bits must"),
        ("3", 1, 0, "bits must"),
        (0.01, 1, 0, "all of 60 coordinates would be 0: give at least 0.2"),
        (2, 0, 0, "steps must"),
        (2, math.nan, 0, "steps must"),
        (2, 1, -1, "after"),
        (2, 1, None, "after"),
    ],
)
def test_bad_arguments_are_refused(bits, steps, after, said):
    with pytest.raises(SubspanError, match=said):
        begin(bits, steps, after)


@pytest.mark.parametrize("net", [build("mlp"), torch.nn.Sequential(SubspaceModel(build("mlp"), 3))])
def test_what_has_no_coordinates_of_its_own_is_refused(net):
    with pytest.raises(SubspanError, match="only a SubspaceModel, or its network"):
        Quantiser(net, Adam(net.parameters()), 2, 10)


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_bits_are_refused_that_no_level_fits_into(dim):
    """Against all coordinates of a few levels."""
    levels = itertools.product(range(-2, 3), repeat=dim)
    least = min(coded_bits(np.array(each)) for each in levels if any(each)) / dim
    model = SubspaceModel(build("mlp"), dim)
    made = Adam(model.parameters(), 0.1)
    with pytest.raises(SubspanError, match="would be 0: give at least") as error:
        Quantiser(model, made, 0.999 * least, 8)
    said = float(str(error.value).split()[-1])
    assert least < said < 1.03 * least
    Quantiser(model, made, said, 8)


def test_coordinates_that_are_not_finite_are_refused():
    model, made, _ = begin()
    run(model, made, 1)
    made.param_groups[0]["lr"] = math.inf
    with pytest.raises(SubspanError, match="not finite"):
        run(model, made, 1)


def test_an_optimizer_of_other_parameters_is_refused():
    model = SubspaceModel(build("mlp"), DIM, compartments="layer")
    with pytest.raises(SubspanError, match="all coordinates"):
        Quantiser(model, Adam(list(model.parameters())[:1]), 2, 10)


def test_a_second_quantiser_is_refused():
    model, made, quantiser = begin()
    with pytest.raises(SubspanError, match=r"remove\(\) that first"):
        Quantiser(model, made, 4, 10)
    quantiser.remove()
    Quantiser(model, made, 4, 10)


def test_a_step_with_a_closure_is_refused():
    model, made, _ = begin()
    with pytest.raises(SubspanError, match="closure"):
        made.step(lambda: model(batch("mlp")).sum())
    assert not coordinates(model).any()
