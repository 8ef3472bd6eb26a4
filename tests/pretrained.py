"""Small networks of transformers, with random weights that are the same at each call."""

import pytest
import torch


class Library:
    """A library that is imported at its first use; a test that wants it is skipped without it."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        if attribute.startswith("_"):  # pytest looks for some of these when it collects
            raise AttributeError(attribute)
        reason = f"{self.name} is not installed: pip install {self.name}"
        return getattr(pytest.importorskip(self.name, reason=reason), attribute)


transformers = Library("transformers")
peft = Library("peft")  # which imports bitsandbytes and more

SMALL = {"vocab_size": 100, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def bert(kind="SequenceClassification", **options):
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "vocab_size": 100,
    }
    config = transformers.BertConfig(**sizes | options)
    return build(getattr(transformers, f"BertFor{kind}"), config)


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, **SMALL)
    return build(transformers.GPT2LMHeadModel, config)


def llama(**options):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = transformers.LlamaConfig(**SMALL | sizes | options)
    return build(transformers.LlamaForCausalLM, config)


def t5():
    config = transformers.T5Config(
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        vocab_size=100,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return build(transformers.T5ForConditionalGeneration, config)


def whisper():
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        decoder_start_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **SMALL,
    )
    return build(transformers.WhisperForConditionalGeneration, config)


def build(cls, config):
    torch.manual_seed(0)
    return cls(config)
