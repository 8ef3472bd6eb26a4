"""Trainers of TRL, unchanged: they are given a network in a subspace, or its handle."""

import copy
import types

import pytest
import torch

from subspan import SubspaceModel
from tests.nets import scatter
from tests.pretrained import llama, transformers
from tests.trainers.test_trainer import DEFAULTS, both, trained

pytestmark = pytest.mark.filterwarnings("ignore")
trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

WORDS = ["<pad>", "<end>", "<unknown>", *(f"w{n}" for n in range(60))]
TEXT = datasets.Dataset.from_dict({"text": [f"w{n} w{n + 1} w{n + 2}" for n in range(40)]})
PROMPTS = datasets.Dataset.from_dict({"prompt": [f"w{n} w{n + 1}" for n in range(40)]})


@pytest.fixture(scope="module")
def words():
    """A tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: n for n, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )


@pytest.fixture(scope="module")
def base(words, tmp_path_factory):
    """The folder of a pretrained model."""
    folder = tmp_path_factory.mktemp("base")
    llama(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def wrapped(base, through):
    model = SubspaceModel(transformers.AutoModelForCausalLM.from_pretrained(base), 20)
    return model, model if through == "handle" else model.body


def fine_tuned(base, words, through, folder, **given):
    model, net = wrapped(base, through)
    arguments = trl.SFTConfig(str(folder), **DEFAULTS | {"bf16": False} | given)
    running = trl.SFTTrainer(
        net, arguments, train_dataset=TEXT, eval_dataset=TEXT, processing_class=words
    )
    running.train()
    return model, running


def test_supervised(base, words, tmp_path):
    found = {}
    for through in ("network", "handle"):
        model, running = fine_tuned(base, words, through, tmp_path)
        loss = running.evaluate()["eval_loss"]
        found[through] = trained(model)
        merged, x = model.merge().eval(), torch.arange(3, 9)[None]
        twin, logits = copy.deepcopy(model.eval()), model(input_ids=x).logits
        ordinary = trl.SFTTrainer(
            merged, running.args, train_dataset=TEXT, eval_dataset=TEXT, processing_class=words
        )
        assert loss == pytest.approx(ordinary.evaluate()["eval_loss"], rel=1e-5)
        scatter(model)  # the trainer's own forward has to do with this network
        torch.testing.assert_close(merged(input_ids=x).logits, logits)
        torch.testing.assert_close(twin(input_ids=x).logits, logits)
        assert torch.equal(
            model.generate(x, max_new_tokens=4), model.merge().generate(x, max_new_tokens=4)
        )
    assert torch.equal(*found.values())
    assert found["handle"].any()


def test_what_a_trainer_makes_of_forward_reads_weights_that_are_kept(base, words, tmp_path):
    """Its loss reads the head beside the network: in a call all of θ is formed once."""
    model, _ = fine_tuned(base, words, "handle", tmp_path)
    formed, once = [], model.subspace._theta
    model.subspace._theta = lambda *given: formed.append(given) or once(*given)
    model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None], fused_lm_head=True)
    assert len(formed) == len(model.subspace.blocks)


def rewarded(base, words, through, folder, **given):
    model, net = wrapped(base, through)
    given = {"num_generations": 4, "max_completion_length": 6, "bf16": False} | given
    running = trl.GRPOTrainer(
        net,
        lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        args=trl.GRPOConfig(str(folder), **DEFAULTS | given),
        train_dataset=PROMPTS,
        processing_class=words,
    )
    running.train()
    return model, running


@pytest.mark.slow
def test_by_rewards(base, words, tmp_path):
    found = [trained(rewarded(base, words, how, tmp_path)[0]) for how in ("network", "handle")]
    assert torch.equal(*found)
    assert found[0].any()


@pytest.mark.slow
@both
def test_by_rewards_with_a_reference_that_follows(through, base, words, tmp_path):
    model, running = rewarded(
        base,
        words,
        through,
        tmp_path,
        beta=0.1,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
    )
    theta = dict(model.merge().named_parameters())
    for name, p in running.ref_model.named_parameters():
        torch.testing.assert_close(p, theta[name])


@both
def test_copies_of_the_weights_are_those_of_the_network(through, base):
    """A reference model is brought near to the network, and vLLM is sent its weights."""
    from trl.generation.vllm_generation import VLLMGeneration
    from trl.trainer.callbacks import SyncRefModelCallback

    model, net = wrapped(base, through)
    scatter(model)
    want = dict(model.merge().named_parameters())
    reference = transformers.AutoModelForCausalLM.from_pretrained(base)
    SyncRefModelCallback._sync_target_model(net, reference, 1.0)
    assert all(torch.allclose(p, want[name]) for name, p in reference.named_parameters())
    there = types.SimpleNamespace(
        model=net,
        _dist=types.SimpleNamespace(is_fsdp=False, gather_params=lambda _: torch.no_grad()),
        _fix_param_name_to_vllm=lambda name: name,
    )
    sent = dict(VLLMGeneration._iter_named_params(there))
    assert sent.keys() == want.keys()
    assert all(torch.equal(p, want[name]) for name, p in sent.items())
