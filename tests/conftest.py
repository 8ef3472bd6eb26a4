"""Fixtures that several test files share."""

import gc
import os
from pathlib import Path

import pytest


def pytest_collection_finish() -> None:
    """Spare garbage collections the millions of objects that all the imports have made.

    They come more rarely, too: Python's own measure is 700 objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_unconfigure() -> None:
    """Let go of them, or libraries of C++ complain at the end of what was left."""
    gc.unfreeze()


@pytest.fixture
def real_data() -> Path:
    """The folder with the real MNIST and CIFAR-10; the test is skipped without it."""
    folder = os.environ.get("SUBSPAN_DATA")
    if not folder or not (Path(folder) / "mnist").is_dir():
        pytest.skip("needs real data: set SUBSPAN_DATA to a folder with mnist/ and cifar10/")
    return Path(folder)
