"""A folder of images of yours, trained by the laboratory: from Python, and by the same command.

One folder for each class under ``train/`` and ``test/``, any format that Pillow reads, all of one
size. ``python examples/own_data.py``
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from subspan import report
from subspan.cli import main as subspan
from subspan.training.config import Run, Training
from subspan.training.train import train

OUT = Path("runs/own_data")
SHAPES = ("disc", "square", "cross")


def draw(shape: str, rng: np.random.Generator) -> Image.Image:
    """One shape of any size anywhere on noise, 20 × 20 grey pixels."""
    image = Image.fromarray(rng.integers(0, 120, (20, 20), dtype=np.uint8))
    pen, r = ImageDraw.Draw(image), int(rng.integers(4, 8))
    x, y = (int(centre) for centre in rng.integers(r, 20 - r, 2))
    box = (x - r, y - r, x + r, y + r)
    if shape == "disc":
        pen.ellipse(box, fill=200)
    elif shape == "square":
        pen.rectangle(box, fill=200)
    else:
        pen.line(box, fill=200, width=3)
        pen.line((x - r, y + r, x + r, y - r), fill=200, width=3)
    return image


def make(folder: Path) -> None:
    """The data set: 200 images of each shape to learn from, and 100 to be examined with."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 200), ("test", 100)):
        for shape in SHAPES:
            (folder / part / shape).mkdir(parents=True)
            for i in range(number):
                draw(shape, rng).save(folder / part / shape / f"{i:03}.png")


def main() -> None:
    """Make the images, train on them, and ask for the same by command."""
    data, out = OUT / "shapes", OUT / "run"
    if not data.exists():
        make(data)

    training = Training(net="lenet-valid", data=str(data), epochs=10, batch_size=32)
    record = train(Run(training, method="hash", options={"dim": 300}, lr=0.17), out)
    print(f"{100 * record.test_score:.1f} % of the test images are told right by 300 numbers")
    print(*report.write(out), sep="\n")

    # The same as a command; what is complete is not repeated.
    command = f"train --net lenet-valid --data {data} --epochs 10 --batch-size 32 --dim 300"
    command += f" --lr 0.17 --out {out}"
    print(f"\n$ subspan {command}")
    raise SystemExit(subspan(command.split()))


if __name__ == "__main__":
    main()
