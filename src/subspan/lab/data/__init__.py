"""Image classification sets by name: decoded once, cached as tensors, batched on the device."""

from subspan.lab.data.images import ImageData as ImageData
from subspan.lab.data.images import Split as Split
from subspan.lab.data.order import FILL as FILL
from subspan.lab.data.order import batches as batches
from subspan.lab.data.order import steps_per_epoch as steps_per_epoch
from subspan.lab.data.sources import load as load
from subspan.lab.data.sources import names as names
