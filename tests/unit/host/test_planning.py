"""What `make plan` refuses before anything is built, what it knows of the data, and its page."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from trainbox.errors import ConfigError, EngineError
from trainbox.host import download, paths, planning, prices, ui
from trainbox.spec.gpu_config import GpuConfig
from trainbox.spec.load import Choices, split_settings
from trainbox.spec.planning import Facts, Rows
from trainbox.spec.recipe.llm import SftRecipe
from trainbox.spec.recipe.sections import Budget, Model
from trainbox.spec.run import DataSource

sys.path.insert(0, str(Path(__file__).parents[2] / "planning"))

from vectors import CASES, FACTS, MODELS, alike

KEPT = {name: Facts(**facts) for line in FACTS.read_text().splitlines() for name, facts in json.loads(line).items()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("said", "name", "count"),
    [
        ("A100 80GB", "A100 80GB", 1), ("2x A100 80GB", "A100 80GB", 2), ("2x RTX 4090", "RTX 4090", 2),
        ("rtx4090", "RTX 4090", 1), ("2x4090", "RTX 4090", 2), ("4 X 3090", "RTX 3090", 4), ("4090", "RTX 4090", 1),
        ("8xH100", "H100", 8), ("A100-80GB:4", "A100 80GB", 4), ("H100 NVL", "H100 NVL", 1),
    ],
)  # fmt: skip
def test_a_gpu_is_found_by_name_and_count(said, name, count):
    gpu, found = planning._wanted(said, Choices("llm-qlora"))
    assert (gpu.name, found) == (name, count)


@pytest.mark.parametrize(
    ("said", "words"),
    [("RTX 4900", ("there is no GPU 'RTX 4900'", "did you mean RTX 4090?")), ("9x H100", ("9 GPUs", "1 to 8"))],
)
def test_a_gpu_that_is_none_is_refused_before_anything_else(said, words):
    with pytest.raises(ConfigError) as refused:
        planning.page(Choices("llm-qlora", model="nowhere/to-be-found"), said)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("name", [name for name in MODELS if "config.json" in MODELS[name]])
def test_the_configurations_of_known_models_say_what_is_needed(name):
    planning.check_config(MODELS[name]["config.json"], name)


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        ({"model_type"}, "has no model_type"),
        ({"hidden_size"}, "has no hidden_size"),
        ({"num_hidden_layers", "vocab_size"}, "has no num_hidden_layers, vocab_size"),
    ],
)
def test_a_configuration_that_cannot_be_sized_says_what_is_missing_before_a_build(tmp_path, absent, said):
    config = MODELS["llama-3.1-8b"]["config.json"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in absent}))
    with pytest.raises(ConfigError) as refused:
        planning.page(Choices("llm-qlora", model=str(path)))
    assert said in str(refused.value)
    assert refused.value.place == str(path)


def test_a_configuration_that_is_not_json_is_refused_by_the_path_that_was_given(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("{,}")
    with pytest.raises(ConfigError, match="is not JSON") as refused:
        planning.page(Choices("llm-qlora", model=str(path)))
    assert refused.value.place == str(path)
    assert "published with the model" in refused.value.remedy


def test_a_model_that_is_nowhere_is_refused():
    with pytest.raises(ConfigError, match="neither here nor a hub name"):
        download.configs(Model(name="/no/such/model"), Path())


def test_the_recipes_budget_stands_over_that_of_gpu_jsonc_and_gets_a_price(tmp_path, monkeypatch):
    config = tmp_path / "mine.yaml"
    config.write_text("recipe: llm-qlora\n")
    wanted = {"gpu_type": "A100 80GB", "gpu_count": 2, "budget": {"max_usd": 5, "max_hours": 3}}
    (tmp_path / "gpu.jsonc").write_text(json.dumps(wanted))
    monkeypatch.setattr(planning, "present", lambda: None)
    recipe = SftRecipe(budget=Budget(max_hours=1))
    found = planning.budgeted(recipe, Choices("llm-qlora", config=str(config))).budget
    assert found == Budget(max_usd=5, max_hours=1, usd_per_hour=3.58)


def test_prices_are_the_lowest_of_skypilots_catalogues(tmp_path):
    catalogue = tmp_path / "v8" / "cloudy" / "vms.csv"
    catalogue.parent.mkdir(parents=True)
    lines = ("AcceleratorName,AcceleratorCount,Price,SpotPrice", "A100-80GB,8,16,4", "A100-80GB,1,2.5,1", ",,0.1,",
             "RTX4090,1,,0.2", "V999,1,1,1", "H100-SXM,1,1.5,")  # fmt: skip
    catalogue.write_text("\n".join(lines))
    assert prices.known() == {}
    prices.refresh(tmp_path)
    assert prices.known() == {"A100 80GB": 2.0, "H100": 1.5}
    gpu, _ = planning._wanted("A100 80GB", Choices("llm-qlora"))
    assert gpu.price == 2.0


def test_without_skypilots_catalogues_it_says_where_they_come_from(tmp_path):
    with pytest.raises(EngineError, match="no catalogues") as refused:
        prices.refresh(tmp_path)
    assert "sky gpus list" in refused.value.remedy


def test_rows_are_as_many_and_as_long_as_the_data_says(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "a" * 100, "output": "b" * 60}, {"instruction": "a" * 1000, "output": "b" * 1000}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = SftRecipe.model_validate({"data": {"path": str(path), "max_length": 256, "validation_split": 0.5}})
    source = DataSource(files={}, hash="", rows={"train": 2})
    found = planning._rows(recipe, tmp_path, source)
    assert (found.count, found.held_out, found.longest) == (1, 1, 256)
    assert 50 < found.tokens < 256


@pytest.mark.parametrize("name", alike())
def test_a_page_fits_a_terminal_and_says_all_of_it(name):
    case = CASES[name]
    recipe = case.recipe.model_copy(update={"budget": Budget(max_hours=0.001)})
    source = DataSource(files={}, hash="", rows={"train": 1000}, reference="my.jsonl")
    config = GpuConfig.model_validate({"gpu_type": "T4"})
    wanted = planning._wanted("T4", Choices("llm-qlora"))
    choices = Choices("llm-qlora", data="my.jsonl")
    page = planning._Page(choices, recipe, source, KEPT[alike()[name]], Rows(1000), wanted, config)
    lines = "\n".join([*page.needs(), *planning._use(choices, recipe)]).splitlines()
    text = "\n".join(lines)
    for word in (
        "Base model", "Method", "GPU ", "/h", "VRAM", "weights", "GPUs that hold it", "Files",
        "Data format", "make train RECIPE=llm-qlora DATA=my.jsonl", "output/final", "Inference", "budget.max_hours",
    ):  # fmt: skip
        assert word in text, text
    told = [any(line.startswith(word) for line in lines) for word in ("Time ", "Cost ")]
    assert told == [("TOO LITTLE" not in text)] * 2
    # What is to be copied stays whole.
    lines = [line for line in lines[: lines.index("Inference   in Python:")] if "make " not in line]
    assert max(map(len, lines)) <= 100, max(lines, key=len)


@pytest.fixture
def measured(monkeypatch):
    """The facts as they were measured in the box: tests/image/test_plan.py."""
    monkeypatch.setattr(planning, "facts", lambda *args: KEPT[alike()["8B qlora least"]])
    monkeypatch.setattr(planning, "present", lambda: None)


def cost(page: str) -> float:
    return float(re.search(r"^Cost +about \$([\d.]+)", page, re.MULTILINE)[1])


def test_a_gpu_that_cannot_hold_the_run_has_no_time_and_the_smallest_that_can_is_held_against_the_budget(measured):
    page = planning.page(Choices("llm-lora", set=("budget.max_usd=0.001",)), "T4")
    assert "TOO LITTLE" in page
    smallest = re.search(r"^(.*?)  .*<- the smallest$", page, re.MULTILINE)[1]
    assert f"WARNING     on {smallest}, the smallest that holds it:\nWARNING     about $" in page
    assert not re.search("^(Time|Cost) ", page, re.MULTILINE)


@pytest.mark.parametrize("gpu", ["RTX 4090", "8x H100"])
def test_a_page_reckons_the_budget_with_the_price_of_its_own_gpu(measured, gpu):
    free = planning.page(Choices("llm-qlora"), gpu)
    for share, warned in ((0.9, True), (1.1, False)):
        page = planning.page(Choices("llm-qlora", set=(f"budget.max_usd={cost(free) * share}",)), gpu)
        assert ("but budget.max_usd" in page) == warned
    limits = (f"budget.max_usd={cost(free) * 1.1}", "budget.usd_per_hour=1000")
    assert "but budget.max_usd" in planning.page(Choices("llm-qlora", set=limits), gpu)


def test_a_page_warns_of_a_gpu_outside_the_limits_of_gpu_jsonc(measured, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("recipe: llm-qlora\n")
    (tmp_path / "gpu.jsonc").write_text('{"max_price": 0.5, "min_vram": 100}')
    choices = Choices("llm-qlora", config=str(config))
    page = planning.page(choices, "2x A100 80GB")
    assert "WARNING     $3.58/h, but max_price in gpu.jsonc is 0.5" in page
    assert "WARNING     80 GB, but min_vram in gpu.jsonc is 100" in page
    assert "none within max_price 0.5 and min_vram 100" in page
    (tmp_path / "gpu.jsonc").write_text('{"max_price": 5, "min_vram": 80}')
    assert "WARNING" not in planning.page(choices, "2x A100 80GB")


def test_what_a_page_says_to_type_is_what_train_takes(measured, tmp_path, monkeypatch):
    model, rows = tmp_path / "config.json", tmp_path / "my.jsonl"
    model.write_text("{}")
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 9)
    page = planning.page(Choices("llm-qlora", model=str(model), data=str(rows)))
    (train,) = re.findall("make train (.*)", page)
    assert train == f"RECIPE=llm-qlora DATA={rows}"
    assert "and MODEL=, the model's folder or hub name" in page
    assert f"{rows}/" not in page
    assert str(paths.REPO / "recipes/llm-qlora/recipe.yaml") not in page
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("recipe: llm-qlora\n")
    page = planning.page(Choices("llm-qlora", config="recipe.yaml"))
    assert f"Files       {paths.REPO}/recipes/llm-qlora/recipe.yaml\n            recipe.yaml\n" in page


def test_the_page_of_another_trainers_recipe_is_without_sizes(monkeypatch):
    monkeypatch.setattr(ui, "warn", lambda text: None)
    page = planning.page(Choices("custom-pytorch"))
    assert "cannot be sized" in page
    assert "RTX 4090" in page
    assert "make train RECIPE=custom-pytorch" in page
    assert "make infer" not in page


@pytest.mark.parametrize("setting", ['sample.prompts=["a b","c"]', "lora.r=8", "model.name=it's $HOME", r"a.b=\\"])
def test_what_was_asked_for_can_be_typed_again(setting):
    choices = Choices("llm-qlora", data="my rows/$1.jsonl", set=(setting, "lora.alpha=16"))
    typed = planning.asked(choices, ("recipe", "model", "data", "set"))
    words = dict(word.split("=", 1) for word in shlex.split(typed))
    assert words == {"RECIPE": "llm-qlora", "DATA": "my rows/$1.jsonl", "SET": words["SET"]}
    assert split_settings(words["SET"]) == choices.set


def test_the_catalogue_of_prices_is_no_part_of_the_checkout():
    assert not paths.cache().is_relative_to(paths.REPO)
