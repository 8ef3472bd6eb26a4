"""Which weights share which coordinates.

A compartment is a group of weights with coordinates and a projection of its own. All weights of a
model, one tensor after another, are cut into compartments by one of these rules:

    global       one compartment for everything (Li 2018)
    layer        one for the parameters that a module holds itself (Minut 2023)
    tensor       one for each parameter
    uniform:k    k of equal size, across the borders of tensors (Gressmann 2020)
    {pattern: d} one for each pattern or preset, with its dimension
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from subspan.errors import SubspanError, is_integer, unknown

if TYPE_CHECKING:
    from subspan.subspace.targets import Presets

Rules = str | Mapping[str, int] | Sequence[tuple[str, int]]  # pairs: JSON would sort a mapping
Patterns = str | Iterable[str] | None
Aliases = Mapping[str, Sequence[str]]  # for every tensor all names that it has
EXPLICIT = "preset:"  # before the name of a preset that shall not be taken for a pattern
ALLOCATIONS = {"equal": lambda n: 1.0, "sqrt": math.sqrt, "size": float}


@dataclass(frozen=True)
class Piece:
    """Entries start … stop−1 of a flattened tensor."""

    tensor: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Compartment:
    """A group of weights and the number of its coordinates; rows of P follow its pieces."""

    name: str
    dim: int
    pieces: tuple[Piece, ...]

    @property
    def weights(self) -> int:
        """D of this compartment."""
        return sum(map(len, self.pieces))


def listed(patterns: Patterns) -> str | list[str] | None:
    """Return patterns as JSON, which can be read more than once; refuse what is no text."""
    if isinstance(patterns, str | None):
        return patterns
    found = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    for pattern in found:
        if not isinstance(pattern, str):
            raise SubspanError(
                f"a pattern is a text (the name of a parameter or a module, a preset, or a regular "
                f"expression), got {type(pattern).__name__}"
            )
    return found


def matches(pattern: str, name: str) -> bool:
    r"""Return whether a pattern selects a parameter, by the rules of PEFT on parameter names.

    The pattern is the name, or the end of it after a dot ("weight", "fc1.weight"), or the same of
    the module that holds the parameter ("fc1", "encoder.fc1"), or a regular expression that
    matches the whole name (".*conv\d.*").
    """
    for end in (name, name.rpartition(".")[0]):
        if pattern and (end == pattern or end.endswith("." + pattern)):
            return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise SubspanError(f"{pattern!r} is no regular expression: {error}") from None


def select(
    aliases: Aliases,
    patterns: Patterns,
    option: str,
    what: str = "parameter",
    presets: Presets | None = None,
) -> set[str]:
    """Select the tensors that any of the patterns matches; a tied tensor has all of its names.

    ``option`` is the argument's name, and ``what`` is selected, for the error. Without presets a
    pattern cannot be the name of one.

    Raises:
        SubspanError: for a pattern that matches nothing, or a preset that the network lacks.
    """
    patterns = listed(patterns)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        matching = {t for t, names in aliases.items() if any(matches(pattern, n) for n in names)}
        if presets is not None:
            matching = presets.choose(pattern, matching, option)
        if not matching:
            every = [name for names in aliases.values() for name in names]
            pieces = [piece.strip() for piece in pattern.split(",")]
            several = f"; several are a list, [{', '.join(pieces)}]" if pieces[1:] else ""
            raise unknown(
                f"pattern in {option} (it matches no {what}{several})",
                pattern,
                every,
                () if presets is None else presets.names,
            )
        chosen |= matching
    return chosen


def partition(
    sizes: Mapping[str, int],
    aliases: Aliases,
    dim: int | Sequence[int] | None,
    rules: Rules = "global",
    allocation: str = "sqrt",
    presets: Presets | None = None,
) -> tuple[Compartment, ...]:
    """Cut tensors into compartments and give each its dimension.

    Arguments are those of :class:`~subspan.subspace.model.SubspaceModel`, beside the number of
    weights of each tensor, in order, and all of its names.

    Raises:
        SubspanError: for anything that leaves a compartment without coordinates or with more
            coordinates than weights, and for weights that no rule covers.
    """
    if isinstance(rules, Sequence) and not isinstance(rules, str):
        rules = dict(rules)
    groups = _groups(sizes, aliases, rules, presets)
    weights = [sum(map(len, pieces)) for pieces in groups.values()]
    if isinstance(rules, Mapping):
        dims = [check_dim(d) for d in rules.values()]
        if dim is not None and dim != sum(dims):
            raise SubspanError(f"the rules say d={sum(dims)} in all, dim says {dim}")
    elif isinstance(dim, Sequence) and not isinstance(dim, str):
        dims = list(dim)
        if len(dims) != len(groups):
            raise SubspanError(
                f"dim lists {len(dims)} dimensions for {len(groups)} compartments: {list(groups)}"
            )
    else:
        dims = allocate(check_dim(dim), weights, allocation)
    for name, d, size in zip(groups, dims, weights, strict=True):
        if check_dim(d) > size:
            raise SubspanError(
                f"compartment {name!r} has {size} weights, too few for d={d} coordinates; "
                f"use d <= {size}"
            )
    return tuple(
        Compartment(name, d, tuple(pieces))
        for (name, pieces), d in zip(groups.items(), dims, strict=True)
    )


def check_dim(dim: object) -> int:
    """``dim`` as a positive integer, or an error that says what it is."""
    if not is_integer(dim, least=1):
        raise SubspanError(
            f"dim must be a positive integer, the number of coordinates; got {dim!r}"
        )
    return dim


def allocate(total: int, sizes: Sequence[int], allocation: str) -> list[int]:
    """Divide ``total`` coordinates: in proportion to a function of the size, 1 to size for each.

    Largest remainders, after shares have been cut to what a compartment can hold.
    """
    if allocation not in ALLOCATIONS:
        raise unknown("allocation", allocation, ALLOCATIONS)
    if not len(sizes) <= total <= sum(sizes):
        raise SubspanError(
            f"dim={total} must be at least the number of compartments, {len(sizes)}, "
            f"and at most the number of weights, {sum(sizes)}"
        )
    shares = [ALLOCATIONS[allocation](size) for size in sizes]
    # The common factor at which shares, each held between 1 and its size, sum up to the total.
    low, high = 0.0, total / min(shares) + max(sizes)
    for _ in range(100):
        factor = (low + high) / 2
        held = [min(max(1.0, factor * x), size) for x, size in zip(shares, sizes, strict=True)]
        # An exact sum: files depend on the outcome, and sum() rounds as its Python version does.
        low, high = (factor, high) if math.fsum(held) < total else (low, factor)
    dims = [min(math.floor(x + 1e-9), size) for x, size in zip(held, sizes, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (dims[i] - held[i], -sizes[i], i))
    while missing := total - sum(dims):  # rounding down left a few over
        for i in by_remainder:
            if missing and dims[i] < sizes[i]:
                dims[i] += 1
                missing -= 1
    return dims


def _groups(
    sizes: Mapping[str, int], aliases: Aliases, rules: Rules, presets: Presets | None
) -> dict[str, list[Piece]]:
    whole = {name: Piece(name, 0, size) for name, size in sizes.items()}
    if isinstance(rules, Mapping):
        return _by_patterns(whole, aliases, rules, presets)
    if rules == "global":
        return {"global": list(whole.values())}
    if rules == "tensor":
        return {name: [piece] for name, piece in whole.items()}
    if rules == "layer":
        layers: dict[str, list[Piece]] = {}
        for name, piece in whole.items():
            # A parameter of the outermost module is a layer of its own.
            layers.setdefault(name.rpartition(".")[0] or name, []).append(piece)
        return layers
    if isinstance(rules, str) and re.fullmatch(r"uniform:[1-9]\d*", rules):
        return _uniform(list(whole.values()), int(rules.partition(":")[2]))
    raise SubspanError(
        f"compartments must be 'global', 'layer', 'tensor', 'uniform:k' (k >= 1) or a mapping of "
        f"patterns to dimensions, got {rules!r}"
    )


def _by_patterns(
    whole: Mapping[str, Piece], aliases: Aliases, rules: Mapping[str, int], presets: Presets | None
) -> dict[str, list[Piece]]:
    """Each tensor goes to the first pattern that selects it."""
    groups: dict[str, list[Piece]] = {}
    left = dict(whole)
    for pattern in rules:
        chosen = select(aliases, pattern, "compartments", presets=presets)
        name = pattern.removeprefix(EXPLICIT)
        if name in groups:
            raise SubspanError(f"compartments names {name!r} twice: give it one dimension")
        groups[name] = [left.pop(tensor) for tensor in list(left) if tensor in chosen]
        if not groups[name]:
            raise SubspanError(f"compartment {name!r} is empty: earlier patterns took all of it")
    if left:
        raise SubspanError(
            f"no compartment for {', '.join(left)}: add a pattern ('.*' takes the rest), or "
            "exclude them"
        )
    return groups


def _uniform(pieces: Iterable[Piece], k: int) -> dict[str, list[Piece]]:
    """Runs of weights, k of them, whose sizes differ by at most one."""
    pieces = list(pieces)
    total = sum(map(len, pieces))
    if k > total:
        raise SubspanError(f"uniform:{k} needs at least {k} weights, the network has {total}")
    borders = [total * i // k for i in range(k + 1)]
    groups: dict[str, list[Piece]] = {f"uniform.{i}": [] for i in range(k)}
    offset = 0
    for piece in pieces:
        for i in range(k):
            start, stop = max(borders[i], offset), min(borders[i + 1], offset + len(piece))
            if start < stop:
                groups[f"uniform.{i}"].append(Piece(piece.tensor, start - offset, stop - offset))
        offset += len(piece)
    return groups
