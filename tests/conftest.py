"""Fixtures that several test files share."""

import atexit
import gc
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

# Trackio reads where its store is when it is imported, once in a process, and others import it.
_trackio = tempfile.TemporaryDirectory(prefix="trackio")
os.environ["TRACKIO_DIR"] = _trackio.name


def end_at_once(process: int = os.getpid()) -> None:
    """End a worker: to take down what all the libraries have made would take seconds.

    What a test has forked is another process, and ends as it would.
    """
    if os.getpid() != process:
        return
    _trackio.cleanup()
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(0)


atexit.register(end_at_once)

# Names that a file of tests imports.
COSTLY = {"go_through", "python", "python_code", "ranks", "start", "peft"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that want a server of forks, or PEFT: of two workers one then starts it."""
    items.sort(key=lambda item: COSTLY.isdisjoint(vars(item.getparent(pytest.Module).obj)))


def pytest_collection_finish() -> None:
    """Spare garbage collections the millions of objects that all the imports have made.

    They come more rarely, too: Python's own measure is 700 objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


# Libraries of C++ complain at the end of what was left, if these stay where they are.
atexit.register(gc.unfreeze)


@pytest.fixture(autouse=True, scope="module")
def begin_afresh():
    """Begin each file with nothing compiled: PyTorch compiles a function eight times, no more.

    What the files before have loaded is spared by garbage collections: a trainer asks for many.
    """
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> None:
    """Compile the kernels of a family in one of several workers: each would compile all of them.

    Libraries are imported here, not above: the process that starts the workers needs none.
    """
    import torch

    import subspan

    # For kinds of devices that are not here, PyTorch would keep a stack of its own for every seed.
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if not device.is_available():
            device.manual_seed_all = lambda seed: None
    together = tmp_path_factory.getbasetemp().parent
    for family in subspan.projections() if worker_id != "master" else ():
        with suppress(FileExistsError):
            (together / f"compiles-{family}").touch(exist_ok=False)
            p = subspan.projection(family, out_dim=100, in_dim=10)
            p.rmatvec(p.matvec(torch.zeros(10)))


@pytest.fixture
def real_data() -> Path:
    """The folder with the real MNIST and CIFAR-10; the test is skipped without it."""
    folder = os.environ.get("SUBSPAN_DATA")
    if not folder or not (Path(folder) / "mnist").is_dir():
        pytest.skip("needs real data: set SUBSPAN_DATA to a folder with mnist/ and cifar10/")
    return Path(folder)
