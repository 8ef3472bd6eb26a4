"""A loop with accelerate, unchanged, that trains a network through 500 numbers.

    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

Processes send each other 500 numbers a step. The state that one saves is small, and goes on in any
number of processes.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import subspan

FOLDER = Path("runs/accelerate")
accelerator = Accelerator(cpu=True)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
share = 50 // accelerator.num_processes


def start():
    """The model, its optimizer and the data, as accelerate prepares them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    model = subspan.SubspaceModel(net, 500)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(images[:1200], labels[:1200]), share, shuffle=True)
    return accelerator.prepare(model, optimizer, data)


model, optimizer, data = start()
for _ in range(10):
    for x, y in data:
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
accelerator.save_state(FOLDER / "state")
size = (FOLDER / "state" / "model.safetensors").stat().st_size
accelerator.print(f"500 numbers, {size:,} bytes in the state")

accelerator = Accelerator(cpu=True)
again, optimizer, data = start()
accelerator.load_state(FOLDER / "state")
with torch.no_grad():
    right = again(images[1200:]).argmax(1) == labels[1200:]
accelerator.print(
    f"loaded again: {100 * right.float().mean():.1f} % in {accelerator.num_processes} process"
)
subspan.save(accelerator.unwrap_model(again), FOLDER / "variant.safetensors")
