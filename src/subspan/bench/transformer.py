"""Measures what it costs to train a decoder through few numbers: memory, steps, the loss.

The decoder is a Llama of random weights, by Hugging Face's transformers. What it may hold beside
θ₀ is three times its largest tensor (θ of one module, its gradient, and one to spare) and the
activations, which are measured where nothing is trained.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from subspan.bench import variants
from subspan.bench.apart import ALLOCATOR
from subspan.bench.variants import CHECKPOINTED, FROZEN, FULL, LORA, SUBSPAN, Problem
from subspan.errors import SubspanError

VARIANTS = (FULL, FROZEN, SUBSPAN, CHECKPOINTED, LORA)
DTYPES = ("float32", "bfloat16")
HEAD, WORDS, PER_LAYER = 64, 16, 128  # width of a head; words, and width, for a unit of depth
LEAST = 240_000  # weights of the smallest decoder


def shape(weights: int) -> dict[str, int]:
    """The shape of a decoder that has at least so many weights, and few more.

    The width n is a multiple of 64, near 128 units for each layer; 16 n words, tied to nothing.
    """
    width = HEAD
    while _count(width + HEAD, (width + HEAD) // PER_LAYER) <= weights:
        width += HEAD
    layers = 1
    while _count(width, layers) < weights:
        layers += 1
    return {
        "hidden_size": width,
        "intermediate_size": _inner(width),
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": width // HEAD,
        "vocab_size": WORDS * width,
    }


def _inner(width: int) -> int:
    return HEAD * round(8 * width / 3 / HEAD)


def _count(width: int, layers: int) -> int:
    a_layer = 4 * width**2 + 3 * width * _inner(width) + 2 * width
    return 2 * WORDS * width**2 + layers * a_layer + width


def weights(wanted: int) -> int:
    """How many weights the decoder has that is made where so many are wanted."""
    of = shape(wanted)
    return _count(of["hidden_size"], of["num_hidden_layers"])


def check(wanted: int, dtype: str, tokens: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        SubspanError: for a number out of range, an unknown dtype, or without transformers.
    """
    if wanted < LEAST:
        raise SubspanError(f"a decoder has {LEAST:,} weights at least, got {wanted:,}")
    if dtype not in DTYPES:
        raise SubspanError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if tokens < 2:
        raise SubspanError(f"tokens must be at least 2, for the next one to be told, got {tokens}")
    if importlib.util.find_spec("transformers") is None:
        raise SubspanError(
            "the part transformer needs Hugging Face's transformers: pip install transformers"
        )


def decoder(of: dict[str, int], dtype: torch.dtype, checkpointed: bool) -> nn.Module:
    """A Llama of this shape with random weights, made in its dtype."""
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(**of, tie_word_embeddings=False, use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        net: nn.Module = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    net.train()
    if checkpointed:
        old = "gradient_checkpointing_enable"  # its name until transformers 5
        enable: Any = getattr(net, "activation_checkpointing_enable", None) or getattr(net, old)
        enable({"use_reentrant": False})
    return net


def steps(
    variant: str, wanted: int, dtype: str, tokens: int, dim: int, device: str
) -> Iterator[dict[str, Any]]:
    """Train in this process, see :func:`subspan.bench.variants.steps`."""
    place = torch.device(device)

    def make(large: bool) -> Problem:
        of = shape(wanted if large else LEAST)
        net = decoder(of, getattr(torch, dtype), variant == CHECKPOINTED).to(place)
        ids = torch.randint(0, of["vocab_size"], (1, tokens), device=place)

        def loss(net: nn.Module, to_input: bool) -> Tensor:
            if to_input:
                embedded = net.get_input_embeddings()(ids)  # type: ignore[operator]
                embedded = embedded.detach().requires_grad_()
                found: Tensor = net(inputs_embeds=embedded, labels=ids).loss
            else:
                found = net(input_ids=ids, labels=ids).loss
            return found

        return Problem(net, loss, (nn.Linear, nn.Embedding))

    return variants.steps(make, variant, dim, place)


def measure(
    wanted: int,
    dtype: str,
    tokens: int,
    dim: int,
    seconds: float,
    device: torch.device,
    done: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for every variant.

    Args:
        wanted: weights, or a few more.
        dtype: of θ₀.
        tokens: of the one text in a step.
        dim: d of the subspace.
        seconds: to spend on each; five steps at least.
        device: where.
        done: is told when all is done.

    Returns:
        Rows with ``dtype``, ``tokens``, ``dim``, ``weights`` and what
        :func:`subspan.bench.variants.measure` says, and ``allowed_bytes``: three times the
        largest tensor and the peak where nothing is trained, the activations.
    """
    number = weights(wanted)
    size = number * getattr(torch, dtype).itemsize
    allocator = {} if device.type == "cuda" else ALLOCATOR
    of_all: dict[str, Any] = {"dtype": dtype, "tokens": tokens, "dim": dim, "weights": number}
    arguments = (wanted, dtype, tokens, dim, str(device))
    rows: list[dict[str, Any]] = [
        of_all | row
        for row in variants.measure(steps, arguments, VARIANTS, size, seconds, allocator)
    ]
    frozen = rows[VARIANTS.index(FROZEN)]
    if "peak_bytes" in frozen:
        for row in rows:
            if "peak_bytes" in row:
                row["allowed_bytes"] = 3 * row["largest_bytes"] + frozen["peak_bytes"]
    done(f"a decoder of {number:,} weights, {dtype}")
    return rows
