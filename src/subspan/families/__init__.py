"""The families of projections; importing this package registers every file of it."""

import importlib
import pkgutil

from subspan.families.base import Projection
from subspan.families.registry import projection, projections

for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_file.name)

__all__ = ["Projection", "projection", "projections"]
