"""Few bytes for few numbers: steps and levels, an arithmetic coder, short JSON.

What decodes is integers only, so that a file means the same on every machine
(``docs/format.md``, "Compact files").
"""

from subspan.coding.levels import coded_bits, decode_levels, encode_levels
from subspan.coding.packing import Reader, pack
from subspan.coding.steps import check_bits, choose_step, find_grid, fits, round_to_levels

__all__ = [
    "Reader",
    "check_bits",
    "choose_step",
    "coded_bits",
    "decode_levels",
    "encode_levels",
    "find_grid",
    "fits",
    "pack",
    "round_to_levels",
]
