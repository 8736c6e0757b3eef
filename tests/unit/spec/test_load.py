from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from trainbox.errors import ConfigError
from trainbox.spec.load import Choices, load_recipe, nearest, parse_setting, split_settings
from trainbox.spec.recipe import RECIPES
from trainbox.spec.recipe.llm import SftRecipe
from trainbox.spec.recipe.sections import Recipe
from trainbox.spec.tree import fields, merge

RECIPE_FOLDERS = sorted(path.parent for path in Path("recipes").glob("*/recipe.yaml"))


def test_there_are_shipped_recipes():
    assert RECIPE_FOLDERS


@pytest.mark.parametrize("folder", RECIPE_FOLDERS, ids=lambda folder: folder.name)
def test_every_shipped_recipe_and_profile_loads(folder):
    profiles = yaml.safe_load((folder / "recipe.yaml").read_text()).get("profiles", {})
    assert "tiny" in profiles
    for profile in ("", *profiles):
        assert load_recipe(folder, Choices(recipe=folder.name, profile=profile))


def test_every_field_tells_its_meaning():
    for cls in RECIPES.values():
        assert not [name for name, field in fields(cls) if name != "task" and not field.description]


def test_what_is_not_written_has_the_default(load):
    assert load("task: sft\n") == SftRecipe()


def test_a_loaded_recipe_cannot_be_changed(load):
    with pytest.raises(ValueError, match="frozen"):
        load("task: sft\n").lora.r = 3


# --- overrides: recipe < profile < MODEL=, DATA= < SET=


def test_a_profile_overrides_the_recipe_and_settings_override_both(load):
    text = "task: sft\nlora: {r: 1, alpha: 1, dropout: 0.5}\nprofiles: {tiny: {lora: {r: 2, alpha: 2}}}\n"
    lora = load(text, "lora.r=3", profile="tiny").lora
    assert (lora.r, lora.alpha, lora.dropout) == (3, 2, 0.5)


def test_a_profile_that_is_not_asked_for_changes_nothing(load):
    assert load("task: sft\nprofiles: {tiny: {lora: {r: 2}}}\n").lora.r == SftRecipe().lora.r


def test_model_replaces_the_pins_of_the_recipes_model(load):
    model = load("task: sft\nmodel: {name: a/b, revision: v1, sha256: abc, dtype: float16}\n", model="c/d").model
    assert (model.name, model.revision, model.sha256, model.dtype) == ("c/d", None, None, "float16")


def test_model_and_data_may_name_a_revision(load):
    recipe = load("task: sft\n", model="c/d@v2", data="e/f@main")
    assert (recipe.model.name, recipe.model.revision) == ("c/d", "v2")
    assert (recipe.data.path, recipe.data.revision) == ("e/f", "main")


def test_a_path_with_an_at_sign_that_exists_is_no_revision(load, tmp_path):
    (tmp_path / "me@home").mkdir()
    recipe = load("task: sft\n", model=str(tmp_path / "me@home"), data=str(tmp_path / "me@home"))
    assert recipe.model.name == recipe.data.path == str(tmp_path / "me@home")
    assert recipe.model.revision is recipe.data.revision is None


def test_data_replaces_the_recipes_validation_file(load):
    data = load("task: sft\ndata: {path: a, validation_file: b, test_file: c, max_length: 7}\n", data="mine").data
    assert (data.path, data.validation_file, data.test_file, data.max_length) == ("mine", None, None, 7)


@pytest.mark.parametrize(
    ("setting", "section", "name", "value"),
    [
        ("lora.r=8", "lora", "r", 8),
        ("training.learning_rate=2e-4", "training", "learning_rate", 2e-4),
        ("training.learning_rate=1.5E-05", "training", "learning_rate", 1.5e-5),
        ("lora.target_modules=[q_proj,v_proj]", "lora", "target_modules", ["q_proj", "v_proj"]),
        ("lora.target_modules=all-linear", "lora", "target_modules", "all-linear"),
        ("lora.target_modules=.*[qk]_proj", "lora", "target_modules", ".*[qk]_proj"),
        ("training.report_to=[tensorboard]", "training", "report_to", ["tensorboard"]),
        ("training.bf16=true", "training", "bf16", True),
        ("training.save_total_limit=null", "training", "save_total_limit", None),
        ("data.columns={instruction: question}", "data", "columns", {"instruction": "question"}),
        ("data.path=a=b", "data", "path", "a=b"),
        ("data.path=no", "data", "path", "no"),
        ("data.path=to German: ", "data", "path", "to German: "),
        ("data.path='to German: '", "data", "path", "to German: "),
        ("model.revision=2024-01-01", "model", "revision", "2024-01-01"),
    ],
)
def test_a_setting_is_read_as_yaml(load, setting, section, name, value):
    assert getattr(getattr(load("task: sft\n", setting), section), name) == value


def test_a_setting_may_hold_spaces_and_lists(load):
    settings = split_settings("""lora.r=8 data.path='my data' sample.prompts='["What is it?", "Who?"]'""")
    recipe = load("task: sft\n", *settings)
    assert (recipe.lora.r, recipe.data.path) == (8, "my data")
    assert recipe.sample.prompts == ["What is it?", "Who?"]


def test_a_setting_fills_a_section_that_is_there_but_empty(load):
    assert load("task: sft\nlora:\n", "lora.r=8").lora.r == 8


@pytest.mark.parametrize(
    ("given_as", "section", "name"),
    [
        ("batch_size", "training", "per_device_train_batch_size"),
        ("num_epochs", "training", "num_train_epochs"),
        ("evaluation_strategy", "training", "eval_strategy"),
        ("lora_alpha", "lora", "alpha"),
        ("lora_dropout", "lora", "dropout"),
    ],
)
def test_common_names_of_a_field_are_understood(load, given_as, section, name):
    value = {"eval_strategy": "epoch", "dropout": 0.5}.get(name, 7)
    assert getattr(getattr(load(f"task: sft\n{section}: {{{given_as}: {value}}}\n"), section), name) == value


@pytest.mark.parametrize("setting", ["training.batch_size=8", "training.per_device_train_batch_size=8"])
def test_a_setting_wins_whatever_names_the_recipe_and_its_profile_use(load, setting):
    text = """
task: sft
training: {batch_size: 2, seed: 1}
profiles:
  tiny: {training: {per_device_train_batch_size: 4}}
  other: {training: {batch_size: 4}}
"""
    for profile in ("", "tiny", "other"):
        assert load(text, setting, profile=profile).training.per_device_train_batch_size == 8
    assert load(text, profile="tiny").training.per_device_train_batch_size == 4


def test_merge_goes_key_by_key_and_changes_neither_side():
    base, over = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"c": 3}, "d": [2]}
    assert merge(base, over) == {"a": {"b": 1, "c": 3}, "d": [2]}
    assert base == {"a": {"b": 1, "c": 2}, "d": [1]}


# --- faults: place, fault, remedy


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lora.rank", "lora.r"),
        ("trainng", "training"),
        ("training.learning_rat", "training.learning_rate"),
        ("learning_rate", "training.learning_rate"),
        ("training.max_length", "data.max_length"),
        ("modle.name", "model"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(load, refuses, key, meant):
    with refuses(2, f"did you mean {meant}?", "is not a field", "invoke explain"):
        load("task: sft\n", f"{key}=1")


def test_an_unknown_key_is_told_with_its_line(load, refuses):
    with refuses(2, "recipes/demo/recipe.yaml:4: lora.rank is not a field", "did you mean lora.r?"):
        load("task: sft\nlora:\n  r: 8\n  rank: 8\n")


def test_an_unknown_key_in_a_profile_is_told_with_its_line(load, refuses):
    with refuses(2, "recipes/demo/recipe.yaml:5: lora.rank is not a field"):
        load("task: sft\nprofiles:\n  tiny:\n    lora:\n      rank: 8\n", profile="tiny")


def test_an_unknown_key_in_a_setting_is_told_with_the_setting(load, refuses):
    with refuses(2, "--set lora.rank: lora.rank is not a field"):
        load("task: sft\nlora:\n  r: 8\n", "lora.rank=8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: sft\nlora:\n  r: eight\n", ("recipe.yaml:3", "lora.r: ", "integer", "'eight'")),
        ("task: sft\nlora:\n  r: 0\n", ("recipe.yaml:3", "lora.r: ", "greater than 0")),
        ("task: sft\nlora:\n  dropout: 1.5\n", ("recipe.yaml:3", "lora.dropout", "less than 1")),
        ("task: sft\nlora: 3\n", ("recipe.yaml:2", "lora: ")),
        ("task: sft\nlora:\n", ("recipe.yaml:2", "lora: ")),
        (
            "task: sft\nlora:\n  target_modules: 3\n",
            ("recipe.yaml:3: lora.target_modules: ", "explain lora.target_modules`"),
        ),
        ("task: sft\nlora:\n  lora_alpha: x\n", ("recipe.yaml:3", "alpha")),
        ("task: sft\ntraining:\n  batch_size: x\n", ("recipe.yaml:3", "batch_size")),
        ("task: sft\npeft:\n  method: qlra\n", ("recipe.yaml:3", "peft.method", "'qlora'")),
        ("task: sft\ndata:\n  columns: {instruction: 3}\n", ("recipe.yaml:3", "data.columns")),
        ("task: sft\ntraining:\n  report_to: [wandb, slack]\n", ("recipe.yaml:3", "training.report_to", "'slack'")),
        ("task: sft\ntraining: {bf16: true, fp16: true}\n", ("recipe.yaml:2", "bf16 and fp16 cannot both be true")),
        ("task: sft\ntraining:\n  learning_rate: .inf\n", ("recipe.yaml:3", "finite")),
        ("task: sft\ntraining:\n  seed: 99999999999\n", ("recipe.yaml:3", "training.seed")),
        ("task: sft\nlora: {r: a, alpha: b}\n", ("recipe.yaml:2", "(and 1 more)")),
        ("task: sft\nlora: {r: 1, r: 2}\n", ("recipe.yaml:2", "lora.r is given twice")),
        ("task: sft\nlora:\n  r: 1\ntask: sft\n", ("recipe.yaml:4", "task is given twice")),
        ("task: stf\n", ("recipe.yaml:1", "task 'stf' is not known", "did you mean sft?")),
        ("lora: {r: 1}\n", ("task is missing", "tasks: sft")),
        ("", ("holds no `key: value` lines",)),
        ("- a\n- b\n", ("holds no `key: value` lines",)),
        ("task: sft\n  lora: [\n", ("recipe.yaml:2", "is not YAML")),
        ("task: sft\nlora: \x07\n", ("is not YAML",)),
        ("task: sft\nlora: {r: !!int ''}\n", ("is not YAML",)),
        ("task: sft\nlora: {r: 2001-99-99}\n", ("recipe.yaml:2", "lora.r: ", "'2001-99-99'")),
        ("task: sft\nlora: {r: !!timestamp 2001-99-99}\n", ("is not YAML",)),
        ("task: sft\nlora: !!python/object:os.system {}\n", ("recipe.yaml:2", "is not YAML")),
        ("task: sft\nlora: &me {r: *me}\n", ("recipe.yaml",)),
        ("task: sft\nprofiles: 3\n", ("profiles: must hold",)),
        ("task: sft\nprofiles: {tiny: 3}\n", ("profiles.tiny: must hold",)),
        (b"task: sft # caf\xe9\n", ("is not UTF-8",)),
        ("task: sft\n".encode("utf-16"), ("is not UTF-8",)),
    ],
)
def test_a_faulty_recipe_is_refused_with_its_place(load, refuses, text, words):
    with refuses(2, "recipes/demo/recipe.yaml", *words):
        load(text)


@pytest.mark.parametrize("text", ["\ufefftask: sft\n", "task: sft\r\nlora:\r\n  r: 8\r\n"])
def test_a_recipe_written_on_windows_loads(load, text):
    assert load(text).task == "sft"


def test_a_recipe_that_is_not_there_is_refused(tmp_path, refuses):
    with refuses(2, "recipes/none/recipe.yaml", "cannot be read", "No such file"):
        load_recipe(tmp_path / "none", Choices(recipe="none"))


def test_an_unknown_profile_names_the_nearest_or_all(load, refuses):
    text = "task: sft\nprofiles: {tiny: {}, 7b: {}, 8: {}}\n"
    with refuses(2, "there is no profile 'tyni'", "did you mean tiny?"):
        load(text, profile="tyni")
    with refuses(2, "there is no profile 'zzz'", "profiles: tiny, 7b, 8"):
        load(text, profile="zzz")
    with refuses(2, "profiles: none"):
        load("task: sft\n", profile="tiny")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("lora.r", ("'lora.r' is not key=value", 'SET="training.max_steps=40"')),
        ("=8", ("is not key=value",)),
        ("lora.r.x=8", ("lora.r.x goes below",)),
        ("lora.r=", ("--set lora.r", "lora.r: ")),
        ("lora.r=2001-99-99", ("--set lora.r", "lora.r: ")),
        ("task=dance", ("--set task", "task 'dance' is not known")),
        ("lora=8", ("--set lora",)),
        ("profiles.tiny=8", ("profiles",)),
    ],
)
def test_a_faulty_setting_is_refused(load, refuses, setting, words):
    with refuses(2, "--set", *words):
        load("task: sft\nlora: {r: 1}\n", setting)


def test_settings_with_an_open_quote_are_refused(refuses):
    with refuses(2, "--set", "cannot be split", "SET="):
        split_settings("a.b='x c.d=2")


def test_nothing_near_gives_no_suggestion():
    assert nearest("zzzzzz", ["lora.r", 3]) == ""


# --- whatever is written, it loads or is refused

KEYS = st.sampled_from(
    ["task", "profiles", "tiny", "<<", *dict(fields(SftRecipe)), "lora", "r", "data", "columns", "training"]
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["sft", "tiny"])
)
TREES = st.dictionaries(
    KEYS | SCALARS,
    st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS | SCALARS, x, max_size=4)),
    max_size=5,
)
YAMLISH = st.text(st.sampled_from("task:sft \n-[]{},&*a!?|>'\"#%@\\\t0x\ufeff\x00\x85"), max_size=40)


def loads_or_refuses(load, text, *settings, **choices):
    with suppress(ConfigError):
        assert isinstance(load(text, *settings, **choices), Recipe)


@given(text=st.text() | YAMLISH | YAMLISH.map("task: sft\n".__add__))
@example(text="[" * 1500)
@example(text="task: sft\nx: " + "[" * 1500)
@example(text="task: sft\n1: 2\n")
@example(text="task: sft\n? [a, b]\n: 2\n")
@example(text="task: sft\nlora: &me {r: 1, me: *me}\n")
@example(text='task: sft\ndescription: "\\ud800"\n')
def test_any_text_as_a_recipe_loads_or_is_refused(load, text):
    loads_or_refuses(load, text.encode("utf-8", "surrogatepass"))


@given(data=st.binary())
def test_any_bytes_as_a_recipe_load_or_are_refused(load, data):
    loads_or_refuses(load, data)


@given(tree=TREES, profile=st.sampled_from(["", "tiny"]))
def test_any_tree_as_a_recipe_loads_or_is_refused(load, tree, profile):
    loads_or_refuses(load, yaml.safe_dump({"task": "sft", **tree}), profile=profile)


@given(keys=st.lists(KEYS | st.text(max_size=5), max_size=3), value=st.text() | YAMLISH)
@example(keys=["lora.r"], value="!!int ''")
@example(keys=["lora.r"], value="!!timestamp x")
@example(keys=["lora.r"], value="[" * 1500)
@example(keys=["lora.r"], value="&a [*a]")
@example(keys=["", ""], value="")
def test_any_setting_loads_or_is_refused(load, keys, value):
    setting = f"{'.'.join(keys)}={value}"
    loads_or_refuses(load, "task: sft\nlora: {r: 1}\n", setting)
    with suppress(ConfigError):
        for part in split_settings(setting):
            parse_setting(part)


@given(name=st.text())
@example(name="x" * 5000)
@example(name="\0")
@example(name="a\0@b")
def test_any_model_and_data_name_loads_or_is_refused(load, name):
    loads_or_refuses(load, "task: sft\n", model=name, data=name)


# --- a file of overrides: over the profile, under MODEL=, DATA= and SET=

RECIPE = "task: sft\nlora: {r: 1, alpha: 1, dropout: 0.5}\nprofiles: {tiny: {lora: {r: 2, alpha: 2}}}\n"


@pytest.fixture
def with_config(load, tmp_path):
    """Load a recipe with a file of overrides of this text."""

    def from_texts(config, *settings, recipe=RECIPE, **choices):
        (tmp_path / "mine.yaml").write_text(config)
        return load(recipe, *settings, config=str(tmp_path / "mine.yaml"), **choices)

    return from_texts


def test_a_config_overrides_the_profile_and_is_overridden_by_settings(with_config):
    lora = with_config("lora: {alpha: 3, r: 3}\n", "lora.r=4", profile="tiny").lora
    assert (lora.r, lora.alpha, lora.dropout) == (4, 3, 0.5)


def test_a_config_wins_whatever_name_of_a_field_it_uses(with_config):
    assert with_config("lora: {lora_alpha: 3}\n").lora.alpha == 3


def test_a_configs_source_has_none_of_the_pins_and_files_of_the_recipes(with_config):
    recipe = "task: sft\nmodel: {name: a/b, revision: v1, sha256: abc}\ndata: {path: a, validation_file: b}\n"
    loaded = with_config("model: {name: c/d}\ndata: {path: e/f, test_file: g}\n", recipe=recipe)
    assert (loaded.model.revision, loaded.model.sha256) == (None, None)
    assert (loaded.data.validation_file, loaded.data.test_file) == (None, "g")
    assert with_config("lora: {r: 3}\n", recipe=recipe).model.sha256 == "abc"


def test_model_and_data_override_a_config(with_config):
    loaded = with_config("model: {name: c/d, revision: x}\ndata: {path: e/f}\n", model="g/h", data="i/j")
    assert (loaded.model.name, loaded.model.revision, loaded.data.path) == ("g/h", None, "i/j")


def test_relative_paths_of_a_config_start_at_its_folder(with_config, tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    (tmp_path / "val.jsonl").write_text("")
    (tmp_path / "reward.py").write_text("")
    monkeypatch.chdir("/")
    loaded = with_config("data: {path: rows, validation_file: ./val.jsonl}\nmodel: {name: org/name}\n")
    assert (loaded.data.path, loaded.data.validation_file) == (str(tmp_path / "rows"), str(tmp_path / "val.jsonl"))
    assert loaded.model.name == "org/name"
    rewards = with_config("rewards: [{type: python, file: reward.py}]\n", recipe="task: grpo\n").rewards
    assert rewards[0].file == str(tmp_path / "reward.py")


def test_a_config_names_its_recipe_and_no_other_is_laid_under_it(with_config, refuses):
    assert with_config("recipe: demo\nlora: {r: 3}\n").lora.r == 3
    with refuses(2, "mine.yaml:2: is for recipe other, but RECIPE is demo"):
        with_config("lora: {r: 3}\nrecipe: other\n")
    with refuses(2, "mine.yaml:1: task is grpo, but recipe demo is for sft"):
        with_config("task: grpo\n")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("lora:\n  rank: 3\n", ("mine.yaml:2: lora.rank is not a field", "did you mean lora.r?")),
        ("trainng: {}\n", ("mine.yaml:1", "did you mean training?")),
        ("profiles: {}\n", ("mine.yaml:1", "profiles")),
        ("lora:\n  r: many\n", ("mine.yaml:2: lora.r: ", "'many'")),
        ("lora:\n  lora_alpha: x\n", ("mine.yaml:2: lora.alpha: ",)),
        ("lora: 3\n", ("mine.yaml:1",)),
        ("", ("mine.yaml: holds no",)),
        ("base_model: a/b\n", ("mine.yaml: is an axolotl configuration", "make import FILE=")),
    ],
)
def test_a_faulty_config_is_refused_with_its_place(with_config, refuses, config, words):
    with refuses(2, *words):
        with_config(config)


def test_a_config_that_is_not_there_is_refused(load, refuses):
    with refuses(2, "nowhere.yaml: cannot be read: No such file"):
        load(RECIPE, config="nowhere.yaml")


def test_a_fault_inside_a_mapping_is_told_where_that_value_was_given(load, refuses):
    text = "task: custom\nscript:\n  arguments:\n    epochs: 3\n    lr: {a: 1}\n"
    with refuses(2, "recipes/demo/recipe.yaml:5: script.arguments: "):
        load(text)
    with refuses(2, "--set script.arguments.lr: script.arguments: "):
        load(text.replace("{a: 1}", "1"), "script.arguments.lr={a: 1}")
    with refuses(2, "--set script.arguments: script.arguments: "):
        load(text.replace("{a: 1}", "1"), "script.arguments={lr: {a: 1}}")


def test_a_fault_in_a_list_of_sections_is_told_with_its_line(load, refuses):
    text = "task: grpo\nrewards:\n  - type: json\n  - type: regex\n    patern: x\nprofiles:\n  p:\n    rewards:\n"
    with refuses(2, "recipes/demo/recipe.yaml:5: rewards[].patern is not a field", "did you mean rewards[].pattern?"):
        load(text + "      - type: json\n")
    with refuses(2, "recipes/demo/recipe.yaml:10: rewards", "needs pattern"):
        load(text.replace("    patern: x\n", "    pattern: x\n\n") + "      - type: regex\n", profile="p")


@given(text=st.text() | YAMLISH | TREES.map(yaml.safe_dump) | st.just("recipe: [1]\nrewards: 3\n"))
def test_any_text_as_a_config_loads_or_is_refused(load, tmp_path, text):
    (tmp_path / "any.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    loads_or_refuses(load, RECIPE, config=str(tmp_path / "any.yaml"))
