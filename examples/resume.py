"""A training that Ctrl-C stops and ``--resume`` goes on with: the same bits at the end.

A job that is killed, or loses its machine, goes on in the same way, from the last epoch that it
finished (of long ones, from at most five minutes before). ``python examples/resume.py``
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

OUT = Path("runs/resume")
TRAIN = "train --net mlp --data digits --method hash --dim 300 --epochs 40 --out"


def start(command: str) -> subprocess.Popen[bytes]:
    """Type ``subspan …``; its progress is not shown, what it says on the error stream is."""
    print(f"$ subspan {command}", flush=True)
    words = [sys.executable, "-m", "subspan.cli", *command.split()]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL)


def losses(out: Path) -> list[float]:
    """Of the epochs that a run has finished, as its record says."""
    record = out / "record.json"
    history = json.loads(record.read_text())["history"] if record.exists() else []
    return [epoch["train_loss"] for epoch in history]


def main() -> None:
    """Train once undisturbed, and once with a stop on the way."""
    shutil.rmtree(OUT, ignore_errors=True)
    whole, stopped = OUT / "undisturbed", OUT / "stopped"

    start(f"{TRAIN} {whole}").wait()

    run = start(f"{TRAIN} {stopped}")
    while len(losses(stopped)) < 3 and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)  # what Ctrl-C sends
    code = run.wait()
    print(f"exit code {code}, {len(losses(stopped))} of 40 epochs in its record")

    start(f"train --resume --out {stopped}").wait()
    print(f"{len(losses(stopped))} epochs in its record")
    models = [(out / "model.safetensors").read_bytes() for out in (whole, stopped)]
    print(f"the same model, bit for bit: {models[0] == models[1]}")
    print(f"the same losses in all epochs: {losses(whole) == losses(stopped)}")


if __name__ == "__main__":
    main()
