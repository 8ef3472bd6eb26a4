"""The gallery: the committed page is what the records say; what is shown, missing, and refused."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from subspan.errors import SubspanError
from subspan.experiments import Benchmark, exhibits, experiments, gallery
from subspan.experiments.exhibits import sweep_command
from subspan.report import read, write
from subspan.report.families import FAMILIES
from subspan.sweeps.growth import Growth
from subspan.training.config import Sweep, Training
from subspan.training.records import differences
from tests.report.test_report import LI, Document, a_sweep, row, save
from tests.runs import contents

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/gallery.md"
FIXED, REDRAWN, LOW_RANK, SUMS = FAMILIES


def an_experiment(
    part: str = "", *, name: str = "nobodys", budget: str = "quick"
) -> dict[str, Any]:
    """Return what ``sweep.json`` says of its experiment."""
    about = {"title": "A | <b>", "source": "Nobody 2026.", "differences": "All of it."}
    return {"experiment": {"name": name, "budget": budget, "part": part} | about}


def a_bench(**config: Any) -> dict[str, Any]:
    step = {"median": 2.0, "low": 1.9, "high": 2.1}
    return {
        "format": 2,
        "status": "complete",
        "config": {"parts": ["lowrank"], "width": 64} | config,
        "machine": {"device": "a device"},
        "lowrank": [
            {"width": 64, "rank": 0, "step": step, "inference": step, "peak_bytes": 800},
            {
                "width": 64,
                "rank": 8,
                "step": step | {"median": 0.5},
                "adaptive": step | {"median": 1},
                "inference": step | {"median": 0.2},
                "peak_bytes": 100,
            },
        ],
    }


def place(folder: Path, raw: dict[str, Any], name: str = "sweep.json") -> Path:
    """A folder with a record, and for a sweep the pictures and the page that belong to it."""
    folder.mkdir(parents=True)
    save(folder, raw, name)
    if name == "sweep.json":
        write(folder)
    return folder


def shown(folder: Path) -> exhibits.Exhibit:
    """The one exhibit of a folder."""
    [exhibit] = exhibits.exhibits(folder)
    return exhibit


# ---- the committed page --------------------------------------------------------------------------


def test_the_committed_page_is_what_the_records_say():
    made = gallery.text(ROOT / "results", PAGE)
    assert "`subspan gallery results docs/gallery.md`" in made
    assert PAGE.read_text("utf-8") == made, "run: subspan gallery results docs/gallery.md"


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", PAGE.read_text("utf-8"))
    assert len(links) > 30
    assert [link for link in links if not (PAGE.parent / unquote(link)).exists()] == []


def test_every_record_is_on_it_and_in_the_right_section():
    found = {exhibit.folder.name: exhibit for exhibit in exhibits.exhibits(ROOT / "results")}
    folders = [path for path in (ROOT / "results").iterdir() if any(path.glob("**/*.json"))]
    assert found.keys() == {path.name for path in folders}
    assert found["mlp-mnist"].family is found["minut-mnist-mlp"].family is FIXED
    for name, exhibit in found.items():
        for family in FAMILIES:
            assert exhibit.family is family or not name.startswith(family.prefix), name
        assert exhibit.pictures or len(exhibit.table.rows) <= 2
        if name.endswith("-quick"):
            assert exhibit.effort.startswith("Budget quick: 1 seed, ")
            assert "no standard deviation is known" in exhibit.effort


# ---- a sweep -------------------------------------------------------------------------------------


def test_published_and_measured_side_by_side(tmp_path):
    raw = a_sweep(["hash"]) | {"published": [LI], **an_experiment()}
    place(tmp_path / "runs/one", raw)
    exhibit = shown(tmp_path / "runs")
    assert exhibit.table.columns == (
        "method",
        "numbers trained",
        "measured, %",
        "seeds",
        "Li 2018, fastfood, %",
    )
    assert exhibit.table.words == 1
    assert exhibit.table.rows == (
        ("full", "61,706", "99.00 ± 0.71", "2", "99.10"),
        ("hash", "1,000", "96.00 ± 2.83", "2", "–"),
        ("hash", "10", "30.00 ± 2.83", "2", "–"),
        ("hash", "100", "80.00 ± 2.83", "2", "76.30"),
        ("", "500", "–", "–", "93.90"),  # published, and not measured
    )
    assert exhibit.effort == "Budget quick: 2 seeds, 0 epochs."
    [d_int, failed] = exhibit.notes
    assert d_int == (
        "Intrinsic dimension, d_int90: hash = 234 (220 to 250 over seeds); "
        "290 published (Li 2018, fastfood)."
    )
    assert failed == "1 run failed; hash-d10-lr0.3-seed0: the loss became nan in epoch 3"
    assert exhibit.command == "subspan reproduce nobodys"
    assert exhibit.family is FIXED


def test_one_seed_is_said_to_be_one(tmp_path):
    raw = a_sweep(["hash"]) | {"rows": [row("hash", 10, [0.5])], "status": "running"}
    raw["config"]["epochs"] = 1
    place(tmp_path / "one", raw)
    exhibit = shown(tmp_path)
    assert exhibit.effort.startswith("1 seed, 1 epoch, so that no standard deviation is known")
    assert "Its status is 'running'." in exhibit.notes
    assert exhibit.table.rows[1] == ("hash", "10", "50.00", "1")


def test_published_points_that_go_by_labels_show_their_own_counts(tmp_path):
    wu = {"label": "Wu", "dims": [3554], "labels": ["656"], "accuracy": [0.98], "method": "prodsum"}
    yang = {"label": "Yang", "dims": [], "labels": ["50"], "accuracy": [0.97]}
    rows = [row("prodsum", 3548, [0.99], label="656"), row("prodsum", 518, [0.96], label="50")]
    place(tmp_path / "one", a_sweep() | {"rows": rows, "d_int": {}, "published": [wu, yang]})
    exhibit = shown(tmp_path)
    assert exhibit.family is SUMS
    assert [line[1:3] + line[-1:] for line in exhibit.table.rows] == [
        ("", "61,706", "–"),
        ("p = 656", "3,548", "98.00 at 3,554 (Wu)"),
        ("p = 50", "518", "97.00 (Yang)"),
    ]


def test_a_score_that_is_no_accuracy_has_its_own_unit(tmp_path):
    raw = a_sweep(["hash"])
    raw["score"] = {"name": "bits", "higher_is_better": False, "zero": 6.0, "percent": False}
    raw["rows"] = [row("hash", 10, [3.25, 3.75])]
    raw["baseline"]["test_score"] = [1.5]
    place(tmp_path / "one", raw)
    table = shown(tmp_path).table
    assert table.columns == ("method", "numbers trained", "measured, bits", "seeds")
    assert table.rows[1] == ("hash", "10", "3.5 ± 0.3536", "2")
    raw["score"] |= {"name": "error", "percent": True}
    place(tmp_path / "other" / "one", raw)
    assert shown(tmp_path / "other").table.columns[2] == "measured, error (%)"


def test_parts_stand_in_the_experiments_order_and_those_left_out_are_named(tmp_path):
    known = experiments()["gressmann-table1"]
    parts = list(known.parts("full"))
    for part in [*reversed(parts[:2]), "aged"]:
        raw = a_sweep(["rbd"]) | an_experiment(part, name=known.name, budget="full")
        place(tmp_path / "runs/table" / part, raw | {"d_int": {}, "failed": []})
    exhibit = shown(tmp_path / "runs")
    assert list(dict.fromkeys(line[0] for line in exhibit.table.rows)) == [*parts[:2], "aged"]
    assert exhibit.table.columns[0] == "part"
    assert exhibit.notes == (f"Not run, of its parts: {', '.join(parts[2:])}.",)
    assert exhibit.family is REDRAWN
    # Without one picture over all parts, there are theirs.
    assert [path.parent.name for path in exhibit.pictures] == [*parts[:2], "aged"]
    (tmp_path / "runs/table/summary.png").write_bytes(b"\x89PNG")
    assert [path.name for path in shown(tmp_path / "runs").pictures] == ["summary.png"]


def test_sweeps_that_have_only_their_folder_in_common_are_not_one(tmp_path):
    """Their scores had one unit, and no command could have made them together."""
    for name, change in (("a", {}), ("b", {"data": "fashion_mnist"})):
        raw = a_sweep()
        place(tmp_path / "mine" / name, raw | {"config": raw["config"] | change})
    one, other = exhibits.exhibits(tmp_path)
    assert (one.title, other.title) == (
        "lenet on mnist, D = 61,706",
        "lenet on fashion_mnist, D = 61,706",
    )
    assert "--data fashion_mnist" in other.command
    raw = a_sweep()  # another network alone is a comparison, as --nets makes one
    place(tmp_path / "nets" / "a", raw)
    place(tmp_path / "nets" / "b", raw | {"config": raw["config"] | {"net": "mlp"}})
    assert [e.title for e in exhibits.exhibits(tmp_path)][2:] == ["lenet, mlp at equal d"]


def test_other_data_and_the_budget_are_in_the_command(tmp_path):
    raw = a_sweep(["hash"]) | an_experiment(name="li-mnist-lenet", budget="full")
    raw["config"]["data"] = "my digits"
    place(tmp_path / "one", raw)
    command = "subspan reproduce li-mnist-lenet --budget full --data 'my digits'"
    assert shown(tmp_path).command == command


def test_the_command_of_a_users_file_names_the_file(tmp_path):
    raw = a_sweep(["hash"]) | an_experiment(name="mine")
    raw["experiment"]["file"] = "my papers/mine.yaml"
    place(tmp_path / "one", raw)
    assert shown(tmp_path).command == "subspan reproduce 'my papers/mine.yaml'"


def test_times_are_shown_where_they_are_a_result(tmp_path):
    raw = a_sweep(["hash"]) | an_experiment(name="minut-sparse-benchmark")
    raw["rows"][0]["bytes_sent_per_step"] = [1234.0, None]
    place(tmp_path / "one", raw)
    exhibit = shown(tmp_path)
    assert exhibit.table.columns[-3:] == ("ms per step", "memory, MB", "bytes sent per step")
    assert exhibit.table.rows[1][-3:] == ("3.0", "500.0", "1,234.0")
    assert "Timed on cpu, 2 threads." in exhibit.notes


def test_a_picture_of_one_point_is_left_out(tmp_path):
    raw = a_sweep(["hash"]) | {"rows": [row("hash", 300, [0.9])], "baseline": None, "d_int": {}}
    place(tmp_path / "one", raw)
    assert shown(tmp_path).pictures == ()
    raw["rows"].append(row("hash", 301, [0.91]))  # above the first, for the eye
    save(tmp_path / "one", raw)
    assert shown(tmp_path).pictures == ()
    raw["rows"].append(row("hash", 600, [0.92]))
    save(tmp_path / "one", raw)
    assert [path.name for path in shown(tmp_path).pictures] == ["curve.png"]


@pytest.mark.parametrize("name", ["lenet-mnist", "mlp-mnist", "options", "task"])
def test_the_command_of_a_sweep_asks_for_the_same(name, cli, monkeypatch, tmp_path):
    if name == "options":
        config = json.loads((ROOT / "results/mlp-mnist/sweep.json").read_text())["config"]
        factors = {
            "fc1": [{"kind": "free", "inner": "p"}],
            "fc2": {"recipe": "low_rank", "rank": 4},
        }
        config |= {
            "methods": ["prodsum", "hash"],
            "lrs": {"prodsum": [0.1, 0.3], "hash": [0.2]},
            "options": {"factors": factors, "bias": 10},
            "baseline": None,
            "patience": 3,
            "small": ["mlp-1", "mlp-3"],
            "resize": "14x14",
        }
    elif name == "task":
        training = Training(task="examples.physics:task", validation=0.2)
        config = json.loads(json.dumps(Sweep(training, dims=("5", "6+7")).as_dict()))
    else:
        config = json.loads((ROOT / f"results/{name}/sweep.json").read_text())["config"]
    asked = []

    def run(parts: Any, *rest: Any, **more: Any) -> None:
        [settings] = parts.values()
        asked.append(json.loads(json.dumps(settings.as_dict())))
        raise SubspanError("asked")

    monkeypatch.setattr("subspan.commands.sweep.sweep_parts", run)
    words = shlex.split(sweep_command(config))
    assert words[0] == "subspan"
    assert cli(*words[1:]).err.endswith("error: asked\n")
    assert [differences(config, one) for one in asked] == [{}]


@pytest.mark.parametrize(("name", "epochs"), [("lenet", 20), ("mlp", 10)])
def test_the_command_of_a_growing_d_is_another(cli, monkeypatch, name, epochs):
    name = f"intrinsic-{name}-mnist"
    record = read(ROOT / "results" / name)
    asked = []

    def plan(config: Growth) -> None:
        asked.append(config.as_dict())
        raise SubspanError("asked")

    monkeypatch.setattr("subspan.commands.intrinsic.GrowthPlan", plan)
    words = shlex.split(sweep_command(record.config))
    assert words[:2] == ["subspan", "intrinsic"]
    assert cli(*words[1:]).err.endswith("error: asked\n")
    assert [differences(record.config, one) for one in asked] == [{}]
    [exhibit] = [one for one in exhibits.exhibits(ROOT / "results") if one.folder.name == name]
    assert exhibit.effort == f"3 seeds, {epochs} epochs for all weights, 4 epochs at each d."


# ---- a benchmark ---------------------------------------------------------------------------------


def test_a_benchmark_is_in_multiples_of_the_dense_network(tmp_path):
    place(tmp_path / "one", a_bench(), "bench.json")
    exhibit = shown(tmp_path)
    assert exhibit.family is LOW_RANK
    assert exhibit.table.columns == (
        "what",
        "a training step, ×",
        "a step, ranks may change, ×",
        "inference, ×",
        "peak memory, ×",
    )
    assert [tuple(line) for line in exhibit.table.rows] == [
        ("dense", "1", "–", "1", "1"),
        ("rank 8", "0.25", "0.5", "0.1", "0.125"),
    ]
    assert exhibit.command == "subspan bench --parts lowrank"
    assert "a device" in exhibit.effort
    assert exhibit.pictures == ()


def test_the_configuration_of_a_benchmark_says_which_experiment_it_is(tmp_path):
    known = experiments()["dlrt-timing"]
    assert isinstance(known, Benchmark)
    bench = known.benches["full"]
    config = {"ranks": list(bench.ranks), "width": bench.width, "seconds": bench.seconds}
    place(tmp_path / "one", a_bench(**config), "bench.json")
    exhibit = shown(tmp_path)
    assert (exhibit.title, exhibit.source) == (known.title, known.source)
    assert exhibit.command == "subspan reproduce dlrt-timing --budget full"
    assert exhibit.effort.startswith("Budget full. ")


# ---- the files -----------------------------------------------------------------------------------


def test_markdown_links_from_where_it_lies(tmp_path, cli):
    raw = a_sweep(["hash"]) | an_experiment()
    place(tmp_path / "runs/a b", raw)
    (tmp_path / "docs").mkdir()
    said = cli("gallery", tmp_path / "runs", tmp_path / "docs/page.md")
    assert (said.code, said.out, said.err) == (0, f"{tmp_path / 'docs/page.md'}\n", "")
    page = (tmp_path / "docs/page.md").read_text("utf-8")
    assert "`subspan gallery runs docs/page.md`" in page
    assert r"### A \| &lt;b>" in page
    assert "Source: Nobody 2026.\n" in page
    assert (
        "\n| method | numbers trained | measured, % | seeds |\n| --- | ---: | ---: | ---: |\n| f"
        in page
    )
    assert "(../runs/a%20b/curve.png)" in page
    assert str(tmp_path) not in page
    assert "\n\n\n" not in page


def test_html_needs_no_other_file(tmp_path):
    place(tmp_path / "first", a_sweep(["hash"]) | {"published": [LI], **an_experiment()})
    for part in ("one", "two"):
        place(tmp_path / "second" / part, a_sweep(["rbd"]) | an_experiment(part))
    page = gallery.write(tmp_path, tmp_path / "index.html", lead=["A & B could not be run."])
    html = page.read_text("utf-8")
    document = Document(html)
    pictures = [link for link in document.loads if link.startswith("data:image/svg+xml;base64,")]
    assert len(pictures) == 3
    links = [link for link in document.loads if link not in pictures]
    assert links == [
        "#first",
        "#second",
        "first/report.html",
        "second/one/report.html",
        "second/two/report.html",
    ]
    assert all((tmp_path / link).is_file() for link in links if not link.startswith("#"))
    assert "script" not in document.tags
    assert "b" not in document.tags  # of the title, which is text
    assert "A & B could not be run." in document.words
    rows = document.tables[FIXED.title]
    assert rows[0][-1] == "Li 2018, fastfood, %"
    assert ["hash", "100", "80.00 ± 2.83", "2", "76.30"] in rows
    assert ["two", "rbd", "10", "30.00 ± 2.83", "2"] in document.tables[REDRAWN.title]


def test_bad_input_is_refused_and_nothing_written(tmp_path, cli):
    place(tmp_path / "runs/one", a_sweep(["hash"]))
    (tmp_path / "empty/folder").mkdir(parents=True)
    before = contents(tmp_path)
    for folder, file, message in (
        ("nowhere", "page.md", "is no folder: give the one with the experiments' folders"),
        ("empty", "page.md", "has a sweep.json or bench.json"),
        ("runs", "page.pdf", "a gallery is a file ….md or ….html, got page.pdf"),
        ("runs", "no/page.md", "cannot be a file"),
    ):
        said = cli("gallery", tmp_path / folder, tmp_path / file)
        assert (said.code, said.out) == (2, "")
        assert message in said.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("sweep.json", lambda raw: raw["config"].update(epochs="ten")),
        ("sweep.json", lambda raw: raw.update(experiment="none")),
        ("sweep.json", lambda raw: raw.pop("rows")),
        ("bench.json", lambda raw: raw.pop("machine")),
        ("bench.json", lambda raw: raw["lowrank"][0].update(peak_bytes=0)),
        ("bench.json", lambda raw: raw["lowrank"][0].pop("width")),
    ],
)
def test_damaged_records_are_an_error(tmp_path, name, damage):
    raw = a_sweep(["hash"]) if name == "sweep.json" else a_bench()
    place(tmp_path / "one", raw, name)
    damage(raw)
    save(tmp_path / "one", raw, name)
    with pytest.raises(SubspanError, match=r"one.* is damaged"):
        gallery.write(tmp_path, tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()
