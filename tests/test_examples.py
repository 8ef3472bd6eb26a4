"""The examples, run as a newcomer runs them: what they print means what they claim."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forks import python

FOLDER = Path(__file__).parents[1] / "examples"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that they run in, and write into."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def run(place: Path) -> Callable[..., str]:
    """Return the output of an example; warnings are errors, and no cache is the user's.

    Trainers of others warn of what is theirs.
    """
    env = {
        "OMP_NUM_THREADS": "1",
        "SUBSPAN_CACHE": str(place / "cache"),
    }

    def printed(name: str, trainer: str = "") -> str:
        if trainer:
            pytest.importorskip(
                trainer, reason=f"{trainer} is not installed: pip install {trainer}"
            )
        warn = "ignore" if trainer else "error"
        *command, line = table()[name]
        words, where = [str(FOLDER / f"{name}.py")], place
        if command:  # a task's: of subspan, in the folder above
            words, where = ["-m", "subspan.cli", *command[0].split()[1:]], FOLDER.parent
            words += ["--out", str(place / name)]
        for _ in range(2):
            said = python(words, where, env | {"PYTHONWARNINGS": warn}, place, warn)
            if "terminate called without an active exception" not in said.stderr:
                break  # else Gloo's threads outlived the interpreter (pytorch/pytorch#179291)
        assert said.returncode == 0, said.stdout + said.stderr
        assert "Traceback" not in said.stderr
        assert trainer or "Warning" not in said.stderr
        assert masked(line) in masked(said.stdout), f"README.md says that it prints {line}"
        return said.stdout + said.stderr

    return printed


def table() -> dict[str, list[str]]:
    """Return what README.md says of the examples: by name, the command and the output."""
    rows = re.findall(
        r"^\| \[(\w+)\.py\]\(\1\.py\) \|[^|]*\|(.*)\|$", (FOLDER / "README.md").read_text(), re.M
    )
    return {name: re.findall(r"`([^`]+)`", cells) for name, cells in rows}


def masked(text: str) -> str:
    """Without what another machine may round differently: numbers and the spaces around them."""
    return re.sub(r"\s+", " ", NUMBER.sub("0", text))


def numbers(text: str, pattern: str) -> list[float]:
    """The numbers of the line that a pattern finds."""
    [line] = [line for line in text.splitlines() if re.search(pattern, line)]
    return [float(number.replace(",", "")) for number in NUMBER.findall(line)]


def test_every_example_is_in_the_table_and_in_these_tests():
    files = {path.stem for path in FOLDER.glob("*.py")}
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert table().keys() == files
    for name, (*command, _) in table().items():
        assert all(words in (FOLDER / f"{name}.py").read_text() for words in command)
    assert files <= tested


def test_own_network(run, place):
    said = run("own_network")
    weights, full, whole = numbers(said, " weights: ")
    few, accuracy, size = numbers(said, r"^500 numbers")
    files = place / "runs/own_network"
    assert whole == (files / "all.safetensors").stat().st_size > 4 * weights
    assert size == (files / "few.safetensors").stat().st_size < whole / 20
    assert 4 * few < size < 4096
    assert full > 93
    assert accuracy > 88
    assert numbers(said, "^loaded again") == [accuracy]
    assert re.search("^refused: .* was trained from other initial weights", said, re.M)


def test_own_data(run, place):
    said = run("own_data")
    accuracy, few = numbers(said, "are told right by")
    assert accuracy > 85  # 33 by chance
    assert few == 300
    [picture] = re.findall(r"^runs/.*/curve\.png$", said, re.M)
    assert (place / picture).is_file()
    assert len(list((place / "runs/own_data/shapes").rglob("*.png"))) == 3 * (200 + 100)
    # The command is of the same run, or it would train again, or refuse the folder.
    command, answer = said.split("$ ")[1].splitlines()[:2]
    assert command.startswith("subspan train --net lenet-valid --data runs/own_data/shapes ")
    assert answer == "complete already, not repeated"


@pytest.mark.slow
def test_resume(run):
    said = run("resume")
    done, of = numbers(said, r"^subspan train: stopped after")
    assert 0 < done < of
    code, first, epochs = numbers(said, "^exit code")
    assert code == 130
    assert 3 <= first < epochs == 40
    assert numbers(said, r"^\d+ epochs in its record") == [40]
    assert said.count("subspan train --resume --out runs/resume/stopped") == 2  # advice, and taken
    assert "the same model, bit for bit: True" in said
    assert "the same losses in all epochs: True" in said


@pytest.mark.slow
def test_rebuild_from_seed(run, place):
    said = run("rebuild_from_seed")
    weights, size, accuracy = numbers(said, "^base:")
    assert weights == 85_002
    assert 4 * 800 < size < 4096
    assert accuracy > 88
    for name in ("turned", "upside-down", "mirrored"):
        before, after, size = numbers(said, f"^{name}")
        assert before + 30 < after
        assert after > 85
        assert size == (place / f"runs/rebuild_from_seed/{name}.safetensors").stat().st_size < 4096
    assert "the same bits in another process: True" in said


@pytest.mark.slow
def test_two_processes(run):
    said = run("two_processes")
    all_weights, many, *_ = numbers(said, r"^DDP, [\d,]+ weights")
    dim, some, in_subspace = numbers(said, "^DDP, SubspaceModel")
    _, fewest, in_bases = numbers(said, "^RandomBases")
    assert many >= 4 * all_weights
    assert 4 * dim <= fewest < 2 * 4 * dim
    assert 4 * dim <= some < 2 * 4 * dim
    assert in_subspace > 80
    assert in_bases > 75
    assert said.count("the same weights: True") == 3


def test_low_rank(run):
    said = run("low_rank")
    weights, trained = numbers(said, "^trained")
    _, truncated = numbers(said, "^truncated")
    [mended] = numbers(said, "^after five epochs")
    few, handed_over = numbers(said, "^handed over")
    assert weights == 112_810
    assert few < weights / 10
    assert trained > 90
    assert truncated + 5 < mended
    assert mended > trained - 4
    assert handed_over == pytest.approx(mended, abs=0.3)  # W = (U S) Vᵀ, in another order
    assert "LowRank" not in said
    assert said.count("out_features=6, bias=False") == 2


def test_own_matrices(run):
    said = run("own_matrices")
    free, error_of_free = numbers(said, "^free")
    few, error = numbers(said, "^of your matrices")
    assert (free, few) == (4096, 6)
    assert error_of_free > 20
    assert error < 1
    shares = {way: float(share) for way, share in re.findall(r"^  ([\w ]+): (\S+)$", said, re.M)}
    truth = {"image": 0.7, "ghost below": 0.2, "mirror image": 0.1}
    assert len(shares) == 6
    for way, share in shares.items():
        assert share == pytest.approx(truth.get(way, 0), abs=0.015), way


@pytest.mark.slow
def test_trainer(run, place):
    said = run("trainer", "transformers")
    weights, before = numbers(said, " weights, upright")
    few, variant = numbers(said, r"^1,000 numbers")
    size, inside = numbers(said, "^the file")
    assert (weights, few) == (39_610, 1000)
    assert before + 30 < variant > 85
    assert 4 * few < inside < size == (place / "runs/trainer/variant.safetensors").stat().st_size
    assert "interrupted and resumed: the same numbers: True" in said
    assert numbers(said, "^an ordinary network") == [variant]


@pytest.mark.slow
def test_lightning_module(run, place):
    said = run("lightning_module", "lightning")
    few, size = numbers(said, "numbers in a file of")
    assert few == 500
    assert size == (place / "runs/lightning/variant.safetensors").stat().st_size < 4096
    assert numbers(said, "^the best checkpoint")[0] > 80


@pytest.mark.slow
def test_accelerate_loop(run):
    said = run("accelerate_loop", "accelerate")
    few, size = numbers(said, "in the state")
    assert 4 * few < size < 4096
    assert numbers(said, "^loaded again")[0] > 80


@pytest.mark.slow
def test_trl_sft(run):
    said = run("trl_sft", "trl")
    assert "weights: 20 21 22 23 24 25" in said
    assert re.search(r"^the variant, [45],\d+ bytes: 20 19 18 17 16 15$", said, re.M)


def test_language_model(run):
    said = run("language_model")
    bits, few, weights, *_ = numbers(said, "^test bits per character")
    assert (few, weights) == (2000, 35_724)
    assert bits < 5  # knowing nothing takes 6.2, log2 of 76 characters


def test_physics(run):
    said = run("physics")
    error, few, weights, *_ = numbers(said, "^test relative error")
    assert (few, weights) == (200, 1185)
    assert error < 0.1  # of u = 0 it is 1
