"""How fast an H100 could make entries of P at best: instructions of the kernels' inner loops.

Of ``hash``, which has none, all instructions of a program outside of the tail.

Needs no GPU: Triton compiles for one, its own ``nvdisasm`` shows the machine code, and what each
kind of instruction costs stands in NVIDIA's CUDA C++ programming guide (throughput of native
instructions, compute capability 9.0). A bound, not a measurement. From the root of the repository:

    python -m benchmarks.gpu_instructions
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import triton
from tests.kernels.compile_gpu import CASES, Case, compiled

from subspan.kernels.gpu import dense, rademacher
from subspan.kernels.gpu import hash as hash_

SMS, CLOCK = 132, 1.7e9
STORED = 3e12 / 4  # entries per second of a float32 matrix that is read at 3 TB/s

# Operations per clock and multiprocessor, and the instructions of each kind by their first letters.
# IMAD.WIDE and IMAD.HI make 64 bits and count as two multiplications. Instructions of the uniform
# data path (U...) take an issue slot and nothing else.
KINDS = {
    "float": (128, ("FADD", "FMUL", "FFMA", "HFMA2")),
    "multiply": (64, ("IMAD",)),
    "integer": (
        64,
        (
            "LOP3",
            "SHF",
            "IADD3",
            "VIADD",
            "LEA",
            "SGXT",
            "ISETP",
            "SEL",
            "I2FP",
            "FSETP",
            "FSEL",
            "PRMT",
            "PLOP3",
            "IMNMX",
            "VIMNMX",
            "MOV",
        ),
    ),
    "special": (16, ("MUFU", "I2F")),
    "memory": (32, ("LDG", "STG", "LDS", "STS", "SHFL", "LDC")),
}
ISSUE = 128  # four schedulers, a warp of 32 each

# kernel, entries that a thread makes in one pass of its inner loop
LOOPS = {
    ("rademacher P w", rademacher._matvec, None): 512,
    ("rademacher Pᵀ g", rademacher._rmatvec, None): 128,
    ("gaussian P w", dense._matvec, dense.gaussian_octet): 8,
    ("gaussian Pᵀ g", dense._rmatvec, dense.gaussian_octet): 8,
}


# kernel, entries that a thread makes
STRAIGHT = {"hash P w": (hash_._matvec, hash_.TILE // 32)}


def disassembled(case: Case) -> list[str]:
    """Has a kernel compiled, and gives the lines of its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled(case).asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True)
    return text.stdout.splitlines()


def instruction(line: str) -> str | None:
    """The instruction of a line, if it has one."""
    found = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
    return found and found[1]


def straight(case: Case) -> list[str]:
    """All instructions of a kernel up to its end; what it calls stands behind that."""
    code: list[str] = []
    for line in disassembled(case):
        if found := instruction(line):
            code.append(found)
            if found == "EXIT" and "@" not in line:
                break
    return code


def loops(case: Case) -> Iterator[list[str]]:
    """The instructions of every loop of a kernel, innermost first."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in disassembled(case):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := instruction(line):
            code.append(found)
            jump = re.search(r"BRA `\((\.L_\w+)\)", line)
            if jump and labels.get(jump[1], len(code)) < len(code) - 1:
                yield code[labels[jump[1]] :]


def count(instructions: list[str]) -> dict[str, Counter[str]]:
    """Instructions by kind; what is of none is "other"."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in (*KINDS, "other")}
    for instruction in instructions:
        name = instruction.split(".")[0]
        kind = next((kind for kind, (_, names) in KINDS.items() if name in names), "other")
        wide = instruction.startswith(("IMAD.WIDE", "IMAD.HI"))
        found[kind]["IMAD.WIDE" if wide else name] += 1
    return found


def clocks(found: dict[str, Counter[str]]) -> dict[str, float]:
    """Clocks of a multiprocessor for one pass of 32 lanes: by issue, and by kind."""
    cost = {"issue": sum(kind.total() for kind in found.values()) * 32 / ISSUE}
    for kind, (rate, _) in KINDS.items():
        cost[kind] = (found[kind].total() + found[kind]["IMAD.WIDE"]) * 32 / rate
    return cost


def show(name: str, instructions: list[str], made: int) -> None:
    """Prints what a thread's instructions for ``made`` entries cost, and the bound that follows."""
    found = count(instructions)
    cost = clocks(found)
    total = sum(kind.total() for kind in found.values())
    limit = max(cost, key=lambda kind: cost[kind])
    bound = made * 32 / cost[limit] * SMS * CLOCK
    print(f"\n### {name}: {total} instructions for {made} entries, {total / made:.2f} each\n")
    print("| kind | instructions | clocks per 32 lanes |\n| --- | --- | --- |")
    for kind, names in found.items():
        text = ", ".join(f"{n} {instruction}" for instruction, n in names.most_common())
        print(f"| {kind} | {text or 'none'} | {cost.get(kind, 0):.0f} |")
    print(f"| all | {total} | {cost['issue']:.0f} |")
    print(
        f"\nAt most {bound:.2g} entries per second ({limit}), {bound / STORED:.1f} times a "
        "stored matrix."
    )


def main() -> None:
    """Prints the tables of gpu-instructions.md."""
    for (name, kernel, entries), made in LOOPS.items():
        case = next(c for c in CASES if c[0] is kernel and c[3].get("ENTRIES") is entries)
        show(name, next(loops(case)), made)
    for name, (kernel, made) in STRAIGHT.items():
        case = next(c for c in CASES if c[0] is kernel)
        show(name, straight(case), made)


if __name__ == "__main__":
    main()
