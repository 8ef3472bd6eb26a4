"""One run of a sweep in several processes of this machine, which torchrun starts.

They find the run in a file, and the first of them to end it leaves the outcome in another. They
look by themselves whether their sweep is to stop.
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from subspan import distributed
from subspan.sweeps.job import Job, Outcome
from subspan.training.stop import Stop

if TYPE_CHECKING:
    from subspan.sweeps.worker import Worker

JOB, OUTCOME = "job", "outcome"
LAST_WORDS = 4000  # characters


def run_in_processes(worker: Worker, job: Job, processes: int) -> Outcome:
    """Train a run in so many processes.

    If they end without an outcome, as when one is killed, it is "died", with their last words.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / JOB).write_bytes(pickle.dumps((worker, job)))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc-per-node={processes}", "-m", __name__, temporary]
        with (folder / "errors").open("w") as errors:
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # a terminal's Ctrl-C is for the sweep's own process
            )
            try:
                process.wait()
            except BaseException:
                _kill(process)
                raise
        with contextlib.suppress(FileNotFoundError, EOFError, pickle.UnpicklingError):
            outcome: Outcome = pickle.loads((folder / OUTCOME).read_bytes())
            return outcome
        words = (folder / "errors").read_text(errors="replace")
        return Outcome(job, "died", traceback=words[-LAST_WORDS:])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill torchrun and its processes, which have sessions of their own and would train on."""
    family = [psutil.Process(process.pid)]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += family[0].children(recursive=True)
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def main(folder: Path) -> None:
    """Be one of the processes."""
    worker, job = pickle.loads((folder / JOB).read_bytes())
    with Stop(elsewhere=worker.folder.is_stopping) as stop:
        outcome = worker.train(job, stop)
        # Processes that fail because another has ended find that its outcome is there.
        with contextlib.suppress(FileExistsError), (folder / OUTCOME).open("xb") as file:
            file.write(pickle.dumps(outcome))
        if outcome.status != "done":
            sys.exit(1)
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
