"""Fixtures of the data tests. None of them needs the network."""

import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Each test has a cache of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SUBSPAN_CACHE", str(folder))
    return folder
