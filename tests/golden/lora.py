"""Write lora.safetensors: a model of LoRA factors as the first version that had them saved it.

    python -m tests.golden.lora

Once a version is released this is not to be run again: a file that does not load any more, or whose
factors are others, means that no model stored before can be rebuilt.
"""

import hashlib
from pathlib import Path

import subspan
from tests.adapters.networks import LORA, Block
from tests.nets import scatter

PATH = Path(__file__).with_name("lora.safetensors")

if __name__ == "__main__":
    model = scatter(subspan.lora(Block, 10, **LORA, init_seed=7))
    thetas = model.subspace.all()
    text = b"".join(thetas[name].detach().numpy().tobytes() for name in sorted(thetas))
    subspan.save(model, PATH, extra={"digest": hashlib.sha256(text).hexdigest()[:32]})
