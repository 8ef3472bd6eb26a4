"""Measures what it costs to train a decoder through few numbers: memory, steps, the loss.

The decoder is a Llama of random weights, by Hugging Face's transformers. What it may hold beside
θ₀ is three times its largest tensor (θ of one module, its gradient, and one to spare) and the
activations, which are measured where nothing is trained.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from subspan.bench import candidates
from subspan.bench.large_network import FROZEN, Problem, measure
from subspan.bench.large_part import LargePart
from subspan.bench.part import Measurement
from subspan.bench.settings import Bench
from subspan.bench.subprocess import ALLOCATOR
from subspan.errors import SubspanError

DTYPES = ("float32", "bfloat16")
HEAD, WORDS, PER_LAYER = 64, 16, 128  # width of a head; words, and width, for a unit of depth
LEAST = 240_000  # weights of the smallest decoder


def shape(weights: int) -> dict[str, int]:
    """Find the shape of a decoder that has at least so many weights, and few more.

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
    """Count the weights of the decoder that is made where so many are wanted."""
    sizes = shape(wanted)
    return _count(sizes["hidden_size"], sizes["num_hidden_layers"])


def decoder(sizes: dict[str, int], dtype: torch.dtype, checkpointed: bool) -> nn.Module:
    """Make a Llama of this shape with random weights, in its dtype."""
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=False, use_cache=False)
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


def problem(
    large: bool, checkpointed: bool, device: torch.device, wanted: int, dtype: str, tokens: int
) -> Problem:
    """Make the decoder and its loss, see :func:`subspan.bench.large_network.steps`."""
    sizes = shape(wanted if large else LEAST)
    net = decoder(sizes, getattr(torch, dtype), checkpointed).to(device)
    ids = torch.randint(0, sizes["vocab_size"], (1, tokens), device=device)

    def loss(net: nn.Module, to_input: bool) -> Tensor:
        if to_input:
            embedded = net.get_input_embeddings()(ids)  # type: ignore[operator]
            embedded = embedded.detach().requires_grad_()
            value: Tensor = net(inputs_embeds=embedded, labels=ids).loss
        else:
            value = net(input_ids=ids, labels=ids).loss
        return value

    return Problem(net, loss, (nn.Linear, nn.Embedding))


class Transformer(LargePart):
    """A large decoder."""

    name = "transformer"
    help = "ways to train a decoder of --decoder weights: peak memory, steps, loss"
    shared = ("dtype", "tokens")
    title = "decoder of {weights:,} weights, {dtype}, {tokens} tokens"
    heading = "a decoder in {dtype}, {tokens} tokens"

    def check(self, settings: Bench) -> None:
        """Refuse a number out of range, an unknown dtype, and to go on without transformers."""
        if settings.decoder < LEAST:
            raise SubspanError(
                f"a decoder has {LEAST:,} weights at least, got {settings.decoder:,}"
            )
        if settings.dtype not in DTYPES:
            raise SubspanError(f"dtype must be one of {', '.join(DTYPES)}, got {settings.dtype!r}")
        if settings.tokens < 2:
            raise SubspanError(
                f"tokens must be at least 2, one to predict from the other, got {settings.tokens}"
            )
        if importlib.util.find_spec("transformers") is None:
            raise SubspanError(
                "the part transformer needs Hugging Face's transformers: pip install transformers"
            )
        candidates.make("hash", weights(settings.decoder), settings.large_dim)

    def measure(self, settings: Bench, done: Callable[[str], None]) -> list[Measurement]:
        """Measure every way to train.

        Returns:
            Rows with ``dtype``, ``tokens``, ``dim``, ``weights`` and those of
            :func:`subspan.bench.large_network.measure`, and ``allowed_bytes``: three times the
            largest tensor and the peak where nothing is trained, the activations.
        """
        dtype, tokens = settings.dtype, settings.tokens
        number = weights(settings.decoder)
        common = {"dtype": dtype, "tokens": tokens, "dim": settings.large_dim, "weights": number}
        found = measure(
            __name__,
            (settings.decoder, dtype, tokens),
            settings,
            number * getattr(torch, dtype).itemsize,
            {} if settings.torch_device.type == "cuda" else ALLOCATOR,
        )
        rows: list[Measurement] = [common | row for row in found]
        frozen = next(row for row in rows if row["projection"] == FROZEN)
        if "peak_bytes" in frozen:
            for row in rows:
                if "peak_bytes" in row:
                    row["allowed_bytes"] = 3 * row["largest_bytes"] + frozen["peak_bytes"]
        done(f"a decoder of {number:,} weights, {dtype}")
        return rows


Transformer()
