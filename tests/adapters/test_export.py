"""A model as a LoRA: the same function in PEFT, to the last bit; or the nearest, and how near."""

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

import subspan
from subspan import SubspaceModel, SubspanError
from subspan.adapters.nearest import factorise
from subspan.checkpoint import save
from subspan.training import nets, state
from tests.adapters.networks import LORA, Block, block, lora
from tests.nets import scatter

TINY = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.arange(1, 22).view(3, 7)


@pytest.fixture(scope="module")
def hf() -> SimpleNamespace:
    """Return transformers, PEFT, and functions that make tiny networks with the same weights."""
    reason = "transformers and peft are not installed: pip install transformers peft"
    library = pytest.importorskip("transformers", reason=reason)
    peft = pytest.importorskip("peft", reason=reason)

    def bert() -> nn.Module:
        config = library.BertConfig(**TINY, intermediate_size=40, max_position_embeddings=16)
        return library.BertForSequenceClassification(config)

    def gpt2() -> nn.Module:
        config = library.GPT2Config(
            vocab_size=30, n_embd=32, n_layer=1, n_head=2, n_positions=16, pad_token_id=0
        )
        return library.GPT2ForSequenceClassification(config)

    def llama() -> nn.Module:
        config = library.LlamaConfig(**TINY, intermediate_size=40, pad_token_id=0)
        return library.LlamaForCausalLM(config)

    def same(make):  # at each call
        def build() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                return make().eval()

        return build

    return SimpleNamespace(peft=peft, bert=same(bert), gpt2=same(gpt2), llama=same(llama))


def load(hf, net, folder):
    return hf.peft.PeftModel.from_pretrained(net, folder)


def sizes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("rank", [1, 8, 16, 32])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_peft_computes_the_same_bits(name, rank, hf, tmp_path):
    build = getattr(hf, name)
    head = {"bert": "classifier", "gpt2": "score", "llama": None}[name]
    model = subspan.lora(build(), 50, rank=rank, alpha=2 * rank + 1, train_fully=head)
    scatter(model)
    wanted = model(IDS).logits
    written = subspan.export_lora(model, tmp_path / "lora")
    first = sizes(tmp_path / "lora")
    assert written.bytes == sum(map(len, first.values()))
    assert (written.rank, written.error, set(written.errors.values())) == (rank, 0, {0})
    subspan.export_lora(model, tmp_path / "lora")
    assert sizes(tmp_path / "lora") == first
    config = json.loads(first["adapter_config.json"])
    tasks = {"bert": "SEQ_CLS", "gpt2": "SEQ_CLS", "llama": "CAUSAL_LM"}
    assert (config["r"], config["task_type"]) == (rank, tasks[name])
    assert config["modules_to_save"] == (None if head is None else [head])

    there = load(hf, build(), tmp_path / "lora").eval()
    assert (there(IDS).logits != wanted).sum() == 0
    assert not torch.equal(build()(IDS).logits, wanted)
    merged, ours = there.merge_and_unload().state_dict(), model.merge().state_dict()
    assert merged.keys() == ours.keys()
    assert all(torch.equal(tensor, merged[key]) for key, tensor in ours.items())


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_peft_has_loaded_trains_on(hf, tmp_path):
    model = subspan.lora(hf.bert(), 50, rank=2, train_fully="classifier")
    scatter(model)
    subspan.export_lora(model, tmp_path)
    there = hf.peft.PeftModel.from_pretrained(hf.bert(), tmp_path, is_trainable=True)
    trained = {name: p.clone() for name, p in there.named_parameters() if p.requires_grad}
    layers = len(model.subspace.adapters)
    assert len(trained) == 2 * layers + 2
    optimizer = torch.optim.Adam(there.parameters(), lr=0.01)
    there(IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()
    assert all(not torch.equal(there.get_parameter(n), p) for n, p in trained.items())
    there.save_pretrained(tmp_path / "again")
    again = safetensors.torch.load_file(tmp_path / "again" / "adapter_model.safetensors")
    before = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert again.keys() == before.keys()


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_autocast_are_as_in_peft(dtype, hf, tmp_path):
    model = subspan.lora(hf.llama().to(dtype), 50, rank=4)
    scatter(model)
    subspan.export_lora(model, tmp_path)
    there = load(hf, hf.llama().to(dtype), tmp_path).eval()
    assert torch.equal(there(IDS).logits, model(IDS).logits)
    merged = there.merge_and_unload().state_dict()
    assert all(
        torch.equal(tensor, merged[key]) for key, tensor in model.merge().state_dict().items()
    )
    whole = subspan.lora(hf.llama(), 50, rank=4)
    scatter(whole)
    subspan.export_lora(whole, tmp_path)
    there = load(hf, hf.llama(), tmp_path).eval()
    with torch.autocast("cpu", dtype):
        assert torch.equal(there(IDS).logits, whole(IDS).logits)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_transformers_saves_a_network_that_anybody_loads(hf, tmp_path):
    net = hf.bert()
    model = subspan.lora(net, 50, rank=2, train_fully="classifier")
    scatter(model)
    net.save_pretrained(tmp_path)
    plain = type(hf.bert()).from_pretrained(tmp_path).eval()
    assert torch.equal(plain(IDS).logits, model.merge()(IDS).logits)
    # A trainer goes on from the same file: it has the coordinates, too.
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    other = subspan.lora(hf.bert(), 50, rank=2, train_fully="classifier")
    other.body.load_state_dict(state)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    key = "bert.encoder.layer.0.attention.self.query.weight"
    with pytest.raises(SubspanError, match=r"query\.weight of this state_dict is not the weight"):
        other.body.load_state_dict(state | {key: 2 * state[key]})
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    with pytest.raises(SubspanError, match="weights without the coordinates of their LoRA"):
        other.body.load_state_dict({k: t for k, t in state.items() if "subspan" not in k})


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_network_with_pefts_layers_is_refused(hf, tmp_path):
    net = hf.peft.get_peft_model(hf.bert(), hf.peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(SubspanError, match=r"query is a Linear of PEFT: merge its adapter first"):
        subspan.lora(net, 10, rank=2)
    model = SubspaceModel(net, 10)
    with pytest.raises(SubspanError, match=r"query is a Linear of PEFT"):
        subspan.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# ---- names ---------------------------------------------------------------------------------------


def test_targets_are_named_so_that_no_other_module_is_meant(tmp_path):
    net = nn.Sequential()
    net.add_module("up", nn.Linear(8, 8))
    net.add_module("inner", block())  # with another "up"
    model = subspan.lora(net, 4, rank=2, targets=["up"], exclude=["inner.up"])
    scatter(model)
    subspan.export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == "up"  # a regular expression that matches the whole name
    assert config["task_type"] is None


@pytest.mark.heavy
@pytest.mark.parametrize("targets", ["attention", "mlp", "all-linear"])
def test_a_decoder_is_as_servers_read_it(targets, hf, tmp_path):
    """The two files have all that vLLM and SGLang ask for (docs/lora.md)."""
    net = hf.llama()
    linear = {name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    subspan.export_lora(scatter(subspan.lora(net, 20, rank=4, targets=targets)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    named = config["target_modules"]
    assert isinstance(named, list)
    assert (config["r"], config["bias"], config["modules_to_save"]) == (4, "none", None)
    assert not config["use_dora"]
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    for key in keys:
        layer, letter, weight = key.removeprefix("base_model.model.").rsplit(".", 2)
        assert layer in linear - {"lm_head"}
        assert layer.rpartition(".")[2] in named
        assert (letter in ("lora_A", "lora_B"), weight) == (True, "weight")
    assert len(keys) == 2 * len(named)  # of one block


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_sounds_to_text_is_no_task_of_pefts(hf, tmp_path):
    """PEFT's word for sequences to sequences gives texts to the network."""
    from tests import pretrained

    model = scatter(subspan.lora(pretrained.whisper().eval(), 50, rank=2))
    subspan.export_lora(model, tmp_path / "sounds")
    heard = {"input_features": torch.ones(2, 8, 32), "decoder_input_ids": torch.ones(2, 3).long()}
    loaded = load(hf, pretrained.whisper().eval(), tmp_path / "sounds")
    assert torch.equal(loaded(**heard).logits, model(**heard).logits)
    subspan.export_lora(subspan.lora(pretrained.t5(), 50, rank=2), tmp_path / "texts")
    config = json.loads((tmp_path / "texts" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_head_with_a_lora_is_no_head_to_peft(hf, tmp_path):
    model = subspan.lora(hf.bert(), 50, rank=2, targets=["query", "classifier"])
    scatter(model)
    subspan.export_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
    assert torch.equal(load(hf, hf.bert(), tmp_path).eval()(IDS).logits, model(IDS).logits)


# ---- the nearest LoRA ----------------------------------------------------------------------------


def test_factors_are_the_nearest_of_their_rank():
    matrix = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 5, 8):
        a, b = factorise(matrix, rank)
        assert (a.shape, b.shape) == ((rank, 5), (7, rank))
        error = float((matrix - b.double() @ a.double()).norm())
        assert error == pytest.approx(float(singular[rank:].norm()), abs=1e-5)


def test_a_subspace_of_all_weights_is_written_as_the_nearest_lora(tmp_path):
    model = SubspaceModel(block(), 20, targets=["up.weight", "down.weight"], train_fully=["head"])
    scatter(model)
    errors = [subspan.export_lora(model, tmp_path, rank=rank).error for rank in (1, 4, 8)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6  # all that these weights can have
    written = subspan.export_lora(model, tmp_path, rank=2)
    names = ("up.weight", "down.weight")
    moved = {n: (model.weights()[n] - block().get_parameter(n)).detach() for n in names}
    tails = [torch.linalg.svdvals(d)[2:].square().sum() for d in moved.values()]
    whole = sum(d.square().sum() for d in moved.values())
    assert written.error == pytest.approx(float((sum(tails) / whole).sqrt()), rel=1e-4)
    assert str(written).splitlines()[0].endswith("relative error of rank 2")
    assert [line.split()[0] for line in str(written).splitlines()[1:]] == ["up", "down", "all"]
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    start = "base_model.model."
    product = tensors[f"{start}up.lora_B.weight"] @ tensors[f"{start}up.lora_A.weight"]
    off = float((moved["up.weight"] - product).norm() / moved["up.weight"].norm())
    assert written.errors["up"] == pytest.approx(off, rel=1e-4)
    assert torch.equal(tensors[f"{start}head.weight"], model.body.head.weight)


class Scaled(Block):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


def changed_buffer():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    model = subspan.lora(net, 4, rank=2, targets=["1"])
    scatter(model)
    return model


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (block, {}, "expected a SubspaceModel, or its network, got an ordinary Block"),
        (lora, {"rank": 3}, "this model's LoRA has rank 2, got rank=3"),
        (lora, {"rank": 0}, "rank must be an integer of at least 1"),
        (lambda: SubspaceModel(block(), 5), {}, "no linear layer has moved"),
        (lambda: scatter(SubspaceModel(block(), 5)), {}, r"words\.weight, up\.bias, norm\.weight"),
        (lambda: lora(train_fully=["up.bias"]), {}, r"up\.bias was trained fully beside the LoRA"),
        (
            lambda: subspan.lora(Scaled(), 5, **LORA | {"train_fully": ["gain"]}),
            {},
            "gain was trained fully and belongs to the network itself",
        ),
        (changed_buffer, {}, r"buffer 0\.running_\w+ was changed by training"),
    ],
)
def test_refusals_write_nothing(make, options, says, tmp_path):
    with pytest.raises(SubspanError, match=says):
        subspan.export_lora(make(), tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "lora").write_text("mine")
    with pytest.raises(SubspanError, match="is a file, and a LoRA is a folder of two"):
        subspan.export_lora(lora(), tmp_path / "lora")
    assert (tmp_path / "lora").read_text() == "mine"


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A file as ``subspan train`` leaves them, of LoRA factors."""
    extra = {"net": "mlp", "data": "digits", "image_shape": [1, 8, 8], "classes": 10, "seed": 0}
    state.seed_generators(0)
    model = subspan.lora(nets.build("mlp", (1, 8, 8), 10), 20, rank=4, train_fully="head")
    scatter(model)
    save(model, tmp_path / "model.safetensors", extra=extra)
    return tmp_path / "model.safetensors"


def test_export_by_command(checkpoint, tmp_path, cli):
    said = cli("export", checkpoint, tmp_path / "lora", "--format", "peft")
    assert (said.code, said.err) == (0, "")
    size = sum(map(len, sizes(tmp_path / "lora").values()))
    assert said.out.startswith("a LoRA of rank 4, exactly that of the model")
    assert said.out.endswith(f"{tmp_path}/lora: {size:,} bytes\n")
    said = cli("export", checkpoint, tmp_path / "w.safetensors", "--rank", "4")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "--rank is that of a LoRA: give --format peft, too" in said.err
    said = cli("export", checkpoint, tmp_path / "w.safetensors", "--format", "gguf")
    assert said.code == 2
    assert not (tmp_path / "w.safetensors").exists()
    said = cli("inspect", checkpoint)
    assert '"rank": 4' in said.out or "rank: 4" in said.out or "'rank': 4" in said.out
