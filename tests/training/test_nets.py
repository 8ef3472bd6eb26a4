"""The networks by name: published parameter counts, shapes, and a user's own."""

import sys

import pytest
import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.training import nets

MNIST, CIFAR, CIFAR_CROPPED = (1, 28, 28), (3, 32, 32), (3, 28, 28)

WEIGHTS = [
    ("mlp", MNIST, 159_010),  # Minut 2023
    ("mlp", CIFAR_CROPPED, 472_610),  # Minut 2023
    ("minut-mlp", CIFAR, 472_610),  # Minut 2023, who crops
    ("minut-lenet", CIFAR, 62_006),  # Minut 2023, who crops
    ("lenet-6-16-120-84", MNIST, 61_706),
    ("lenet-k3-4-8", MNIST, 4 * 9 + 4 + 8 * 4 * 9 + 8 + 6 * 6 * 8 * 10 + 10),
    ("separable-7-10-10-11-12", MNIST, 997),  # github.com/JoshWarn/Parameter-Efficient-MNIST
    ("separable-ln-32-64-64-64-64", CIFAR, 18_154),
    ("mlp-10", MNIST, 7_960),  # Minut 2023
    ("minut-mlp-10", CIFAR, 23_640),  # Minut 2023
    ("mlp-200", MNIST, 159_010),
    ("mlp-200-200", MNIST, 199_210),  # Li 2018
    ("mlp-200-200", CIFAR, 656_810),  # Li 2018
    ("mlp-1024-512", MNIST, 1_333_770),  # Wu 2018
    ("lenet", MNIST, 61_706),  # Minut 2023
    ("lenet", CIFAR_CROPPED, 62_006),  # Minut 2023
    ("lenet", CIFAR, 62_006),
    ("lenet-valid", MNIST, 44_426),  # Li 2018
    ("lenet-valid", CIFAR, 62_006),  # Li 2018
    ("lenet5-caffe", MNIST, 431_080),  # Schotthöfer 2022, with biases
    ("lenet-tf", MNIST, 3_274_634),  # Wu 2018
    ("linear", MNIST, 7_850),
    ("spectral", MNIST, 800 + 8 + 3_200 + 16 + 3_136 * 2_048 + 2_048 + 20_490),  # Wu 2018
    ("gressmann-fc", MNIST, 101_770),
    ("gressmann-fc", CIFAR, 394_634),
    ("gressmann-cnn", MNIST, 93_322),
    ("gressmann-cnn", CIFAR, 122_570),
    ("resnet8", CIFAR, 77_850),
    ("resnet20", CIFAR, 272_282),
    ("vgg11", CIFAR, 9_228_362),
    ("vgg16", CIFAR, 14_724_042),
]


SIZED = ["lenet-k3-4-8-9", "lenet-k4-2-3", "lenet-k7-1-1", "separable-4-8-3", "separable-ln-4-8-3"]


def weights(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("name", "shape", "expected"), WEIGHTS)
def test_weights_are_the_published_count(name, shape, expected):
    assert weights(nets.build(name, shape)) == expected


def test_separable_networks_may_be_normalised():
    """Over all channels and pixels of an image, with no numbers of its own."""
    plain, normal = (nets.build(f"separable-{ln}4-8-3", CIFAR) for ln in ("", "ln-"))
    assert weights(plain) == weights(normal)
    seen = normal[: list(dict(normal.named_children())).index("conv3_norm") + 1]
    out = seen(torch.randn(2, *CIFAR)).flatten(1)
    assert out.mean(dim=1).abs().max() < 1e-5
    assert torch.allclose(out.var(dim=1, unbiased=False), torch.ones(2), atol=1e-3)
    assert not any("norm" in name for name, _ in plain.named_children())


@pytest.mark.parametrize("name", ["gressmann-fc", "gressmann-cnn"])
def test_gressmanns_networks_begin_as_keras_has_them(name):
    for layer in nets.build(name).modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            fans = sum(layer.weight.shape[:2]) * layer.weight[0, 0].numel()
            bound = (6 / fans) ** 0.5
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert not layer.bias.any()


def test_lenet5_caffe_without_biases():
    net = nets.build("lenet5-caffe")
    assert sum(p.numel() for name, p in net.named_parameters() if "bias" not in name) == 430_500


def test_resnet8_with_running_statistics():
    net = nets.build("resnet8", CIFAR)
    statistics = sum(b.numel() for name, b in net.named_buffers() if "running" in name)
    assert statistics == 480
    assert weights(net) + statistics == 78_330  # Gressmann 2020


def test_resnet20_has_1376_running_statistics():
    net = nets.build("resnet20", CIFAR)
    assert sum(b.numel() for name, b in net.named_buffers() if "running" in name) == 1_376


@pytest.mark.parametrize("name", [*nets.names(), "mlp-7-5", *SIZED])
@pytest.mark.parametrize("shape", [MNIST, CIFAR, (2, 45, 37)])
def test_logits_have_one_column_per_class(name, shape):
    assert nets.build(name, shape, classes=7)(torch.zeros(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize("name", [*nets.names(), *SIZED])
def test_images_from_the_smallest_size_on(name):
    """A net takes its least size and each one above, and says so one pixel below."""
    smallest = nets._entry(name).smallest
    for side in range(smallest, 29):
        assert nets.build(name, (1, side, side))(torch.zeros(2, 1, side, side)).shape == (2, 10)
    if smallest > 1:
        side = smallest - 1
        message = f"{name!r} takes images of at least {smallest}x{smallest} .*got {side}x{side}"
        with pytest.raises(SubspanError, match=message):
            nets.build(name, (1, side, side))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "name", ["lenet", *SIZED, *(n for n in nets._NETS if nets._NETS[n].smallest > 1)]
)
def test_no_smaller_image_would_do(name):
    """Past the check, a pixel less leaves some layer without any."""
    side = nets._entry(name).smallest - 1
    with pytest.raises((RuntimeError, SubspanError)):
        nets._entry(name).build((1, side, side), 10)(torch.zeros(2, 1, side, side))


def test_one_short_side_is_too_small():
    with pytest.raises(SubspanError, match="at least 12x12 pixels, got 40x8: use larger"):
        nets.build("lenet", (1, 40, 8))


@pytest.mark.parametrize("name", ["minut-mlp", "minut-lenet"])
def test_minuts_networks_see_the_centre_of_an_image(name):
    x = torch.rand(1, *CIFAR, requires_grad=True)
    nets.build(name, CIFAR)(x).sum().backward()
    seen = x.grad.abs().sum(dim=(0, 1)) > 0
    assert seen[2:30, 2:30].all()
    assert seen.sum() == 28 * 28


def test_residual_block_adds_its_input():
    net = nets.build("resnet8", CIFAR)
    block = net.get_submodule("stage1_block1")
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_resnet_halves_the_image_twice(name):
    features = nets.build(name, CIFAR)[:-3]  # without pool, flatten, fc1
    assert features(torch.zeros(1, *CIFAR)).shape == (1, 64, 8, 8)


def test_layers_are_named_for_selection():
    names = [name for name, _ in nets.build("lenet").named_parameters()]
    layers = ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert names == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def test_layers_are_not_linear_in_each_other():
    net = nets.build("mlp-8-8", (1, 2, 2))
    assert [type(m).__name__ for m in net] == ["Flatten", *["Linear", "ReLU"] * 2, "Linear"]


@pytest.mark.parametrize(
    ("name", "builtin"),
    [("lenet", True), ("mlp", True), ("mlp-3-4", True), ("mlp-", False), ("my.nets:f", False)],
)
def test_is_builtin(name, builtin):
    assert nets.is_builtin(name) is builtin


@pytest.mark.parametrize("name", ["mlp-0", "mlp-x", "mlp-", "mlp--3", "mlp-200-", "LENET", ""])
def test_unknown_name(name):
    with pytest.raises(SubspanError, match=r"unknown net .*known are .*lenet-tf.*mlp-WIDTH-WIDTH"):
        nets.build(name)


def test_unknown_name_gets_the_nearest():
    with pytest.raises(SubspanError, match="did you mean lenet"):
        nets.build("lennet")


@pytest.mark.parametrize("shape", [(28, 28), (0, 28, 28), (1, 28, -1)])
def test_input_shape_is_checked(shape):
    with pytest.raises(SubspanError, match="three positive integers"):
        nets.build("mlp", shape)


def test_classes_are_checked():
    with pytest.raises(SubspanError, match="at least one class"):
        nets.build("mlp", classes=0)


USERS_OWN = """
from torch import nn
seen = {}
def both(input_shape, classes):
    seen.update(input_shape=input_shape, classes=classes)
    return nn.Linear(input_shape[0], classes)
def keyword_only(*, classes, depth=3):
    return nn.Linear(depth, classes)
def neither():
    return nn.Linear(1, 1)
def anything(**kwargs):
    assert not kwargs
    return nn.Linear(1, 1)
class Net(nn.Linear):
    def __init__(self, classes): super().__init__(2, classes)
def demanding(width): ...
def nothing(): return None
number = 3
ready = nn.Linear(1, 1)
"""


@pytest.fixture
def users_own(tmp_path, monkeypatch):
    """A module in the working directory, which is not on ``sys.path`` yet."""
    (tmp_path / "my_nets.py").write_text(USERS_OWN)
    (tmp_path / "broken_nets.py").write_text("import no_such_library")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    for name in ("my_nets", "broken_nets"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("users_own")
@pytest.mark.parametrize(
    ("function", "size"),
    [("both", (3, 5)), ("keyword_only", (3, 5)), ("neither", (1, 1)), ("anything", (1, 1))],
)
def test_users_own_function(function, size):
    net = nets.build(f"my_nets:{function}", CIFAR, classes=5)
    assert (net.in_features, net.out_features) == size


@pytest.mark.usefixtures("users_own")
def test_users_own_class_and_arguments():
    assert nets.build("my_nets:Net", CIFAR, classes=5).out_features == 5
    nets.build("my_nets:both", CIFAR, classes=5)
    assert sys.modules["my_nets"].seen == {"input_shape": CIFAR, "classes": 5}


@pytest.mark.usefixtures("users_own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "there is no module 'no_such_module' in .*: run from the folder"),
        ("my_nets.sub:f", r"there is no module 'my_nets\.sub'"),
        ("my_nets:bott", "unknown function of my_nets 'bott': did you mean both"),
        ("my_nets:number", "expected a function or class that makes a net, got int"),
        ("my_nets:ready", "expected a function or class that makes a net, got Linear"),
        ("my_nets:nothing", "must return a torch.nn.Module, got NoneType"),
        ("my_nets:demanding", r"its signature is \(width\)"),
        ("my_nets:", "package.module:function"),
        (":both", "package.module:function"),
        ("./my_nets.py:both", "package.module:function"),
    ],
)
def test_users_own_errors(name, message):
    with pytest.raises(SubspanError, match=message):
        nets.build(name)


@pytest.mark.usefixtures("users_own")
def test_a_missing_import_inside_the_users_module_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        nets.build("broken_nets:f")
