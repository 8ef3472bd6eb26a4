"""The Hugging Face Hub: models published as their coordinates, and loaded with their base.

A repository is one checkpoint (``model.safetensors``) and a card. The checkpoint names the network
that the coordinates go with, so that nothing but the repository's name is needed to load it.
"""

from subspan.hub.loading import load, locate
from subspan.hub.publishing import push_to_hub

__all__ = ["load", "locate", "push_to_hub"]
