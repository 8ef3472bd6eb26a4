"""A bound on the test error of a checkpoint, from its bytes and from its mistakes on the samples.

The classifier is the file: all that training chose (d, bits, family, seed, network, which epoch,
how pixels are normalised) stands in its bytes and is paid for there, so that no choice needs a
union of its own, and the validation part counts among the samples although choices looked at it
(:mod:`subspan.training.occam`). What is not in the bytes must have been fixed before the samples
were seen: whatever this module cannot check of that, it refuses or says.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspan import checkpoint
from subspan.checkpoint.compact import CHOSEN
from subspan.errors import SubspanError
from subspan.subspace import init
from subspan.subspace.model import SubspaceModel
from subspan.training import tasks
from subspan.training.evaluate import rebuild
from subspan.training.occam import log_prior, occam_bound, pac_bayes_bound
from subspan.training.schema import fitting

AROUND_A_BASE = ("subspace", "part")  # kinds of files that hold no θ₀
STATISTICS = ("mean", "std")  # what classifiers know of the samples beside their weights
SAMPLES = "samples"  # a digest of them, of texts
ALIKE = 0.01  # of the pixels' statistics, which another validation part changes a little
NETWORKS = 2**32  # that might have been named by a template in place of a chosen one
ROUNDING = 1e-3  # of the largest score: how much it may change in a batch of another size


@dataclass(frozen=True)
class Certificate:
    """A bound on a classifier's error, and everything that it was computed from.

    Attributes:
        checkpoint: the path of the file.
        data: the set whose training part, validation part included, are the samples.
        bytes: of the file.
        size_bits: of the bytes, 8 for each.
        length_bits: for their number, log₂ L (L + 1).
        choices_bits: log₂ of how many files or decoders beside this one are counted.
        confidence_bits: log₂ 1/δ.
        delta: the probability, over the draw of the samples, that the bound is wrong.
        choices: see :func:`certify`; times :data:`NETWORKS` where the template of a compact file
            names a network that was chosen by a look at such samples.
        samples: how many there are.
        mistakes: of the classifier on them.
        classes: how many there are to tell apart; None if the file does not say.
        error_bound: on the error of a new sample, by Occam's bound with the exact binomial tail.
        pac_bayes_bound: by the bound of Seeger and Maurer, for comparison; never smaller.
        assumptions: sentences on what was taken on trust.
    """

    checkpoint: str
    data: str
    bytes: int
    size_bits: int
    length_bits: float
    choices_bits: float
    confidence_bits: float
    delta: float
    choices: int
    samples: int
    mistakes: int
    classes: int | None
    error_bound: float
    pac_bayes_bound: float
    assumptions: list[str]

    @property
    def training_error(self) -> float:
        """The share of the samples that the classifier tells wrongly."""
        return self.mistakes / self.samples

    @property
    def guessing(self) -> float:
        """The error of guessing among equally frequent classes; 1 where nobody knows how many."""
        return 1 - 1 / self.classes if self.classes else 1.0


def certify(
    path: str | os.PathLike[str],
    data: str | None = None,
    *,
    delta: float = 0.05,
    choices: int = 1,
    base_is_prior: bool = False,
) -> Certificate:
    """Bound the error of a classifier on new samples; the test part is never looked at.

    Args:
        path: a checkpoint of ``subspan train``.
        data: where its training data are now; None is where they were.
        delta: the probability that the bound may be wrong, in (0, 1), fixed in advance.
        choices: how many networks, decoders or projections that no byte of the file tells apart
            might have been used for this file after a look at the samples, this one included.
        base_is_prior: whether weights that the file leaves to the network (a pretrained base, or
            those of your own code) were fixed without these samples. Only you can know.

    Raises:
        SubspanError: if the file does not say what it was trained on, the data are others, the
            task has no mistakes to count, the network is no function of one sample, or weights
            outside of the file may have been made from the samples.
    """
    delta, choices = fitting(float, delta, "delta"), fitting(int, choices, "choices")
    data = fitting(str | None, data, "data")
    base_is_prior = fitting(bool, base_is_prior, "base_is_prior")
    if not 0 < delta < 1:
        raise SubspanError(f"delta must be a probability in (0, 1), as 0.05, got {delta}")
    if choices < 1:
        raise SubspanError(f"choices must be at least 1, which is the file's own, got {choices}")
    header = checkpoint.inspect(path)
    extra = header["extra"]
    if missing := [fact for fact in ("net", "data", "seed") if fact not in extra]:
        raise SubspanError(
            f"{path} does not say what it was trained on ({', '.join(missing)}), so that nobody "
            "knows which samples its bytes were chosen by: a bound needs a file of subspan train"
        )
    assumptions = [
        "the samples are independent draws of what the classifier will meet",
        "the library, the network's code and delta were fixed before anyone saw the samples",
    ]
    if ":" in (extra.get("task") or ""):
        assumptions += [
            "no training or validation sample of your task is one of its test part",
            "your task gives the samples that it gave in the training",
        ]
    assumptions += _check_base(path, header, base_is_prior)
    task, name = tasks.again(extra, data), data or extra["data"] or extra["task"]
    _check_same(path, task.describe(), extra, name)
    model, _ = rebuild(path)
    net = model.merge() if isinstance(model, SubspaceModel) else model
    with _watched(net.eval()):
        mistakes, samples = _counted(task.as_trained(extra, str(path)).count_mistakes(net))
    size = header["bytes"]
    choices *= NETWORKS if header.get("template") in CHOSEN else 1
    log_confidence = log_prior(size) + math.log(delta) - math.log(choices)
    return Certificate(
        checkpoint=str(path),
        data=name,
        bytes=size,
        size_bits=8 * size,
        length_bits=math.log2(size) + math.log2(size + 1),
        choices_bits=math.log2(choices),
        confidence_bits=-math.log2(delta),
        delta=delta,
        choices=choices,
        samples=samples,
        mistakes=mistakes,
        classes=extra.get("classes"),
        error_bound=occam_bound(mistakes, samples, log_confidence),
        pac_bayes_bound=pac_bayes_bound(
            mistakes, samples, log_prior(size) - math.log(choices), delta
        ),
        assumptions=assumptions,
    )


def _check_base(path: object, header: Mapping[str, Any], trusted: bool) -> list[str]:
    """Refuse weights outside of the file that may have been made from the samples."""
    extra, around = header["extra"], header["kind"] in AROUND_A_BASE
    pretrained = "base" in header or tasks.kind(extra.get("task")).head is not None
    seed = header["init_seed"] if header["kind"] == "subspace" else extra.get("init_seed")
    own = ":" in f"{extra['net']}{extra.get('task') or ''}"
    cure = "train with --init seed, or "
    if around and pretrained:
        whose = "a pretrained base"
    elif around and own and seed is None:
        whose = "the initial weights that your code makes"
    elif own and (name := _made_by_code(path, extra)) is not None:
        whose, cure = f"what your code makes beside the drawn weights ({name})", ""
    else:
        return []
    if not trusted:
        raise SubspanError(
            f"{path} is numbers around {whose}, which are not in its bytes and may have been made "
            f"from these samples: {cure}say --base-is-prior if you know that they were not"
        )
    return [f"{whose} never saw these samples"]


def _made_by_code(path: object, extra: Mapping[str, Any]) -> str | None:
    """Name a tensor that neither a file nor a seed gives, and that is not 0 or 1 all over."""
    make = tasks.kind(extra.get("task")).network(extra)
    stored = checkpoint.read(str(path))[1].keys()
    made = {} if make is None else init.left_as_made(init.build(make, 0))
    for name, tensor in made.items():
        plain = any(bool((tensor == value).all()) for value in (0, 1))
        if not plain and not stored & {name, f"body.{name}"}:
            return name
    return None


def _check_same(
    path: object, here: Mapping[str, Any], there: Mapping[str, Any], name: object
) -> None:
    """Refuse data of which the file says something else."""
    for fact, value in json.loads(json.dumps(here)).items():
        said = there.get(fact)
        if said is None and fact in STATISTICS:
            raise SubspanError(
                f"{path} does not say the {fact} of its training data: taken from the data now, it "
                "would be a part of the classifier that no byte pays for"
            )
        if said is None and fact == SAMPLES:
            raise SubspanError(
                f"{path} does not say which samples it was trained on, as files of earlier "
                "versions do not: train it again"
            )
        if said is not None and not _alike(value, said):
            what = "the digest of its samples" if fact == SAMPLES else fact
            raise SubspanError(
                f"{name} is not what {path} was trained on ({what} is {value}, the file says "
                f"{said}): give the data of its training as --data"
            )


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=ALIKE)
    return bool(one == other)


def _counted(found: Any) -> tuple[int, int]:
    """Return mistakes and samples as a task has counted them."""
    try:
        mistakes, samples = map(operator.index, found)
    except (TypeError, ValueError, RuntimeError):
        mistakes, samples = -1, 0
    if not 0 <= mistakes <= samples or not samples:
        raise SubspanError(
            "the task's count_mistakes must return the number of mistakes and that of samples, at "
            f"least one, of which they are a part, got {found!r}"
        )
    return mistakes, samples


@contextmanager
def _watched(net: nn.Module) -> Iterator[None]:
    """Refuse a network whose scores of a sample depend on the rest of its batch, or on chance.

    Mistakes of such a network are not independent, and no tail of a binomial bounds them.
    BatchNorm without running statistics makes one; so does dropout that eval() does not end. Two
    samples of the first batch go through the network once more, without the others.
    """

    def compare(net: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        hook.remove()
        again = net(*map(_two, args), **{key: _two(value) for key, value in kwargs.items()})
        alone, together = _scores(again), _scores(out)[:2]
        largest = float(together.abs().max())
        if not torch.allclose(alone, together, rtol=0, atol=ROUNDING * largest):
            raise SubspanError(
                "the network's scores of a sample depend on the other samples of its batch "
                "(BatchNorm without running statistics does that) or on chance, and a bound holds "
                "for a function of one sample: train a network without that"
            )

    hook = net.register_forward_hook(compare, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _two(value: Any) -> Any:
    return value[:2] if isinstance(value, Tensor) else value


def _scores(out: Any) -> Tensor:
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(found, Tensor):
        raise SubspanError(f"the network must return scores, got {type(out).__name__}")
    return found.float()
