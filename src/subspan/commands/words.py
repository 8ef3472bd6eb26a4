"""Words of a command line that are looked at before a command parses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def take_option(words: Iterable[str], option: str) -> tuple[list[str], list[str]]:
    """Divide words into the values of one option, as "--import", and all other words.

    A value follows its option, or stands behind an equals sign. The option may be given several
    times; one without a value has "".
    """
    values, rest, left = [], [], iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name == option:
            values.append(value if equals else next(left, ""))
        else:
            rest.append(word)
    return values, rest


def given_values(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield every value with the option that it is given to, as in ``--dim 5`` and ``--dim=5``.

    A word that follows none, or a flag, is not told from a value.
    """
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if not (word.startswith("--") and equals):
            name, value = before, word
        if not value.startswith("--"):
            yield name, value
