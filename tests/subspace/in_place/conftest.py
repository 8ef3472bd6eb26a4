"""Both ways of forming θ: kept for a call, as of small networks, and formed for each operator."""

import pytest

from subspan.subspace import formed
from subspan.subspace import forming as formers


@pytest.fixture(params=["kept", "formed"])
def forming(request, monkeypatch):
    """Make every network a large one, of which nothing is kept, in one of two runs."""
    if request.param == "formed":
        monkeypatch.setattr(formed, "KEPT", 0)
    return request.param


@pytest.fixture
def formed_sizes(monkeypatch):
    """How many weights were formed by each call of the operator."""
    sizes, form = [], formers.form_values

    def counted(w, step, group, bases, dtype=None):
        sizes.extend(len(piece) for call in group for piece in call.pieces)
        return form(w, step, group, bases, dtype)

    monkeypatch.setattr(formers, "form_values", counted)
    return sizes
