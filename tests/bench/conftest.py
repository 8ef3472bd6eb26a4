"""Fixtures of runs and of the command line."""

import pytest

from subspan.bench import timing
from tests.runs import cache_once, cli, ctrl_c, in_tmp_path, trained  # noqa: F401


@pytest.fixture(autouse=True)
def little_to_copy(monkeypatch):
    """Copy 1 MiB to measure the memory's speed, which each benchmark does first."""
    monkeypatch.setattr(timing, "COPIED", 2**20)
