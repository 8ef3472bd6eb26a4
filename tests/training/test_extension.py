"""A module of the user's adds to the command line: ``--import module``."""

import json
import sys
from pathlib import Path

import pytest

from subspan.cli import main
from subspan.errors import SubspanError
from subspan.layers.atoms import Sum, atoms
from subspan.training import own
from subspan.training.train import train
from tests.forks import Ended, python
from tests.runs import a_run

MINE = """
from dataclasses import dataclass
from subspan.families.hash import Hash

@dataclass(frozen=True)
class Scaled(Hash, family="scaled"):
    \"\"\"Hash of another scale.

    Args:
        gain: how much longer the columns are.
    \"\"\"

    gain: float = 1.0

    def _matvec(self, w, step, start, stop):
        return self.gain * super()._matvec(w, step, start, stop)

    def _rmatvec(self, g, step, start, stop):
        return self.gain * super()._rmatvec(g, step, start, stop)
"""
TWICE = "from subspan.families.hash import Hash\nclass Again(Hash, family='hash'): pass\n"
DIGITS = ("--net", "mlp", "--data", "digits", "--epochs", "1")


def subspan(folder: Path, *arguments: str) -> Ended:
    """A command that a person gives in a folder of their own."""
    return python(["-m", "subspan.cli", *arguments], folder, {"SUBSPAN_IMPORT": ""}, folder)


def test_the_options_of_a_projection_of_the_users_are_flags(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    shown = subspan(tmp_path, "train", "--import=mine", "--method", "scaled", "--help").stdout
    assert "--gain" in shown
    assert "how much longer the columns are" in " ".join(shown.split())


def test_it_trains_in_the_workers_of_a_sweep(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    how = ("--import", "mine", *DIGITS, "--methods", "scaled", "--dims", "10", "--gain", "3")
    how += ("--jobs", "2", "--baseline", "null", "--lrs", "0.1", "--out", "curve")
    done = subspan(tmp_path, "sweep", *how)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads((tmp_path / "curve" / "sweep.json").read_text())["rows"]
    assert row["method"] == "scaled"
    plain = train(a_run(net="mlp", dim=10, lr=0.1), tmp_path / "hash")
    assert row["mean_test_score"] != plain.test_score
    [record] = (tmp_path / "curve" / "runs").glob("scaled-*/record.json")
    assert json.loads(record.read_text())["config"]["options"]["gain"] == 3.0


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\nraise ValueError('no licence')\n", ["mine.py, line 2", "ValueError: no licence"]),
        ("def f(:\n", ["mine.py, line 1", "SyntaxError"]),
        (TWICE, ["mine.py, line 2", "'hash' is registered"]),
        ("import nowhere.to_be_found\n", ["mine.py, line 1", "nowhere"]),
    ],
)
def test_an_import_that_fails_is_named(tmp_path, monkeypatch, source, words):
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's
    with pytest.raises(SubspanError) as error:
        own.load("mine")
    assert all(word in str(error.value) for word in words), error.value
    assert "mine" not in sys.modules


METHOD = """
from subspan.training.methods import Method, Option
class Mine(Method):
    options = (Option({option!r}, int, "mine"),)
    def wrap(self, net, seed, options): return net
    def rates(self, options): return (0.01,)
Mine({name!r}, "mine")
"""
TASK = """
from subspan.training.tasks import Option, TaskKind, register
class Mine(TaskKind):
    options = (Option("epochs", int, "mine"),)
    def load(self, training, seed): ...
    def network(self, extra): ...
register(Mine("mine", "mine"))
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (METHOD.format(name="mine", option="epochs"), "subspan train has --epochs already: call"),
        (METHOD.format(name="mine", option="out"), "subspan train has --out already: call"),
        (TASK, "subspan train has --epochs already: call"),
        (METHOD.format(name="hash", option="k"), "a method named 'hash' is registered already: "),
    ],
)
def test_a_name_that_is_taken(source, message, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    done = subspan(tmp_path, "train", "--import", "mine", "--dim", "5", *DIGITS)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_file_whose_projection_is_not_imported(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    how = ("--import", "mine", "--method", "scaled", "--dim", "5", "--steps", "1", "--out", "out")
    assert subspan(tmp_path, "train", *DIGITS, *how).returncode == 0
    done = subspan(tmp_path, "eval", "out/model.safetensors")
    assert done.returncode == 2
    assert "unknown projection 'scaled'" in done.stderr
    assert "(--import on the command line)" in done.stderr
    assert subspan(tmp_path, "eval", "out/model.safetensors", "--import", "mine").returncode == 0


def test_a_package_that_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing" / "__init__.py").write_text("raise ValueError('no licence')\n")
    monkeypatch.setenv("SUBSPAN_IMPORT", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert main(["train", "--import", "failing.method", *DIGITS, "--out", "out"]) == 2
    said = f"failing.method fails in {tmp_path}/failing/__init__.py, line 1: ValueError: no licence"
    assert said in capsys.readouterr().err


def test_nothing_is_written_then(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("x = 1\nraise ValueError('no licence')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's
    assert main(["train", "--import", "mine", *DIGITS, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert "mine.py, line 2: ValueError: no licence" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["absent", "absent.part", "mine:f", "", "../mine"])
def test_an_import_that_is_no_module(name):
    with pytest.raises(SubspanError, match=r"no module|needs a module"):
        own.load(name)


def test_a_second_registration_of_a_name_is_an_error():
    from subspan.experiments import experiments, register
    from subspan.training.methods import methods

    with pytest.raises(TypeError, match="'toeplitz' is registered already"):

        class Again(Sum, kind="toeplitz"):
            """A second one."""

    with pytest.raises(TypeError, match="a method named 'full' is registered already"):
        type(methods()["full"])("full", "a second one")
    with pytest.raises(TypeError, match="'li-mnist-fc' is registered already"):
        register(experiments()["li-mnist-fc"])


def test_a_projection_that_has_the_name_of_a_kind_is_refused(monkeypatch):
    from subspan.families import registry

    monkeypatch.setitem(registry.FAMILIES, "toeplitz", registry.FAMILIES["hash"])
    with pytest.raises(SubspanError, match="is a kind of atoms and a projection"):
        atoms("toeplitz", 4, 4)


def test_atoms_that_are_projections_have_the_projections_options():
    assert atoms("sparse", 8, 8, p=4, s=2).projection.s == 2
    with pytest.raises(SubspanError, match="option of projection 'sparse'"):
        atoms("sparse", 8, 8, p=4, gain=2)


def test_modules_are_not_named_in_a_file_of_options(tmp_path, capsys):
    """There they would be too late, and a key that nothing reads is refused."""
    (tmp_path / "run.yaml").write_text("imports: mine\n")
    assert (
        main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "x")]) == 2
    )
    assert "unknown key" in capsys.readouterr().err
