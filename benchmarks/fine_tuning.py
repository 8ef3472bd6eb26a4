"""A training step of MiniLM by ways to fine-tune it, in turns: 32 sentences of 32 words.

    python benchmarks/fine_tuning.py --out benchmarks/results/fine-tuning

Adam trains what each way trains, the classifier of two classes always. LoRA is PEFT's, in queries
and values, as the subspace of LoRA's factors is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import subspan
from subspan.bench.parts.variants import load
from subspan.bench.timing import interleaved
from subspan.files import write_atomically
from subspan.training import machine

SENTENCES, WORDS, D = 32, 32, 1000
LAYERS = ["query", "value"]
REFERENCE = "LoRA, r = 1"


def subspace(targets: str | None) -> nn.Module:
    """MiniLM through d numbers and its head."""
    return subspan.SubspaceModel(load(), D, targets=targets, train_fully="head")


def factors() -> nn.Module:
    """MiniLM through d numbers of LoRA's factors."""
    return subspan.lora(load(), D, rank=1, targets=LAYERS, train_fully="head")


def adapters(rank: int) -> nn.Module:
    """MiniLM with PEFT's LoRA."""
    config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=rank, target_modules=LAYERS)
    return get_peft_model(load(), config)


WAYS: dict[str, Callable[[], nn.Module]] = {
    "all weights": load,
    REFERENCE: lambda: adapters(1),
    "LoRA, r = 8": lambda: adapters(8),
    "subspace, norms and biases": lambda: subspace("norms-and-biases"),
    "subspace, LoRA's factors": factors,
    "subspace, all weights": lambda: subspace(None),
}


def make_step(model: nn.Module) -> Callable[[], None]:
    """Return a step of training, on one batch of random words."""
    net = model.train()
    optimizer = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), lr=1e-4)
    words = torch.randint(1000, 30_000, (SENTENCES, WORDS))
    labels = torch.arange(SENTENCES) % 2

    def step() -> None:
        optimizer.zero_grad()
        net(input_ids=words, labels=labels).loss.backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure every way, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/fine-tuning"), help="a folder")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each way")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    steps = {name: make_step(make()) for name, make in WAYS.items()}
    timings = interleaved(steps, given.seconds, torch.device("cpu"))
    device = machine.device_name(torch.device("cpu"))
    told = {"device": device, "versions": machine.versions()}
    record = {"machine": told, "dim": D, "steps": timings}
    write_atomically(given.out / "steps.json", json.dumps(record, indent=1).encode())
    for name, timing in timings.items():
        ratio = timing["median"] / timings[REFERENCE]["median"]
        print(f"{name:28}  {1e3 * timing['median']:7.1f} ms  {ratio:5.2f} × {REFERENCE}")


if __name__ == "__main__":
    main()
