"""Smaller ordinary networks, and comparisons of several networks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from subspan.errors import SubspanError
from subspan.experiments.exhibits import exhibits
from subspan.report import pictures, read
from subspan.report.curves import small_curves
from subspan.sweeps.running import Running
from subspan.sweeps.smaller import beside, smaller
from subspan.sweeps.sweep import sweep, total_runs
from subspan.training import nets
from subspan.training.nets import weights
from tests.runs import NET, WEIGHTS, a_sweep, sweep_of


@pytest.mark.parametrize("name", ["mlp", "mlp-300-50", "lenet", "lenet-k3-12-20-40"])
def test_the_largest_within_the_numbers(name):
    """A little wider, in any of its layers, and there are too many weights."""
    for wanted in (1000, 3500, 8000):
        found = smaller(name, [wanted])
        assert len(found) == (2 if "lenet" in name else 1)
        for small in found:
            assert weights(small, (1, 28, 28), 10) <= wanted
            chosen, whole = nets.widths(small), nets.widths(name)
            assert len(chosen.dense) == len(whole.dense)
            shares = [
                (n + 1) / w
                for n, w in zip(
                    chosen.channels + chosen.dense, whole.channels + whole.dense, strict=True
                )
            ]
            # All widths at the factor at which the next of them grows.
            factor = min(shares) + 1e-9

            def at(units, factor=factor):
                return tuple(max(1, int(factor * w)) for w in units)

            wider = replace(chosen, channels=at(whole.channels), dense=at(whole.dense))
            assert weights(wider.name, (1, 28, 28), 10) > wanted
    assert [nets.widths(n).kernel for n in smaller("lenet", [5000])] == [3, 5]


def test_what_has_no_smaller_one():
    assert smaller("mlp", [804]) == []  # one unit: 784 + 1 + 10 + 10
    assert smaller("mlp", [805]) == ["mlp-1"]
    assert smaller("mlp", [159_010, 10**9]) == []  # no smaller than itself
    assert smaller("mlp", [159_009]) == ["mlp-199"]
    assert smaller("mlp", [900, 1000, 805]) == ["mlp-1"]
    with pytest.raises(SubspanError, match="kind of mlp and lenet only, not of 'resnet8'"):
        smaller("resnet8", [1000])


def test_beside_a_sweep():
    assert beside(a_sweep(dims=("90", "100+60"))) == ("mlp-1", "mlp-2")  # 64·w + w + 10·w + 10
    with pytest.raises(SubspanError, match=r"needs dims that are numbers, got 0\.3"):
        beside(a_sweep(dims=("0.3",)))


def test_small_networks_in_a_sweep(tmp_path):
    config = a_sweep(small=("mlp-1", "mlp-2"), seeds=2)
    assert total_runs(config) == 2 * 5
    result = sweep(config, tmp_path, Running(jobs=1))
    rows = result.rows
    assert [(row.method, row.dim, row.label) for row in rows] == [
        ("hash", 10, "10"),
        ("hash", 40, "40"),
        ("full", 85, "mlp-1"),
        ("full", 160, "mlp-2"),
    ]
    assert [row.small for row in rows] == ["", "", "mlp-1", "mlp-2"]
    assert [row.stored_parameters for row in rows[2:]] == [85, 160]
    assert result.baseline.dim == WEIGHTS
    assert list(result.d_int) == ["hash"]
    assert (tmp_path / "runs" / "mlp-1-full-lr0.01-seed1" / "model.safetensors").is_file()
    assert result.config["small"] == ["mlp-1", "mlp-2"]
    alone = sweep(replace(config, small=(), seeds=1), tmp_path / "b", Running(jobs=1))
    assert "small" not in alone.config
    found = read(tmp_path)
    assert found.methods == ["hash"]
    assert found.weights == WEIGHTS
    [curve] = small_curves(found)
    assert curve.dims == (85, 160)
    assert [len(seeds) for seeds in curve.scores] == [2, 2]
    lines = {line.get_label(): line for line in pictures.sweep_figure(found).axes[0].lines}
    assert lines["smaller networks, all weights"].get_linestyle() == "None"
    assert list(lines["smaller networks, all weights"].get_xdata()) == [85, 160]


def test_a_small_network_of_no_such_name(tmp_path):
    with pytest.raises(SubspanError, match="unknown net 'mpl-1'"):
        sweep(a_sweep(small=("mpl-1",)), tmp_path / "out", Running(jobs=1))
    assert not (tmp_path / "out").exists()
    with pytest.raises(SubspanError, match="small names one value twice"):
        a_sweep(small=("mlp-1", "mlp-1"))


def test_networks_by_command(in_tmp_path, cli):
    words = ("--dims", "10,90", "--epochs", 1, "--lrs", 0.3, "--baseline-lrs", 0.01, "--jobs", 1)
    command = ("sweep", "--nets", f"{NET},mlp-4-4", "--small", "auto", *words, "--out", "c")
    said = cli(*command)
    assert (said.code, said.err) == (0, "")
    assert f"\n{NET}\n" in said.out
    assert "picture of all: c/comparison.png" in said.out
    results = {net: sweep_of(Path("c") / net) for net in (NET, "mlp-4-4")}
    assert [r["config"]["net"] for r in results.values()] == [NET, "mlp-4-4"]
    assert [r["config"]["small"] for r in results.values()] == [["mlp-1"], ["mlp-1-1"]]
    assert Path("c/comparison.png").read_bytes().startswith(b"\x89PNG")
    axes = pictures.comparison_figure({net: read(Path("c") / net) for net in results}).axes[0]
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    assert [star.get_xdata()[0] for star in stars] == [WEIGHTS, 64 * 4 + 4 + 20 + 50]
    assert [star.get_ydata()[0] for star in stars] == pytest.approx(
        [100 * r["baseline"]["mean_test_score"] for r in results.values()]
    )
    curves = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert [list(line.get_ydata()) for line in curves] == [
        pytest.approx([100 * row["mean_test_score"] for row in r["rows"][:2]])
        for r in results.values()
    ]
    # On a page of its own it is one experiment, with this picture and its command.
    [exhibit] = exhibits(Path())
    assert exhibit.title == f"mlp-4-4, {NET} at equal d"  # as the folders are ordered
    assert [path.name for path in exhibit.pictures] == ["comparison.png"]
    typed = "subspan sweep --nets mlp-4-4,mlp-8 --data digits --methods hash --dims 10,90"
    assert exhibit.command.startswith(typed)
    assert "--small auto" in exhibit.command
    # Again: nothing is repeated.
    before = json.dumps(results)
    assert (
        cli("sweep", "--nets", f"{NET},mlp-4-4", "--small", "auto", *words, "--out", "c").code == 0
    )
    assert json.dumps({net: sweep_of(Path("c") / net) for net in results}) == before
    for both, message in (
        (f"{NET},{NET}", f"nets names one network twice: {NET}, {NET}"),
        (f"{NET},mpl-4", "mpl-4: unknown net 'mpl-4': did you mean"),
        (f"{NET},mlp-1", "mlp-1: dim=90 must be at least the number of compartments"),
    ):
        said = cli("sweep", "--nets", both, *words, "--out", "d")
        assert said.code == 2
        assert message in said.err
        assert not Path("d").exists()
