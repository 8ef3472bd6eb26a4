"""Modules that moved are found under the names that they had."""

import importlib
import subprocess
import sys

import pytest

import subspan


@pytest.mark.parametrize("old", sorted(set(subspan._MOVED) - {"subspan.lab"}))
def test_an_old_name_is_the_same_module(old):
    module = importlib.import_module(subspan._MOVED[old])
    before = module.__spec__
    assert importlib.import_module(old) is module
    assert module.__spec__ is before


def test_parts_of_packages_that_moved():
    code = """
from subspan.lab import nets, train
from subspan.lab.tasks.shuffled_labels import __name__ as name
from subspan.lab.bench.minilm import encoder
from subspan.slots import saved_buffers
import subspan.training.nets
assert nets is subspan.training.nets
assert name == "subspan.training.tasks.shuffled_labels"
try:
    import subspan.lab.nothing
except ModuleNotFoundError as error:
    assert error.name == "subspan.lab.nothing", error.name
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
