"""Modules that moved are found under the names that they had."""

import importlib

import pytest

import subspan


@pytest.mark.parametrize("old", sorted(set(subspan._MOVED) - {"subspan.lab"}))
def test_an_old_name_is_the_same_module(old):
    module = importlib.import_module(subspan._MOVED[old])
    before = module.__spec__
    assert importlib.import_module(old) is module
    assert module.__spec__ is before


def test_parts_of_packages_that_moved():
    from subspan.lab import nets, train  # noqa: F401
    from subspan.lab.bench.minilm import encoder  # noqa: F401
    from subspan.lab.tasks.shuffled_labels import __name__ as name
    from subspan.slots import saved_buffers

    from subspan.subspace import parameters
    from subspan.training import nets as ours

    assert nets is ours
    assert saved_buffers is parameters.saved_buffers
    assert name == "subspan.training.tasks.shuffled_labels"
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module("subspan.lab.nothing")
    assert error.value.name == "subspan.lab.nothing"
