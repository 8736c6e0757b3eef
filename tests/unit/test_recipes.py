"""Every shipped recipe: it loads in every profile, its sample can be learned from, its files are all there."""

import json
import re
from pathlib import Path

import pytest
import yaml

from trainbox.host import data, explaining, paths, pipeline
from trainbox.spec.dataset import check, find_splits, located, reader
from trainbox.spec.load import Choices, load_recipe

RECIPES = pipeline.recipe_names()


def test_there_are_recipes():
    assert {"llm-qlora", "llm-lora", "llm-full"} <= set(RECIPES)


def profiles(name):
    return ["", *yaml.safe_load((paths.REPO / "recipes" / name / "recipe.yaml").read_text()).get("profiles", {})]


@pytest.mark.parametrize(("name", "profile"), [(name, profile) for name in RECIPES for profile in profiles(name)])
def test_a_recipe_loads_in_each_profile_and_its_sample_is_good_data(name, profile, monkeypatch, tmp_path):
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path))
    folder = pipeline.recipe_folder(name)
    recipe = load_recipe(folder, Choices(name, profile))
    recipe = located(recipe, folder)
    if recipe.task == "custom":
        source, _ = data.check(recipe, folder)
        assert (source.formats["files"], list(source.script_files)) == (2, ["train.py"])
        return
    splits = find_splits(recipe, folder)
    facts = check(recipe, splits)
    if recipe.kind == "text-to-image":  # small ones, of few images: SDXL's own size is four times theirs
        assert (facts.rows["train"] >= 10, facts.rows["validation"] >= 2) == (True, True)
        assert not [line for line in facts.warnings if "enlarged" not in line and "usual" not in line]
        return
    enough = {"train": 20_000, "validation": 2000} if is_text(facts) else {"train": 100, "validation": 10}
    for split, least in enough.items():
        characters = sum(path.stat().st_size for path in splits[split])
        assert (characters if is_text(facts) else facts.rows[split]) >= least
    assert facts.warnings == ()
    assert len(facts.formats) == len({path.suffix for files in splits.values() for path in files})


def is_text(facts):
    """Whether a row is a whole file of plain text."""
    return set(facts.formats) == {"text"}


@pytest.mark.parametrize("name", RECIPES)
def test_no_held_out_row_of_a_sample_is_a_training_row(name):
    folder = pipeline.recipe_folder(name)
    recipe = located(load_recipe(folder, Choices(name)), folder)
    if recipe.task == "custom":
        known = {path.stem: set(path.read_text().splitlines()[1:]) for path in Path(recipe.data.path).iterdir()}
    else:
        known = {
            split: {line for _, example in reader(recipe).read(files) for line in lines(example)}
            for split, files in find_splits(recipe, folder).items()
        }
    for split in known.keys() - {"train"}:
        assert known[split]
        assert not known["train"] & known[split]


def lines(example):
    """Those of a text, else the whole example as one."""
    return filter(None, example["text"].splitlines()) if set(example) == {"text"} else [json.dumps(example)]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_tiny_profile_that_needs_no_network(name):
    recipe = load_recipe(pipeline.recipe_folder(name), Choices(name, "tiny"))
    steps = recipe.script.arguments["steps"] if recipe.task == "custom" else recipe.training.max_steps
    assert recipe.model.name.startswith("random:") or (recipe.task, recipe.model.name) == ("custom", "")
    assert 0 < steps <= 20


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
        for prompt in sample.prompts or [] if sample else []:
            assert profile == "tiny" or json.dumps(prompt.lower())[1:-1] not in rows


def test_the_schema_for_editors_is_the_one_that_the_fields_make():
    assert json.loads((paths.REPO / "recipes/recipe.schema.json").read_text()) == explaining.schema()


def resolved(node, schema):
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def unknown_keys(value, node, schema):
    """Keys of a value that its part of the schema does not know."""
    node = resolved(node, schema)
    if isinstance(value, list) and "items" in node:
        return [key for below in value for key in unknown_keys(below, node["items"], schema)]
    if not isinstance(value, dict) or "properties" not in node:
        return []
    assert node["additionalProperties"] is False
    known = node["properties"]
    here = [key for key in value if key not in known]
    return here + [key for name in value.keys() & known for key in unknown_keys(value[name], known[name], schema)]


@pytest.mark.parametrize("name", RECIPES)
def test_the_schema_of_its_task_knows_every_key_of_a_recipe_and_of_its_profiles(name):
    schema = explaining.schema()
    tree = yaml.safe_load((paths.REPO / "recipes" / name / "recipe.yaml").read_text())
    (case,) = [
        case for case in schema["oneOf"] if resolved(case, schema)["properties"]["task"]["const"] == tree["task"]
    ]
    assert unknown_keys(tree, case, schema) == []
    profile = resolved(case, schema)["properties"]["profiles"]["additionalProperties"]
    for below in tree["profiles"].values():
        assert unknown_keys(below, profile, schema) == []
    section, typo = ("script", "fiel") if tree["task"] == "custom" else ("lora", "rank")
    assert unknown_keys({section: {typo: 1}, "modle": {}}, case, schema) == ["modle", typo]


def test_the_schema_knows_the_other_names_and_every_section_has_its_own_definition():
    schema = explaining.schema()
    assert {"num_train_epochs", "num_epochs", "batch_size"} <= set(schema["$defs"]["Training"]["properties"])
    cases = [resolved(case, schema)["properties"] for case in schema["oneOf"]]
    ranks = {
        case["task"]["const"]: resolved(case["lora"], schema)["properties"]["r"]["default"]
        for case in cases
        if "lora" in case
    }
    assert (ranks["sft"], ranks["seq2seq"]) == (64, 8)
    (rewards,) = [case["rewards"] for case in cases if "rewards" in case]
    assert resolved(rewards["items"], schema)["required"] == ["type"]
    references = re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema))
    assert set(references) == set(schema["$defs"])


def test_explain_prints_a_field_once_with_its_defaults_by_task_and_the_tasks_that_have_it(capsys):
    explaining.explain("")
    printed = capsys.readouterr().out.splitlines()
    names = [line.partition(" ")[0] for line in printed if line and not line.startswith(" ")]
    assert len(names) == len(set(names))
    explaining.explain("lora.r")
    assert capsys.readouterr().out.startswith("lora.r = 64 (sft, preference, grpo), 8 (masked-lm, ")
    explaining.explain("lora.alpha")
    assert capsys.readouterr().out.startswith("lora.alpha = 16.0  (number")
    explaining.explain("training.learning_rate")
    assert "2e-05 (text-classification, token-classification), 0.0003 (seq2seq)" in capsys.readouterr().out
    explaining.explain("data.packing")
    assert "    Only for sft.\n" in capsys.readouterr().out


@pytest.mark.parametrize("section", ["rewards", "rewards[]"])
def test_explain_knows_the_fields_in_a_list_of_sections(section, capsys):
    explaining.explain(section)
    printed = capsys.readouterr().out
    assert printed.startswith("rewards[].type = (needed)  (one of exact-match | ")
    assert "rewards[].weight = 1.0  (number)" in printed
    assert "lora" not in printed


def test_explain_prints_every_field_and_names_the_nearest_for_a_typo(capsys):
    explaining.explain("")
    printed = capsys.readouterr().out
    for field in ("training.learning_rate = 0.0002", "lora.r = 64", "also batch_size", "data.packing = false"):
        assert field in printed
    with pytest.raises(Exception, match="no section") as caught:
        explaining.explain("lora.rank")
    assert "did you mean lora.r?" in str(caught.value)
