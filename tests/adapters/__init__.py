"""LoRA factors in a subspace, and LoRA files."""
