"""A trained model as one safetensors file: its coordinates and the recipe around them.

The file holds the coordinates of all compartments as one tensor, what was trained fully, the
buffers that training changed, and one metadata key, ``subspan``, with sorted JSON: format, recipe,
counts, fingerprint of θ₀ and a digest of all (``docs/format.md``). Of an ordinary network it holds
all weights, or what was trained of them where the others are at hand. Nothing in it is executable.
"""

from subspan.checkpoint.file import inspect, read
from subspan.checkpoint.loading import check_base, load, rebuild, restore
from subspan.checkpoint.part import base_of, check_part, hold_base
from subspan.checkpoint.saving import contents, save, to_bytes

__all__ = [
    "base_of",
    "check_base",
    "check_part",
    "contents",
    "hold_base",
    "inspect",
    "load",
    "read",
    "rebuild",
    "restore",
    "save",
    "to_bytes",
]
