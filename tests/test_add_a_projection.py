"""The example in docs/add-a-projection.md, run as it stands and held to every law."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import subspan
from subspan.families import base, registry
from tests import laws

PAGE = Path(__file__).parents[1] / "docs" / "add-a-projection.md"


@pytest.fixture(scope="module", autouse=True)
def _example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The page's first block of Python as a module of its own, and gone again afterwards."""
    folder = tmp_path_factory.mktemp("example")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (folder / "toeplitz.py").write_text(blocks[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        importlib.import_module("toeplitz")
        yield
    del registry.FAMILIES["toeplitz"]
    registry.from_recipe.cache_clear()


@pytest.mark.parametrize("law", [*laws.LAWS, *laws.COSTLY])
def test_the_example_obeys(law: laws.Law) -> None:
    law(subspan.projection("toeplitz", out_dim=509, in_dim=20))


def test_the_example_is_what_the_page_says() -> None:
    p = subspan.projection("toeplitz", out_dim=9, in_dim=4, seed=1)
    diagonals = p.source.signs(0, 12)
    for i, row in enumerate(p.dense(dtype=torch.float32) * 3):
        assert torch.equal(row, diagonals[i : i + 4].flip(0))


def test_the_table_names_every_attribute_of_a_family() -> None:
    listed = set(re.findall(r"^\| `(\w+)=?` \|", PAGE.read_text(), re.MULTILINE))
    assert listed == {"family", "domain", "norm", "orthonormal", "bitwise", "local"}
    assert listed <= set(base.Projection.__annotations__)
