"""A layer as a sum of matrices of yours: what is learnt is how much of each there is.

A camera distorts its images in an unknown way. The engineer suspects a few ways, writes down the
matrix of each, and finds from ten images what 4,096 free weights cannot: which ways, and how
strong. ``python examples/own_matrices.py``
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from subspan.layers import ProductOfSumsLinear

WAYS = {
    "image": lambda x: x,
    "ghost on the right": lambda x: x.roll(1, 2),
    "ghost below": lambda x: x.roll(1, 1),
    "mirror image": lambda x: x.flip(2),
    "upside down": lambda x: x.flip(1),
    "blur": lambda x: sum(x.roll((i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9,
}
TRUTH = {"image": 0.7, "ghost below": 0.2, "mirror image": 0.1}


def train(layer: nn.Module, x: Tensor, y: Tensor) -> None:
    """An ordinary loop, on all images at once."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(3000):
        optimizer.zero_grad()
        mse_loss(layer(x), y).backward()
        optimizer.step()


def main() -> None:
    """Learn the camera from ten images by free weights and by six coefficients."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    x = images.flatten(1)
    y = sum(share * WAYS[way](images) for way, share in TRUTH.items()).flatten(1)

    # The columns of an operator's matrix are what it makes of the images of one bright pixel.
    pixels = torch.eye(64).view(64, 8, 8)
    matrices = torch.stack([way(pixels).reshape(64, 64).T for way in WAYS.values()])
    sums = ProductOfSumsLinear(64, 64, [{"kind": "given", "tensor": matrices}], bias=False)
    dense = nn.Linear(64, 64, bias=False)

    for name, layer in (("free", dense), ("of your matrices", sums)):
        train(layer, x[:10], y[:10])
        error = (layer(x[10:]) - y[10:]).norm() / y[10:].norm()
        numbers = sum(p.numel() for p in layer.parameters())
        print(f"{name}: {numbers:,} numbers, error on other images {100 * error:.1f} %")
    for way, share in zip(WAYS, sums.coefficients(0).tolist(), strict=True):
        print(f"  {way}: {share:z.2f}")


if __name__ == "__main__":
    main()
