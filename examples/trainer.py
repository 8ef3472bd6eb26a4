"""Trainer of transformers, unchanged: a pretrained network learns more, through 1,000 numbers.

A small vision transformer reads digits. Its variant reads them upside down. The training is
interrupted, goes on from a checkpoint, and comes to the same numbers as one that was not.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import subspan

FOLDER = Path("runs/trainer")
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
turned = images.flip(2, 3)


def accuracy(predicted):
    """In percent."""
    return {"accuracy": 100 * (predicted.predictions.argmax(1) == predicted.label_ids).mean()}


def trainer(net, images, lr, **more):
    """A Trainer as for any other network."""
    data = [{"pixel_values": x, "labels": y} for x, y in zip(images, digits.target, strict=True)]
    arguments = TrainingArguments(
        FOLDER,
        learning_rate=lr,
        per_device_train_batch_size=50,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        num_train_epochs=15,  # 360 steps
        **more,
    )
    rest = {"eval_dataset": data[1200:], "compute_metrics": accuracy}
    made = Trainer(net, arguments, train_dataset=data[:1200], **rest)
    made.remove_callback(PrinterCallback)
    return made


def untrained():
    """A vision transformer of 39,610 weights."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=10,
    )
    return ViTForImageClassification(config)


torch.manual_seed(0)
net = untrained()
trainer(net, images, 0.003, save_strategy="no").train()
net.save_pretrained(FOLDER / "pretrained")
before = trainer(net, turned, 0.0).evaluate()["eval_accuracy"]
print(f"{net.num_parameters():,} weights, upright digits; upside down: {before:.1f} %")


def variant():
    """The pretrained network in a subspace, at w = 0."""
    net = ViTForImageClassification.from_pretrained(FOLDER / "pretrained")
    return subspan.SubspaceModel(net, 1000)


model = variant()
whole = trainer(model, turned, 0.03, save_steps=180)
whole.train()
print(f"1,000 numbers: {whole.evaluate()['eval_accuracy']:.1f} %")
size = subspan.save(model, FOLDER / "variant.safetensors")
inside = (FOLDER / "checkpoint-360" / "model.safetensors").stat().st_size
print(f"the file: {size:,} bytes; the same in a checkpoint: {inside:,} bytes")

again = variant()
resumed = trainer(again, turned, 0.03, save_steps=180)
resumed.train(resume_from_checkpoint=FOLDER / "checkpoint-180")
same = torch.equal(again.coordinates["global"], model.coordinates["global"])
print(f"interrupted and resumed: the same numbers: {same}")

model.save_pretrained(FOLDER / "network")  # all weights, for programs without subspan
plain = ViTForImageClassification.from_pretrained(FOLDER / "network")
after = trainer(plain, turned, 0.0).evaluate()["eval_accuracy"]
print(f"an ordinary network again: {after:.1f} %")
