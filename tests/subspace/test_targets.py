"""Presets: weights by name, found by the structure of a network."""

import pytest
import torch
from torch import nn

import subspan
from subspan import SubspaceModel, SubspanError
from subspan.subspace.targets import HEAD_RATE, PRESETS, RATES, default_rate, find_linears
from subspan.training import nets
from tests.nets import Tied

pytestmark = pytest.mark.heavy

WIDE = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
SMALL = {**WIDE, "num_hidden_layers": 2, "vocab_size": 20, "max_position_embeddings": 16}
DECODER = {**SMALL, "num_key_value_heads": 1, "pad_token_id": 0}
D = 10  # coordinates


def selected(net, **options):
    """The layers, without their repetition, whose parameters are trained."""
    return layers(SubspaceModel(net, D, **options), lambda row: row.compartment == "global")


def layers(model, which):
    return [row.tensor for row in model.summary().rows if which(row)]


def bert(kind="SequenceClassification"):
    from tests import pretrained

    return pretrained.bert(kind, **SMALL)


def of(name, config, **given):
    """Make a tiny network of transformers."""
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(getattr(transformers, config)(**given))


def torch_encoder(layers=2):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Reader(nn.Module):
    """A Transformer with a head of its own."""

    def __init__(self):
        super().__init__()
        self.rows, self.encoder = nn.Linear(4, 8), torch_encoder()
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.encoder(self.rows(x)).mean(1))


NETS = {
    "bert": bert,
    "roberta": lambda: of("RobertaForSequenceClassification", "RobertaConfig", **SMALL),
    "distilbert": lambda: of(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        vocab_size=20, dim=8, n_layers=2, n_heads=2, hidden_dim=16, max_position_embeddings=16,
    ),
    "gpt2": lambda: of(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2,
    ),
    "llama": lambda: of("LlamaForCausalLM", "LlamaConfig", **DECODER),
    "qwen2": lambda: of("Qwen2ForSequenceClassification", "Qwen2Config", **DECODER),
    "phi3": lambda: of("Phi3ForCausalLM", "Phi3Config", **DECODER),
    "mixtral": lambda: of("MixtralForCausalLM", "MixtralConfig", num_local_experts=2, **DECODER),
    "t5": lambda: of(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2,
    ),
    "vit": lambda: of(
        "ViTForImageClassification",
        "ViTConfig",
        image_size=8, patch_size=4, num_channels=1, num_hidden_layers=2, **WIDE,
    ),
    "swin": lambda: of(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=16, patch_size=4, num_channels=1, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
        window_size=2,
    ),
    "modernbert": lambda: of("ModernBertForSequenceClassification", "ModernBertConfig", **DECODER),
    "xlnet": lambda: of(
        "XLNetForSequenceClassification",
        "XLNetConfig",
        vocab_size=20, d_model=8, n_layer=2, n_head=2, d_inner=16,
    ),
    "torch": Reader,
}  # fmt: skip

# What attention and mlp choose in the first block, and the head, by the names of layers.
CHOSEN = {
    "bert": ("query key value dense", "dense", "classifier"),
    "roberta": ("query key value dense", "dense", "dense out_proj"),
    "distilbert": ("q_lin k_lin v_lin out_lin", "lin1 lin2", "pre_classifier classifier"),
    "gpt2": ("c_attn c_proj", "c_fc c_proj", ""),
    "llama": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", "lm_head"),
    "qwen2": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", "score"),
    "phi3": ("o_proj qkv_proj", "gate_up_proj down_proj", "lm_head"),
    "mixtral": ("q_proj k_proj v_proj o_proj", "experts", "lm_head"),
    "t5": ("q k v o", "wi wo", ""),
    "vit": ("q_proj k_proj v_proj o_proj", "fc1 fc2", "classifier"),
    "swin": ("q_proj k_proj v_proj o_proj", "fc1 fc2", "classifier"),
    "modernbert": ("Wqkv Wo", "Wi Wo", "dense norm classifier"),
    "xlnet": ("rel_attn", "layer_1 layer_2", "summary logits_proj"),
    "torch": ("self_attn out_proj", "linear1 linear2", "out"),
}


@pytest.fixture(params=NETS)
def named(request):
    return request.param, NETS[request.param]()


def test_presets_choose_by_structure(named):
    name, net = named
    attention, mlp, head = CHOSEN[name]
    try:
        for preset, expected in (("attention", attention), ("mlp", mlp)):
            model = SubspaceModel(net, D, targets=preset)
            trained = layers(model, lambda row: row.compartment == "global")
            first = {x.rpartition(".")[0].rpartition(".")[2]: 0 for x in trained}
            model.unwrap()
            assert " ".join(first) == expected
            assert not [
                x for x in trained if "norm" in x.lower() or "embed" in x.lower().split(".")
            ]
        if head:
            model = SubspaceModel(net, D, train_fully="head")
            fully = layers(model, lambda row: row.compartment == "fully trained")
            model.unwrap()
            assert " ".join(dict.fromkeys(x.split(".")[-2] for x in fully)) == head
        else:
            with pytest.raises(
                SubspanError, match="has no head of its own, which 'head' in targets"
            ):
                SubspaceModel(net, D, targets="head")
    except SubspanError as error:
        raise AssertionError(name) from error


def test_presets_hold_each_other_and_leave_the_head_out(named):
    name, net = named
    chosen = {}
    for preset in PRESETS[:4]:
        model = SubspaceModel(net, D, targets=preset)
        chosen[preset] = set(layers(model, lambda row: row.compartment == "global"))
        model.unwrap()
    assert not chosen["attention"] & chosen["mlp"]
    assert chosen["attention"] | chosen["mlp"] <= chosen["all-linear"]
    flat = {name for name, p in net.named_parameters() if p.dim() <= 1}
    assert chosen["norms-and-biases"] <= flat
    model = SubspaceModel(net, D, targets=["all-linear", "norms-and-biases"])
    both = set(layers(model, lambda row: row.compartment == "global"))
    assert both == chosen["all-linear"] | chosen["norms-and-biases"]
    head = CHOSEN[name][2].split()
    assert not [name for name in both if head and name.split(".")[-2] == head[-1]]


def test_linear_layers_for_lora(named):
    name, net = named
    for preset in ("attention", "mlp", "all-linear"):
        if (name, preset) in {("mixtral", "mlp"), ("xlnet", "attention"), ("torch", "attention")}:
            with pytest.raises(SubspanError, match=r"its presets are .*all-linear"):
                find_linears(net, preset)
            continue
        found = find_linears(net, preset)
        assert found
        assert all(net.get_submodule(path).weight.dim() == 2 for path in found)
        assert not {"out", *CHOSEN[name][2].split()[-1:]} & set(found)


@pytest.mark.parametrize("kind", ["Model", "Backbone"])
def test_a_base_model_whose_encoder_has_the_name_of_one_has_no_head(kind):
    sizes = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 2, **WIDE}
    net = of(f"DINOv3ViT{kind}", "DINOv3ViTConfig", **sizes)
    with pytest.raises(SubspanError, match="has no head of its own"):
        SubspaceModel(net, D, train_fully="head")
    assert "norm.weight" in selected(net, targets="norms-and-biases")


def test_experts_of_an_attention_are_its_projections():
    """In JetMoE each has queries and an output of its own."""
    sizes = {"kv_channels": 4, "num_local_experts": 2, "num_experts_per_tok": 1}
    net = of("JetMoeForCausalLM", "JetMoeConfig", **DECODER | sizes | {"num_key_value_heads": 2})
    attention = [x for x in selected(net, targets="attention") if x.startswith("model.layers.0.")]
    names = "kv_proj experts.input_linear experts.output_linear experts.router.layer"
    assert sorted(attention) == [
        f"model.layers.0.self_attention.{x}.weight" for x in sorted(names.split())
    ]


def test_vectors_of_many_dimensions_are_no_stacks_of_experts():
    """RWKV mixes times by (1, 1, n) vectors beside its linear layers."""
    sizes = {"hidden_size": 8, "attention_hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 20}
    net = of("RwkvForCausalLM", "RwkvConfig", context_length=16, **sizes)
    mlp = selected(net, targets="mlp")
    assert {x.partition("feed_forward.")[2] for x in mlp} == {
        "key.weight", "receptance.weight", "value.weight",
    }  # fmt: skip


def test_find_linears_takes_patterns():
    net = bert()
    assert find_linears(net, ["query", r".*layer\.1.*key"]) == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.self.key",
    ]
    assert find_linears(net, "classifier") == ["classifier"] == find_linears(net, "head")
    with pytest.raises(SubspanError, match="matches no linear layer"):
        find_linears(net, "LayerNorm")
    with pytest.raises(SubspanError, match="no parameter of one dimension"):
        find_linears(net, "norms-and-biases")


# ---- networks of people's own --------------------------------------------------------------------


class Block(nn.Module):
    """A block as CLIP has it, whose own name speaks of attention."""

    def __init__(self):
        super().__init__()
        self.attn, self.norm = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class ResidualAttentionBlock(Block):
    pass


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(8, 4) for _ in range(3))


class SelfAttention(nn.Module):
    """An attention of a list of heads."""

    def __init__(self):
        super().__init__()
        self.heads, self.proj = nn.ModuleList([Head(), Head()]), nn.Linear(8, 8)


class AttentionModel(nn.Module):
    """A network whose own name, and its encoder's, speaks of attention."""

    def __init__(self, block):
        super().__init__()
        self.attention_encoder = nn.ModuleDict({"blocks": nn.Sequential(block(), block())})
        self.out = nn.Linear(8, 3)


class HeadsBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.sa, self.ffwd = SelfAttention(), nn.Linear(8, 8)


@pytest.mark.parametrize("block", [Block, ResidualAttentionBlock, HeadsBlock])
def test_names_of_blocks_and_networks_do_not_count(block):
    attention = selected(AttentionModel(block), targets="attention")
    mlp = selected(AttentionModel(block), targets="mlp")
    assert attention
    assert all(".attn." in name or ".sa." in name for name in attention)
    assert mlp
    assert all(".mlp." in name or ".ffwd." in name for name in mlp)
    assert selected(AttentionModel(block), targets="head") == ["out.weight", "out.bias"]


def test_what_is_called_attention_and_holds_no_layers_is_none():
    net = nn.Sequential(nn.Linear(8, 8))
    net.attention_norm, net.attn_scale = nn.LayerNorm(8), nn.Embedding(4, 8)
    net.last = nn.Linear(8, 2)
    with pytest.raises(SubspanError, match="has no module that is called attention"):
        SubspaceModel(net, D, targets="attention")


def test_the_head_of_a_network_around_a_pretrained_one():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(8, 2)  # the first, and the base's last layer is linear
            self.base = bert().bert

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = bert()

    assert selected(Around(), targets="head") == ["classifier.weight", "classifier.bias"]
    assert selected(Inside(), targets="head") == [
        f"model.classifier.{x}" for x in ("weight", "bias")
    ]
    with pytest.raises(SubspanError, match="BertModel has no head of its own"):
        SubspaceModel(bert().bert, D, targets="head")


def test_the_head_around_a_part_of_a_base_model():
    vision = {**WIDE, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    both = {"text_config": DECODER, "vision_config": vision}
    classifier = ["classifier.weight", "classifier.bias"]
    net = of("CLIPForImageClassification", "CLIPConfig", **both)
    assert selected(net, targets="head") == classifier
    # A part of its vision_model is called head, which "head" took for what was meant.
    net = of("SiglipForImageClassification", "SiglipConfig", **both)
    with pytest.raises(SubspanError, match=r"'head' in train_fully is a preset, .* 'preset:head'"):
        SubspaceModel(net, D, train_fully="head")
    assert selected(net, targets="preset:head") == classifier


def test_blocks_without_an_attention_have_an_mlp_like_the_others():
    kinds = {"layer_types": ["conv", "full_attention"]}
    names = selected(of("Lfm2ForCausalLM", "Lfm2Config", **DECODER, **kinds), targets="mlp")
    assert names == [
        f"model.layers.{i}.feed_forward.{layer}.weight"
        for i in (0, 1)
        for layer in ("w1", "w3", "w2")
    ]


def test_a_tied_head_is_none_and_untied_parts_of_it_are():
    assert not [name for name in selected(bert("MaskedLM"), targets="head") if "embed" in name]
    rows = SubspaceModel(bert("MaskedLM"), D, train_fully="head").summary().rows
    fully = [row.tensor for row in rows if row.compartment == "fully trained"]
    assert "cls.predictions.transform.dense.weight" in fully
    assert selected(bert("QuestionAnswering"), targets="head") == [
        "qa_outputs.weight",
        "qa_outputs.bias",
    ]
    assert not [
        x for x in find_linears(bert("MaskedLM")) if x.startswith("cls.predictions.decoder")
    ]


def test_a_layer_that_is_tied_to_an_embedding_is_an_output():
    assert selected(Tied(), targets="all-linear") == ["hidden.weight", "hidden.bias"]
    assert find_linears(Tied()) == ["hidden"]


def test_other_networks():
    assert selected(nets.build("lenet"), targets="head") == ["fc3.weight", "fc3.bias"]
    assert selected(nets.build("lenet"), targets="all-linear") == [
        f"{layer}.{name}" for layer in ("fc1", "fc2") for name in ("weight", "bias")
    ]  # fmt: skip
    named = nn.Sequential()
    named.head, named.more = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), nn.Linear(2, 2)
    assert all(name.startswith("head.") for name in selected(named, targets="head"))


@pytest.mark.parametrize("preset", ["attention", "mlp"])
def test_what_a_network_lacks_is_refused_with_what_it_has(preset):
    net = nets.build("lenet")
    presets = (
        r"its presets are norms-and-biases \(226 numbers in 4 parameters\), all-linear \(.*\), "
    )
    for option in ("targets", "exclude", "train_fully"):
        with pytest.raises(
            SubspanError, match=f"Sequential has no .* {preset!r} in {option} asks for: {presets}"
        ):
            SubspaceModel(net, D, **{option: preset})
    with pytest.raises(SubspanError, match="in compartments asks for"):
        SubspaceModel(net, compartments={preset: 5, ".*": 5})
    assert all(type(module) is not SubspaceModel for module in net.modules())
    assert SubspaceModel.of(net) is None


def test_unknown_names_and_ambiguous_heads():
    with pytest.raises(
        SubspanError, match=r"'atention': did you mean attention\?.*; presets are att"
    ):
        SubspaceModel(torch_encoder(), D, targets="atention")
    with pytest.raises(
        SubspanError, match=r"unknown preset in targets 'heads': did you mean head\?"
    ):
        SubspaceModel(torch_encoder(), D, targets="preset:heads")
    with pytest.raises(SubspanError, match=r"last layer, layers\.1\.norm2, is not linear"):
        SubspaceModel(torch_encoder(), D, targets="head")
    two = nn.Sequential()
    two.body, two.policy, two.value = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 1)
    with pytest.raises(SubspanError, match="policy and value end it beside each other"):
        SubspaceModel(two, D, train_fully="head")


# ---- presets and patterns ------------------------------------------------------------------------


def test_presets_and_patterns_mix():
    names = selected(bert(), targets=["attention", "pooler.dense"], exclude=["value", "preset:mlp"])
    assert {name.split(".")[-2] for name in names} == {"query", "key", "dense"}
    assert any("pooler" in name for name in names)
    model = SubspaceModel(bert(), compartments={"attention": 5, "preset:mlp": 4, ".*": 3})
    assert {part.name: part.dim for part in model.compartments} == {
        "attention": 5,
        "mlp": 4,
        ".*": 3,
    }
    assert all("attention" in piece.tensor for piece in model.compartments[0].pieces)
    with pytest.raises(SubspanError, match="names 'attention' twice"):
        SubspaceModel(bert(), compartments={"attention": 5, "preset:attention": 5, ".*": 3})


def test_a_module_that_has_the_name_of_a_preset():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
            self.out = nn.Linear(8, 2)

    with pytest.raises(
        SubspanError, match=r"chooses 4 parameters .* a module that holds 2: give 'pre"
    ):
        SubspaceModel(Attends(), D, targets="attention")
    assert len(selected(Attends(), targets="preset:attention")) == 4
    assert selected(Attends(), targets="head") == ["head.weight", "head.bias"]  # not the last
    mlp = nn.Sequential()
    mlp.mlp, mlp.out = nn.Linear(4, 8), nn.Linear(8, 2)
    assert selected(mlp, targets="mlp") == ["mlp.weight", "mlp.bias"]  # which has no preset


def test_a_file_chooses_the_same_again(tmp_path):
    model = SubspaceModel(
        bert(), compartments={"attention": 9, "preset:norms-and-biases": 8},
        targets=["attention", "norms-and-biases"], train_fully="head",
    )  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p)
    subspan.save(model, tmp_path / "model.safetensors")
    again = subspan.load(tmp_path / "model.safetensors", bert())
    assert again.recipe == model.recipe
    assert again.recipe["targets"] == ["attention", "norms-and-biases"]
    assert again.summary() == model.summary()
    ids = torch.randint(20, (2, 5))
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("preset", "refused"),
    [
        ("targets", "other parameters than those that 'head'"),
        ("train_fully", "from other initial weights"),
    ],
)
def test_a_file_whose_presets_mean_other_weights_is_refused(tmp_path, monkeypatch, preset, refused):
    torch.manual_seed(0)
    net = Reader()
    model = SubspaceModel(net, D, **{preset: "head"})
    subspan.save(model, tmp_path / "model.safetensors")
    model.unwrap()
    from subspan.subspace.structure import Choice, Structure

    monkeypatch.setattr(Structure, "head", lambda self: Choice(frozenset(["rows"])))
    with pytest.raises(SubspanError, match=refused):
        subspan.load(tmp_path / "model.safetensors", net)
    assert SubspaceModel.of(net) is None


# ---- rates ---------------------------------------------------------------------------------------


def test_groups_of_parameters_have_their_own_rates():
    model = SubspaceModel(
        bert(), 40, targets="norms-and-biases", train_fully="head", compartments="tensor"
    )
    coordinates, head = model.parameter_groups()
    assert coordinates["lr"] == default_rate("norms-and-biases", 40)
    assert head["lr"] == HEAD_RATE
    assert {id(p) for p in coordinates["params"]} == {id(w) for w in model.coordinates.values()}
    assert {id(p) for p in head["params"]} == {id(p) for p in model.fully_trained().values()}
    assert len(coordinates["params"]) + len(head["params"]) == len(list(model.parameters()))
    rates = [group["lr"] for group in model.parameter_groups(lr=0.1, head_lr=0.2)]
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1, head_lr=0.2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    assert rates == [0.1, 0.2]
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


def test_groups_hold_what_is_trained_now():
    model = SubspaceModel(nets.build("lenet"), D)
    (group,) = model.parameter_groups()
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    model.requires_grad_(False)
    with pytest.raises(SubspanError, match="all parameters are frozen"):
        model.parameter_groups()


def test_a_rate_goes_by_the_preset_and_the_length_of_a_step():
    assert default_rate("attention", 1000) == default_rate(["preset:attention"], 1000)
    assert default_rate("mlp", 10) == 10 * default_rate("mlp", 1000)
    assert default_rate(["mlp", "attention"], 1000) == default_rate(None, 1000) == RATES[""]
    assert default_rate(["subspan_A", "subspan_B"], 1000) == RATES["factors"]
    assert set(RATES) == {*PRESETS, "factors", ""}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_trainer_takes_the_groups_and_schedules_both_rates(way, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = SubspaceModel(bert(), D, train_fully="head")
    groups = model.parameter_groups(lr=0.1, head_lr=0.01)
    given = {
        "optimizers": (torch.optim.AdamW(groups), None),
        "optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups}),
    }
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    data = [{"input_ids": torch.arange(4), "labels": torch.tensor(k % 2)} for k in range(8)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, **{way: given[way]})
    trainer.train()
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert rates == [0.1, 0.01]
    assert all(bool(w.any()) for w in model.coordinates.values())
