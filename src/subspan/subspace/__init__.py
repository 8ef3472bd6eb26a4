"""A network whose weights are θ₀ + P w: the wrapper, in place."""

from subspan.subspace.model import SubspaceModel

__all__ = ["SubspaceModel"]
