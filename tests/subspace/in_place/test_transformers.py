"""Networks of transformers in a subspace: generate, save and train as ever."""

import pytest
import torch

from subspan import SubspaceModel, SubspanError
from tests.nets import scatter

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # transformers has many of its own
    pytest.mark.usefixtures("forming"),
]

SMALL = {"vocab_size": 100, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, **SMALL)
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **SMALL,
    )
    return transformers.LlamaForCausalLM(config)


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
    return transformers.T5ForConditionalGeneration(config)


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
    return transformers.WhisperForConditionalGeneration(config)


NETS = {"gpt2": gpt2, "llama": llama, "t5": t5, "whisper": whisper}
HOW = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "no cache": {"do_sample": False, "use_cache": False},
}


def wrapped(name, **options):
    """A network in a subspace away from θ₀, and an input."""
    torch.manual_seed(0)
    net = NETS[name]().eval()
    x = torch.randn(2, 8, 32) if name == "whisper" else torch.randint(3, 100, (2, 7))
    return scatter(SubspaceModel(net, 50, **options)).eval(), x


def tokens(net, x, how):
    torch.manual_seed(1)
    return net.generate(x, max_new_tokens=6, **HOW[how])


def some_slow(first, quick):
    """All pairs with a network, of which those with ``quick``, and all of GPT-2, are quick."""
    return [
        pytest.param(one, name, marks=() if name == "gpt2" or one == quick else pytest.mark.slow)
        for name in NETS
        for one in first
    ]


@pytest.mark.parametrize(("how", "name"), some_slow(HOW, "greedy"))
def test_the_tokens_are_those_of_the_merged_network(name, how):
    model, x = wrapped(name)
    want = tokens(model.merge(), x, how)
    assert torch.equal(tokens(model.body, x, how), want)
    assert torch.equal(tokens(model, x, how), want)


@pytest.mark.parametrize(("through", "name"), some_slow(["network", "handle"], "network"))
def test_save_pretrained_writes_a_complete_ordinary_network(name, through, tmp_path):
    model, x = wrapped(name)
    (model if through == "handle" else model.body).save_pretrained(tmp_path)
    merged = model.merge().eval()
    plain = type(merged).from_pretrained(tmp_path).eval()
    assert list(plain.state_dict()) == list(merged.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, merged.state_dict()[key]), key
    assert torch.equal(tokens(plain, x, "greedy"), tokens(model, x, "greedy"))


@pytest.mark.parametrize("name", NETS)
def test_what_was_saved_is_loaded_back_as_coordinates(name):
    model, x = wrapped(name)
    torch.manual_seed(0)
    other = SubspaceModel(NETS[name]().eval(), 50)
    other.body.load_state_dict(model.merge().state_dict())
    for key, w in other.coordinates.items():
        torch.testing.assert_close(w, model.coordinates[key], rtol=1e-3, atol=1e-4)
    assert torch.equal(tokens(other, x, "greedy"), tokens(model, x, "greedy"))


def test_the_dtype_is_the_networks_own():
    torch.manual_seed(0)
    net = gpt2().to(torch.bfloat16)
    model = SubspaceModel(net, 50)
    assert net.dtype == model.dtype == torch.bfloat16
    assert net.device == model.device == torch.device("cpu")
    assert model.coordinates["global"].dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model, x = wrapped("llama")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=x, labels=x, use_cache=False).loss.backward()
        gradients.append(model.coordinates["global"].grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


def test_a_larger_vocabulary_is_refused_before_anything_changes():
    model, x = wrapped("gpt2")
    want = tokens(model, x, "greedy")
    with pytest.raises(SubspanError, match="computed when it is read"):
        model.resize_token_embeddings(120)
    assert torch.equal(tokens(model, x, "greedy"), want)
    assert model.config.vocab_size == 100
    model.tie_weights()
    assert torch.equal(tokens(model, x, "greedy"), want)


@pytest.mark.parametrize("through", ["network", "handle"])
def test_a_trainer_trains_evaluates_and_resumes(through, tmp_path):
    def trainer(steps, out):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_size=32,
            intermediate_size=64,
            vocab_size=100,
        )
        model = SubspaceModel(transformers.BertForSequenceClassification(config), 20)
        arguments = transformers.TrainingArguments(
            str(out),
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=0.1,
            save_steps=2,
            logging_steps=1,
            seed=3,
        )
        net = model if through == "handle" else model.body
        ids = torch.randint(2, 100, (8, 7), generator=torch.Generator().manual_seed(1))
        data = [{"input_ids": row, "labels": n % 2} for n, row in enumerate(ids)]
        return model, transformers.Trainer(net, arguments, train_dataset=data, eval_dataset=data)

    whole, first = trainer(4, tmp_path / "whole")
    first.train()
    found = first.evaluate()
    assert found["eval_loss"] < 0.8
    assert whole.coordinates["global"].abs().sum() > 0
    again, second = trainer(4, tmp_path / "again")
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(
        again.coordinates["global"], whole.coordinates["global"], rtol=1e-3, atol=1e-3
    )
    assert torch.equal(
        again.subspace.stored("classifier.weight").detach(),
        whole.subspace.stored("classifier.weight").detach(),
    )


@pytest.mark.parametrize("through", ["network", "handle"])
def test_a_state_of_coordinates_that_is_given_saves_all_weights(through, tmp_path):
    """Accelerate's guide says: save_pretrained(dir, state_dict=get_state_dict(model))."""
    model, x = wrapped("gpt2")
    net = model if through == "handle" else model.body
    net.save_pretrained(tmp_path, state_dict=net.state_dict())
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(tokens(plain, x, "greedy"), tokens(model, x, "greedy"))
    state = {key: value.clone() for key, value in net.state_dict().items()}
    scatter(model)
    with pytest.raises(SubspanError, match="are not those that the network has"):
        net.save_pretrained(tmp_path, state_dict=state)
