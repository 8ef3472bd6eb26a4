"""The encoder that steps in random bases are timed with: its size, and what it needs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from subspan import SubspanError
from subspan.bench import minilm
from subspan.training import nets

NAME = "subspan.bench.minilm:encoder"


def test_it_has_the_size_of_minilm():
    pytest.importorskip("transformers")
    net = nets.build(NAME, (1, 28, 28))
    assert sum(p.numel() for p in net.parameters()) == 22_713_216 + 384 * 10 + 10
    with torch.no_grad():
        assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)
        assert net(torch.full((1, 1, 28, 28), 1e9)).isfinite().all()  # the last word


def test_without_transformers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SubspanError, match="needs Hugging Face's transformers"):
        minilm.encoder()
