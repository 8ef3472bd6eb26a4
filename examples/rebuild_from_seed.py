"""A network in 4 kB and a seed, and as many variants of it as you like, at 4 kB each.

θ₀ and P come from seeds, so that a file has to hold the numbers that were trained and nothing else,
and another process on another machine makes the same weights of them, bit for bit.
``python examples/rebuild_from_seed.py``
"""

import hashlib
import subprocess
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import subspan

OUT = Path("runs/rebuild_from_seed")
VARIANTS = {"turned": (1, 0), "upside-down": (2, 0), "mirrored": (0, 1)}  # right angles, a mirror


def build() -> nn.Module:
    """The architecture. What its weights are at first does not matter: a seed says it."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def images(turns: int = 0, mirror: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits as one customer or another writes them: images and labels to train on, and to test."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    x = torch.rot90(x, turns, (1, 2))
    x = x.flip(2) if mirror else x
    return x[:1400], y[:1400], x[1400:], y[1400:]


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """An ordinary loop."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(10):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    return 100 * (net(x).argmax(1) == y).float().mean().item()


def digest(net: nn.Module) -> str:
    """A few digits that any change of any weight would change."""
    bits = b"".join(tensor.detach().numpy().tobytes() for tensor in net.parameters())
    return hashlib.sha256(bits).hexdigest()[:16]


def rebuild(name: str) -> nn.Module:
    """An ordinary network from this file's `build`, the base's 4 kB and a variant's 4 kB."""
    base = subspan.load(OUT / "base.safetensors", build).merge()
    return subspan.load(OUT / f"{name}.safetensors", base).merge()


def main() -> None:
    """Train a base and its variants; another process rebuilds them and says what it got."""
    OUT.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = subspan.SubspaceModel.from_seed(build, 800, init_seed=2024)
    train(model, *images()[:2])
    size = subspan.save(model, OUT / "base.safetensors")
    base = model.merge()  # an ordinary network, nothing of subspan in it
    weights = subspan.count(base).dense
    print(f"base: {weights:,} weights in {size:,} bytes, {accuracy(base, *images()[2:]):.1f} %")

    digests = {}
    for name, change in VARIANTS.items():
        *training, x, y = images(*change)
        before = accuracy(base, x, y)
        variant = subspan.SubspaceModel(model.merge(), 800)  # θ₀ is the base now
        train(variant, *training)
        size = subspan.save(variant, OUT / f"{name}.safetensors")
        net = variant.merge()
        digests[name] = digest(net)
        print(f"{name}: {before:.1f} % before, {accuracy(net, x, y):.1f} % with {size:,} bytes")
    print(
        f"ten thousand such variants: {1e4 * size / 1e6:.0f} MB, with all their weights "
        f"{1e4 * 4 * weights / 1e9:.1f} GB"
    )

    command = [sys.executable, __file__, *VARIANTS]
    rebuilt = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    print(f"the same bits in another process: {rebuilt == list(digests.values())}")


if __name__ == "__main__":
    if sys.argv[1:]:  # the other process
        print(*(digest(rebuild(name)) for name in sys.argv[1:]))
    else:
        main()
