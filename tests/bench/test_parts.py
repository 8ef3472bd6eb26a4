"""Parts of the benchmark: one file each, from outside, too; committed records remain readable."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from subspan.bench import Bench, bench, picture
from subspan.bench import part as module
from subspan.bench.part import measured, parts
from subspan.bench.table import of_bench
from subspan.commands.bench import show_bench
from subspan.errors import SubspanError

ROOT = Path(__file__).parents[2]
RECORDS = sorted(
    [*ROOT.glob("benchmarks/results/*/bench.json"), *ROOT.glob("results/*/bench.json")]
)

# A part of somebody else's: the time of a sort.
MINE = '''
"""The time of torch.sort, against that of adding a number."""

import torch

from subspan.bench.part import Part, Quantity
from subspan.bench.timing import interleaved


class Sorting(Part):
    name = "sorting"
    help = "torch.sort against an addition"
    shared = ("size",)
    quantities = (Quantity("time", "ms", "the time"),)
    title = "sorting {size:,} numbers"
    subject, base_name, unit = "operation", "adding", "times an addition"

    def check(self, settings):
        if settings.batch_size < 2:
            raise SystemExit("nothing to sort")

    def measure(self, settings, done):
        x = torch.randn(settings.batch_size, device=settings.torch_device)
        calls = {"adding": lambda: x + 1, "sorting": lambda: x.sort()}
        timings = interleaved(calls, settings.seconds, settings.torch_device)
        done("sorting")
        size = settings.batch_size
        return [{"projection": k, "size": size, "time": v} for k, v in timings.items()]


Sorting()
'''


def test_every_part_is_there_and_says_what_it_measures():
    known = parts()
    assert set(Bench().parts) < set(known)
    for name, part in known.items():
        assert (part.name, bool(part.help), bool(part.shared)) == (name, True, True)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_committed_records_are_shown(path, capsys):
    record = json.loads(path.read_text())
    found = measured(record)
    assert [part.name for part, _ in found] == record["config"]["parts"]
    groups = [(part, some) for part, rows in found for some in part.groups(rows)]
    rows = sum(len(some) for _, some in groups)
    assert len(of_bench(record).rows) == rows
    show_bench(record, [])
    said = capsys.readouterr().out
    for part, some in groups:
        assert part.make_heading(some) in said
        assert len(part.table(some, record["machine"]).rows) == len(some)
    axes = picture.draw(record).axes
    assert [ax.get_title() for ax in axes] == [part.make_title(some) for part, some in groups]
    for ax, (part, some) in zip(axes, groups, strict=True):
        labels = [label.get_text() for label in ax.get_yticklabels()]
        assert part.name == "lowrank" or labels == [part.tick(row) for row in some]


def test_ratios_are_held_against_the_parts_own_base():
    """In the gallery, too: steps against plain Adam, not against a stored matrix."""
    record = json.loads((ROOT / "benchmarks/results/cpu-2-cores/bench.json").read_text())
    table = of_bench(record)
    cells = {(row[0], row[1]): row[2:] for row in reversed(table.rows)}
    assert table.columns[:2] == ("part", "what")
    assert cells["products", "stored-dense"][:2] == ("1", "1")
    assert cells["steps", "adam"][2] == "1"
    first = record["memory"][0]
    assert cells["memory", "adam"][3] == f"{first['peak_bytes'] / 4 / first['out_dim']:.3g}"


@pytest.fixture
def mine(in_tmp_path, monkeypatch):
    """A module with a part; both are forgotten afterwards."""
    (in_tmp_path / "mine.py").write_text(MINE)
    parts()
    monkeypatch.setattr(module, "_registry", copy.copy(module._registry))
    monkeypatch.setenv("SUBSPAN_IMPORT", "")
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's
    yield in_tmp_path
    sys.modules.pop("mine", None)


def test_a_part_of_somebody_elses(mine, cli):
    words = ["bench", "--parts", "sorting", "--seconds", "0.001", "--out", "b"]
    said = cli(*words)
    assert said.code == 2
    assert "unknown part 'sorting'" in said.err
    assert not (mine / "b").exists()
    said = cli(*words, "--import", "mine")
    assert (said.code, said.err) == (0, "")
    assert "\nsorting 128 numbers\n" in said.out
    assert "× adding" in said.out
    assert [line.split()[0] for line in said.out.splitlines()[-4:-2]] == ["adding", "sorting"]
    record = json.loads((mine / "b" / "bench.json").read_text())
    ratio = record["sorting"][1]["time"]["median"] / record["sorting"][0]["time"]["median"]
    [axes] = picture.draw(record).axes
    assert axes.get_xlabel() == "times an addition"
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == pytest.approx([1, ratio])
    assert of_bench(record).columns == ("what", "the time, ×")
    assert "torch.sort against an addition" in cli("bench", "--help", "--import", "mine").out


def test_a_record_of_a_part_that_is_not_there(mine):
    with pytest.raises(SubspanError, match="unknown part 'sorting'"):
        measured({"config": {"parts": ["sorting"]}, "sorting": []})


def test_two_parts_of_one_name(mine, cli):
    (mine / "again.py").write_text(MINE.replace('"sorting"', '"steps"'))
    said = cli("bench", "--import", "again")
    assert said.code == 2
    assert "a part named 'steps' is registered already" in said.err
    sys.modules.pop("again", None)


TIME = {"median": 0.1, "low": 0.09, "high": 0.11}
ROW = {"projection": "a", "size": 1, "time": TIME}


@pytest.fixture
def odd(monkeypatch):
    """A part whose rows a test chooses; it is forgotten afterwards."""
    parts()
    monkeypatch.setattr(module, "_registry", copy.copy(module._registry))

    class Odd(module.Part):
        name, help, shared, title = "odd", "whatever", ("size",), "of {size:,}"
        quantities = (module.Quantity("time", "ms", "the time"),)
        rows = None

        def measure(self, settings, done):
            return self.rows

    return Odd()


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (None, "must be a list, got None"),
        ([ROW | {"time": float("nan")}], r"\[0\]\.time must be a finite number, got nan"),
        ([ROW | {"size": np.int64(1)}], r"\[0\]\.size must be a number, got np\.int64"),
        ([ROW | {"time": TIME | {"median": 0.0}}], "ZeroDivisionError"),
        ([ROW | {"time": "long"}], "TypeError"),
        ([{"projection": "a", "time": TIME}], "KeyError.'size'."),
        ([ROW | {"size": "many"}], "ValueError"),
    ],
)
def test_rows_of_which_no_table_can_be_made_are_not_kept(rows, why, odd, tmp_path):
    odd.rows, settings = rows, Bench(parts=("odd",), seconds=1e-3)
    with pytest.raises(SubspanError, match=f"no table can be made of the rows of odd: .*{why}"):
        bench(settings, tmp_path)
    assert not (tmp_path / "bench.json").exists()
    odd.rows = [ROW]
    assert bench(settings, tmp_path)["odd"] == [ROW]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda record: record.pop("machine"), "machine must be a mapping"),
        (lambda record: record["machine"].pop("device"), "machine lacks device"),
        (lambda record: record["odd"][0].pop("size"), "KeyError"),
        (lambda record: record.update(odd=None), "must be a list, got None"),
    ],
)
def test_a_damaged_record_is_named_and_replaced_only_when_that_is_asked_for(
    spoil, why, odd, tmp_path
):
    odd.rows, settings = [ROW], Bench(parts=("odd",), seconds=1e-3)
    record = bench(settings, tmp_path)
    spoil(record)
    (tmp_path / "bench.json").write_text(json.dumps(record))
    with pytest.raises(SubspanError, match=rf"bench\.json is damaged .*{why}.* give --overwrite"):
        bench(settings, tmp_path)
    assert bench(settings, tmp_path, overwrite=True)["odd"] == [ROW]


@pytest.mark.parametrize("name", ["status", "machine", "config", "format"])
def test_a_part_with_the_name_of_something_else_in_the_record(name, odd):
    with pytest.raises(TypeError, match=f"a part named '{name}' has no place in bench.json"):
        type("Again", (type(odd),), {"name": name})()
