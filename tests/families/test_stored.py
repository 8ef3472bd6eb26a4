"""``stored``: the same matrix in every layout."""

import pytest
import torch

import subspan
from subspan import Projection, SubspanError
from subspan.families import stored


def make(**options: object) -> Projection:
    return subspan.projection("stored", out_dim=301, in_dim=16, seed=4, stream=1, **options)


@pytest.mark.parametrize("of", [name for name in subspan.projections() if name != "stored"])
def test_entries_are_those_of_the_generated_family(of: str) -> None:
    generated = subspan.projection(of, out_dim=301, in_dim=16, seed=4, stream=1)
    assert torch.equal(make(of=of).dense(step=2), generated.dense(step=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", stored.LAYOUTS)
def test_all_layouts_multiply_alike(layout: str, dtype: torch.dtype) -> None:
    p, dense = (make(of="sparse", layout=x) for x in (layout, "dense"))
    for rows in (range(301), range(17, 200), range(5, 6), range(9, 9)):
        w, g = torch.randn(16).to(dtype), torch.randn(len(rows)).to(dtype)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
        close = {"rtol": tolerance, "atol": tolerance}
        one, other = p.matvec(w, step=1, rows=rows), dense.matvec(w, step=1, rows=rows)
        torch.testing.assert_close(one, other, **close)
        one, other = p.rmatvec(g, step=1, rows=rows), dense.rmatvec(g, step=1, rows=rows)
        torch.testing.assert_close(one, other, **close)


def test_qr_makes_the_columns_orthonormal_and_keeps_their_span() -> None:
    Q, P = make(qr=True).dense(), make().dense()
    assert (Q.T @ Q - torch.eye(16)).abs().max() < 1e-14
    R = Q.T @ P
    torch.testing.assert_close(Q @ R, P)
    assert R.tril(-1).abs().max() < 1e-14
    assert R.diagonal().min() > 0


def test_the_matrix_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    p, made = make(of="hash"), []
    dense = Projection.dense
    monkeypatch.setattr(Projection, "dense", lambda *a, **kw: made.append(1) or dense(*a, **kw))
    stored._matrix.cache_clear()
    for _ in range(3):
        p.rmatvec(p.matvec(torch.ones(16)))
    assert len(made) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "csx"}, "unknown layout 'csx': did you mean csr"),
        ({"layout": "coo", "qr": True}, "qr fills the matrix: use layout='dense', not 'coo'"),
        ({"of": "stored"}, "'stored' cannot store itself"),
        ({"of": "gausian"}, "unknown projection 'gausian': did you mean gaussian"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(SubspanError, match=message):
        make(**options)
