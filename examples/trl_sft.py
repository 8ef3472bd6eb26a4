"""SFTTrainer of TRL, unchanged: a language model learns to count down, through 1,000 numbers.

A small Llama has learnt to count up. Fine-tuning changes no weight of it: the variant is a file of
a few kilobytes beside it, and both answer from one network in memory.
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig, SFTTrainer

import subspan

FOLDER = "runs/trl"
WORDS = {word: n for n, word in enumerate(["<end>", *map(str, range(40))])}
words = Tokenizer(models.WordLevel(WORDS, unk_token="<end>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def counting(step):
    """Texts such as "5 6 7 8 9 10"."""
    starts = range(5, 35) if step > 0 else range(35, 5, -1)
    return Dataset.from_dict(
        {"text": [" ".join(str((n + step * k) % 40) for k in range(6)) for n in starts]}
    )


def train(net, texts, lr, steps):
    """SFTTrainer as for any other network."""
    arguments = SFTConfig(
        FOLDER,
        learning_rate=lr,
        max_steps=steps,
        per_device_train_batch_size=30,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    trainer = SFTTrainer(net, arguments, train_dataset=texts, processing_class=words)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def answer(net, prompt):
    """The prompt and four more words."""
    tokens = torch.tensor([words(prompt)["input_ids"]])
    return words.decode(net.generate(tokens, max_new_tokens=4, do_sample=False)[0])


torch.manual_seed(0)
net = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
)
train(net, counting(+1), 0.003, 150)
print(f"pretrained, {net.num_parameters():,} weights: {answer(net, '20 21')}")
model = subspan.SubspaceModel(net, 1000)
train(model, counting(-1), 0.05, 150)
size = subspan.save(model, f"{FOLDER}/variant.safetensors")
print(f"the variant, {size:,} bytes: {answer(model, '20 19')}")
