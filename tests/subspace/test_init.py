import math

import pytest
import torch
from torch import nn

from subspan import SubspanError
from subspan.subspace.init import build, initialize
from subspan.subspace.parameters import digest_tensors
from tests.forks import python_code
from tests.nets import NETS

H = 40  # of the recurrent layers

# Half-width of the uniform distribution of every kind of weight, by hand.
BOUNDS = {
    "linear": (nn.Linear(50, 60), "weight", 1 / math.sqrt(50)),
    "conv1d": (nn.Conv1d(8, 50, 5), "weight", 1 / math.sqrt(40)),
    "conv2d": (nn.Conv2d(8, 50, 3), "weight", 1 / math.sqrt(72)),
    "conv3d": (nn.Conv3d(4, 20, 3), "weight", 1 / math.sqrt(108)),
    "grouped conv2d": (nn.Conv2d(8, 80, 3, groups=4), "weight", 1 / math.sqrt(18)),
    "transposed": (nn.ConvTranspose2d(8, 50, 3), "weight", 1 / math.sqrt(72)),
    "grouped transposed": (nn.ConvTranspose2d(8, 80, 3, groups=4), "weight", 1 / math.sqrt(18)),
    "embedding": (nn.Embedding(50, 60), "weight", math.sqrt(3)),
    "input of an lstm": (nn.LSTM(30, H), "weight_ih_l0", math.sqrt(6 / (30 + H))),
    "state of an lstm": (nn.LSTM(30, H), "weight_hh_l0", math.sqrt(6 / (H + H))),
    "projection of an lstm": (nn.LSTM(99, 80, proj_size=20), "weight_hr_l0", math.sqrt(6 / 100)),
    "gru": (nn.GRU(30, H), "weight_ih_l0", math.sqrt(6 / (30 + H))),
    "lstm cell": (nn.LSTMCell(30, H), "weight_ih", math.sqrt(6 / (30 + H))),
    "attention, packed": (nn.MultiheadAttention(40, 2), "in_proj_weight", math.sqrt(6 / 80)),
    "attention": (nn.MultiheadAttention(40, 2, kdim=30), "k_proj_weight", math.sqrt(6 / 70)),
    "attention, out": (nn.MultiheadAttention(40, 2), "out_proj.weight", 1 / math.sqrt(40)),
    "bilinear": (nn.Bilinear(20, 5, 15), "weight", math.sqrt(6 / (100 + 15 * 5))),
    "a matrix": (nn.ParameterList([torch.zeros(40, 50)]), "0", math.sqrt(6 / 90)),
    "a cube": (nn.ParameterList([torch.zeros(20, 10, 8)]), "0", math.sqrt(6 / (80 + 160))),
}


@pytest.mark.parametrize("kind", BOUNDS)
def test_weights_are_uniform_within_the_bound_of_their_layer(kind):
    module, name, bound = BOUNDS[kind]
    initialize(module, 3)
    weight = module.get_parameter(name).detach().flatten().double()
    n = len(weight)
    assert n >= 1000
    assert weight.abs().max() <= bound
    assert weight.abs().max() > bound * (1 - 20 / n)
    assert abs(weight.mean()) < 4 * bound / math.sqrt(3 * n)
    # The variance of a uniform variable's square is 4 a⁴ / 45.
    assert abs(weight.square().mean() - bound**2 / 3) < 4 * bound**2 * math.sqrt(4 / 45 / n)
    # Kolmogorov and Smirnov: the distance from the straight line, 0.1 % level.
    line = (weight.sort().values / bound + 1) / 2 - (torch.arange(n) + 0.5) / n
    assert line.abs().max() < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("kind", BOUNDS)
def test_every_bias_is_zero(kind):
    module = BOUNDS[kind][0]
    initialize(module, 3)
    for name, parameter in module.named_parameters():
        if "bias" in name:
            assert not parameter.any(), name


def test_other_vectors_and_scalars_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.BatchNorm1d(5), nn.PReLU(3, 0.2)
            self.gain, self.vector = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.rand(3))

    net = Net()
    vector = net.vector.detach().clone()
    net.norm.running_mean.fill_(3)
    initialize(net, 0)
    assert torch.equal(net.norm.weight, torch.ones(5))
    assert torch.equal(net.norm.running_mean, torch.full((5,), 3.0))
    assert torch.equal(net.act.weight, torch.full((3,), 0.2))
    assert net.gain == 2
    assert torch.equal(net.vector, vector)


def test_each_tensor_has_draws_of_its_own():
    net = nn.Sequential(*[nn.Linear(5, 5, bias=False) for _ in range(3)])
    initialize(net, 0)
    weights = [layer.weight.detach().clone() for layer in net]
    assert len({digest_tensors({"": w}) for w in weights}) == 3
    initialize(net, 1)
    assert not any(torch.equal(layer.weight, w) for layer, w in zip(net, weights, strict=True))


def test_a_tied_tensor_follows_its_first_module():
    net = build(NETS["tied"], 0)
    assert net.output.weight is net.embedding.weight
    assert net.embedding.weight.abs().max() > 1.5  # an embedding's, not a linear layer's 0.4


def test_nothing_to_draw_is_no_trouble():
    for shape in ((0, 3), (3, 0), (2, 0, 3)):
        net = nn.Linear(1, 1)
        net.weight = nn.Parameter(torch.empty(shape))
        initialize(net, 0)
    initialize(nn.ReLU(), 0)


def test_other_dtypes_are_the_float32_values_rounded():
    for dtype in (torch.float64, torch.bfloat16):
        plain, other = nn.Linear(5, 5), nn.Linear(5, 5, dtype=dtype)
        initialize(plain, 0)
        initialize(other, 0)
        assert torch.equal(other.weight, plain.weight.to(dtype))


def hexes(tensor, count):
    return [float(x).hex() for x in tensor.detach().flatten()[:count]]


def test_golden_values():
    """θ₀ of every stored model is made of these: they must never change."""
    layer = nn.Linear(4, 3)
    initialize(layer, 0)
    assert hexes(layer.weight, 4) == [
        "0x1.2658940000000p-2",
        "-0x1.d5d7680000000p-3",
        "-0x1.36cae80000000p-3",
        "0x1.a8c7580000000p-3",
    ]
    initialize(layer, (1 << 64) - 1)
    assert hexes(layer.weight, 2) == ["0x1.cae4c80000000p-3", "-0x1.7048c80000000p-3"]
    net = nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 2))
    initialize(net, 7)
    assert hexes(net[1].weight_hh_l0, 2) == ["-0x1.9e29b60000000p-4", "-0x1.3fde680000000p-2"]


CODE = """
import torch
from subspan.subspace.init import build
from subspan.subspace.parameters import digest_tensors
from tests.nets import NETS
torch.set_num_threads({threads})
for name, make in NETS.items():
    print(name, digest_tensors(dict(build(make, 5).named_parameters())))
"""


@pytest.mark.heavy
def test_the_same_in_another_process_with_other_threads(tmp_path):
    run = python_code(CODE.format(threads=1 if torch.get_num_threads() > 1 else 2), tmp_path)
    here = [
        f"{n} {digest_tensors(dict(build(make, 5).named_parameters()))}" for n, make in NETS.items()
    ]
    assert run.stdout.splitlines() == here


def test_build_leaves_the_generator_of_torch_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = build(NETS["raw"], 4)
    assert torch.equal(torch.rand(3), expected)
    second = build(NETS["raw"], 4)  # what is not drawn is made under a fixed seed
    assert digest_tensors(dict(first.named_parameters())) == digest_tensors(
        dict(second.named_parameters())
    )


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.0, "1", None])
def test_seeds_are_checked_before_anything_is_made(seed):
    with pytest.raises(SubspanError, match="seed must be an integer in"):
        build(lambda: pytest.fail("made"), seed)
