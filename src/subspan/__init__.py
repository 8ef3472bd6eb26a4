"""subspan: train any PyTorch network through far fewer numbers than it has weights.

The public names, nothing else; each is imported when it is first used, so that the command line
answers at once and ``import subspan`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspan import layers as layers
    from subspan import optim as optim
    from subspan.adapters import export_lora as export_lora
    from subspan.adapters import lora as lora
    from subspan.checkpoint import save as save
    from subspan.counts import count as count
    from subspan.errors import SubspanError as SubspanError
    from subspan.families import Projection as Projection
    from subspan.families import projection as projection
    from subspan.families import projections as projections
    from subspan.hub import load as load
    from subspan.hub import push_to_hub as push_to_hub
    from subspan.subspace.growing import grow as grow
    from subspan.subspace.model import SubspaceModel as SubspaceModel
    from subspan.variants import Variants as Variants

__version__ = "0.1.0"

_HOME = {
    "Projection": "subspan.families.base",
    "SubspaceModel": "subspan.subspace",
    "SubspanError": "subspan.errors",
    "Variants": "subspan.variants",
    "count": "subspan.counts",
    "export_lora": "subspan.adapters",
    "grow": "subspan.subspace.growing",
    "load": "subspan.hub",
    "lora": "subspan.adapters",
    "projection": "subspan.families.registry",
    "projections": "subspan.families.registry",
    "push_to_hub": "subspan.hub",
    "save": "subspan.checkpoint",
}

_PACKAGES = ("layers", "optim")

__all__ = ["__version__", *_HOME, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"subspan.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'subspan' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
