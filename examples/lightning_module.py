"""Lightning, unchanged: a module whose network is trained through 500 numbers.

A callback of a few lines says how many numbers there are and keeps the small file beside the
checkpoints. `devices=2, strategy="ddp"` sends 500 numbers a step between processes.
"""

from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import subspan

FOLDER = Path("runs/lightning")
FOLDER.mkdir(parents=True, exist_ok=True)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32), torch.tensor(digits.target))
train, test = torch.utils.data.random_split(data, [1200, 597], torch.Generator().manual_seed(0))


class Reader(lightning.LightningModule):
    """A network of two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)  # θ₀, which has to be the same when a checkpoint is loaded
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
        self.net = subspan.SubspaceModel(net, 500)

    def training_step(self, batch, _):
        """As for any other network."""
        return cross_entropy(self.net(batch[0] / 16), batch[1])

    def validation_step(self, batch, _):
        """In percent."""
        right = self.net(batch[0] / 16).argmax(1) == batch[1]
        self.log("accuracy", 100 * right.float().mean())

    def configure_optimizers(self):
        """500 numbers are all that it trains."""
        return torch.optim.Adam(self.net.parameters(), lr=0.1)


class SmallFile(Callback):
    """Keeps the file of coordinates up to date, and says how large it is."""

    def on_train_start(self, trainer, module):
        """Say how many numbers there are."""
        module.net.print_trainable_parameters()

    def on_validation_end(self, trainer, module):
        """Write the file."""
        if trainer.is_global_zero:
            self.size = subspan.save(module.net, FOLDER / "variant.safetensors")

    def on_train_end(self, trainer, module):
        """Say how large it is."""
        print(f"{module.net.summary().coordinates} numbers in a file of {self.size:,} bytes")


def trainer(epochs, *callbacks):
    """One process; output of its own only."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **quiet
    )


def loaders():
    """Images to train on, and images to test."""
    generator = torch.Generator().manual_seed(2)
    return DataLoader(train, 50, shuffle=True, generator=generator), DataLoader(test, 597)


best = ModelCheckpoint(FOLDER, monitor="accuracy", mode="max", enable_version_counter=False)
trainer(10, best, SmallFile()).fit(Reader(), *loaders())
loaded = Reader.load_from_checkpoint(best.best_model_path)
[found] = trainer(1).validate(loaded, loaders()[1], verbose=False)
print(f"the best checkpoint: {found['accuracy']:.1f} %")
