"""The Numba kernels against the families' own torch code, which defines them."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import prange
from torch import Tensor

import subspan
from subspan import Projection, kernels
from subspan.cache import cache
from subspan.kernels import Kernel
from subspan.kernels.cpu import common
from tests.forks import python, python_code
from tests.laws import vector
from tests.reference import ROUNDED

FAMILIES = sorted(kernels.available("cpu"))
EVERYTHING = {"stream": (1 << 24) - 1, "seed": (1 << 64) - (1 << 33) + 5}

# Rows and columns around the blocks of 128 rows, the words of 32 and the groups of 64 columns, the
# tiles of 1,024 rows, and a transform with several long segments.
SHAPES = [
    (1, 1),
    (2, 1),
    (31, 3),
    (128, 64),
    (129, 65),
    (300, 63),
    (517, 130),
    (1000, 1),
    (1023, 5),
    (1025, 7),
    (2081, 33),
    (20_011, 3),
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same_by_torch(p: Projection, x: Tensor, step: int, rows: range, adjoint: bool) -> Tensor:
    """A product by the family's own hooks."""
    hook = p._rmatvec if adjoint else p._matvec
    return hook(x, torch.tensor(step), rows.start, rows.stop)


def assert_entries(family: str, ours: Tensor, theirs: Tensor) -> None:
    if family in ROUNDED:
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()
    else:
        assert torch.equal(ours, theirs)


def test_every_family_that_is_not_stored_has_kernels() -> None:
    assert set(FAMILIES) == set(subspan.projections()) - {"stored"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("D", "d"), SHAPES)
def test_entries_are_the_same_bits(family: str, D: int, d: int) -> None:
    p = subspan.projection(family, out_dim=D, in_dim=d, **EVERYTHING)
    for step, rows in (
        (0, range(D)),
        ((1 << 32) - 1, range(D // 3, D - D // 4)),
        (7, range(D // 2, D)),
    ):
        for j in {0, 31, 32, 64, d - 1} & {*range(d)}:
            unit = torch.eye(d)[j]
            ours = p.matvec(unit, step=step, rows=rows)
            assert_entries(family, ours, same_by_torch(p, unit, step, rows, False))
        for i in {rows.start, (rows.start + rows.stop) // 2, rows.stop - 1}:
            unit = torch.zeros(len(rows))
            unit[i - rows.start] = 1
            ours = p.rmatvec(unit, step=step, rows=rows)
            assert_entries(family, ours, same_by_torch(p, unit, step, rows, True))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_products_are_as_good_as_torchs(family: str, data: st.DataObject) -> None:
    D = data.draw(st.integers(1, 3000), "D")
    p = subspan.projection(
        family,
        out_dim=D,
        in_dim=data.draw(st.integers(1, min(D, 300)), "d"),
        seed=data.draw(st.integers(0, 2**64 - 1), "seed"),
        stream=data.draw(st.integers(0, 2**24 - 1), "stream"),
    )
    step = data.draw(st.integers(0, 2**32 - 1), "step")
    start, stop = sorted(data.draw(st.tuples(st.integers(0, D), st.integers(0, D)), "rows"))
    rows = range(start, stop)
    for adjoint, size in ((False, p.in_dim), (True, len(rows))):
        x = vector(size, torch.float32, seed=size)
        ours = (p.rmatvec if adjoint else p.matvec)(x, step=step, rows=rows)
        torchs = same_by_torch(p, x, step, rows, adjoint) if rows else torch.zeros_like(ours)
        truth = same_by_torch(p, x.double(), step, rows, adjoint) if rows else ours.double()
        own_error = (torchs - truth).norm()
        assert (ours - truth).norm() <= 2 * own_error + 5e-7 * (truth.norm() + x.norm())


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"orthogonal"}))  # computes all rows
def test_far_rows(family: str) -> None:
    # Calls of the generator beyond 2²⁶; of sequences, beyond 2³¹; rows beyond 2³² and at the end.
    for last in ((1 << 32) + 150, (1 << 34) - 3):
        p = subspan.projection(family, out_dim=(1 << 34) - 3, in_dim=70, **EVERYTHING)
        rows = range(last - 297, last)
        w, g = torch.eye(70)[3], torch.zeros(297)
        g[100] = 1
        assert_entries(family, p.matvec(w, rows=rows), same_by_torch(p, w, 0, rows, False))
        assert_entries(family, p.rmatvec(g, rows=rows), same_by_torch(p, g, 0, rows, True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_range_that_begins_and_ends_anywhere(family: str) -> None:
    # Several tasks, each with sums of its own, and blocks cut on both sides.
    p = subspan.projection(family, out_dim=200_003, in_dim=5, seed=3)
    rows = range(77, 200_003 - 66)
    w, g = vector(5, torch.float32), vector(len(rows), torch.float32)
    for x, adjoint in ((w, False), (g, True)):
        ours = (p.rmatvec if adjoint else p.matvec)(x, rows=rows)
        torchs = same_by_torch(p, x.double(), 0, rows, adjoint)
        assert (ours - torchs).norm() <= 3e-6 * torchs.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_do_not_change_a_bit(family: str) -> None:
    p = subspan.projection(family, out_dim=200_003, in_dim=70)
    w, g = vector(70, torch.float32), vector(200_003, torch.float32)
    products = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        cache.clear()
        products.append((p.matvec(w), p.rmatvec(g)))
        assert torch.get_num_threads() == threads
    for forward, backward in products[1:]:
        assert torch.equal(forward, products[0][0])
        assert torch.equal(backward, products[0][1])


@pytest.mark.parametrize("family", ["fastfood", "hash"])
def test_what_is_kept_is_what_would_be_made(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = subspan.projection(family, out_dim=70_001, in_dim=300, seed=5)
    w, g = vector(300, torch.float32), vector(50_000, torch.float32)
    rows = range(20_000, 70_000)
    cache.clear()
    kept = p.matvec(w, rows=rows), p.rmatvec(g, rows=rows)
    assert cache.held > 0
    cache.clear()
    monkeypatch.setattr(common, "KEPT", 0)
    made = p.matvec(w, rows=rows), p.rmatvec(g, rows=rows)
    assert cache.held == 0
    assert torch.equal(kept[0], made[0])
    assert torch.equal(kept[1], made[1])


def test_the_index_of_a_basis_that_is_drawn_again_is_not_kept() -> None:
    cache.clear()
    subspan.projection("hash", out_dim=70_001, in_dim=300).matvec(torch.randn(300), step=3)
    assert cache.held == 0


def test_kernels_take_float32_and_16_bits_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def product(p: Projection, x: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        calls.append((int(step), start, stop))
        return torch.zeros(stop - start)

    fake = {"hash": Kernel(product, product)}
    monkeypatch.setattr(kernels, "available", lambda device: fake if device == "cpu" else {})
    p = subspan.projection("hash", out_dim=40, in_dim=3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert not p.matvec(torch.ones(6, dtype=dtype)[::2], step=2, rows=range(3, 9)).any()
    assert calls == [(2, 3, 9)] * 3
    assert p.matvec(torch.ones(3, dtype=torch.float64)).all()
    assert kernels.find("stored", torch.ones(3)) is None
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("device", "module", "said"),
    [
        ("cpu", "cpu", "^Numba kernels are not available"),
        ("cuda", "gpu", r"^Triton \(pip install 'subspan\[gpu\]'\) kernels are not available"),
    ],
)
def test_a_missing_package_is_said_and_torch_computes(
    device: str, module: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"subspan.kernels.{module}", None)
    monkeypatch.delattr(kernels, module, raising=False)
    with pytest.warns(UserWarning, match=said + r" .*; products there run in plain torch$"):
        assert kernels.available.__wrapped__(device) == {}


def test_where_numba_does_not_compile_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A debugger wants it so, or a measurement of which lines have run."""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    monkeypatch.delitem(sys.modules, "subspan.kernels.cpu")
    monkeypatch.delattr(kernels, "cpu")
    with pytest.warns(UserWarning, match=r"\(NUMBA_DISABLE_JIT is set\); products there run in"):
        assert kernels.available.__wrapped__("cpu") == {}


def test_a_device_without_kernels_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = functools.cache(kernels.available.__wrapped__)
    with pytest.warns(UserWarning, match="no kernels for 'mps' devices; .* plain torch") as said:
        assert fresh("mps") == fresh("mps") == {}
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fresh("meta") == {}
        monkeypatch.setenv("SUBSPAN_KERNELS", "reference")
        assert all(fresh(device) == {} for device in ("xpu", "cpu", "cuda"))


REFERENCE = """
import sys, torch, subspan
for family in {families}:
    p = subspan.projection(family, out_dim=1000, in_dim=70, seed=1 << 40)
    weights = p.matvec(torch.arange(70.0), step=1, rows=range(100, 400))
    print(weights.numpy().tobytes().hex())
assert not any(name.startswith(("numba", "llvmlite")) for name in sys.modules)
"""


@pytest.mark.heavy
def test_reference_by_the_environment(tmp_path: Path) -> None:
    """SUBSPAN_KERNELS=reference never imports Numba, and gives the same weights."""
    code = REFERENCE.format(families=FAMILIES)
    result = python_code(code, tmp_path, SUBSPAN_KERNELS="reference")
    for family, line in zip(FAMILIES, result.stdout.split(), strict=True):
        p = subspan.projection(family, out_dim=1000, in_dim=70, seed=1 << 40)
        weights = torch.frombuffer(bytearray.fromhex(line), dtype=torch.float32)
        ours = p.matvec(torch.arange(70.0), step=1, rows=range(100, 400))
        if p.bitwise:
            assert torch.equal(ours, weights)
        torch.testing.assert_close(ours, weights, rtol=1e-5, atol=1e-5)


# ---- forked processes ----------------------------------------------------------------------------

FORKED = """
import os, sys, traceback
import torch, subspan, subspan.kernels
from torch.utils.data import DataLoader

def products(family):
    p = subspan.projection(family, out_dim=40_001, in_dim=7, seed=1 << 40)
    w, g = torch.arange(7.0).sin(), torch.arange(40_001.0).cos()
    return p.matvec(w), p.rmatvec(g), w, g, p.bitwise

def compare(found, expected):
    for ours, theirs, x in zip(found[:2], expected[:2], expected[2:4]):
        assert (ours - theirs).norm() <= 5e-7 * (theirs.norm() + x.norm())
    assert not found[4] or torch.equal(found[0], expected[0])

class Items:
    def __len__(self):
        return len(families)

    def __getitem__(self, k):
        return products(families[k])

for threads in (1, 2):
    torch.set_num_threads(threads)
    expected = {family: products(family) for family in families}  # starts the parent's threads
    child = os.fork()
    if child == 0:
        try:
            assert torch.get_num_threads() == 1
            for family in families:
                compare(products(family), expected[family])
            grandchild = os.fork()
            if grandchild == 0:
                compare(products("hash"), expected["hash"])
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 7
            os._exit(7)
        finally:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    loader = DataLoader(Items(), None, num_workers=1, multiprocessing_context="fork")
    for family, found in zip(families, loader):
        compare(found, expected[family])
    assert torch.get_num_threads() == threads  # and the parent still has kernels
    assert all(subspan.kernels.find(family, torch.ones(1)) for family in families)
    assert torch.equal(products("gaussian")[1], expected["gaussian"][1])
"""


@pytest.mark.heavy
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork() here")
def test_products_in_a_forked_process(tmp_path: Path) -> None:
    """Neither killed nor waiting for ever, and the same to the last digits."""
    program = tmp_path / "program.py"
    program.write_text(f"families = {FAMILIES}\n{FORKED}")
    env = {"OMP_NUM_THREADS": "2"}
    ended = python([str(program)], tmp_path, env, tmp_path, warn="ignore")
    assert ended.returncode == 0, ended.stderr


TOGETHER = """
import threading, numba, torch, subspan
numba.config.THREADING_LAYER = "{layer}"
p, w, g = subspan.projection("hash", out_dim=50_000, in_dim=10), torch.ones(10), torch.ones(50_000)
want, found = (p.matvec(w), p.rmatvec(g)), []
def work():
    for _ in range(100):
        found.append(torch.equal(p.matvec(w), want[0]) and torch.equal(p.rmatvec(g), want[1]))
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(numba.threading_layer(), len(found), all(found))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("layer", ["workqueue", "default"])
def test_products_in_several_threads_at_once(layer: str, tmp_path: Path) -> None:
    """Numba once ended the process where its own threads were all there is."""
    name, *rest = python_code(TOGETHER.format(layer=layer), tmp_path).stdout.split()
    assert rest == ["400", "True"]
    assert layer in ("default", name)


# ---- compiled code between processes -------------------------------------------------------------

FIRST = """
import torch, subspan
p = subspan.projection("kronecker", out_dim=500, in_dim=20)  # its kernel is compiled soonest
print(p.matvec(torch.ones(20)).sum().item())
from subspan.kernels.cpu import kronecker
print(sum(kronecker._signs.stats.cache_hits.values()))
"""


def first_product(folder: Path) -> tuple[str, int]:
    """The result of a product in a new process, and how often compiled code was found."""
    result = python_code(FIRST, folder, NUMBA_CACHE_DIR=str(folder / "cache"))
    assert result.stderr == ""  # the first call says nothing
    value, hits = result.stdout.split()
    return value, int(hits)


@pytest.mark.heavy
def test_compiled_code_is_kept_between_processes(tmp_path: Path) -> None:
    value, hits = first_product(tmp_path)
    assert hits == 0
    [folder] = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("kernels-")
    assert list(folder.rglob("*.nbc"))
    assert first_product(tmp_path) == (value, 1)


def test_nothing_is_kept_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(common.numba.config, "CACHE_DIR", str(file))
    monkeypatch.setenv("HOME", str(file))
    assert common._folder.__wrapped__() is None
    monkeypatch.setattr(common, "_folder", lambda: None)

    def double(x):
        for i in prange(x.size):
            x[i] *= 2

    x = np.ones(5)
    common.kernel(double)(x)
    assert x.sum() == 10


def test_an_edit_anywhere_in_the_kernels_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(Path(common.__file__).parent, sources, ignore=shutil.ignore_patterns("__*"))
    monkeypatch.setattr(common, "__file__", str(sources / "common.py"))
    monkeypatch.setattr(common.numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    before = common._folder.__wrapped__()
    assert common._folder.__wrapped__() == before
    with (sources / "hash.py").open("a") as file:
        file.write("# an edit")
    assert common._folder.__wrapped__() != before


@pytest.mark.parametrize("d", [7, 3000])  # with signs in the table of coordinates, and without
@pytest.mark.parametrize("width", [1, 384, 1025])
def test_vectors_that_begin_at_rows_of_their_own(d, width):
    """``hash``, near borders of tiles and in the tail, twice at one row."""
    size = 70_001
    p = subspan.projection("hash", out_dim=size, in_dim=d, seed=5)
    firsts = torch.tensor([0, 1000, 1023, 1024, 65_500, 65_500, size - width])
    kernel, step = kernels.available("cpu")["hash"], torch.tensor(3)
    w = vector(d, torch.float32)
    base = vector(len(firsts) * width, torch.float32, 1).view(-1, width)
    rows, theirs = p.matvec(w, step=3), base.clone()
    for theta, first in zip(theirs, firsts.tolist(), strict=True):
        theta += rows[first : first + width]
    ours = base.clone()
    kernel.added_apart(p, w, step, firsts, ours)
    assert torch.equal(ours, theirs)
    gradient = torch.zeros(size, dtype=torch.float64)
    for part, first in zip(base, firsts.tolist(), strict=True):
        gradient[first : first + width] += part
    found = kernel.gathered_apart(p, base, step, firsts)
    expected = p.rmatvec(gradient, step=3)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
