"""subspan: train any PyTorch network through far fewer numbers than it has weights.

The public names, nothing else; each is imported when it is first used, so that the command line
answers at once and ``import subspan`` costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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

# Where modules are that were in `lab`, or beside the packages, and what they were called before:
# programs and records that name them go on.
_ROOMS = {
    "subspace": "changes compartments formed init quantised sharded states summary weights "
    "calls:blocks guards:theta0 inplace:classes slots:parameters",
    "training": "config data evaluate export locks loop methods nets options_file own records "
    "replay score state tasks trackers train signals:stop",
    "sweeps": "backends intrinsic smaller sweep claims:folder jobs:worker pool:runner",
    "experiments": "everything",
    "commands": "console doctor",
}
_MOVED = {
    "subspan.lab": "subspan.training",
    "subspan.layers.places": "subspan.layers.replace",
    "subspan.lab.bench": "subspan.bench",
    "subspan.lab.parts": "subspan.experiments.many",
    "subspan.lab.report": "subspan.report",
    "subspan.lab.report.exhibits": "subspan.experiments.exhibits",
    "subspan.lab.report.gallery": "subspan.experiments.gallery",
    "subspan.lab.reproduce": "subspan.experiments",
    "subspan.optim.base": "subspan.optim.moments",
    "subspan.optim.copies": "subspan.optim.optimizer",
    "subspan.optim.parts": "subspan.optim.compartment",
}
for _room, _names in _ROOMS.items():
    for _name in _names.split():
        _old, _, _new = _name.partition(":")
        _before = "subspan" if _room == "subspace" else "subspan.lab"
        _MOVED[f"{_before}.{_old}"] = f"subspan.{_room}.{_new or _old}"
        if _new:
            _MOVED[f"subspan.{_room}.{_old}"] = f"subspan.{_room}.{_new}"

__all__ = ["__version__", *_HOME, *_PACKAGES]


class _Moved(MetaPathFinder, Loader):
    """Finds a module under its old name: it is the same module."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if not name.startswith("subspan."):
            return None
        old, rest = name, ""
        while old not in _MOVED and "." in old:
            old, _, last = old.rpartition(".")
            rest = f".{last}{rest}"
        if old not in _MOVED or (old == "subspan.lab" and rest):
            return None
        return ModuleSpec(name, self, origin=_MOVED[old] + rest)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(spec.origin))
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # which the import system has just replaced


sys.meta_path.insert(0, _Moved())  # before the files of a package that moved are found twice


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"subspan.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'subspan' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
