"""Examples in the README and the guide run, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from subspan.sweeps.running import Running

README = Path(__file__).parents[1] / "README.md"
GUIDE = README.parent / "docs" / "guide.md"
VARIANTS = README.parent / "docs" / "variants.md"
TASKS = README.parent / "docs" / "laboratory.md"
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_the_first_example_runs(tmp_path, monkeypatch):
    """With a network that is read from a folder of the same name, and is tiny."""
    transformers = pytest.importorskip("transformers")
    [code] = FENCE.findall(README.read_text())
    [name] = re.findall(r'from_pretrained\("(.*?)"\)', code)
    monkeypatch.chdir(tmp_path)
    tiny = transformers.BertConfig(
        vocab_size=1000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.BertModel(tiny).save_pretrained(name)
    exec(code, {"__name__": "readme"})
    head = 2 * 65
    assert (tmp_path / "variant.safetensors").stat().st_size < 4096 + 4 * (1000 + head)


def test_the_guides_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = FENCE.findall(GUIDE.read_text())
    assert len(blocks) >= 3
    exec("".join(blocks), {"__name__": "guide"})
    assert (tmp_path / "model.safetensors").stat().st_size < 2048 + 4 * 200
    assert "dense network" in capsys.readouterr().out


def test_the_example_of_variants_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [code] = FENCE.findall(VARIANTS.read_text())
    exec(code, {"__name__": "variants"})
    assert capsys.readouterr().out == "2 ['anna', 'ben'] True\n"


def test_every_link_leads_somewhere():
    """In the README and the documents: files, and headings of them."""
    broken = []
    documents = ("*.md", "docs/**/*.md", "*/README.md")
    for page in (path for pattern in documents for path in README.parent.glob(pattern)):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            path, _, heading = target.partition("#")
            file = page.parent / path if path else page
            if not file.exists():
                broken.append(f"{page.name}: {target}")
            elif heading:
                titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
                if heading not in anchors:
                    broken.append(f"{page.name}: {target}")
    assert broken == []


def test_the_readme_stays_a_front_door():
    text = README.read_text()
    assert text.count("\n") <= 130
    assert text[: text.index("```python")].count("\n") < 40
    numbers = re.findall(r"(?<![\w.])\d[\d,.]*", text)
    assert len(numbers) <= 0.06 * len(text.split())


def test_the_guide_to_tasks(tmp_path, monkeypatch):
    """Its task is trained as it says."""
    from subspan.sweeps.sweep import sweep
    from subspan.training.config import Sweep, Training

    [code] = FENCE.findall(TASKS.read_text())
    (tmp_path / "guide_to_tasks.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Sweep(
        Training(task="guide_to_tasks:waves", epochs=40, batch_size=20),
        dims=("3", "10"),
        lrs=(0.3,),
        baseline_lrs=(0.03,),
    )
    result = sweep(config, tmp_path / "out", Running(jobs=1))
    assert result.failed == []
    assert result.baseline.mean_test_score < 0.1
    assert result.rows[1].mean_test_score < 0.1
    assert 3 <= result.d_int["hash"].value <= 10
