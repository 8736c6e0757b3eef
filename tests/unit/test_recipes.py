"""Every shipped recipe: it loads in every profile, its sample can be learned from, its files are all there."""

import json

import pytest
import yaml

from trainbox.host import explaining, paths, pipeline
from trainbox.spec.dataset import check, find_splits
from trainbox.spec.load import Choices, load_recipe

RECIPES = pipeline.recipe_names()


def test_there_are_recipes():
    assert {"llm-qlora", "llm-lora", "llm-full"} <= set(RECIPES)


def profiles(name):
    return ["", *yaml.safe_load((paths.REPO / "recipes" / name / "recipe.yaml").read_text()).get("profiles", {})]


@pytest.mark.parametrize(("name", "profile"), [(name, profile) for name in RECIPES for profile in profiles(name)])
def test_a_recipe_loads_in_each_profile_and_its_sample_is_good_data(name, profile):
    folder = pipeline.recipe_folder(name)
    recipe = load_recipe(folder, Choices(name, profile))
    facts = check(recipe, find_splits(recipe.data, folder))
    assert facts.rows["train"] >= 100


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_tiny_profile_that_needs_no_network(name):
    recipe = load_recipe(pipeline.recipe_folder(name), Choices(name, "tiny"))
    assert recipe.model.name.startswith("random:")
    assert 0 < recipe.training.max_steps <= 20


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_all_its_files_and_a_small_sample(name):
    folder = pipeline.recipe_folder(name)
    for file in ("recipe.yaml", "Dockerfile", "requirements.in", "requirements.lock", "README.md"):
        assert (folder / file).is_file(), file
    assert sum(path.stat().st_size for path in (folder / "sample").rglob("*")) < 200_000


@pytest.mark.parametrize("name", RECIPES)
def test_held_out_prompts_are_in_no_row_of_the_sample(name):
    folder = pipeline.recipe_folder(name)
    rows = "".join(path.read_text().lower() for path in (folder / "sample").glob("*.jsonl"))
    for profile in profiles(name):
        sample = getattr(load_recipe(folder, Choices(name, profile)), "sample", None)
        for prompt in sample.prompts if sample else []:
            assert profile == "tiny" or json.dumps(prompt.lower())[1:-1] not in rows


def test_the_schema_for_editors_is_the_one_that_the_fields_make():
    assert json.loads((paths.REPO / "recipes/recipe.schema.json").read_text()) == explaining.schema()


def test_the_schema_knows_every_key_of_the_shipped_recipes_and_the_other_names():
    schema = explaining.schema()
    training = schema["$defs"]["Training"]["properties"]
    assert {"num_train_epochs", "num_epochs", "batch_size", "evaluation_strategy"} <= set(training)
    for name in RECIPES:
        tree = yaml.safe_load((paths.REPO / "recipes" / name / "recipe.yaml").read_text())
        assert set(tree) <= set(schema["properties"])
        assert set(tree.get("training", {})) <= set(training)


def test_explain_prints_every_field_and_names_the_nearest_for_a_typo(capsys):
    explaining.explain("")
    printed = capsys.readouterr().out
    for field in ("training.learning_rate = 0.0002", "lora.r = 64", "also batch_size", "data.packing = false"):
        assert field in printed
    with pytest.raises(Exception, match="no section") as caught:
        explaining.explain("lora.rank")
    assert "did you mean lora.r?" in str(caught.value)
