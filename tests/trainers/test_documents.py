"""The first example of docs/fine-tuning.md runs, and asks for no more lines than PEFT does."""

import re
from pathlib import Path

import pytest

from tests.pretrained import bert, transformers
from tests.trainers.test_trainer import CLASSES

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = Path(__file__).parents[2] / "docs" / "fine-tuning.md"


def test_the_same_job_in_no_more_lines(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    common, theirs, ours, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [len([line for line in code.splitlines() if line]) for code in (theirs, ours)]
    assert lines[1] <= lines[0]
    monkeypatch.chdir(tmp_path)
    [name] = re.findall(r'NAME = "(.*)"', common)
    bert(hidden_size=64, intermediate_size=512).save_pretrained(name)
    kind = transformers.TrainingArguments
    short = {"use_cpu": True, "max_steps": 2, "disable_tqdm": True, "report_to": []}
    monkeypatch.setattr(transformers, "TrainingArguments", lambda *a, **k: kind(*a, **k, **short))
    for code in (theirs, ours):
        exec(common + code, {"data": CLASSES})
    assert (tmp_path / "runs/lora/variant/adapter_model.safetensors").exists()
    assert (tmp_path / "runs/few/variant.safetensors").stat().st_size < 6000
    [saved] = (tmp_path / "runs/few").glob("checkpoint-*/model.safetensors")  # the table's 7,552
    assert saved.stat().st_size < 6000
