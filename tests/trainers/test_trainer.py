"""Trainer of transformers, unchanged: it is given a network in a subspace, or its handle."""

import pytest
import torch
from safetensors.torch import load_file

import subspan
from subspan import SubspaceModel
from tests.nets import scatter
from tests.pretrained import bert, gpt2, llama, t5, transformers

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has many of its own

IDS = torch.randint(3, 100, (16, 7), generator=torch.Generator().manual_seed(1))
CLASSES = [{"input_ids": row, "labels": n % 2} for n, row in enumerate(IDS)]
TEXT = [{"input_ids": row, "labels": row} for row in IDS]
ANSWERS = [{"input_ids": row, "start_positions": 1, "end_positions": 2} for row in IDS]
DEFAULTS = {
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.1,
    "logging_strategy": "no",
    "save_strategy": "no",
    "seed": 3,
}
both = pytest.mark.parametrize("through", ["network", "handle"])


def arguments(out, **given):
    return transformers.TrainingArguments(str(out), **DEFAULTS | given)


def trainer(net, through, out, data=CLASSES, more=(), wrap=(), **given):
    """A model of 20 coordinates around a network, and a Trainer that is given one of both."""
    model = SubspaceModel(net, **{"dim": 20} | dict(wrap))
    return model, transformers.Trainer(
        model if through == "handle" else model.body,
        arguments(out, **given),
        train_dataset=data,
        eval_dataset=data,
        **dict(more),
    )


def trained(model):
    """All that is trained, in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def eval_loss_of(net, out, data, **given):
    """The loss that a Trainer finds for an ordinary network."""
    given = {key: value for key, value in given.items() if key != "auto_find_batch_size"}
    ordinary = transformers.Trainer(net, arguments(out, **given), eval_dataset=data)
    return ordinary.evaluate()["eval_loss"]


SETTINGS = {
    "plain": (bert, CLASSES, {}),
    "accumulation": (gpt2, TEXT, {"gradient_accumulation_steps": 2}),
    "bfloat16": (bert, CLASSES, {"bf16": True}),
    "checkpointing": (gpt2, TEXT, {"gradient_checkpointing": True}),
    "smoothed labels": (bert, CLASSES, {"label_smoothing_factor": 0.1}),
    "smoothed text": (gpt2, TEXT, {"label_smoothing_factor": 0.1}),
    "answers": (lambda: bert("QuestionAnswering"), ANSWERS, {}),
    "decay": (bert, CLASSES, {"weight_decay": 0.5}),
    "noise": (gpt2, TEXT, {"neftune_noise_alpha": 5.0}),
    "batch size": (bert, CLASSES, {"auto_find_batch_size": True}),
    "adafactor": (bert, CLASSES, {"optim": "adafactor"}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_mean_what_they_do_for_an_ordinary_network(name, tmp_path):
    build, data, given = SETTINGS[name]
    found, losses = {}, []
    for through in ("network", "handle"):
        model, running = trainer(build(), through, tmp_path, data, **given)
        running.train()
        losses.append(running.evaluate()["eval_loss"])
        found[through] = trained(model)
    assert torch.equal(*found.values())
    assert found["handle"].abs().min() > 0
    want = eval_loss_of(model.merge(), tmp_path, data, **given)
    assert losses == pytest.approx([want, want], rel=1e-3 if "bf16" in given else 1e-5)


@pytest.mark.slow
@both
def test_compiled(through, tmp_path):
    found = []
    for given in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        model, running = trainer(bert(), through, tmp_path, **given)
        running.train()
        running.save_model()
        found.append(trained(model))
    torch.testing.assert_close(*found)


@both
def test_coordinates_decay_and_biases_do_not(through, tmp_path):
    _, running = trainer(
        bert(), through, tmp_path, weight_decay=0.5, wrap={"train_fully": "classifier"}
    )
    decayed, others = running.create_optimizer().param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(20,), (2, 32)]
    assert [tuple(p.shape) for p in others["params"]] == [(2,)]


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [{}, {"dim": 60, "projection": "fastfood", "compartments": "layer"}]
)
@both
def test_an_interrupted_training_goes_on_exactly(through, wrap, tmp_path):
    given = {"wrap": wrap, "save_strategy": "steps", "save_steps": 2}
    whole, first = trainer(gpt2(), through, tmp_path / "whole", TEXT, **given)
    first.train()
    again, second = trainer(gpt2(), through, tmp_path / "again", TEXT, **given)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(trained(again), trained(whole))
    last = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    if through == "handle":
        assert sum(t.numel() for t in last.values()) == whole.summary().coordinates + 32
        return
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    want = whole.merge().state_dict()
    assert loaded.state_dict().keys() == want.keys()
    assert all(torch.equal(value, want[key]) for key, value in loaded.state_dict().items())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


@pytest.mark.parametrize("wrap", [SubspaceModel, subspan.lora])
def test_a_part_in_a_subspace_is_saved_and_goes_on_with_the_network_around_it(wrap, tmp_path):
    def training(out, **given):
        net = llama(tie_word_embeddings=False)
        model = wrap(net.model, 20)
        net.lm_head.requires_grad_(False)
        return model, transformers.Trainer(net, arguments(out, **given), train_dataset=TEXT)

    whole, first = training(tmp_path / "whole", save_strategy="steps", save_steps=2)
    first.train()
    again, second = training(tmp_path / "again")
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(trained(again), trained(whole))
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "whole" / "checkpoint-4", output_loading_info=True
    )
    assert not report["missing_keys"]
    logits = first.model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, logits)


@pytest.mark.parametrize("change", ["other coordinates", "half a file", "no file"])
def test_coordinates_beside_a_network_count_only_if_they_give_it(change, tmp_path):
    whole, first = trainer(bert(), "network", tmp_path, save_strategy="steps", save_steps=4)
    first.train()
    file = tmp_path / "checkpoint-4" / "coordinates.pt"
    kept = torch.load(file)
    assert torch.equal(kept["subspan_global"], trained(whole))
    if change == "other coordinates":
        torch.save({"subspan_global": kept["subspan_global"] + 0.1}, file)
    elif change == "half a file":
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    again, second = trainer(bert(), "network", tmp_path)
    second._load_from_checkpoint(str(file.parent))
    torch.testing.assert_close(trained(again), trained(whole), rtol=1e-4, atol=1e-5)


@both
def test_the_best_checkpoint_is_loaded_at_the_end(through, tmp_path):
    scores = iter([1.0, 3.0, 2.0, 1.0])
    seen = {}

    class Watch(transformers.TrainerCallback):
        def on_save(self, args, state, control, **_):
            seen[state.global_step] = trained(model)

    model, running = trainer(
        bert(),
        through,
        tmp_path,
        wrap={"train_fully": ["classifier"]},
        more={
            "compute_metrics": lambda _: {"score": next(scores)},
            "callbacks": [Watch(), transformers.EarlyStoppingCallback(1)],
        },
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    running.train()
    assert running.state.global_step == 3  # stopped after one that was worse
    assert not torch.equal(seen[3], seen[2])
    assert torch.equal(trained(model), seen[2])


def test_a_saved_state_of_the_handle_is_small_and_loads_back(tmp_path):
    model, running = trainer(gpt2(), "handle", tmp_path, TEXT)
    running.train()
    running.save_model()
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size < 1000
    other = SubspaceModel(gpt2(), 20)
    other.load_state_dict(load_file(file))
    assert torch.equal(trained(other), trained(model))


@both
def test_a_network_is_made_anew_for_every_training(through, tmp_path):
    made = []

    def make(trial=None):
        model = SubspaceModel(bert(), 20)
        made.append(model)
        return model if through == "handle" else model.body

    running = transformers.Trainer(
        None, arguments(tmp_path), train_dataset=CLASSES, model_init=make
    )
    running.train()
    running.train()
    assert len(made) == 3
    assert torch.equal(trained(made[1]), trained(made[2]))
    assert trained(made[1]).any()


# ---- predictions ---------------------------------------------------------------------------------


@both
def test_generated_sequences_are_those_of_the_merged_network(through, tmp_path):
    model = scatter(SubspaceModel(t5(), 20))
    given = DEFAULTS | {"predict_with_generate": True, "generation_max_length": 6}
    predicted = []
    for net in (model if through == "handle" else model.body, model.merge()):
        how = transformers.Seq2SeqTrainingArguments(str(tmp_path), **given)
        running = transformers.Seq2SeqTrainer(net, how, eval_dataset=TEXT)
        predicted.append(running.predict(TEXT))
    assert (predicted[0].predictions == predicted[1].predictions).all()
    assert predicted[0].metrics["test_loss"] == pytest.approx(predicted[1].metrics["test_loss"])


def test_a_quantised_network_is_trained(tmp_path):
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes"
    )
    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    how = transformers.BitsAndBytesConfig(load_in_8bit=True)
    net = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=how, device_map="cpu"
    )
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(net, arguments(tmp_path))
    for through in ("handle", "network"):
        model, running = trainer(net, through, tmp_path, TEXT)
        assert net.is_quantized
        running.train()
        assert trained(model).any()
        net = model.unwrap()
