"""Models on the Hub: published as coordinates, and loaded with the base that their file names."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import subspan
from subspan import SubspaceModel, SubspanError, checkpoint, cli
from subspan.checkpoint.base import _difference
from subspan.hub.card import MARK
from subspan.hub.loading import _configure
from tests.hub.server import TOKEN, Hub
from tests.pretrained import bert, transformers

hub_client = pytest.importorskip("huggingface_hub", reason="needs the extra hub")

pytestmark = pytest.mark.heavy

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"hidden_size": 16, "vocab_size": 50, "max_position_embeddings": 16}
TOKENS = {"input_ids": torch.arange(12).view(2, 6)}
HEAD = ["classifier"]


def make_base(folder, seed=0, **options):
    """Save a tiny BERT without a head, and return the files of its folder."""
    torch.manual_seed(seed)
    net = transformers.BertModel(transformers.BertConfig(**SIZES), **options)
    net.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Files of three networks: two with a pooler, one without."""
    folder = tmp_path_factory.mktemp("bases")
    options = {"one": (0, {}), "two": (1, {}), "bare": (0, {"add_pooling_layer": False})}
    for name, (seed, more) in options.items():
        make_base(folder / name, seed, **more)
    return folder


@pytest.fixture
def hub(bases, tmp_path, monkeypatch):
    """A Hub of this machine with the base ``org/base``, and an empty cache."""
    server = Hub()
    constants = hub_client.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server.first = server.add("org/base", files(bases / "one"))
    yield server
    server.shutdown()
    server.server_close()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def classifier(name, labels=3, **options):
    kind = transformers.BertForSequenceClassification
    return kind.from_pretrained(name, num_labels=labels, **options)


@torch.no_grad()
def scatter(model):
    """Move the coordinates and the head away from where they began."""
    for n, p in enumerate(model.parameters()):
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)) * 0.1)
    return model.eval()


def variant(name, dim=40, labels=3, **options):
    options = {"train_fully": HEAD} | options
    return scatter(SubspaceModel(classifier(name, labels), dim, **options))


def logits(model):
    with torch.no_grad():
        return model.eval()(**TOKENS).logits


def assert_same(loaded, model):
    assert torch.equal(logits(loaded), logits(model))


# ---- there and back --------------------------------------------------------------------------


def test_a_published_model_is_loaded_by_its_name_alone(hub):
    model = variant("org/base")
    url = model.push_to_hub("user/small", scores={"accuracy": 91.5}, token=TOKEN)
    repository = hub.repositories["user/small"]
    commit, published = repository.commits[-1]
    assert url == f"{hub.url}/user/small/commit/{commit}"
    assert len(repository.commits) == 2  # made, and filled at once
    assert published.keys() == {".gitattributes", "model.safetensors", "README.md"}
    loaded = subspan.load("user/small")
    assert isinstance(loaded, SubspaceModel)
    assert type(loaded.body) == transformers.BertForSequenceClassification  # noqa: E721
    assert_same(loaded, model)
    assert subspan.load("user/small", revision=commit).recipe == model.recipe


def test_the_file_names_its_base_and_is_small(hub, tmp_path):
    model = variant("org/base", 1000, targets=[".*encoder.*"])
    header, tensors = checkpoint.contents(model, {"scores": {"accuracy": 91.5, "f1": 90.25}})
    assert header["base"] == {
        "repo": "org/base",
        "revision": hub.first,
        "class": "transformers.BertForSequenceClassification",
        "dtype": "float32",
        "config": {"num_labels": 3},
    }
    head = sum(t.numel() for name, t in tensors.items() if name != "coordinates")
    assert len(checkpoint.to_bytes(header, tensors)) - 4 * head <= 5_000


def test_the_card_says_what_the_model_is_and_runs(hub):
    model = variant("org/base")
    model.push_to_hub(
        "user/small",
        scores={"accuracy": 91.5},
        card={"license": "apache-2.0", "tags": ["reviews"]},
        token=TOKEN,
    )
    card = hub_client.ModelCard(hub.repositories["user/small"].commits[-1][1]["README.md"].decode())
    assert card.data.to_dict() == {
        "library_name": "subspan",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "tags": ["subspan", "reviews"],
    }
    for fact in (f"org/base at revision {hub.first}", "| 40 |", "| accuracy | 91.5 |", "seed 0"):
        assert fact in card.text
    names = {}
    exec(card.text.split("```python")[1].split("```")[0], names)
    assert_same(names["net"], model)


def test_a_text_that_somebody_wrote_stays(hub):
    model = variant("org/base")
    model.push_to_hub("user/small", token=TOKEN)
    repository = hub.repositories["user/small"]
    ours = repository.commits[-1][1]["README.md"].decode()
    assert MARK in ours
    theirs = ours.replace(MARK, "").replace("# small", "# Mine").replace("tags:", "tags:\n- own")
    repository.commit({"README.md": theirs.encode()})
    scatter(SubspaceModel.of(model.body)).push_to_hub("user/small", scores={"f1": 1.0}, token=TOKEN)
    card = repository.commits[-1][1]["README.md"].decode()
    assert "# Mine" in card
    assert "f1" not in card
    assert hub_client.ModelCard(card).data.tags == ["subspan", "own"]


def test_metadata_of_a_card_are_as_they_were_given_or_refused(hub):
    model = variant("org/base")
    given = {"tags": "mine", "base_model": "org/other"}
    scores = {"a|b\nc": 1.0}
    model.push_to_hub("user/small", card=given, scores=scores, token=TOKEN)
    repository = hub.repositories["user/small"]
    card = hub_client.ModelCard(repository.commits[-1][1]["README.md"].decode())
    assert card.data.tags == ["subspan", "mine"]
    assert card.data.base_model == "org/other"
    assert "| a\\|b c | 1.0 |" in card.text
    model.push_to_hub("user/small", extra={"scores": [1, 2]}, token=TOKEN)
    for broken in ("---\na: [b\n---\ntext", "---\n- a\n---\ntext"):
        repository.commit({"README.md": broken.encode()})
        before = len(repository.commits)
        with pytest.raises(SubspanError, match=r"from the README\.md of user/small \(.*: mend"):
            model.push_to_hub("user/small", token=TOKEN)
        assert len(repository.commits) == before


@pytest.mark.parametrize("what", ["scores", "card", "extra"])
def test_values_without_names_are_refused(hub, what):
    with pytest.raises(SubspanError, match=f"{what} must have a name for each value"):
        variant("org/base").push_to_hub("user/small", token=TOKEN, **{what: [0.5]})


def test_the_networks_own_method_publishes_all_weights(hub):
    model = variant("org/base")
    model.body.push_to_hub("user/whole", token=TOKEN)
    whole = transformers.BertForSequenceClassification.from_pretrained("user/whole")
    assert torch.equal(logits(whole), logits(model))


class Own(nn.Module, hub_client.PyTorchModelHubMixin):
    """A network of no library, with the methods of the Hub's mixin."""

    def __init__(self, width=8):
        super().__init__()
        self.inner, self.out = nn.Linear(4, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.out(self.inner(x).tanh())


def test_a_network_with_the_mixin_keeps_its_methods(hub, tmp_path):
    """Its own publish all weights, ours the coordinates."""
    Own(16).save_pretrained(tmp_path / "base")
    model, x = SubspaceModel(Own.from_pretrained(tmp_path / "base"), 5), torch.randn(3, 4)
    scatter(model)
    model.body.push_to_hub("user/whole", token=TOKEN)
    assert torch.equal(Own.from_pretrained("user/whole")(x), model(x))
    for number, one in enumerate((model, model.body)):
        one.save_pretrained(tmp_path / str(number))
        assert torch.equal(Own.from_pretrained(tmp_path / str(number))(x), model(x))
    model.push_to_hub("user/small", token=TOKEN)
    loaded = subspan.load("user/small", Own.from_pretrained(tmp_path / "base"))
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(SubspanError, match="does not name a network that can be fetched"):
        subspan.load("user/small")


def test_a_file_is_enough_wherever_its_base_can_be_found(hub, bases, tmp_path):
    for name in ("org/base", str(bases / "one")):
        model = variant(name)
        subspan.save(model, tmp_path / "m.safetensors")
        torch.manual_seed(5)  # of the head that is drawn
        assert_same(subspan.load(tmp_path / "m.safetensors"), model)
        subspan.save(subspan.load(tmp_path / "m.safetensors"), tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_a_folder_is_a_repository_of_this_machine(hub, tmp_path):
    model = variant("org/base")
    subspan.save(model, tmp_path / "model.safetensors")
    assert_same(subspan.load(tmp_path), model)


def test_what_was_changed_in_the_configuration_comes_back(hub, tmp_path):
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    net = classifier("org/base", 2, layer_norm_eps=0.5, **labels)
    net.config.pad_token_id = 7  # which the embedding does not hear of
    model = scatter(SubspaceModel(net, 40, train_fully=HEAD))
    subspan.save(model, tmp_path / "m.safetensors")
    loaded = subspan.load(tmp_path / "m.safetensors")
    assert loaded.config.to_dict() == net.config.to_dict()
    assert str(loaded) == str(model)
    assert_same(loaded, model)


def test_a_head_of_another_size_takes_the_place_of_the_bases(hub, bases, tmp_path):
    classifier(str(bases / "one"), 2).save_pretrained(tmp_path / "headed")
    hub.add("org/headed", files(tmp_path / "headed"))
    net = classifier("org/headed", 3, ignore_mismatched_sizes=True)
    model = scatter(SubspaceModel(net, 40, train_fully=HEAD))
    subspan.save(model, tmp_path / "m.safetensors")
    assert_same(subspan.load(tmp_path / "m.safetensors"), model)


def test_dtypes_come_back(hub, tmp_path):
    net = classifier("org/base", dtype=torch.bfloat16)
    net.classifier.float()
    model = scatter(SubspaceModel(net, 40, train_fully=HEAD))
    subspan.save(model, tmp_path / "m.safetensors")
    loaded = subspan.load(tmp_path / "m.safetensors")
    for name, p in model.body.state_dict().items():
        assert p.dtype == loaded.body.state_dict()[name].dtype
        assert torch.equal(p, loaded.body.state_dict()[name])


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_that_was_converted_comes_back_as_it_is(hub, before, after):
    model = SubspaceModel(classifier("org/base", dtype=before), 40, train_fully=HEAD).to(after)
    if after == torch.float16:
        model.classifier.float()
    scatter(model).push_to_hub("user/small", token=TOKEN)
    loaded = subspan.load("user/small")
    for name, p in model.body.named_parameters():
        twin = loaded.body.get_parameter(name)
        assert twin.dtype == p.dtype
        assert torch.equal(twin.data, p.data)
    assert_same(*(m.merge().to(after) for m in (loaded, model)))


def test_a_network_with_replaced_parts_names_no_base(hub, tmp_path):
    net = classifier("org/base")
    net.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.Tanh()
    model = SubspaceModel(net, 40, train_fully=HEAD)
    assert "base" not in checkpoint.contents(model)[0]
    with pytest.raises(SubspanError, match="or parts of it were replaced since"):
        model.push_to_hub("user/small", token=TOKEN)
    with pytest.raises(SubspanError, match="cannot be the whole base: parts of the network were"):
        model.push_to_hub("user/small", base="org/base", token=TOKEN)
    assert "user/small" not in hub.repositories


def test_networks_that_nobody_can_fetch_are_given_to_load(hub, tmp_path):
    def build():
        return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))

    torch.manual_seed(0)
    for net, model in ((build, SubspaceModel.from_seed(build, 5)), (build(), None)):
        model = scatter(model or SubspaceModel(net, 5))
        model.push_to_hub("user/own", token=TOKEN)
        card = hub.repositories["user/own"].commits[-1][1]["README.md"].decode()
        named = {"build": build, "net": model.merge() if net is build else model.unwrap()}
        exec(card.split("```python")[1].split("```")[0], named)
        assert named["model"].recipe["dim"] == 5
    with pytest.raises(SubspanError, match="does not name a network that can be fetched"):
        subspan.load("user/own")
    with pytest.raises(SubspanError, match="no class of Transformers: leave base out"):
        subspan.save(SubspaceModel(build(), 5), tmp_path / "m", base="org/base")
    with pytest.raises(SubspanError, match="drawn from a seed: leave base out"):
        subspan.save(SubspaceModel.from_seed(build, 5), tmp_path / "m", base="org/base")
    with pytest.raises(SubspanError, match="base='org/other' is not in the cache"):
        subspan.save(variant("org/base"), tmp_path / "m", base="org/other")


def test_lora_factors_are_published_alike(hub):
    model = scatter(subspan.lora(classifier("org/base"), 40, rank=2, train_fully=HEAD))
    model.push_to_hub("user/factors", token=TOKEN)
    assert "LoRA factors" in hub.repositories["user/factors"].commits[-1][1]["README.md"].decode()
    assert_same(subspan.load("user/factors"), model)


def test_inspect_takes_a_repository(hub, capsys):
    variant("org/base").push_to_hub("user/small", token=TOKEN)
    assert cli.main(["inspect", "user/small"]) == 0
    assert "org/base" in capsys.readouterr().out


# ---- bases that cannot be right --------------------------------------------------------------


def test_a_base_of_another_revision_is_refused_by_both_names(hub, bases, tmp_path):
    subspan.save(variant("org/base"), tmp_path / "m.safetensors")
    second = hub.add("org/base", files(bases / "two"))
    net = classifier("org/base")
    before = {name: p.clone() for name, p in net.named_parameters()}
    here, there = (f"org/base at revision {commit} in float32" for commit in (second, hub.first))
    match = f"trained from {there}, and this is {here}"
    with pytest.raises(SubspanError, match=match):
        subspan.load(tmp_path / "m.safetensors", net)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert SubspaceModel.of(net) is None
    assert subspan.load(tmp_path / "m.safetensors")  # which has its own revision


def test_a_base_in_another_dtype_is_refused_by_both(hub, tmp_path):
    subspan.save(variant("org/base"), tmp_path / "m.safetensors")
    net = classifier("org/base", dtype=torch.bfloat16)
    with pytest.raises(SubspanError, match=r"in float32, and this is .* in bfloat16\): give"):
        subspan.load(tmp_path / "m.safetensors", net)


def test_weights_drawn_at_random_are_refused_by_name(hub, bases, tmp_path):
    hub.add("org/bare", files(bases / "bare"))
    model = variant("org/bare")
    subspan.save(model, tmp_path / "m.safetensors")
    match = r"org/bare at revision \w+ does not have \(bert.pooler.dense.bias, bert.pool"
    with pytest.raises(SubspanError, match=match):
        subspan.load(tmp_path / "m.safetensors")
    with pytest.raises(SubspanError, match=f"nothing was published.* the file .*{match}"):
        model.push_to_hub("user/small", token=TOKEN)
    assert "user/small" not in hub.repositories
    model = variant("org/bare", train_fully=[*HEAD, "pooler.dense"])
    model.push_to_hub("user/small", token=TOKEN)
    assert_same(subspan.load("user/small"), model)


def test_a_folder_is_published_by_the_repository_that_has_it(hub, bases):
    model = variant(str(bases / "one"))
    with pytest.raises(SubspanError, match=r"one, a folder that others do not have: .*base="):
        model.push_to_hub("user/small", token=TOKEN)
    other = hub.add("org/base", files(bases / "two"))
    with pytest.raises(SubspanError, match=r"nothing was published.*other initial weights"):
        model.push_to_hub("user/small", base="org/base", token=TOKEN)
    with pytest.raises(SubspanError, match="org/base has no revision 9 on the Hub"):
        model.push_to_hub("user/small", base="org/base@9", token=TOKEN)
    assert "user/small" not in hub.repositories
    assert other != hub.first
    model.push_to_hub("user/small", base=f"org/base@{hub.first}", token=TOKEN)
    assert_same(subspan.load("user/small"), model)


def test_a_network_of_no_name_is_not_published(hub):
    net = bert()
    with pytest.raises(SubspanError, match="is in no subspace"):
        subspan.push_to_hub(net, "user/small", token=TOKEN)
    with pytest.raises(SubspanError, match="which repository it was loaded from"):
        SubspaceModel(net, 40).push_to_hub("user/small", token=TOKEN)


def forge(path, **base):
    """A file whose header names another base."""
    header, tensors = checkpoint.read(path)
    header["base"] |= base
    path.write_bytes(checkpoint.to_bytes(header, tensors))


@pytest.mark.parametrize(
    "name", ["os.system", "transformers.BertConfig", "transformers.pipeline", "transformers.Bertt"]
)
def test_a_file_names_classes_of_networks_only(name, hub, tmp_path):
    subspan.save(variant("org/base"), path := tmp_path / "m.safetensors")
    forge(path, **{"class": name})
    with pytest.raises(SubspanError, match=f"is of a {name}, which transformers"):
        subspan.load(path)


def test_a_file_sets_nothing_that_runs(hub, tmp_path):
    subspan.save(variant("org/base"), path := tmp_path / "m.safetensors")
    forge(
        path, config={"num_labels": 3, "_attn_implementation": "evil/kernel", "auto_map": {"x": 1}}
    )
    loaded = subspan.load(path)
    assert loaded.config._attn_implementation != "evil/kernel"
    assert not hasattr(loaded.config, "auto_map")
    forge(path, repo=3)
    with pytest.raises(SubspanError, match="its base cannot be read"):
        subspan.load(path)


def test_a_file_sets_nothing_that_runs_in_a_part_of_a_configuration():
    """Networks of several parts have a configuration for each."""
    ours, theirs = transformers.CLIPConfig(), transformers.CLIPConfig()
    ours.text_config.hidden_size, ours.vision_config.id2label = 64, {0: "cat", 1: "dog"}
    evil = {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel", "new": 1}
    changes = json.loads(json.dumps(_difference(ours, theirs)))
    changes["text_config"] |= evil | {"auto_map": {"x": 1}}
    _configure(theirs, changes)
    assert theirs.to_dict() == ours.to_dict()
    assert theirs.text_config._attn_implementation != "evil/kernel"
    assert not hasattr(theirs.text_config, "auto_map")


def test_pickled_weights_are_not_read(hub, bases, tmp_path):
    pickled = files(bases / "one")
    safetensors_file = tmp_path / "w"
    safetensors_file.write_bytes(pickled.pop("model.safetensors"))
    torch.save(safetensors.torch.load_file(safetensors_file), tmp_path / "bin")
    hub.add("org/pickled", pickled | {"pytorch_model.bin": (tmp_path / "bin").read_bytes()})
    subspan.save(variant("org/pickled"), path := tmp_path / "m.safetensors")
    with pytest.raises(SubspanError, match=r"org/pickled .*safetensors"):
        subspan.load(path)
    config = json.loads(pickled["config.json"]) | {"transformers_weights": "adapter_model.bin"}
    hub.add("org/pickled", {"config.json": json.dumps(config).encode()})
    forge(path, revision="main")
    with pytest.raises(SubspanError, match=r"in adapter_model.bin, which is not safetensors"):
        subspan.load(path)


def test_a_folder_that_is_not_here_is_named(hub, bases, tmp_path):
    subspan.save(variant(str(bases / "one")), path := tmp_path / "m.safetensors")
    forge(path, folder="nowhere/base")
    with pytest.raises(SubspanError, match="nowhere/base, and there is no such folder here"):
        subspan.load(path)
    assert not [asked for asked in hub.asked if "nowhere" in asked]


# ---- the page ----------------------------------------------------------------------------------


def test_the_page_is_true(hub, bases, monkeypatch):
    hub.add("sentence-transformers/all-MiniLM-L6-v2", files(bases / "one"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text()
    names = {}
    for block in page.split("```python")[1:]:
        exec(block.split("```")[0], names)
    assert_same(names["net"], subspan.load("user/name"))


# ---- the Hub says no -------------------------------------------------------------------------


def test_what_is_not_there_is_said(hub):
    model = variant("org/base")
    with pytest.raises(SubspanError, match="no file user/none here, and there is no repository"):
        subspan.load("user/none")
    hub.add("user/empty", {"README.md": b""})
    with pytest.raises(SubspanError, match="user/empty does not have the files"):
        subspan.load("user/empty")
    with pytest.raises(SubspanError, match="is no subspan checkpoint"):
        subspan.load("org/base")
    model.push_to_hub("user/small", token=TOKEN)
    with pytest.raises(SubspanError, match="user/small has no revision v2 on the Hub"):
        subspan.load("user/small", revision="v2")
    hub.repositories["user/small"].gated = True
    with pytest.raises(SubspanError, match="user/small is gated: ask for access"):
        subspan.load("user/small")
    for name in ("m.safetensors", "runs/m.safetensors", "a/b/c", "nothing"):
        with pytest.raises(SubspanError, match="is not a file"):
            subspan.load(name, nn.Linear(2, 2))
    with pytest.raises(SubspanError, match="has no revision: leave revision='v2'"):
        subspan.load("runs/m.safetensors", revision="v2")


def test_a_base_that_is_gone_is_named_with_the_file(hub, tmp_path, monkeypatch):
    model, net = variant("org/base"), classifier("org/base")
    model.push_to_hub("user/small", token=TOKEN)
    monkeypatch.setattr(hub_client.constants, "HF_HUB_CACHE", str(tmp_path / "other"))
    del hub.repositories["org/base"]
    match = "base of user/small cannot be had, for there is no repository org/base .*give it to"
    with pytest.raises(SubspanError, match=match):
        subspan.load("user/small")
    assert_same(subspan.load("user/small", net), model)


def test_tokens_are_asked_for(hub):
    model = variant("org/base")
    with pytest.raises(SubspanError, match=r"log in \(`hf auth login`\)"):
        model.push_to_hub("user/small")
    with pytest.raises(SubspanError, match="your token may not write to user/small"):
        model.push_to_hub("user/small", token="hf_reader")
    with pytest.raises(SubspanError, match="'user//small' cannot be the name of a repository"):
        model.push_to_hub("user//small", token=TOKEN)
    with pytest.raises(SubspanError, match="'small' does not say whose"):
        model.push_to_hub("small", token=TOKEN)
    assert hub.repositories.keys() == {"org/base"}


def test_without_a_network_the_cache_is_enough(hub, monkeypatch):
    model = variant("org/base")
    model.push_to_hub("user/small", token=TOKEN)
    subspan.load("user/small")
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client between its tries
    assert_same(subspan.load("user/small"), model)
    for _ in range(2):  # without a network, and with one that must not be used
        with pytest.raises(SubspanError, match="the Hub cannot be reached for user/other"):
            subspan.load("user/other")
        monkeypatch.setattr(hub_client.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SubspanError, match="the Hub cannot be reached for user/small"):
        model.push_to_hub("user/small", token=TOKEN)


@pytest.mark.parametrize("library", ["huggingface_hub", "transformers"])
def test_a_library_that_is_missing_is_named(library, hub, monkeypatch):
    model = variant("org/base")
    model.push_to_hub("user/small", token=TOKEN)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SubspanError, match=rf"{library} .*pip install 'subspan\[hub\]'"):
        subspan.load("user/small")
