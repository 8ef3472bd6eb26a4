"""Recipes: what they stand for, what overrides them, and mistakes."""

import pytest
import yaml

from subspan import SubspanError
from subspan.checkpoint.compact import CHOSEN, TEMPLATES
from subspan.commands.recipe import open_recipe, recipes
from subspan.experiments import experiments
from subspan.training import nets
from subspan.training.config import Training
from subspan.training.options_file import read_text
from tests.runs import record_of


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_of_options_that_exist(name):
    options = yaml.safe_load(read_text(recipes()[name], name))
    assert nets.is_builtin(options["net"])
    Training(**options)


def test_compact_files_have_templates_for_the_networks_of_golf():
    options = yaml.safe_load(read_text(recipes()["golf"], "golf"))
    photos = experiments()["golf-cifar10"].parts("full")["bound"].training
    named = [TEMPLATES[number] for number in CHOSEN]
    assert [each["extra"]["net"] for each in named] == [options["net"], photos.net]
    for each, shape in zip(named, [(1, 28, 28), (3, 32, 32)], strict=True):
        assert each["extra"]["image_shape"] == list(shape)
        assert each["weights"] == nets.weights(each["extra"]["net"], shape)


@pytest.mark.parametrize("in_file", [False, True])
def test_what_is_given_besides_has_the_last_word(in_file, cli, in_tmp_path):
    """Wherever it stands; and the record holds what was trained, not the name of the recipe."""
    (in_tmp_path / "own.yaml").write_text("net: separable-2-3\n" + "recipe: golf\n" * in_file)
    given = ["--dim", 5, "--batch-size", 999, "--config", "own.yaml"]
    given += [] if in_file else ["--recipe", "golf"]
    given += ["--steps", 1]
    said = cli("train", *given)
    assert (said.code, said.err) == (0, "")
    config = record_of(in_tmp_path / "runs" / "train")["config"]
    assert (config["net"], config["epochs"], config["data"]) == ("separable-2-3", 30, "digits")
    assert "recipe" not in config
    again = cli("train", "--resume", *given)
    assert (again.code, "complete already" in again.out) == (0, True)


@pytest.mark.parametrize("command", ["train", "sweep", "intrinsic"])
def test_the_help_names_them(command, cli):
    said = " ".join(cli(command, "--help").out.split())
    assert all(f"{name} (" in said for name in recipes())


def test_mistakes(cli, in_tmp_path):
    said = cli("train", "--recipe", "gulf", "--dim", 5)
    assert (said.code, "unknown recipe 'gulf': did you mean golf?" in said.err) == (2, True)
    for command in ("train", "sweep", "intrinsic"):
        said = cli(command, "--config", "{recipe: gulf, epochs: 1}")
        assert (said.code, "unknown recipe 'gulf': did you mean golf?" in said.err) == (2, True)
    with pytest.raises(SubspanError, match="there can be one recipe, got golf and golf"):
        open_recipe(["--recipe", "golf", "--config={recipe: golf}"])
    with pytest.raises(SubspanError, match="there can be one recipe, got golf and golf"):
        open_recipe(["--recipe", "golf", "--recipe=golf"])
    assert not list(in_tmp_path.iterdir())
