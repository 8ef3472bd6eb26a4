"""Write compact.json: compact files byte for byte, with what they hold.

    python -m tests.golden.compact

Once a version is released this script has no other use than adding files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

import subspan
from subspan import SubspaceModel, checkpoint
from subspan.checkpoint.compact import read_compact
from tests.nets import MLP

PATH = Path(__file__).with_name("compact.json")
LABORATORY = {
    "net": "lenet",
    "data": "mnist",
    "seed": 2,
    "method": "hash",
    "image_shape": [1, 28, 28],
    "classes": 10,
    "mean": [0.130634159],
    "std": [0.308090001],
}

PHOTOS = {
    "net": "separable-ln-32-64-64-64-64",
    "data": "cifar10",
    "seed": 0,
    "method": "hash",
    "image_shape": [3, 32, 32],
    "classes": 10,
    "mean": [0.491624594, 0.482304543, 0.446643323],
    "std": [0.247051612, 0.243468821, 0.261571556],
    "names": "4910675e35533f6e",
}


def golden_model(dim: int = 60, **options: object) -> SubspaceModel:
    """A model from a seed whose coordinates are integers over 64, always the same."""
    model = SubspaceModel.from_seed(MLP, dim, init_seed=5, seed=2, **options)
    with torch.no_grad():
        for k, w in enumerate(model.coordinates.values()):
            square = torch.arange(w.numel()) ** 3 % 41 - 20 + k
            w.copy_(square.float() ** 3 / 64)
    return model


FILES: dict[str, Callable[[Path], int]] = {
    "plain": lambda path: subspan.save(golden_model(), path, bits=4),
    "grid": lambda path: subspan.save(golden_model(20), path, bits=40),
    "laboratory": lambda path: subspan.save(
        golden_model(100, compartments="layer"), path, bits=2.5, extra=LABORATORY
    ),
    "head": lambda path: subspan.save(golden_model(30, train_fully="2"), path, bits=3),
    "golf": lambda path: subspan.save(
        golden_model(40), path, bits=3, extra=LABORATORY | {"net": "separable-8-16-16-16-16"}
    ),
    "photos": lambda path: subspan.save(golden_model(40), path, bits=3, extra=PHOTOS),
}

if __name__ == "__main__":
    golden = {}
    for name, write in FILES.items():
        file = Path("golden.subspan")
        write(file)
        data = file.read_bytes()
        step, (header, tensors) = read_compact(data, file).step, checkpoint.read(file)
        golden[name] = {
            "file": data.hex(),
            "header": header,
            "step": step.hex(),
            "levels": [round(w / step) for w in tensors["coordinates"].tolist()],
        }
        file.unlink()
    PATH.write_text(json.dumps(golden, indent=1) + "\n")
