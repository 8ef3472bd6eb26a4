"""Both ways of forming θ: kept for a call, as of small networks, and formed for each operator."""

import pytest

from subspan.subspace import formed


@pytest.fixture(params=["kept", "formed"])
def forming(request, monkeypatch):
    """Make every network a large one, of which nothing is kept, in one of two runs."""
    if request.param == "formed":
        monkeypatch.setattr(formed, "KEPT", 0)
    return request.param
