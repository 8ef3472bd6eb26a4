"""The same job takes no more lines than with PEFT: fine-tune a classifier, save it, load it."""

import pytest
import torch

OURS = """
net = AutoModelForSequenceClassification.from_pretrained(BASE)
model = subspan.SubspaceModel(net, 1000, targets="all-linear", train_fully="head")
optimizer = torch.optim.AdamW(model.parameter_groups())
Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
subspan.save(model, "model.safetensors")
again = subspan.load("model.safetensors", AutoModelForSequenceClassification.from_pretrained(BASE))
"""

PEFTS = """
net = AutoModelForSequenceClassification.from_pretrained(BASE)
config = LoraConfig(task_type="SEQ_CLS", r=1, target_modules="all-linear")
model = get_peft_model(net, config)
Trainer(model, arguments, train_dataset=data).train()
model.save_pretrained("variant")
again = AutoPeftModelForSequenceClassification.from_pretrained("variant")
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.heavy
def test_fine_tuning_takes_no_more_lines_than_with_peft(tmp_path, monkeypatch):
    from tests.pretrained import bert, transformers

    pytest.importorskip("accelerate")
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    import subspan

    monkeypatch.chdir(tmp_path)
    bert().base_model.save_pretrained("base")
    arguments = transformers.TrainingArguments(
        "out", max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    data = [{"input_ids": torch.arange(4), "labels": torch.tensor(k % 2)} for k in range(8)]
    given = {"BASE": "base", "arguments": arguments, "data": data, "torch": torch}
    given |= {"subspan": subspan, "Trainer": transformers.Trainer, **vars(peft)}
    given["AutoModelForSequenceClassification"] = transformers.AutoModelForSequenceClassification
    for program in (OURS, PEFTS):
        names = dict(given)
        exec(program, names)
        with torch.no_grad():
            ids = torch.arange(4)[None]
            logits = [names[model].eval()(input_ids=ids).logits for model in ("model", "again")]
        assert torch.equal(*logits)
    assert OURS.count("\n") <= PEFTS.count("\n")
