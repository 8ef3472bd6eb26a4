"""Tiny networks of Transformers with a tokenizer of words, and sets of texts, made on the fly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ("good", "fine", "bad", "poor", "film", "plot", "a", "the", "was", "and")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def save_tokenizer(folder: Path, *, ends: bool) -> None:
    """Save a tokenizer of words; ``ends`` marks where a text begins and ends, as BERT's does."""
    import tokenizers
    import transformers

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]"}
    if ends:
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        model.post_processor = tokenizers.processors.TemplateProcessing(
            "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    else:
        names |= {"eos_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names).save_pretrained(folder)


def bert(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Save a BERT of two layers, without a head."""
    import torch
    import transformers

    sizes = {"vocab_size": 14, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 12} | settings
    torch.manual_seed(seed)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    save_tokenizer(folder, ends=True)
    return folder


def gpt2(folder: Path, *, weights: bool = True, **settings: Any) -> Path:
    """Save a GPT-2 of two layers; or only its configuration."""
    import torch
    import transformers

    sizes = {"vocab_size": 14, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    config = transformers.GPT2Config(**sizes | {"bos_token_id": 3, "eos_token_id": 3} | settings)
    torch.manual_seed(0)
    if weights:
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    save_tokenizer(folder, ends=False)
    return folder


def reviews(
    folder: Path,
    count: int = 60,
    parts: tuple[str, ...] = ("train", "test"),
    names: tuple[str, ...] = ("neg", "pos"),
    text: str = "text",
    label: str = "label",
) -> Path:
    """Save parquet files of short reviews, whose first word tells the label."""
    import datasets

    folder.mkdir(parents=True)
    for part in parts:
        rows: dict[str, list[Any]] = {text: [], label: []}
        for number in range(count):
            kind = number % 2
            first = WORDS[(2 - 2 * kind) + number // 2 % 2]
            rest = [WORDS[4 + (number * 7 + i) % 6] for i in range(number % 5)]
            rows[text].append(" ".join([first, *rest]))
            rows[label].append(kind)
        features = datasets.Features(
            {text: datasets.Value("string"), label: datasets.ClassLabel(names=list(names))}
        )
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(folder / f"{part}.parquet"))
    return folder
