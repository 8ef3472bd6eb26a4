"""JSON in few bytes: small integers and common words are one byte each.

The words of :data:`WORDS` have their numbers for ever: new ones are added at the end.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

_OF_HEADER = """
    extra fingerprint init_seed layout recipe weights lora quantised base parameters
    repo revision folder class dtype config late num_labels
"""
_OF_RECIPE = """
    dim projection compartments allocation targets exclude train_fully seed padding
    keep train global layer tensor sqrt equal size s qr of rank alpha
    hash gaussian rademacher orthogonal fastfood kronecker sparse sparse2full stored
    attention mlp norms-and-biases all-linear head subspan_A subspan_B
"""
_OF_TRAINING = """
    net data method image_shape classes mean std names depth task validation
    linear lenet lenet-valid lenet5-caffe lenet-tf spectral resnet8 resnet20 vgg11 vgg16
    minut-mlp minut-lenet digits mnist fashion_mnist cifar10 cifar100
"""
_DTYPES = "float32 float64 float16 bfloat16 int64"
WORDS = tuple(f"{_OF_HEADER} {_OF_RECIPE} {_OF_TRAINING} {_DTYPES}".split())
_NUMBER = {word: number for number, word in enumerate(WORDS)}

WORD = 0x80  # the first of them; below, integers are themselves
NULL, FALSE, TRUE, POSITIVE, NEGATIVE, DOUBLE, NINE_DIGITS = range(0xE0, 0xE7)
TEXT, HEX, LIST, OBJECT, LEFT_OUT = range(0xE7, 0xEC)

LONGEST = 1 << 14  # bits of an integer: longer ones are no JSON in Python, and slow to read
DEEPEST = 100  # lists and objects inside one another, so that every reader has room for them
ABSENT = object()  # stands in a patch for a key that is left out


def pack(value: Any, depth: int = 0) -> bytes:
    """Return the bytes of a JSON value, or of :data:`ABSENT`.

    Raises:
        TypeError: for anything else.
        ValueError: for a text that UTF-8 cannot hold, and for more than :data:`DEEPEST` lists and
            objects inside one another.
    """
    if depth > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    if value is ABSENT:
        return bytes([LEFT_OUT])
    match value:
        case None:
            return bytes([NULL])
        case bool():
            return bytes([TRUE if value else FALSE])
        case int() if 0 <= value < WORD:
            return bytes([value])
        case int():
            tag, size = (POSITIVE, value) if value > 0 else (NEGATIVE, -1 - value)
            return bytes([tag]) + varint(size)
        case float():
            return _pack_float(value)
        case str():
            return _pack_text(value)
        case list():
            entries = (pack(each, depth + 1) for each in value)
            return bytes([LIST]) + varint(len(value)) + b"".join(entries)
        case dict():
            entries = (pack(key) + pack(value[key], depth + 1) for key in sorted(value))
            return bytes([OBJECT]) + varint(len(value)) + b"".join(entries)
    raise TypeError(f"{value!r} is not JSON")


def _pack_float(value: float) -> bytes:
    if abs(value) < 3e38:
        short = struct.pack("<f", value)
        if _nine_digits(short).hex() == value.hex():
            return bytes([NINE_DIGITS]) + short
    return bytes([DOUBLE]) + struct.pack("<d", value)


def _pack_text(text: str) -> bytes:
    if text in _NUMBER:
        return bytes([WORD + _NUMBER[text]])
    if re.fullmatch("([0-9a-f]{2})+", text):
        return bytes([HEX]) + varint(len(text) // 2) + bytes.fromhex(text)
    data = text.encode()
    return bytes([TEXT]) + varint(len(data)) + data


def _nine_digits(data: bytes) -> float:
    """Return the decimal number of nine digits that a float32 is written as."""
    return float(f"{struct.unpack('<f', data)[0]:.9g}")


def varint(value: int) -> bytes:
    """Return a number from 0 on, seven bits a byte, the low ones first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


class Reader:
    """Takes values off the front of some bytes.

    Every method raises ValueError where the bytes end too early or are no such value.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        if size > len(self.data) - self.place:
            raise ValueError("it ends too early")
        self.place += size
        return self.data[self.place - size : self.place]

    def varint(self) -> int:
        """Return a number of :func:`varint`."""
        value = shift = 0
        while shift < LONGEST:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
        raise ValueError("it has too large a number")

    def key(self) -> str:
        """Return a text of :func:`pack`."""
        key = self.value()
        if not isinstance(key, str):
            raise ValueError(f"{key!r} is no key")
        return key

    def value(self) -> Any:
        """Return a value of :func:`pack`."""
        tag = self.take(1)[0]
        if tag < WORD:
            return tag
        if tag - WORD < len(WORDS):
            return WORDS[tag - WORD]
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag not in _READ:
            raise ValueError("it has a word or a value that this version does not know")
        return _READ[tag](self)


_CONSTANTS = {NULL: None, FALSE: False, TRUE: True, LEFT_OUT: ABSENT}
_READ: dict[int, Callable[[Reader], Any]] = {
    POSITIVE: Reader.varint,
    NEGATIVE: lambda reader: -1 - reader.varint(),
    DOUBLE: lambda reader: struct.unpack("<d", reader.take(8))[0],
    NINE_DIGITS: lambda reader: _nine_digits(reader.take(4)),
    TEXT: lambda reader: reader.take(reader.varint()).decode(),
    HEX: lambda reader: reader.take(reader.varint()).hex(),
    LIST: lambda reader: [reader.value() for _ in range(reader.varint())],
    OBJECT: lambda reader: {reader.key(): reader.value() for _ in range(reader.varint())},
}
