"""Initial weights from a seed: θ₀ that any machine rebuilds bit for bit.

Sources: He, Zhang, Ren and Sun, ICCV 2015 (linear and convolutional layers, with the negative slope
a = √5 of PyTorch's own layers, so that a net starts at the scale that its users know: among He,
Glorot and this, it also trained best in a subspace, see ``docs/design.md``); Glorot and Bengio,
AISTATS 2010 (the others). Uniform rather than normal variants, because a uniform float32 needs no
logarithm and comes out the same on every backend: 2u − 1 is exact and one product follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.philox import Source
from subspan.subspace.parameters import find_slots
from subspan.subspace.quantised import read_quantised

DOMAIN = 16
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def initialize(net: nn.Module, seed: int, only: Collection[str] | None = None) -> None:
    """Overwrite a network's parameters in place by draws from ``seed``.

    ===============================  ==========================================================
    weight of Linear, Conv           He with a = √5: uniform in ±√(1 / fan_in)
    Embedding                        uniform in ±√3 (variance 1)
    other tensors of 2 dimensions    Glorot: uniform in ±√(6 / (fan_in + fan_out)); a recurrent
    or more                          weight and ``in_proj_weight`` gate by gate
    bias                             0
    other vectors and scalars        as the constructor left them (1 in normalisations)
    ===============================  ==========================================================

    The p-th tensor (in the order of ``named_parameters``) takes sequence p of the generator.

    Args:
        net: any module; its buffers are left alone.
        seed: in [0, 2⁶⁴).
        only: names of the parameters to draw; None draws all. What a tensor gets is the same.
    """
    source = Source(seed, DOMAIN)
    for position, (path, module, attribute) in enumerate(_owners(net)):
        if only is not None and path not in only:
            continue
        tensor = module.get_parameter(attribute)
        if (packed := read_quantised(module, attribute)) is not None:
            raise SubspanError(
                f"{path} is quantised ({packed.kind}), and initial weights cannot be drawn "
                "into it: give the network with its own weights"
            )
        bound = _bound(module, attribute, tensor)
        if bound is not None:
            u = source.uniforms(0, tensor.numel(), column=position, device=tensor.device)
            tensor.copy_((2 * u - 1).view(tensor.shape) * bound)


def build(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a network from a function, initialised from ``seed``.

    The function runs under a fixed seed of torch's own generator, which it leaves as it found it:
    what :func:`initialize` does not draw comes out the same each time on one version of torch.
    """
    if isinstance(make, nn.Module):
        raise SubspanError("expected a function that makes the network, got the network itself")
    key = Source(seed, DOMAIN).seed % (1 << 63)  # refuses what is no seed
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key)  # and not those of other devices
        net = make()
    if not isinstance(net, nn.Module):
        raise SubspanError(f"expected a function that returns a Module, got {type(net).__name__}")
    initialize(net, seed)
    return net


def left_as_made(net: nn.Module) -> dict[str, Tensor]:
    """Return by name all that :func:`initialize` does not draw, plain attributes included."""
    made = {
        path: module.get_parameter(attribute)
        for path, module, attribute in _owners(net)
        if _bound(module, attribute, module.get_parameter(attribute)) is None
    }
    plain = {
        f"{name}.{key}".lstrip("."): value
        for name, module in net.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    return {**made, **dict(net.named_buffers()), **plain}


def _owners(net: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """List parameters with module and attribute: a tied one has those that hold it first."""
    return [(s.path, *s.find(net)) for s in find_slots(net) if s.path == s.tensor]


def _bound(module: nn.Module, attribute: str, tensor: Tensor) -> float | None:
    """Half-width of the uniform distribution of a parameter; None leaves it as it is."""
    if "bias" in attribute:
        return 0.0
    if tensor.dim() < 2 or not tensor.numel():
        return None
    if isinstance(module, nn.Embedding):
        return math.sqrt(3)
    fan_out, fan_in, receptive = tensor.shape[0], tensor[0].numel(), tensor[0, 0].numel()
    if isinstance(module, TRANSPOSED):  # (inputs, outputs / groups, *kernel)
        return math.sqrt(1 / (tensor.shape[0] // module.groups * receptive))
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return math.sqrt(1 / fan_in)  # √(6 / ((1 + a²) fan_in))
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):  # the projection of an LSTM is no gate
        fan_out = min(fan_out, module.hidden_size)
    if isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight":
        fan_out //= 3
    return math.sqrt(6 / (fan_in + fan_out * receptive))
