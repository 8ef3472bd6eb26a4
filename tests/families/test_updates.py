"""Updates in place beyond the laws: their memory, and what they refuse."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import subspan
from subspan import SubspanError
from subspan.families import base, operator, updates
from tests.laws import vector


class Live(TorchDispatchMode):
    """Bytes of the tensors that operators made and that still live, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.see((args, kwargs), made=False)  # what was there before: an output may be its view
        out = function(*args, **(kwargs or {}))
        self.see(out, made=True)
        return out

    def see(self, tree, made):
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes() if made else 0
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.seen.discard(key)
        self.now -= size


LOCAL = ["gaussian", "rademacher", "sparse", "hash", "fastfood", "kronecker"]


@pytest.mark.parametrize("family", LOCAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_of_the_size_of_the_weights_exists_beside_them(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BLOCK", 1 << 12)
    monkeypatch.setattr(updates, "ROUND", 1 << 12)
    monkeypatch.setattr(base, "product", operator.project)  # an operator, whose result is seen
    p = subspan.projection(family, out_dim=1 << 18, in_dim=5)
    theta, g, w = torch.zeros(1 << 18, dtype=dtype), torch.ones(1 << 18, dtype=dtype), torch.ones(5)
    with Live() as live:
        p.addmv_(theta, w)
        p.addrmv_(w, g)
    assert 0 < live.peak <= 4 * (1 << 12) * 4  # of the 1 MiB that the weights are in float32
    assert theta.any()


def test_gradients_are_not_recorded() -> None:
    p = subspan.projection("hash", out_dim=10, in_dim=3)
    theta, w = torch.nn.Parameter(torch.zeros(10)), torch.nn.Parameter(torch.ones(3))
    assert p.addmv_(theta, w).is_leaf
    assert theta.detach().any()


def test_strided_vectors_are_refused() -> None:
    p = subspan.projection("hash", out_dim=10, in_dim=3)
    theta, w = torch.zeros(10), torch.zeros(3)
    strided_theta, strided_w = torch.zeros(20)[::2], torch.zeros(6)[::2]
    for update, arguments, name in (
        (p.addmv_, (strided_theta, w), "theta"),
        (p.addmv_, (theta, strided_w), "w"),
        (p.addrmv_, (strided_w, theta), "w"),
        (p.addrmv_, (w, strided_theta), "g"),
    ):
        with pytest.raises(SubspanError, match=f"^{name} must be contiguous in an update"):
            update(*arguments)


@pytest.mark.heavy
def test_a_step_that_changes_in_a_compiled_update_does_not_recompile() -> None:
    p = subspan.projection("rademacher", out_dim=50, in_dim=4)

    @torch.compile(fullgraph=True, backend="eager")
    def update(theta: torch.Tensor, g: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        c = p.addrmv_(torch.zeros(4), g, step=step)
        return p.addmv_(theta, c, alpha=-0.1, step=step)

    theta, expected, g = torch.zeros(50), torch.zeros(50), torch.arange(50.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            update(theta, g, torch.tensor(step))
            expected -= 0.1 * p.matvec(p.rmatvec(g, step=step), step=step)
    torch.testing.assert_close(theta, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [9, 2000])
def test_16_bit_tensors_a_part_at_a_time(monkeypatch, dtype, d):
    """Sums are of float32, each rounded once; where a part ends makes no difference."""
    monkeypatch.setattr(updates, "ROUND", 1000)
    p = subspan.projection("hash", out_dim=20_000, in_dim=d, seed=2)
    w, step = vector(d, torch.float32), torch.tensor(1)
    parts = [vector(n, seed=n).to(dtype).view(-1, 7) for n in (7 * 333, 0, 7, 7 * 1000)]
    rows = p.matvec(w, step=1, rows=range(5, 5 + 7 * 1334)).split([part.numel() for part in parts])
    for theta, part, along in zip(updates.add(p, parts, w, step, 5), parts, rows, strict=True):
        assert theta.dtype == dtype
        assert torch.equal(theta, (part.float() + along.view(part.shape)).to(dtype))
    g = torch.zeros(p.out_dim, dtype=torch.float64)
    g[5 : 5 + 7 * 1334] = torch.cat([part.double().reshape(-1) for part in parts])
    expected = p.rmatvec(g, step=1)
    found = updates.gather(p, parts, w, step, 5)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
