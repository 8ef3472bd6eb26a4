"""LoRA: a subspace over its factors, and files that PEFT loads.

The package is not called ``lora``, because :func:`subspan.lora` is the public function.
"""

from subspan.adapters.export import LoraExport, export_lora
from subspan.adapters.lora import lora

__all__ = ["LoraExport", "export_lora", "lora"]
