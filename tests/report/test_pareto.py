"""The Pareto picture: whose points are in it, that they are the records', and the frontier."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from subspan.errors import SubspanError
from subspan.report import pareto, pareto_page
from subspan.report.known import KnownResult, known_results
from subspan.report.points import MeasuredPoint, frontier, measured_points
from subspan.training.records import read_json
from tests.report.test_report import a_run, a_sweep, row

ROOT = Path(__file__).parents[2]
THEIRS = KnownResult("Them 2020", "a | paper", "quoted", "one run", ((97.0, 50, None),))


def place(folder: Path, raw: dict[str, Any], name: str = "sweep.json") -> None:
    folder.mkdir(parents=True)
    (folder / name).write_text(json.dumps(raw))


def one_run(seed: int, test: float, **other: Any) -> dict[str, Any]:
    raw = a_run() | {"test_score": test} | other
    return raw | {"config": raw["config"] | {"seed": seed}}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Records of MNIST at several depths, of other data, and such as do not count."""
    grown = row("hash", 20, [0.5, 0.6], checkpoint_bytes=None)  # as from subspan intrinsic
    place(
        tmp_path / "a/part", a_sweep(["hash"]) | {"rows": [row("hash", 100, [0.96, 0.98]), grown]}
    )
    place(tmp_path / "a/part/runs/hash", one_run(7, 0.99), "record.json")  # is in its sweep
    place(tmp_path / "b/seed0", one_run(0, 0.97, checkpoint_bytes=250), "record.json")
    later = one_run(1, 0.98)
    later["config"]["option"] = None  # which a later version has
    place(tmp_path / "b/seed1", later, "record.json")
    place(tmp_path / "b/seed1 (copy)", one_run(1, 0.98), "record.json")  # no third seed
    place(tmp_path / "b/failed", one_run(2, 0.99, status="running"), "record.json")
    other = a_sweep() | {"status": "running"}
    place(tmp_path / "c", other)
    digits = a_sweep(["rbd"])
    digits["config"]["data"] = "digits"
    place(tmp_path / "d", digits)
    shuffled = a_sweep(["rbd"])
    shuffled["config"]["task"] = "shuffled"
    place(tmp_path / "e", shuffled)
    return tmp_path


def test_the_points_are_those_of_the_complete_records(tree):
    points = measured_points([tree], ["mnist", "digits"])
    found = [(p.folder, p.method, p.numbers, p.bytes, p.scores) for p in points["mnist"]]
    part = tree / "a/part"
    assert found == [
        (part, "hash", 20, None, pytest.approx((50, 60))),
        (part, "hash", 100, 1300, pytest.approx((96, 98))),
        (tree / "b/seed0", "hash", 750, 250, pytest.approx((97, 98))),  # its seeds together
        (part, "full", 61706, 4 * 61706 + 900, pytest.approx((98.5, 99.5))),
    ]
    assert points["mnist"][1].deviation == pytest.approx(math.sqrt(2))
    assert {p.method for p in points["digits"]} == {"full", "rbd"}
    # A folder inside of another one does not count twice.
    assert len(measured_points([tree, tree / "a"], ["mnist"])["mnist"]) == 4


def test_the_table_has_the_numbers_of_the_records(tree, cli):
    said = cli("pareto", tree / "a", tree / "b", "--data", "mnist", "--out", tree / "two")
    assert (said.code, len(said.out.split())) == (0, 3)
    assert "97.50 ± 0.71" in (tree / "two/pareto.md").read_text("utf-8")
    said = cli("pareto", tree, "--data", "mnist", "--out", tree / "out")
    assert said.out.split() == [str(tree / f"out/pareto.{end}") for end in ("png", "svg", "md")]
    page = (tree / "out/pareto.md").read_text("utf-8")
    assert f"`subspan pareto {tree.name} --data mnist --out {tree.name}/out`" in page
    for line in (
        "| 20 | – | 55.00 ± 7.07 | 2 | hash | lenet | numbers | [a/part](../a/part) |",
        "| 100 | 1,300 | 97.00 ± 1.41 | 2 | hash | lenet | numbers | [a/part](../a/part) |",
        "| 750 | 250 | 97.50 ± 0.71 | 2 | hash | mlp | bytes | [b/seed0](../b/seed0) |",
        "| 61,706 | 247,724 | 99.00 ± 0.71 | 2 | full | lenet | numbers, bytes | [a/part](../a/",
        "| 697 | – | 99.03 | Warn 2023 |",
    ):
        assert line in page


def point(numbers: int, val: float | None, *scores: float, **other: Any) -> MeasuredPoint:
    parts = {"folder": Path("f"), "net": "lenet", "method": "hash", "label": "", "bytes": None}
    return MeasuredPoint(**parts | other, scores=scores, val=val, numbers=numbers)


def test_a_point_of_the_frontier_beats_all_smaller_ones_in_validation_and_on_the_test_set():
    first, second = point(10, 80, 79, 81), point(40, 90, 89, 91)
    left_out = [
        point(5, 99, 99),  # one seed
        point(8, None, 70, 71),  # no validation
        point(20, 79, 95, 96),  # lucky on the test set
        point(30, 85, 75, 76),  # lucky in validation
        point(50, 90, 90, 91),
        point(10, 79, 78, 79),
    ]
    assert frontier([*left_out, second, first], "numbers") == [first, second]
    assert frontier([*left_out, second, first], "bytes") == []
    small = point(99, 70, 60, 61, bytes=7)
    assert frontier([first, small], "bytes") == [small]


@pytest.fixture
def figure():
    points = [
        point(1000, 98, 98.0, 98.2, bytes=4000),
        point(100, 90, 89.0, 91.0, bytes=400),
        point(5000, 98, 97.0, method="rbd"),
        point(400, 60, 60.0, 70.0, method="full"),
    ]
    return pareto.draw({"mnist": points}, {"mnist": [THEIRS]})


def test_the_picture_has_the_points_where_they_are(figure):
    numbers, size = figure.axes
    marks = {
        (line.get_marker(), float(x)): (y, line.get_alpha(), line.get_markerfacecolor())
        for line in numbers.lines
        for x, y in zip(*line.get_data(), strict=True)
        if line.get_linestyle() == "None"
    }
    assert marks["o", 1000][:2] == (pytest.approx(98.1), 1)
    assert marks["o", 100][:2] == (90, 1)
    assert marks["v", 5000][:2] == (97, 0.35)  # of one seed
    assert marks["X", 400][:2] == (65, 0.55)  # not on the frontier
    assert marks["D", 50] == (97, 1, "white")
    bars = [
        list(line.get_ydata()) for line in numbers.lines if list(line.get_xdata()) == [100, 100]
    ]
    assert [90 - math.sqrt(2), 90 + math.sqrt(2)] in [pytest.approx(bar) for bar in bars]
    # The error is logarithmic, and a step down to a tenth of it as long anywhere.
    heights = [numbers.transData.transform((1, accuracy))[1] for accuracy in (80, 98, 99.8)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1])
    assert [text.get_text() for text in numbers.texts] == ["Them 2020"]
    assert not size.texts  # nobody knows the bytes
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[0] == "Frontier of the library"
    assert {"Fixed random subspaces", "All weights trained", "Others, quoted"} < set(names)
    assert "Others, read at the source" not in names
    assert plt.get_fignums() == []


def test_names_neither_cover_each_other_nor_what_they_name():
    known = known_results()["mnist"]
    points = [point(1000, 98, 98.0, 98.2, bytes=4000)]
    figure = pareto.draw({"mnist": points}, {"mnist": known})
    for axes, size in zip(figure.axes, ("numbers", "bytes"), strict=True):
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == sum(bool(work.at(size)) for work in known)
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        theirs = [axes.transData.transform(at) for work in known for at in work.at(size)]
        assert not [box for box in boxes for at in theirs if box.contains(*at)]


def test_what_cannot_be_drawn_is_one_sentence(tree, cli):
    for words, message in (
        (["no"], "no is no folder"),
        ([tree / "c"], "no complete sweep or run on images is in"),
        ([tree, "--data", "mnst"], "unknown data in these records 'mnst': did you mean mnist?"),
        ([tree, "--data", "cifar10"], "known are digits, mnist"),
        ([tree, "--data", "mnist", "--out", tree / "d/sweep.json"], "is a file: give a folder"),
    ):
        said = cli("pareto", *words)
        assert (said.code, said.out) == (2, "")
        assert message in said.err
        assert len(said.err.splitlines()) == 1
    place(tree / "z", {"format": 2, "status": "complete", "config": {}})
    with pytest.raises(SubspanError, match="damaged"):
        measured_points([tree], ["mnist"])


def test_what_others_reached_has_a_source_and_a_size():
    known = known_results()
    assert {"mnist", "cifar10"} <= known.keys()
    for works in known.values():
        assert len({work.name for work in works}) == len(works)
        for work in works:
            assert work.source
            assert work.how
            assert ("; by " in work.source) == (work.status == "quoted")
            for accuracy, *sizes in work.points:
                assert 10 < accuracy < 100
                assert all(size is None or 10 < size < 1e7 for size in sizes)
    with pytest.raises(ValueError, match="status must be read or quoted, got heard"):
        KnownResult("a", "b", "heard", "c", ((90.0, 1, 1),))
    with pytest.raises(ValueError, match=r"a point is \[accuracy, numbers, bytes\], got \[90.0"):
        KnownResult("a", "b", "read", "c", ((90.0, None, None),))


# ---- the committed picture -----------------------------------------------------------------------


def test_the_committed_page_is_what_the_records_say():
    out = ROOT / "results/pareto"
    points = measured_points([ROOT / "results"], ["mnist", "cifar10"])
    made = pareto_page.text([ROOT / "results"], out, points, known_results())
    command = re.search("`(subspan pareto [^`]*)`", made)
    assert command
    assert (out / "pareto.md").read_text("utf-8") == made, f"run: {command[1]}"
    assert {file.name for file in out.iterdir()} == {"pareto.md", "pareto.png", "pareto.svg"}
    # Every row of one of the records, read without the code above.
    sweep = read_json(ROOT / "results/lenet-mnist/sweep.json")
    for each in sweep["rows"]:
        scores = [100 * score for score in each["test_score"]]
        start = f"| {each['stored_parameters']:,} | {each['checkpoint_bytes']:,} | "
        assert f"{start}{sum(scores) / len(scores):.2f} ± " in made
