"""Image classification sets by name: decoded once, cached as tensors, batched on the device."""

from subspan.training.data.images import ImageData as ImageData
from subspan.training.data.images import Split as Split
from subspan.training.data.order import batches as batches
from subspan.training.data.order import steps_per_epoch as steps_per_epoch
from subspan.training.data.sources import load as load
from subspan.training.data.sources import names as names
