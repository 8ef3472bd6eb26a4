import pytest
import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.subspace.parameters import (
    digest_tensors,
    find_aliases,
    find_slots,
    saved_buffers,
    select_trainable,
)
from tests.nets import NETS, build


def paths(net):
    return [slot.path for slot in find_slots(net)]


@pytest.mark.parametrize("name", NETS)
def test_slots_are_the_parameters_once_each(name):
    net = build(name)
    found = find_slots(net)
    named = dict(net.named_parameters())
    assert list(find_aliases(found)) == list(named)
    for slot in found:
        module, attribute = slot.find(net)
        assert getattr(module, attribute) is named[slot.tensor]


def test_a_tied_tensor_has_two_slots_and_a_module_under_two_names_one():
    found = find_aliases(find_slots(build("tied")))
    assert found["embedding.weight"] == ["embedding.weight", "output.weight"]
    assert found["hidden.weight"] == ["hidden.weight"]


@pytest.mark.parametrize("net", [nn.LazyLinear(3), nn.Linear(2, 2, device="meta")])
def test_parameters_without_values_are_refused(net):
    with pytest.raises(SubspanError, match="weight has no values yet: run a batch"):
        find_slots(net)


def test_saved_buffers_are_those_of_the_state_dict():
    net = build("cnn")
    net.register_buffer("cache", torch.ones(1), persistent=False)
    net.register_buffer("empty", None)
    assert list(saved_buffers(net)) == [k for k in net.state_dict() if k.startswith("norm.r")] + [
        "norm.num_batches_tracked"
    ]


# ---- what to train -------------------------------------------------------------------------------


def trained(net, **options):
    names = find_aliases(find_slots(net))
    tensors = {name: net.get_parameter(name) for name in names}
    options = {"targets": None, "exclude": None, "fully": set()} | options
    return select_trainable(tensors, names, **options)


def test_by_default_what_requires_a_gradient_is_trained():
    net = build("raw")
    net.linear.bias.requires_grad_(False)
    assert trained(net) == {"scale": 12, "gain": 1, "linear.weight": 16}


def test_targets_exclude_and_fully():
    net = build("raw")
    net.linear.bias.requires_grad_(False)
    assert trained(net, targets="linear") == {"linear.weight": 16, "linear.bias": 4}
    assert trained(net, targets=["linear", "gain"], exclude="bias") == {
        "gain": 1,
        "linear.weight": 16,
    }
    assert trained(net, fully={"linear.weight"}) == {"scale": 12, "gain": 1}


def test_empty_tensors_have_nothing_to_train():
    net = build("raw")
    net.empty = nn.Parameter(torch.empty(0, 3))
    assert "empty" not in trained(net)


@pytest.mark.parametrize(
    "options", [{"targets": []}, {"exclude": ".*"}, {"fully": {"gain"}, "targets": "gain"}]
)
def test_nothing_to_train_is_refused(options):
    with pytest.raises(SubspanError, match="no parameter is left to train in the subspace"):
        trained(build("raw"), **options)


def test_a_network_without_parameters_is_refused():
    with pytest.raises(SubspanError, match="unfreeze some, of none"):
        trained(nn.ReLU())


def test_what_is_not_real_is_refused_unless_it_stays():
    net = build("raw")
    net.table = nn.Parameter(torch.arange(3), requires_grad=False)
    net.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    assert {"table", "phase"}.isdisjoint(trained(net))
    for name in ("table", "phase"):
        with pytest.raises(SubspanError, match=f"{name} is torch.* and P w is real: exclude it"):
            trained(net, targets=[name])


# ---- digests ----------------------------------------------------------------------------------


def test_the_digest_sees_names_dtypes_shapes_and_every_byte():
    x = torch.arange(6.0)
    base = digest_tensors({"x": x})
    assert base == digest_tensors({"x": x.clone()})
    changed = x.clone()
    changed[5] = torch.nextafter(changed[5], torch.tensor(9.0))
    others = [{"y": x}, {"x": x.double()}, {"x": x.view(2, 3)}, {"x": changed}, {"x": -x}, {}]
    digests = [digest_tensors(other) for other in others]
    assert len({base, *digests}) == 7
    assert digest_tensors({"a": x, "b": x}) != digest_tensors({"b": x, "a": x})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.ones(0, 3),
        torch.ones(2, 3).T,
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.tensor(3),
        torch.ones(2, dtype=torch.complex64),
    ],
    ids=str,
)
def test_any_tensor_has_a_digest(tensor):
    assert digest_tensors({"x": tensor}) == digest_tensors({"x": tensor.clone().contiguous()})
    assert len(digest_tensors({"x": tensor})) == 32


SPARSE = [
    lambda a: a.to_sparse(),
    lambda a: a.to_sparse_csr(),
    lambda a: a.to_sparse_csc(),
    lambda a: a.to_sparse_bsr((2, 2)),
    lambda a: a.to_sparse_bsc((2, 2)),
]


def test_what_was_digested_can_be_resized():  # as observers of quantisation do with their buffers
    for tensor in (torch.empty(0), torch.ones(3)):
        digest_tensors({"t": tensor})
        assert tensor.resize_(5).shape == (5,)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("make", SPARSE)
def test_sparse_tensors_have_digests_of_what_is_stored(make):
    x = torch.eye(4) + torch.ones(4).diag(0).roll(1, 0)
    base = digest_tensors({"x": make(x)})
    assert base == digest_tensors({"x": make(x.clone())})
    others = [digest_tensors({"x": tensor}) for tensor in (x, make(2 * x), make(x.T.contiguous()))]
    assert len({base, *others}) == 4


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_are_told_apart_by_their_layouts():
    square = torch.eye(4)
    assert len({digest_tensors({"x": make(square)}) for make in SPARSE}) == 5
    double = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=False)
    assert digest_tensors({"x": double}) == digest_tensors({"x": double.coalesce()})


def test_lazy_conjugates_are_the_numbers_that_they_mean():
    z = torch.tensor([1 + 2j, 3 - 4j])
    for lazy in (z.conj(), z.conj().imag):
        plain = torch.tensor(lazy.tolist(), dtype=lazy.dtype)
        assert digest_tensors({"x": lazy}) == digest_tensors({"x": plain})
