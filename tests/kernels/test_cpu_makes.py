"""Products do not depend on the make of the processor: other registers, the same bits."""

import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, re, subspan, torch
from subspan.kernels.cpu import hash as kernel
torch.manual_seed(0)
digest = hashlib.sha256()
for family in ("hash", "rademacher", "sparse"):
    p = subspan.projection(family, out_dim=5_001, in_dim=70, seed=3)
    for product in (p.matvec(torch.randn(70), step=1), p.rmatvec(torch.randn(5_001), step=1)):
        digest.update(product.numpy().tobytes())
code = "".join(kernel._matvec.inspect_asm().values())
print(digest.hexdigest(), len(re.findall("zmm", code)))
"""


def run(tmp_path, name="", features="") -> tuple[str, int]:
    """Digest of products, and how often their code names a register of 512 bits."""
    own = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features} if name else {}
    env = os.environ | own | {"NUMBA_CACHE_DIR": str(tmp_path / (name or "own"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env, check=True
    )
    digest, wide = done.stdout.split()
    return digest, int(wide)


@pytest.mark.slow
def test_products_are_the_same_bits_for_registers_of_any_width(tmp_path):
    llvm = pytest.importorskip("llvmlite.binding")
    features = llvm.get_host_cpu_features().flatten()
    digest, _ = run(tmp_path)
    if "+sse2" in features:
        assert run(tmp_path, "x86-64", "+sse2") == (digest, 0)
    if "+avx2" in features:
        narrow = "+avx2,+bmi,+bmi2,+fma,+sse4.2,+popcnt"
        assert run(tmp_path, "x86-64-v3", narrow) == (digest, 0)
    if "+avx512f" in features:
        # A processor for which LLVM prefers registers of 256 bits: ours are whole all the same.
        also, wide = run(tmp_path, "sapphirerapids", re.sub(r"[-+]prefer-256-bit,?", "", features))
        assert also == digest
        assert wide > 100
