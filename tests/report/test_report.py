"""The report: what is plotted, what the page says, that it loads nothing, and bad records."""

from __future__ import annotations

import base64
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from subspan.errors import SubspanError
from subspan.report import bars, page, pictures, read, write
from subspan.report.curves import measured_curves, number, published_curves, title
from subspan.sweeps.result import SweepRecord
from subspan.training.records import RunRecord
from subspan.training.score import Score

EIGHT = [
    *("hash", "rademacher", "gaussian", "sparse"),
    *("orthogonal", "fastfood", "kronecker", "sparse-original"),
]


def row(method: str, dim: int, test: list[float], **other: Any) -> dict[str, Any]:
    return {
        "method": method,
        "dim": dim,
        "label": str(dim),
        "lr": 0.1,
        "seeds": list(range(len(test))),
        "test_score": test,
        "val_score": test,
        "trainable_parameters": dim,
        "stored_parameters": dim,
        "weights": 61706,
        "checkpoint_bytes": 4 * dim + 900,
        "seconds_total": [31.0] * len(test),
        "seconds_per_step": [0.003] * len(test),
        "peak_memory_bytes": [5e8] * len(test),
    } | other


def a_sweep(methods: list[str] | None = None) -> dict[str, Any]:
    methods = methods or ["hash", "rademacher"]
    found = {"value": 234.5, "low": 220.1, "high": 250.2, "target": 0.891, "threshold": 0.9}
    return {
        "format": 2,
        "config": {"net": "lenet", "data": "mnist", "methods": methods, "threshold": 0.9},
        "baseline": row("full", 61706, [0.985, 0.995], label="all weights", lr=0.001),
        "rows": [
            row(method, dim, [mean - 0.02, mean + 0.02])
            for method in methods
            for dim, mean in ((1000, 0.96), (10, 0.3), (100, 0.8))  # not in order
        ],
        "d_int": {method: {**found, "note": ""} for method in methods},
        "failed": [{"run": "hash-d10-lr0.3-seed0", "error": "the loss became nan in epoch 3"}],
        "versions": {"subspan": "0.1.0", "torch": "2.13.0"},
        "device": "cpu, 2 threads",
        "status": "complete",
    }


LI = {
    "label": "Li 2018, fastfood",
    "dims": [100, 500],
    "accuracy": [0.763, 0.939],
    "baseline": 0.991,
    "d_int": 290,
}


def a_run() -> dict[str, Any]:
    keys = ("epoch", "train_loss", "val_loss", "val_score", "learning_rate", "seconds")
    history = [(1, 0.9, 0.5, 0.85, 0.1, 6.1), (2, 0.4, 0.3, 0.935, 0.05, 6.0)]
    return {
        "format": 2,
        "config": {"net": "mlp", "data": "mnist", "method": "hash"}
        | {"options": {"dim": 750}, "lr": 0.1, "seed": 0},
        "test_score": 0.93,
        "val_score": 0.935,
        "trainable_parameters": 750,
        "stored_parameters": 750,
        "weights": 159010,
        "checkpoint_bytes": 3900,
        "seconds_total": 31.0,
        "seconds_per_step": 0.003,
        "peak_memory_bytes": 5e8,
        "history": [dict(zip(keys, epoch, strict=True)) for epoch in history],
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "status": "complete",
        "error": None,
    }


def save(folder: Path, raw: dict[str, Any], name: str = "sweep.json") -> Path:
    (folder / name).write_text(json.dumps(raw))
    return folder


def read_sweep(folder: Path, raw: dict[str, Any]) -> SweepRecord:
    sweep = read(save(folder, raw))
    assert isinstance(sweep, SweepRecord)
    return sweep


def svg_texts(svg: bytes) -> list[str]:
    """The texts of a picture, which must be an XML document."""
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter() if "text" in e.tag]


class Document(HTMLParser):
    """A page's tables by heading, its other text, and everything that it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.inside.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "tr":
            self.tables[self.heading].append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag):
        while self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if self.inside and self.inside[-1] == "h2":
            self.heading = data
            self.tables[data] = []
        elif self.inside and self.inside[-1] in ("td", "th"):
            self.tables[self.heading][-1][-1] += data
        elif data.strip():
            self.words.append(data)


# --- the picture of a sweep ---------------------------------------------------------------------


def test_curves_are_sorted_means_in_percent(tmp_path):
    curve = measured_curves(read_sweep(tmp_path, a_sweep()))[0]
    assert curve.dims == (10, 100, 1000)
    assert curve.mean == pytest.approx([30, 80, 96])
    assert curve.scores[0] == pytest.approx((28, 32))
    assert curve.label == "hash: d_int90 = 234"
    assert (curve.d_int, curve.interval) == (234.5, (220.1, 250.2))
    assert curve.target == pytest.approx(89.1)


def test_labels_say_upper_bound_and_not_reached(tmp_path):
    raw = a_sweep()
    raw["d_int"]["hash"].update(value=10, note="upper bound: the smallest d tried, 10, …")
    raw["d_int"]["rademacher"].update(value=None, low=None, high=None, threshold=0.75)
    labels = [curve.label for curve in measured_curves(read_sweep(tmp_path, raw))]
    assert labels == ["hash: d_int90 ≤ 10", "rademacher: d_int75 not reached"]


def test_figure_shows_curve_baseline_and_intrinsic_dimension_at_their_coordinates(tmp_path):
    figure = pictures.sweep_figure(read_sweep(tmp_path, a_sweep(["hash"])))
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.get_title() == "lenet on mnist, D = 61,706"
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["hash: d_int90 = 234"].get_xdata()) == [10, 100, 1000]
    assert list(lines["hash: d_int90 = 234"].get_ydata()) == pytest.approx([30, 80, 96])
    assert list(lines["all weights: 99.0 %"].get_ydata()) == pytest.approx([99, 99])
    assert list(lines["90 % of all weights"].get_ydata()) == pytest.approx([89.1, 89.1])
    (drop,) = [line for line in axes.lines if list(line.get_xdata()) == [234.5, 234.5]]
    assert list(drop.get_ydata()) == pytest.approx([axes.get_ylim()[0], 89.1])
    segments = [s for c in axes.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    assert [s.tolist() for s in segments] == [
        [[220.1, pytest.approx(89.1)], [250.2, segments[0][1][1]]]
    ]
    band = next(c for c in axes.collections if not hasattr(c, "get_segments"))
    ys = band.get_paths()[0].vertices[:, 1]
    assert (ys.min(), ys.max()) == pytest.approx((28, 98))


def test_published_curve_is_dashed_with_open_markers_and_its_own_mark(tmp_path):
    sweep = read_sweep(tmp_path, a_sweep() | {"published": [LI]})
    (curve,) = published_curves(sweep)
    assert curve.target == pytest.approx(89.19)
    (axes,) = pictures.sweep_figure(sweep).axes
    line = next(li for li in axes.lines if li.get_label() == "Li 2018, fastfood: d_int90 = 290")
    assert list(line.get_ydata()) == pytest.approx([76.3, 93.9])
    assert line.get_linestyle() == "--"
    assert line.get_markerfacecolor() == "white"
    assert any(list(li.get_xdata()) == [290, 290] for li in axes.lines)


def test_eight_methods_are_told_apart(tmp_path):
    (axes,) = pictures.sweep_figure(read_sweep(tmp_path, a_sweep(EIGHT))).axes
    curves = [line for line in axes.lines if line.get_label().split(":")[0] in EIGHT]
    assert len({(line.get_color(), line.get_marker()) for line in curves}) == 8
    assert len({line.get_color() for line in curves}) == 8
    assert len({line.get_marker() for line in curves}) >= 7


@pytest.mark.parametrize("methods", [["hash"], EIGHT, ["a-method-with-a-name-of-its-own" * 2]])
def test_legend_lies_below_the_axes_and_within_a_column(tmp_path, methods):
    figure = pictures.sweep_figure(read_sweep(tmp_path, a_sweep(methods) | {"published": [LI]}))
    pictures.png(figure)  # lays it out
    (legend,), (axes,) = figure.legends, figure.axes
    box = legend.get_window_extent()
    assert figure.get_size_inches()[0] == 3.5
    assert box.y1 < axes.get_tightbbox().y0
    assert box.y0 >= 0
    if len(methods[0]) < 20:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert axes.title.get_window_extent().x1 <= figure.bbox.x1
    assert min(axes.get_window_extent().size) > 1.4 * figure.dpi  # inches left for the data


def test_dims_beside_the_trained_numbers_are_not_called_numbers_trained(tmp_path):
    raw = a_sweep()
    assert (
        "(numbers trained)" in pictures.sweep_figure(read_sweep(tmp_path, raw)).axes[0].get_xlabel()
    )
    raw["rows"][0]["trainable_parameters"] += 5130
    label = pictures.sweep_figure(read_sweep(tmp_path, raw)).axes[0].get_xlabel()
    assert label == "subspace dimension d"


def test_ticks_are_few_and_round():
    assert pictures.dimension_ticks(9, 3300, [10, 3000]) == [10, 100, 1000]
    assert pictures.dimension_ticks(40, 600, [50, 500]) == [50, 100, 200, 500]
    assert pictures.dimension_ticks(550, 990, [600, 750, 900]) == [600, 750, 900]
    assert pictures.dimension_ticks(0.9, 1.1e7, [1, 10**7]) == [1, 100, 10**4, 10**6]
    assert len(pictures.dimension_ticks(600, 700, list(range(601, 700)))) <= 6


def test_numbers_for_people():
    assert [number(n) for n in (7.31, 10, 234.5, 61706)] == ["7.3", "10", "234", "61,706"]


# --- the files ----------------------------------------------------------------------------------


def test_write_a_sweep(tmp_path):
    files = write(save(tmp_path, a_sweep() | {"published": [LI]}))
    assert [f.name for f in files] == ["curve.png", "curve.svg", "report.html"]
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in files} | {"sweep.json"}
    png, svg, html = (f.read_bytes() for f in files)
    assert png.startswith(b"\x89PNG")
    texts = svg_texts(svg)
    for words in (
        "lenet on mnist, D = 61,706",
        "hash: d_int90 = 234",
        "Li 2018, fastfood: d_int90 = 290",
        "90 % of all weights",
        "test accuracy (%)",
        "1,000",
    ):
        assert words in texts
    assert base64.b64encode(svg) in html


def test_page_of_a_sweep_holds_the_tables(tmp_path):
    raw = a_sweep() | {"published": [LI], "status": "running"}
    raw["d_int"]["rademacher"] |= {"value": 300.0, "high": None, "note": "the interval is open"}
    write(save(tmp_path, raw))
    document = Document((tmp_path / "report.html").read_text("utf-8"))
    words = " ".join(document.words)
    assert "hash reaches 90 % of the accuracy of all weights at d = 234 of D = 61,706." in words
    assert "Status: running" in words
    assert "Stored: every number that inference needs" in words
    tables = document.tables
    assert ["hash", "234", "220 to 250", "0.38", "89.10"] in tables["Intrinsic dimension"]
    assert ["rademacher", "300", "220 to –", "0.49", "89.10"] in tables["Intrinsic dimension"]
    assert "rademacher: the interval is open." in words
    assert ["hash", "1000", "96.00 ± 2.83", "96.00 ± 2.83", "2", "0.1"] in tables["Accuracy"]
    assert ["full", "all weights", "99.00 ± 0.71", "99.00 ± 0.71", "2", "0.001"] in tables[
        "Accuracy"
    ]
    sizes = " ".join(tables["Size and cost"][1])
    assert sizes == "hash 1000 1,000 1,000 61,706 4,900 3.0 31.0 500.0"
    assert tables["Published and measured side by side: Li 2018, fastfood"] == [
        ["d", "published", "hash", "rademacher"],
        ["100", "76.3", "80.0 (+3.7)", "80.0 (+3.7)"],
        ["500", "93.9", "–", "–"],
        ["all weights", "99.1", "99.0 (-0.1)", "99.0 (-0.1)"],
        ["d_int90", "290", "234", "300"],
    ]
    assert tables["Failed runs"][1] == ["hash-d10-lr0.3-seed0", "the loss became nan in epoch 3"]
    assert ["methods", '["hash", "rademacher"]'] in tables["Configuration"]
    assert tables["Versions and device"][1:] == [
        ["subspan", "0.1.0"],
        ["torch", "2.13.0"],
        ["device", "cpu, 2 threads"],
    ]


def test_at_a_single_d_methods_are_compared_by_bars(tmp_path):
    raw = a_sweep(["hash", "fastfood"])
    assert not bars.suits(read_sweep(tmp_path, raw))
    raw["rows"] = [
        row("hash", 300, [0.80, 0.90], seconds_per_step=[0.004, 0.006]),
        row("fastfood", 300, [0.70], peak_memory_bytes=[]),
    ]
    sweep = read_sweep(tmp_path, raw)
    assert bars.suits(sweep)
    accuracy, memory, step, total = bars.figure(sweep).axes
    widths = [[bar.get_width() for bar in axes.patches] for axes in (accuracy, memory, step, total)]
    assert widths[0] == pytest.approx([99, 85, 70])  # the baseline first
    assert widths[1] == pytest.approx([500, 500])  # not recorded: no bar
    assert widths[2] == pytest.approx([3, 5, 3])
    assert widths[3] == pytest.approx([31, 31, 31])
    assert [axes.get_xscale() for axes in (accuracy, memory, step)] == ["linear"] * 3
    raw["rows"].append(row("stored-coo", 300, [0.70], seconds_per_step=[0.5]))
    scales = [axes.get_xscale() for axes in bars.figure(read_sweep(tmp_path, raw)).axes]
    assert scales == ["linear", "linear", "log", "linear"]  # 3 ms and 500 ms
    raw["rows"].pop()
    read_sweep(tmp_path, raw)
    names = [label.get_text() for label in accuracy.get_yticklabels()]
    assert names == ["full", "hash", "fastfood"]
    assert accuracy.get_ylim()[0] > accuracy.get_ylim()[1]  # from above to below
    files = write(tmp_path)
    assert "What each method reaches" in files[2].read_text()
    assert "d = 300" in " ".join(svg_texts(files[1].read_bytes()))
    raw["rows"][1]["test_score"] = [0.0]
    assert len(bars.figure(read_sweep(tmp_path, raw)).axes[0].patches) == 3  # not as if unknown
    raw["rows"].pop()  # one method: a curve of one point
    assert not bars.suits(read_sweep(tmp_path, raw))


def test_write_a_run(tmp_path):
    files = write(save(tmp_path, a_run(), "record.json"))
    texts = svg_texts(files[1].read_bytes())
    assert "mlp on mnist, hash d = 750, D = 159,010" in texts
    assert {"training", "validation", "loss", "epoch", "test, at the end: 93.0 %"} <= set(texts)
    document = Document(files[2].read_text("utf-8"))
    assert "Test accuracy: 93.00 %" in document.words
    assert document.tables["Accuracy"][1] == ["hash", "750", "93.00", "93.50", "1", "0.1"]
    assert document.tables["History"][2] == ["2", "0.4", "0.3", "93.50", "0.05", "6.0"]


def test_a_run_names_what_its_method_is_varied_by(tmp_path):
    raw = a_run()
    raw["config"] |= {"method": "dlrt", "options": {"tolerance": 0.1}}
    run = read(save(tmp_path, raw, "record.json"))
    assert title(run) == "mlp on mnist, dlrt tolerance = 0.1, D = 159,010"
    raw["config"] |= {"method": "one of the user's", "options": {}}
    run = read(save(tmp_path, raw, "record.json"))
    assert title(run) == "mlp on mnist, one of the user's, D = 159,010"


def test_run_figure_plots_losses_and_accuracy_by_epoch(tmp_path):
    run = read(save(tmp_path, a_run(), "record.json"))
    assert isinstance(run, RunRecord)
    losses, accuracy = pictures.run_figure(run).axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[0.9, 0.4], [0.5, 0.3]]
    assert list(accuracy.lines[0].get_ydata()) == pytest.approx([85, 93.5])
    assert accuracy.lines[1].get_ydata()[0] == pytest.approx(93)


def test_a_failed_run_still_has_a_page(tmp_path):
    raw = a_run() | {"history": [], "status": "failed", "error": "the loss became nan"}
    raw |= dict.fromkeys(("test_score", "val_score", "checkpoint_bytes", "seconds_per_step"))
    raw["config"]["options"] = {}
    files = write(save(tmp_path, raw, "record.json"))
    assert "no epoch was finished" in svg_texts(files[1].read_bytes())
    document = Document(files[2].read_text("utf-8"))
    assert "the loss became nan" in document.words
    assert document.tables["Accuracy"][1] == ["hash", "–", "–", "–", "0", "0.1"]


def test_a_sweep_without_a_good_run_still_has_a_page(tmp_path):
    raw = a_sweep() | {"rows": [], "d_int": {}, "baseline": None}
    files = write(save(tmp_path, raw))
    assert "no run succeeded" in svg_texts(files[1].read_bytes())
    document = Document(files[2].read_text("utf-8"))
    assert "No run succeeded; the reasons are below." in document.words
    assert len(document.tables["Failed runs"]) == 2


def test_a_sweep_comes_before_a_run(tmp_path):
    save(tmp_path, a_run(), "record.json")
    assert isinstance(read(save(tmp_path, a_sweep())), SweepRecord)


def test_page_loads_nothing(tmp_path):
    files = write(save(tmp_path, a_sweep() | {"published": [LI]}))
    html = files[2].read_text("utf-8")
    document = Document(html)
    assert document.loads
    assert all(load.startswith("data:image/svg+xml;base64,") for load in document.loads)
    assert not document.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert not re.search(r"url\(|@import|https?:", html)
    for element in ElementTree.fromstring(files[1].read_bytes()).iter():
        assert element.tag.split("}")[1] not in ("script", "image", "foreignObject")
        for name, value in element.attrib.items():
            assert not name.endswith("href") or value.startswith("#")


def test_hostile_names_stay_text(tmp_path):
    net, method = '<script>alert("$x")</script>&', "_<b>$\\frac$"
    raw = a_sweep([method])
    raw["config"]["net"] = net
    files = write(save(tmp_path, raw))
    html = files[2].read_text("utf-8")
    assert "script" not in Document(html).tags
    assert f"{net} on mnist, D = 61,706" in Document(html).words
    assert Document(html).tables["Accuracy"][1][0] == method
    texts = svg_texts(files[1].read_bytes())
    assert f"{method}: d_int90 = 234" in texts
    assert any("<script>" in text for text in texts)


def test_svg_depends_on_the_data_only(tmp_path):
    sweep = read_sweep(tmp_path, a_sweep())
    first = pictures.svg(pictures.sweep_figure(sweep))
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.facecolor": "r"}):
        assert pictures.svg(pictures.sweep_figure(sweep)) == first
    assert b"date" not in first.lower()


# --- bad records --------------------------------------------------------------------------------


def damaged(raw: dict[str, Any], path: str, value: Any) -> str:
    raw = copy.deepcopy(raw)
    *parents, last = path.split(".")
    place: Any = raw
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return json.dumps(raw)


BAD_SWEEPS = {
    "empty": "",
    "cut": json.dumps(a_sweep())[:500],
    "list": "[]",
    "word": '"sweep"',
    "nothing": "{}",
    "newer": damaged(a_sweep(), "format", 3),
    "old": damaged(a_sweep(), "format", 0),
    "no rows": damaged(a_sweep(), "rows", KeyError),
    "percent": damaged(a_sweep(), "rows.0.test_score", [93.1]),
    "nan": damaged(a_sweep(), "rows.0.test_score", [float("nan")]),
    "no method": damaged(a_sweep(), "rows.0.method", KeyError),
    "no score": damaged(a_sweep(), "rows.0.test_score", []),
    "d of 0": damaged(a_sweep(), "rows.0.dim", 0),
    "infinite d": damaged(a_sweep(), "rows.0.dim", float("inf")),
    "d_int": damaged(a_sweep(), "d_int.hash", 290),
    "config": damaged(a_sweep(), "config", None),
    "failed": damaged(a_sweep(), "failed", ["hash"]),
    "published": damaged(a_sweep() | {"published": [LI]}, "published.0.dims", [1]),
}


@pytest.mark.parametrize("name", BAD_SWEEPS)
def test_bad_record_is_an_error_and_writes_nothing(tmp_path, name):
    (tmp_path / "sweep.json").write_text(BAD_SWEEPS[name])
    with pytest.raises(SubspanError, match="has format" if name == "newer" else "is damaged"):
        write(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["sweep.json"]


def test_bytes_that_are_no_text_are_an_error(tmp_path):
    (tmp_path / "record.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(SubspanError, match="is damaged"):
        write(tmp_path)


def test_missing_record_names_both(tmp_path):
    with pytest.raises(SubspanError, match=r"expected sweep\.json or record\.json"):
        write(tmp_path)
    with pytest.raises(SubspanError, match="found neither"):
        write(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def everywhere(value: Any, path: str = "") -> list[str]:
    """The path of every entry in a record's JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    paths = []
    for key, inner in items:
        here = f"{path}{key}"
        if isinstance(value, dict):
            paths.append(here)
        if isinstance(inner, dict | list):
            paths += everywhere(inner, here + ".")
    return paths


@pytest.mark.parametrize("value", [KeyError, None, "x", -1, [], {}, [None]], ids=repr)
def test_any_damage_is_read_as_an_error_or_shown(tmp_path, value):
    """No damage gets past reading to break the page."""
    sweep = a_sweep(["hash"]) | {"published": [LI]}
    for name, raw, show in (
        ("sweep.json", sweep, lambda found: page.of_sweep(found, pictures.CAPTION)),
        ("record.json", a_run(), page.of_run),
    ):
        for path in everywhere(raw):
            (tmp_path / name).write_text(damaged(raw, path, value))
            try:
                found = read(tmp_path)
            except SubspanError:
                continue
            page.render(show(found), b"")
        (tmp_path / name).unlink()


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write(save(tmp_path, a_sweep()))
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_score_that_is_no_accuracy(tmp_path):
    """Its own unit, and a share of the way from its zero."""
    raw = a_sweep(["hash"])
    score = {"name": "bits", "higher_is_better": False, "zero": 6.0, "percent": False}
    raw["score"] = score
    raw["baseline"]["test_score"] = [1.5, 2.5]
    for entry, mean in zip(raw["rows"], (2.25, 5.0, 3.0), strict=True):
        entry["test_score"], entry["val_score"] = [mean - 0.25, mean + 0.25], [mean]
    raw["d_int"]["hash"]["target"] = 2.4
    sweep = read_sweep(tmp_path, raw)
    assert sweep.score == Score(**score)
    axes = pictures.sweep_figure(sweep).axes[0]
    assert axes.get_ylabel() == "test bits"
    found = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(found["hash: d_int90 = 234"]) == pytest.approx([5.0, 3.0, 2.25])
    assert found["all weights: 2"][0] == 2
    assert found["90 % of all weights"][0] == pytest.approx(6 - 0.9 * 4)
    write(tmp_path)
    document = Document((tmp_path / "report.html").read_text("utf-8"))
    words = " ".join(document.words)
    assert "hash reaches 90 % of the bits of all weights at d = 234 of D = 61,706." in words
    assert ["hash", "1000", "2.25 ± 0.3536", "2.25", "2", "0.1"] in document.tables["Bits"]
    assert document.tables["Bits"][0] == [
        "method",
        "d",
        "test",
        "validation",
        "seeds",
        "learning rate",
    ]
    assert document.tables["Intrinsic dimension"][1][-1] == "2.4"


def test_records_of_the_first_format_are_read(tmp_path):
    """They said accuracy where later ones say score."""
    raw = json.loads(json.dumps(a_sweep()).replace("_score", "_accuracy")) | {"format": 1}
    assert read_sweep(tmp_path, raw) == read_sweep(tmp_path, a_sweep())
    old = json.loads(json.dumps(a_run()).replace("_score", "_accuracy")) | {"format": 1}
    (tmp_path / "sweep.json").unlink()
    found = read(save(tmp_path, old, "record.json"))
    assert found == read(save(tmp_path, a_run(), "record.json"))
    assert found.history[1].val_score == 0.935
