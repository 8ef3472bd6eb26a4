"""Filters in the cosine spectrum, against SciPy's transform and sums over everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
import torch

from subspan import SubspanError
from subspan.layers import SpectralFilters


def expected(layer, x):
    spectrum = torch.from_numpy(scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho"))
    S, T = layer.out_size
    H = layer.filters.detach()
    out = torch.zeros(len(x), layer.out_channels, S, T, dtype=x.dtype)
    for o in range(layer.out_channels):
        for c in range(layer.in_channels):
            out[:, o] += spectrum[:, c, :S, :T] * H[o, c]
    image = scipy.fft.idctn(out.numpy(), axes=(2, 3), norm="ortho")
    return (
        torch.from_numpy(image) * math.sqrt(S * T / math.prod(layer.size))
        + layer.bias.detach()[:, None, None]
    )


@pytest.mark.parametrize("out_size", [None, 5, 2, (3, 6)])
@pytest.mark.parametrize("size", [8, (9, 7)])
def test_values(size, out_size):
    torch.manual_seed(0)
    layer = SpectralFilters(3, 4, size, 6, out_size, dtype=torch.float64, seed=2)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, *layer.size, dtype=torch.float64)
    torch.testing.assert_close(layer(x).detach(), expected(layer, x))


def test_filters_are_sums_of_shared_tuples():
    layer = SpectralFilters(3, 4, 8, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.a.zero_()
        layer.a[6 + 2] = 2.0
    H = layer.filters.detach()
    assert (H[[0, 2, 3]] == 0).all()
    column = layer.atoms.matvec(torch.eye(6, dtype=torch.float64)[2])
    torch.testing.assert_close(H[1].flatten(), 2 * layer.scale * column)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 6 + 4
    assert set(layer.state_dict()) == {"a", "bias"}


@pytest.mark.parametrize("size", [8, (9, 7)])
def test_a_support_is_that_of_an_even_convolution(size):
    """The image has its mirror images around it, which end with their first pixels."""
    torch.manual_seed(0)
    layer = SpectralFilters(2, 3, size, 15, support=3, bias=False, dtype=torch.float64)
    drawn = torch.stack([layer.atoms.matvec(a) for a in layer.a.detach().view(3, 15)])
    half = layer.scale * drawn.view(3, 2, 3, 3)
    kernel = torch.zeros(3, 2, 5, 5, dtype=torch.float64)
    for i in range(-2, 3):
        for k in range(-2, 3):
            share = math.prod(1 if at == 0 else math.sqrt(2) / 2 for at in (i, k))
            kernel[:, :, 2 + i, 2 + k] = share * half[:, :, abs(i), abs(k)]
    x = torch.randn(2, 2, *layer.size, dtype=torch.float64)
    around = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), "symmetric"))
    torch.testing.assert_close(layer(x).detach(), torch.nn.functional.conv2d(around, kernel))


def test_a_reduction_keeps_a_smooth_image_as_bright():
    layer = SpectralFilters(1, 1, 16, 1, 8, bias=False, family="hash")
    with torch.no_grad():
        layer.a.fill_(1)
        sign = layer.filters.detach()
    x = torch.full((1, 1, 16, 16), 3.0)
    assert layer(x).shape == (1, 1, 8, 8)
    torch.testing.assert_close(layer(x).detach(), (3 * sign[0, 0, 0, 0]).expand(1, 1, 8, 8))


@pytest.mark.parametrize("more", [{}, {"support": 5}, {"support": 5, "out_size": 7}])
def test_variance_is_kept_at_the_start(more):
    found = []
    for seed in range(20):
        torch.manual_seed(seed)
        layer = SpectralFilters(8, 16, 14, 50, seed=seed, **more)
        # White noise has so much of its variance at the frequencies that stay.
        stays = math.prod(layer.out_size) / 14**2
        found.append(layer(torch.randn(20, 8, 14, 14)).var().item() / stays)
    assert sum(found) / 20 == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("support", [None, 3])
def test_a_layer_made_without_values_is_filled_from_a_state(support):
    made = SpectralFilters(2, 3, 8, 6, support=support)
    x = torch.randn(4, 2, 8, 8)
    empty, assigned, moved = (
        SpectralFilters(2, 3, 8, 6, support=support, device="meta") for _ in range(3)
    )
    used = SpectralFilters(2, 3, 8, 6, support=support)
    for filled in (empty, used):
        filled.to_empty(device="cpu").load_state_dict(made.state_dict())
    for other in (assigned, moved):
        other.load_state_dict(made.state_dict(), assign=True)
    for other in (empty, used, assigned, moved.to("cpu")):
        assert torch.equal(other(x), made(x))
        assert torch.equal(other.filters, made.filters)


def test_gradients():
    layer = SpectralFilters(2, 3, 5, 4, 3, dtype=torch.float64)
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)

    def run(x, a):
        return torch.func.functional_call(layer, {"a": a}, x)

    assert torch.autograd.gradcheck(run, (x, layer.a))


def test_bad_input():
    with pytest.raises(
        SubspanError, match=r"out_size must be at most \(8, 8\), the image's, got \(9, 9\)"
    ):
        SpectralFilters(1, 1, 8, 3, 9)
    for support in (0, 9):
        with pytest.raises(SubspanError, match=rf"support must be in \[1, 8\], got {support}"):
            SpectralFilters(1, 1, 8, 3, support=support)
    with pytest.raises(SubspanError, match="does not fit in D=16"):
        SpectralFilters(1, 1, 8, 17, support=4)
    with pytest.raises(SubspanError, match="does not fit in D=64"):
        SpectralFilters(1, 1, 8, 65)
    with pytest.raises(SubspanError, match="expected images of 2 × 8 × 8, got 1 × 8 × 8"):
        SpectralFilters(2, 1, 8, 3)(torch.ones(4, 1, 8, 8))
