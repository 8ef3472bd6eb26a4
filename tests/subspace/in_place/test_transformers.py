"""Networks of transformers in a subspace: generate, save and train as ever."""

import pytest
import torch

from subspan import SubspaceModel, SubspanError
from tests.nets import scatter
from tests.pretrained import bert, gpt2, llama, t5, transformers, whisper

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore"),  # transformers has many of its own
    pytest.mark.usefixtures("forming"),
]

NETS = {"gpt2": gpt2, "llama": llama, "t5": t5, "whisper": whisper}
HOW = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "no cache": {"do_sample": False, "use_cache": False},
}


def wrapped(name, **options):
    """A network in a subspace away from θ₀, and an input."""
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
    other = SubspaceModel(NETS[name]().eval(), 50)
    other.body.load_state_dict(model.merge().state_dict())
    for key, w in other.coordinates.items():
        torch.testing.assert_close(w, model.coordinates[key], rtol=1e-3, atol=1e-4)
    assert torch.equal(tokens(other, x, "greedy"), tokens(model, x, "greedy"))


def test_a_class_that_wraps_itself_is_refused_by_from_pretrained(tmp_path):
    class Wrapped(transformers.GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            SubspaceModel(self, 50)

    gpt2().save_pretrained(tmp_path)
    with pytest.raises(SubspanError, match="from_pretrained runs has none: wrap what that returns"):
        Wrapped.from_pretrained(tmp_path)


def test_the_dtype_is_the_networks_own():
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


def test_weights_are_tied_again_with_their_biases():
    """The library pads a tied bias by nothing, and sets it."""
    model = scatter(SubspaceModel(bert("MaskedLM"), 50)).eval()
    x = torch.randint(3, 99, (2, 7))
    want = model(input_ids=x).logits
    model.tie_weights()
    assert torch.equal(model(input_ids=x).logits, want)
    with pytest.raises(SubspanError, match="computed when it is read"):
        model.cls.predictions.bias.data = model.cls.predictions.bias.detach() + 1


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
