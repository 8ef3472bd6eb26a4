"""The page of a report: what a sweep or a run has to say, as tables, and the template's filling."""

from __future__ import annotations

import base64
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from subspan.report.curves import d_int_bound, d_int_name, number, point_of, title
from subspan.sweeps.intrinsic import IntrinsicDimension
from subspan.sweeps.result import PointRecord, Published, SweepRecord
from subspan.training.records import RunRecord
from subspan.training.score import Score

NONE = "–"  # not recorded, not known, or not published
Column = tuple[str, Callable[[Any], str]]  # its name, and how its cell of a row is written


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs and a table: of figures, set flush right, or of words."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False
    text: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """All words of a page; the picture comes separately."""

    title: str
    lead: Sequence[str]
    caption: str
    sections: Sequence[Section]


def render(page: Page, svg: bytes) -> str:
    """Return the page as one self-contained HTML document with the picture inside.

    The picture is an image in a data URI, so that nothing in it can run.
    """
    return template("page.html").render(page=page, picture=embedded(svg))


def template(name: str, *, escape: bool = True) -> jinja2.Template:
    """Return a template of this folder; one of HTML must ``escape`` what is filled in."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""),
        autoescape=escape,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def cell(words: str) -> str:
    """Return text that cannot end a cell of a Markdown table, nor begin a tag."""
    return " ".join(words.split()).replace("|", r"\|").replace("<", "&lt;")


def embedded(picture: bytes) -> str:
    """Return a picture, SVG or PNG, as an address that holds it."""
    kind = "png" if picture.startswith(b"\x89PNG") else "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def of_sweep(sweep: SweepRecord, caption: str) -> Page:
    """Return the page of a sweep, with the caption of its picture."""
    caption = caption.replace("{score}", sweep.score.name)
    if sweep.published:
        caption += " Dashed, with open markers: published."
    protocol = (
        "Mean ± standard deviation over seeds. The learning rate is the best on validation; the "
        "test set is read once, at the end."
    )
    rows = [*sweep.rows, sweep.baseline] if sweep.baseline else sweep.rows
    sections = [_intrinsic(sweep)] if sweep.d_int else []
    sections.append(_scores(rows, sweep.score, protocol))
    sections += [_side_by_side(source, sweep) for source in sweep.published]
    sections.append(_cost(rows))
    sections += _counts(rows, sweep.score)
    if sweep.failed:
        sections.append(
            Section(
                "Failed runs",
                ["run", "reason"],
                [(f.run, f.error) for f in sweep.failed],
                words=True,
            )
        )
    lead = _answer(sweep) + _unfinished(sweep)
    return Page(title(sweep), lead, caption, sections + _facts(sweep))


def of_run(run: RunRecord) -> Page:
    """Return the page of a single run."""
    known, point = run.test_score, point_of(run)
    lead = [] if known is None else [f"Test {run.score.name}: {run.score.show(known)}"]
    lead += [*_unfinished(run), *([run.error] if run.error else [])]
    caption = "Losses and validation score by epoch. The test set is read once, at the end."
    sections = [_scores([point], run.score), _cost([point]), *_counts([point], run.score)]
    return Page(title(run), lead, caption, [*sections, _history(run), *_facts(run)])


def _answer(sweep: SweepRecord) -> list[str]:
    """Say the main result of a sweep in a sentence."""
    if not sweep.rows:
        return ["No run succeeded; the reasons are below."]
    if not sweep.d_int or sweep.baseline is None:
        return []
    goal = f"{100 * sweep.threshold:g} % of the {sweep.score.name} of {sweep.baseline.label}"
    reached = {m: found.value for m, found in sweep.d_int.items() if found.value is not None}
    if not reached:
        return [f"No curve of means over seeds reaches {goal}."]
    best = min(reached, key=lambda method: reached[method])
    return [
        f"{best} reaches {goal} at d {d_int_bound(sweep.d_int[best])}"
        + (f" of D = {sweep.weights:,}." if sweep.weights else ".")
    ]


def _unfinished(found: SweepRecord | RunRecord) -> list[str]:
    if found.status == "complete":
        return []
    return [f"Status: {found.status}. The page shows what there is so far."]


def section(heading: str, columns: Sequence[Column], things: Iterable[Any], *text: str) -> Section:
    """Make a section whose table has a row for each thing."""
    rows = [[write(thing) for _, write in columns] for thing in things]
    return Section(heading, [name for name, _ in columns], rows, text=text)


def _intrinsic(sweep: SweepRecord) -> Section:
    score, name = sweep.score, d_int_name(sweep.threshold)

    def interval(found: IntrinsicDimension) -> str:
        ends = [or_none(number, end) for end in (found.low, found.high)]
        return f"{ends[0]} to {ends[1]}" if set(ends) != {NONE} else NONE

    def share(found: IntrinsicDimension) -> str:
        if found.value and sweep.weights:
            return f"{100 * found.value / sweep.weights:.2g}"
        return NONE

    meaning = (
        f"{name} is the least d at which the mean test {score.name} reaches "
        f"{100 * sweep.threshold:g} "
        "% of what training all weights reaches, interpolated linearly in log d. The interval is "
        "a bootstrap over seeds, which is too narrow where there are fewer than about five."
    )
    columns: list[Column] = [
        ("method", lambda item: item[0]),
        (name, lambda item: d_int_bound(item[1]).removeprefix("= ")),
        ("interval", lambda item: interval(item[1])),
        ("share of D, %", lambda item: share(item[1])),
        (f"{score.name} to reach{_unit(score)}", lambda item: shown([item[1].target], score)),
    ]
    notes = [f"{method}: {found.note}." for method, found in sweep.d_int.items() if found.note]
    return section("Intrinsic dimension", columns, sweep.d_int.items(), meaning, *notes)


def _scores(rows: Sequence[PointRecord], score: Score, *text: str) -> Section:
    columns: list[Column] = [
        ("method", lambda row: row.method),
        ("d", lambda row: row.label or NONE),
        (f"test{_unit(score)}", lambda row: shown(row.test_score, score)),
        (f"validation{_unit(score)}", lambda row: shown(row.val_score, score)),
        ("seeds", lambda row: str(len(row.test_score))),
        ("learning rate", lambda row: f"{row.lr:g}"),
    ]
    return section(score.name[:1].upper() + score.name[1:], columns, rows, *text)


def _cost(rows: Sequence[PointRecord]) -> Section:
    counts = (
        "Trained: every number that the optimizer moves. Stored: every number that inference needs "
        "beyond seeds: the coordinates, what is trained in full, and buffers such as running "
        "means. D: the weights of the network that they stand for, tied ones once. The file is "
        "the checkpoint, with its names and shapes."
    )
    costs = "Time and memory are those of training on the device named below, means over seeds."
    head = any(row.head_parameters for row in rows)
    if head:
        counts += (
            " Head: those of the trained numbers that every method trains as they are; d does not "
            "count them."
        )
    sent = any(row.bytes_sent for row in rows)
    columns: list[Column] = [
        ("method", lambda row: row.method),
        ("d", lambda row: row.label or NONE),
        ("trained", lambda row: _count(row.trainable_parameters)),
        *[("head", lambda row: _count(row.head_parameters))] * head,
        ("stored", lambda row: _count(row.stored_parameters)),
        ("weights D", lambda row: _count(row.weights)),
        ("file, bytes", lambda row: _count(row.checkpoint_bytes)),
        ("ms per step", lambda row: mean(row.seconds_per_step, 1e3)),
        ("seconds", lambda row: mean(row.seconds_total)),
        ("memory, MB", lambda row: mean(row.peak_memory_bytes, 1e-6)),
        *[("bytes sent per step", lambda row: mean(row.bytes_sent))] * sent,
    ]
    return section("Size and cost", columns, rows, counts, costs)


def _counts(points: Sequence[PointRecord], score: Score) -> list[Section]:
    """Make the section of factored networks: their ranks, and their counts in several ways."""
    rows = [row for row in points if row.counts]
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row.counts))

    def ranks(row: PointRecord) -> str:
        return "; ".join(", ".join(map(str, seed.values())) for seed in row.ranks)

    def share(row: PointRecord) -> str:
        known = names[0] in row.counts
        return f"{100 * row.counts[names[0]] / row.weights:.1f}" if known else NONE

    columns: list[Column] = [
        ("method", lambda row: row.method),
        ("", lambda row: row.label or NONE),
        (f"test{_unit(score)}", lambda row: shown(row.test_score, score)),
        ("ranks", ranks),
        *((name, lambda row, name=name: _count(row.counts.get(name))) for name in names),
        ("of D, %", share),
    ]
    text = "Numbers, biases and dense layers included; ranks layer by layer, seed by seed."
    return [section("Ranks and counts", columns, rows, text)]


def _side_by_side(source: Published, sweep: SweepRecord) -> Section:
    """Published and measured: in every cell the accuracy, and its lead over the published one."""

    def line(name: str, published: float, measured: Sequence[Sequence[float]]) -> list[str]:
        means = [100 * statistics.mean(seeds) if seeds else math.nan for seeds in measured]
        cells = [or_none(lambda m: f"{m:.1f} ({m - 100 * published:+.1f})", m) for m in means]
        return [name, f"{100 * published:.1f}", *cells]

    accuracy: dict[tuple[str, int | str], Sequence[float]] = {}
    for row in sweep.rows:
        accuracy[row.method, row.dim] = accuracy[row.method, row.label] = row.test_score
    known = [*sweep.methods, *["full"] * any(row.small for row in sweep.rows)]
    methods = [method for method in known if source.method in (None, method)]
    rows = [
        line(
            at if isinstance(at, str) else number(at),
            published,
            [accuracy.get((method, at), ()) for method in methods],
        )
        for at, published in (source.points if source.labels else sorted(source.points))
    ]
    if source.baseline is not None:
        all_weights = sweep.baseline.test_score if sweep.baseline else ()
        rows.append(line("all weights", source.baseline, [all_weights] * len(methods)))
    if source.d_int is not None:
        found = [sweep.d_int.get(method) for method in methods]
        bounds = [d_int_bound(f).removeprefix("= ") if f else NONE for f in found]
        rows.append([d_int_name(sweep.threshold), number(source.d_int), *bounds])
    return Section(
        f"Published and measured side by side: {source.label}",
        ["at" if source.labels else "d", "published", *methods],
        rows,
        text=["Test accuracy in %, in brackets the difference from the published one in points."],
    )


def _history(run: RunRecord) -> Section:
    columns: list[Column] = [
        ("epoch", lambda line: str(line.epoch)),
        ("training loss", lambda line: f"{line.train_loss:.4g}"),
        ("validation loss", lambda line: f"{line.val_loss:.4g}"),
        (
            f"validation {run.score.name}{_unit(run.score)}",
            lambda line: shown([line.val_score], run.score),
        ),
        ("learning rate", lambda line: f"{line.learning_rate:.3g}"),
        ("seconds", lambda line: f"{line.seconds:.1f}"),
    ]
    return section("History", columns, run.history)


def _facts(found: SweepRecord | RunRecord) -> list[Section]:
    """Make the sections that a repetition needs: configuration, versions and device."""
    versions = {**found.versions, "device": found.device}
    return [
        Section(heading, ["name", "value"], [[k, _plain(v)] for k, v in facts.items()], words=True)
        for heading, facts in (("Configuration", found.config), ("Versions and device", versions))
    ]


def shown(values: Sequence[float], score: Score) -> str:
    """Return the mean as people read it, and with several seeds the standard deviation."""
    return score.summary(values) if values else NONE


def _unit(score: Score) -> str:
    return ", %" if score.percent else ""


def mean(values: Sequence[float], scale: float = 1) -> str:
    """Return the mean of what was measured, as people read it."""
    return f"{scale * statistics.mean(values):,.1f}" if values else NONE


def or_none(write: Callable[[Any], str], value: float | None) -> str:
    """Write a number, or that there is none."""
    return NONE if value is None or math.isnan(value) else write(value)


def _count(value: int | None) -> str:
    return or_none("{:,}".format, value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
