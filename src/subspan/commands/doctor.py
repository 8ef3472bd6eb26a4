"""``subspan doctor``: kernels, devices, the generator's known answers, versions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from subspan import kernels
from subspan.commands import console
from subspan.commands.parsing import Arguments, Parser, parse
from subspan.errors import SubspanError
from subspan.families import projection, projections
from subspan.philox import philox4x32
from subspan.training import machine

# Random123's published vectors: counter, key, result.
KNOWN_ANSWERS = (
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@dataclass(frozen=True)
class Check:
    """One line of the doctor's: what was checked, whether it passed, and what was seen."""

    subject: str
    passed: bool
    seen: str


def run_checks() -> list[Check]:
    """Check everything; nothing is raised, nothing is written."""
    checks = [Check("version", True, f"{name} {v}") for name, v in machine.versions().items()]
    checks.append(Check("device", True, machine.device_name(torch.device("cpu"))))
    checks += [
        Check("device", True, torch.cuda.get_device_name(i))
        for i in range(torch.cuda.device_count())
    ]
    checks += [_check_known_answer(*vector) for vector in KNOWN_ANSWERS]
    checks += [_check_products(name) for name in projections()]
    return checks


def _check_known_answer(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> Check:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    words = [int(word) for word in philox4x32((c0, c1, c2, c3), key)]
    seen = " ".join(f"{word:08x}" for word in words)
    return Check("Philox4x32-10 known answer", words == list(expected), seen)


def _check_products(name: str) -> Check:
    """Check ⟨P w, g⟩ = ⟨w, Pᵀ g⟩ in float32, by the kernel that users get, and P w in float64."""
    p = projection(name, out_dim=1009, in_dim=37, seed=2**40 + 1)
    kernel = "numba" if name in kernels.available("cpu") else "torch"
    try:
        w, g = torch.linspace(-1, 1, 37), torch.linspace(1, -2, 1009)
        exact = p.matvec(w.double())
        error = float((p.matvec(w) - exact).norm() / exact.norm())
        adjoint = float((p.matvec(w) @ g - w @ p.rmatvec(g)).abs() / (exact.norm() * g.norm()))
    except Exception as failure:  # the doctor reports what it finds
        return Check(f"projection {name}", False, f"{kernel}: {failure!r}")
    passed = max(error, adjoint) < 1e-5
    return Check(
        f"projection {name}", passed, f"{kernel}: error {error:.0e}, adjoint {adjoint:.0e}"
    )


def main(argv: Arguments) -> None:
    """Check what works on this machine: kernels, devices, the generator's known answers."""
    parse(Parser("doctor", main.__doc__), argv)
    checks = run_checks()
    for check in checks:
        mark, style = ("ok  ", None) if check.passed else ("FAIL", "red")
        console.say(f"{mark} {check.subject}: {check.seen}", style=style)
    if failed := [check.subject for check in checks if not check.passed]:
        raise SubspanError(f"failed checks: {', '.join(failed)}")
