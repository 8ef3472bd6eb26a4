"""The families of projections; importing this package registers every file of it."""

import sys

from subspan.families.base import Projection
from subspan.families.registry import projection, projections
from subspan.registry import import_files

import_files(sys.modules[__name__])

__all__ = ["Projection", "projection", "projections"]
