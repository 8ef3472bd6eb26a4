"""How a run ends, as a value: in this process, and in several that torchrun starts."""

import errno
import pickle
import signal
import subprocess
import sys

import pytest
import torch

from subspan.cache import cache
from subspan.errors import Stopped, SubspanError
from subspan.families import projection, stored
from subspan.sweeps import processes
from subspan.sweeps import worker as module
from subspan.sweeps.folder import SweepFolder
from subspan.sweeps.job import Job, Outcome
from subspan.sweeps.result import SweepRecord
from subspan.sweeps.worker import Worker
from subspan.training import locks, own
from subspan.training.locks import BusyError
from subspan.training.stop import Stop
from tests.runs import a_run

JOB = Job("a", a_run(dim=5))
POPEN = subprocess.Popen
FIRST = SweepRecord(status="running", config={}, baseline=None, rows=[])


@pytest.fixture
def folder(tmp_path):
    """A folder that a sweep has joined."""
    folder = SweepFolder(tmp_path)
    with folder.join(FIRST, overwrite=False):
        yield folder


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (SubspanError("no such net"), "failed", "no such net"),
        (TypeError("a bug"), "failed", "TypeError: a bug"),
        (BusyError("another process"), "busy", ""),
        (Stopped("stopped", 15), "stopped", ""),
        (OSError(errno.EACCES, "no"), "failed", "PermissionError: [Errno 13] no"),
        (OSError(errno.ENOSPC, "full"), "full", ""),
        (caused(RuntimeError("cannot write"), OSError(errno.EDQUOT, "full")), "full", ""),
    ],
)
def test_what_a_run_raises(error, status, text, folder, monkeypatch):
    def train(*_, **__):
        raise error

    monkeypatch.setattr(module, "train", train)
    outcome = pickle.loads(pickle.dumps(Worker(folder)(JOB)))
    assert (outcome.job, outcome.status, outcome.error) == (JOB, status, text)
    assert outcome.errno in ((errno.ENOSPC, errno.EDQUOT) if status == "full" else (0,))
    bug = status == "failed" and not isinstance(error, SubspanError)
    assert bug == (f"{type(error).__name__}: " in outcome.traceback)
    assert bug == ("in train\n" in outcome.traceback)


def test_interrupts_are_not_outcomes(folder, monkeypatch):
    def train(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", train)
    with pytest.raises(KeyboardInterrupt):
        Worker(folder).run(JOB, Stop())


def test_a_run_is_not_begun_when_it_is_busy_or_its_sweep_stops(folder, monkeypatch):
    monkeypatch.setattr(module, "train", lambda *_, **__: {"status": "complete"})
    with locks.lock_folder(folder.run("a")):
        assert Worker(folder)(JOB).status == "busy"
    assert Worker(folder)(JOB) == Outcome(JOB, "done", {"status": "complete"})
    folder.ask_to_stop()
    assert Worker(folder)(JOB).status == "stopped"
    assert Worker(folder).run(JOB, Stop()).status == "stopped"


def test_imports_travel_with_the_run(folder, in_tmp_path, monkeypatch):
    """A process on another machine does not have the environment of the sweep's."""
    monkeypatch.setenv(own.IMPORTS, "")
    monkeypatch.setattr(module, "train", lambda *_, **__: {"imported": "mine" in sys.modules})
    (in_tmp_path / "mine.py").touch()
    worker = pickle.loads(pickle.dumps(Worker(folder, imports=("mine",))))
    assert worker.run(JOB, Stop()) == Outcome(JOB, "done", {"imported": True})
    assert own.remembered() == ("mine",)  # for processes that this one starts
    sys.modules.pop("mine")
    outcome = Worker(folder, imports=("not_there",)).run(JOB, Stop())
    assert outcome.status == "failed"
    assert "there is no module 'not_there'" in outcome.error


def test_a_run_leaves_no_matrices_to_the_next(folder, monkeypatch):
    """Which would count them as its own memory."""

    def train(*_, **__):
        p = projection("stored", out_dim=20, in_dim=3, seed=0)
        stored._matrix(p, 0, torch.device("cpu"), torch.float32)
        cache.get("a run's", lambda: (torch.ones(3),))

    monkeypatch.setattr(module, "train", train)
    assert Worker(folder).run(JOB, Stop()).status == "done"
    assert stored._matrix.cache_info().currsize == 0
    built = []
    cache.get("a run's", lambda: (built.append(True) or torch.ones(3),))
    assert built
    cache.clear()


# ---- several processes, with something quick in place of torchrun --------------------------------


def launched(code, folder, monkeypatch):
    """The outcome of a run whose processes do this."""

    def start(command, **how):
        assert command[-2] == "subspan.sweeps.processes"
        return POPEN([sys.executable, "-c", code, command[-1]], **how)

    monkeypatch.setattr(processes.subprocess, "Popen", start)
    return Worker(folder, processes=2).run(JOB, Stop())


def test_the_first_outcome_of_several_processes_counts(folder, monkeypatch):
    def train(*_, **__):
        raise next(errors)

    errors = iter([SubspanError("a multiple"), RuntimeError("connection closed")])
    monkeypatch.setattr(module, "train", train)
    (folder.out / processes.JOB).write_bytes(pickle.dumps((Worker(folder), JOB)))
    for _ in range(2):
        with pytest.raises(SystemExit):
            processes.main(folder.out)
    outcome = pickle.loads((folder.out / processes.OUTCOME).read_bytes())
    assert (outcome.status, outcome.error) == ("failed", "a multiple")


def test_processes_that_leave_no_outcome_have_died(folder, monkeypatch):
    code = (
        "import sys, os; print('no memory', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    )
    outcome = launched(code, folder, monkeypatch)
    assert (outcome.status, outcome.traceback) == ("died", "no memory\n")
    code = "import sys; open(sys.argv[1] + '/outcome', 'w')"  # killed while it writes
    assert launched(code, folder, monkeypatch).status == "died"


def test_a_second_signal_kills_the_processes(folder, monkeypatch):
    """The processes that they have started end, too."""
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started, popen = [], POPEN

    def interrupted(process):
        started.append(processes.psutil.Process(process.pid))
        while not (children := started[0].children()):
            pass
        started.extend(children)
        raise Stopped("stopped at once", signal.SIGINT)

    class Interrupted(popen):
        def wait(self, *arguments, **options):
            return popen.wait(self, *arguments, **options) if started else interrupted(self)

    monkeypatch.setitem(globals(), "POPEN", Interrupted)
    outcome = launched(code, folder, monkeypatch)
    assert outcome.status == "stopped"
    processes.psutil.wait_procs(started, timeout=10)
    assert len(started) == 2
    assert not any(one.is_running() and one.status() != "zombie" for one in started)
