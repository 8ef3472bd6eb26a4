"""The card of a repository: what the model is, and how it is loaded, from the file's header.

A card that a person has written, or taken over by deleting the mark, keeps its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from subspan.checkpoint.base import say_base
from subspan.checkpoint.file import COORDINATES
from subspan.errors import SubspanError
from subspan.hub.client import first_line, need

MARK = "<!-- subspan writes this page at each upload; without this line it keeps the text. -->"


def make_card(
    repo: str,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    size: int,
    metadata: Mapping[str, Any],
    existing: str | None = None,
) -> str:
    """Write the README.md of a repository for a checkpoint of ``size`` bytes.

    The user's ``metadata`` (license, datasets, language …) are fields of huggingface_hub's
    ``ModelCardData``. Those of an ``existing`` card stay, and its text, if it is without the mark.
    """
    hub = need("huggingface_hub")
    text, before = _text(repo, header, tensors, size), {}
    try:
        if existing is not None:
            card = hub.ModelCard(existing, ignore_metadata_errors=True)
            before, text = card.data.to_dict(), text if MARK in existing else card.text.lstrip("\n")
        data = before | {"library_name": "subspan"}
        if "repo" in header.get("base", {}):
            data |= {"base_model": header["base"]["repo"], "base_model_relation": "adapter"}
        tags = ["subspan", *_listed(before.get("tags")), *_listed(metadata.get("tags"))]
        data |= dict(metadata) | {"tags": list(dict.fromkeys(tags))}
        return f"---\n{hub.ModelCardData(**data).to_yaml()}\n---\n\n{text}"
    except Exception as error:  # of YAML, and of huggingface_hub's own checks
        raise SubspanError(
            f"the metadata of the card cannot be written, from card= and from the README.md of "
            f"{repo} ({first_line(error)}): mend what is wrong there"
        ) from error


def _listed(tags: str | list[str] | None) -> list[str]:
    return [tags] if isinstance(tags, str) else list(tags or [])


def _text(repo: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor], size: int) -> str:
    base, recipe, seed = header.get("base"), header["recipe"], header["init_seed"]
    d = tensors[COORDINATES].numel()
    fully = [name.removeprefix("body.") for name in tensors if name != COORDINATES]
    name = f"[{base['repo']}](https://huggingface.co/{base['repo']})" if base else "A network"
    if base:
        start, given, note = "those of the base", "", "fetches the base, too"
    elif seed is not None:
        start, given, note = f"drawn from seed {seed}", ", build", "build() makes the network"
    else:
        start, given, note = "those before training", ", net", "net is the network before training"
    kind, start = (
        ("LoRA factors", "drawn from a seed") if header.get("lora") else ("weights", start)
    )
    facts = {
        "base": say_base(base),
        "network": f"{header['weights']:,} weights" + (f", `{base['class']}`" if base else ""),
        "coordinates": f"{d:,}",
        "stored as they are": ", ".join(f"`{name}`" for name in fully),
        "projection": f"`{recipe['projection']}`, seed {recipe['seed']}",
        "LoRA": ", ".join(f"{key} {value}" for key, value in header.get("lora", {}).items()),
        "file": f"{size:,} bytes",
    }
    scores = header["extra"].get("scores")
    sentence = (
        f"{name} with {kind} θ = θ₀ + P w. θ₀ are {start}, P is a random matrix that is made from "
        f"a seed, and w are the {d:,} numbers of this repository."
    )
    lines = [
        "import subspan  # pip install 'subspan[hub]'",
        "",
        f'model = subspan.load("{repo}"{given})  # {note}',
        "net = model.merge()  # an ordinary network with these weights",
    ]
    code = "\n".join(["```python", *lines, "```"])
    tables = [_table("what", "", facts)]
    tables += [_table("score", "value", scores)] if isinstance(scores, dict) else []
    parts = [MARK, f"# {repo.rpartition('/')[2]}", sentence, code, *tables]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    """Write a table of two columns; "" without rows."""
    cells = [(_cell(name), _cell(value)) for name, value in rows.items() if value != ""]
    lines = [f"| {name} | {value} |" for name, value in cells]
    return "\n".join([f"| {left} | {right} |", "| --- | --- |", *lines]) if lines else ""


def _cell(content: Any) -> str:
    return " ".join(str(content).split()).replace("|", "\\|")
