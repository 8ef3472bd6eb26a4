"""The examples in docs/add-an-optimizer.md, run as they stand and held to every law."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from subspan.optim.estimators import ESTIMATORS
from subspan.optim.integrators import INTEGRATORS, Integrator
from tests import optimizer_laws
from tests.optim import test_integrators as of_integrators
from tests.optim.test_laws import bases, dlrt

PAGE = Path(__file__).parents[1] / "docs" / "add-an-optimizer.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
FILES = {"sign_descent": 0, "one_sided": 2, "svd_retraction": 4}
ROWS = {1: "for law in", 3: "law(bases(", 5: "law(dlrt("}


@pytest.fixture(scope="module", autouse=True)
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModuleType]]:
    """The page's files as modules, and their names gone again afterwards."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name, number in FILES.items():
            (folder / f"{name}.py").write_text(BLOCKS[number])
        yield {name: importlib.import_module(name) for name in FILES}
    del ESTIMATORS["one-sided"], INTEGRATORS["svd-retraction"]


@pytest.mark.parametrize("row", ROWS)
def test_the_examples_obey(row: int) -> None:
    """Every law, by the rows of the page."""
    assert ROWS[row] in BLOCKS[row]
    if row == 1:
        exec(BLOCKS[row], {"torch": torch})
        return
    for law in optimizer_laws.LAWS:
        exec(BLOCKS[row], {"law": law, "bases": bases, "dlrt": dlrt})


def test_the_integrator_obeys_the_laws_of_integrators() -> None:
    for move in (
        of_integrators.Move("svd-retraction"),
        of_integrators.Move("svd-retraction", True),
    ):
        of_integrators.test_bases_stay_orthonormal(move, of_integrators.SPECTRA[1])
        of_integrators.test_all_are_consistent(move)
        of_integrators.test_full_rank_is_gradient_descent(move)
        of_integrators.test_small_singular_values_do_not_matter(move, 1e-8)


def test_workers_vote(examples: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two others disagree with this process about one weight of three."""
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = examples["sign_descent"].SignDescent([p], lr=1.0)

    class Voters:
        def compare_once(self, *_: object) -> None: ...
        def compare_weights(self, *_: object) -> None: ...
        def combine(self, own: Tensor, step: int) -> Tensor:
            others = torch.tensor([[1.0, -1, -1], [1, 1, -1]])
            return (own + others.sum(dim=0)).div(3).unsqueeze(0)

    monkeypatch.setattr(optimizer, "_workers", Voters())
    p.grad = torch.tensor([0.1, 2.0, 3.0])
    optimizer.step()
    assert p.tolist() == [-1, -1, 1]


def test_the_table_names_every_attribute_of_an_integrator() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert listed == set(Integrator.__dataclass_fields__)


def test_two_of_one_name_are_an_error() -> None:
    for number, kind in ((2, "estimator"), (4, "integrator")):
        with pytest.raises(TypeError, match=f"an {kind} named '.*' is registered already"):
            exec(BLOCKS[number], {})
