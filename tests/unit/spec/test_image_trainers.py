"""Configurations of kohya's tools and of ai-toolkit: every key is carried over or listed, each fault has its line."""

import json

import pytest
import yaml

from trainbox.host import pipeline
from trainbox.spec.foreign import Why
from trainbox.spec.image_trainers import AI_TOOLKIT, KOHYA
from trainbox.spec.load import Choices, load_recipe, read_config

TOML = """
[general]
shuffle_caption = true
keep_tokens = 1
flip_aug = false

[[datasets]]
resolution = 512
batch_size = 4
shuffle_caption = false
color_aug = true

  [[datasets.subsets]]
  image_dir = "photos"
  num_repeats = 10
  class_tokens = "sks dog"

  [[datasets.subsets]]
  image_dir = "dogs"
  is_reg = true
  random_crop = true

[[datasets]]
resolution = 768

  [[datasets.subsets]]
  image_dir = "more"
  keep_tokens = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in ("photos", "dogs", "more"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(**changed):
    process = {
        "type": "sd_trainer",
        "trigger_word": "ohwx",
        "network": {"type": "lora", "linear": 16, "linear_alpha": 8},
        "save": {"save_every": 200, "max_step_saves_to_keep": 4, "dtype": "float16"},
        "datasets": [
            {"folder_path": "photos", "caption_ext": "txt", "resolution": [512, 768], "num_repeats": 2},
            {"folder_path": "dogs", "is_reg": True, "shuffle_tokens": True, "caption_dropout_rate": 0.1},
        ],
        "train": {
            "steps": 900, "batch_size": 2, "lr": 2e-4, "optimizer": "adamw8bit", "noise_scheduler": "flowmatch",
            "dtype": "bf16", "gradient_checkpointing": False, "ema_config": {"use_ema": True, "ema_decay": 0.99},
        },
        "model": {"name_or_path": "black-forest-labs/FLUX.1-dev", "is_flux": True, "quantize": True},
        "sample": {"prompts": ["[trigger] asleep"], "sample_every": 100, "guidance_scale": 4, "sampler": "flowmatch"},
        **changed,
    }  # fmt: skip
    return {"job": "extension", "config": {"name": "mine", "process": [process]}, "meta": {"version": "1.0"}}


def loaded(path, recipe, **more):
    return load_recipe(pipeline.recipe_folder(recipe), Choices(recipe, data=str(path), **more))


def test_a_subset_beats_its_data_set_which_beats_general(here):
    (here / "set.toml").write_text(TOML)
    found = loaded("set.toml", "sd15-lora")
    first, second, third = found.data.subsets
    assert (found.data.shuffle_caption, found.data.keep_tokens) == (False, 1)
    assert (first.path, first.num_repeats, first.class_tokens) == (str(here / "photos"), 10, "sks dog")
    assert (second.path, second.is_reg, second.keep_tokens) == (str(here / "dogs"), True, None)
    assert (third.path, third.keep_tokens) == (str(here / "more"), 3)
    assert (found.data.resolution, found.training.per_device_train_batch_size) == (512, 4)


def test_what_a_data_set_has_no_counterpart_for_is_listed(here):
    (here / "set.toml").write_text(TOML)
    made = read_config("set.toml")
    assert set(made.left) == {
        "general.shuffle_caption", "datasets[0].color_aug", "datasets[0].subsets[1].random_crop",
        "datasets[1].resolution",
    }  # fmt: skip
    assert "already 512" in made.left["datasets[1].resolution"]
    assert made.recipes[0] == "sd15-lora"
    (here / "set.toml").write_text(TOML.replace("512", "1024").replace("768", "1024"))
    assert read_config("set.toml").recipes[0] == "sdxl-lora"


@pytest.mark.parametrize(("sides", "one"), [("[512, 768]", 640), ('"768,768"', 768), ("640", 640)])
def test_a_resolution_of_two_sides_becomes_the_square_of_its_area(here, sides, one):
    (here / "set.toml").write_text(TOML.replace("resolution = 512", f"resolution = {sides}"))
    assert loaded("set.toml", "sd15-lora").data.resolution == one


def test_a_job_says_everything_of_a_run(here):
    (here / "job.yaml").write_text(yaml.safe_dump(job()))
    found, made = loaded("job.yaml", "flux-lora"), read_config("job.yaml")
    assert (found.lora.r, found.lora.alpha, found.data.trigger_word) == (16, 8, "ohwx")
    assert (found.training.max_steps, found.training.learning_rate, found.training.optim) == (900, 2e-4, "adamw_8bit")
    assert (found.training.save_steps, found.training.save_total_limit, found.training.bf16) == (200, 4, True)
    assert (found.peft.method, found.quantization.quant_type, found.diffusion.ema_decay) == ("qlora", "int8", 0.99)
    assert (found.data.resolution, found.data.caption_extension) == ([512, 768], "txt")
    assert (found.sample.prompts, found.sample.every, found.sample.guidance_scale) == (["[trigger] asleep"], 100, 4)
    first, second = found.data.subsets
    assert (first.path, first.num_repeats) == (str(here / "photos"), 2)
    assert (second.is_reg, second.shuffle_caption, second.caption_dropout_rate) == (True, True, 0.1)
    at = "config.process[0]"
    assert set(made.left) == {
        "job", "config.name", "meta.version", f"{at}.save.dtype", f"{at}.train.noise_scheduler", f"{at}.sample.sampler",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ({"is_xl": True}, "sdxl-lora"),
        ({"arch": "zimage"}, "z-image-lora"),
        ({"arch": "flux"}, "flux-lora"),
        ({}, "sd15-lora"),
    ],
)
def test_the_model_of_a_job_decides_the_recipe(here, model, recipe):
    (here / "job.yaml").write_text(yaml.safe_dump(job(model={"name_or_path": "a/b", **model})))
    assert read_config("job.yaml").recipes[0] == recipe


def put(tree, key, value):
    head, _, rest = key.partition(".")
    name = head.removesuffix("[]")
    if rest:
        below = tree.setdefault(name, [{}] if name != head else {})
        put(below[0] if name != head else below, rest, value)
    else:
        tree[name] = value


VALUES = {
    "type": "lora", "lr_scheduler": "cosine", "timestep_type": "sigmoid", "optimizer": "adamw8bit", "resolution": 512,
    "caption_extension": ".txt", "caption_ext": "txt", "prompts": ["a dog"], "trigger_word": "ohwx", "lr": 1e-4,
    "class_tokens": "dog", "default_caption": "dog", "caption_prefix": "a", "caption_suffix": "b", "neg": "bad",
    "width": 512, "height": 512, "min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64,
    "weight_decay": 0.1, "noise_offset": 0.1, "ema_decay": 0.9, "caption_dropout_rate": 0.1, "dtype": "bf16",
    "caption_tag_dropout_rate": 0.1, "token_dropout_rate": 0.1, "name_or_path": "a/b", "image_dir": "photos",
    "folder_path": "photos", "metadata_file": "x.json", "arch": "flux",
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "rule"), [(source, rule) for source in (KOHYA, AI_TOOLKIT) for rule in source.rules]
)
def test_every_key_that_is_documented_is_carried_over_or_listed_and_what_it_becomes_is_valid(here, source, rule):
    process = {"type": "sd_trainer", "datasets": [{"folder_path": "photos"}]}
    tree = {"config": {"process": [process]}} if source is AI_TOOLKIT else {
        "datasets": [{"subsets": [{"image_dir": "photos"}]}]
    }  # fmt: skip
    if not rule.endswith("process[].type"):
        put(tree, rule, VALUES.get(rule.rpartition(".")[2], 1))
    (here / "x.yaml").write_text(yaml.safe_dump(tree))
    made = read_config("x.yaml")
    shown = rule.replace("[]", "[0]")
    assert (shown in made.left) == isinstance(source.rules[rule.replace("general.", "datasets[].")], Why)
    assert (shown in made.left) != (shown in [theirs for theirs, _, _ in made.carried])
    loaded("x.yaml", made.recipes[0])


def test_a_folder_is_looked_for_from_the_file_on_and_a_home_is_one(here, monkeypatch):
    (here / "more/set.toml").write_text(TOML.replace('"photos"', '"../photos"').replace('"dogs"', '"~/dogs"'))
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.chdir("/")
    first, second, third = loaded(here / "more/set.toml", "sd15-lora").data.subsets
    assert (first.path, second.path, third.path) == (str(here / "photos"), str(here / "dogs"), "more")


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_a_file_written_on_windows_is_read_too(here, change):
    (here / "set.toml").write_bytes(change(TOML).encode())
    assert len(loaded("set.toml", "sd15-lora").data.subsets) == 3


def test_settings_are_laid_over_the_file(here):
    (here / "set.toml").write_text(TOML)
    found = loaded("set.toml", "sdxl-lora", set=("data.resolution=1024", "lora.r=8"), model="a/b")
    assert (found.data.resolution, found.lora.r, found.model.name, len(found.data.subsets)) == (1024, 8, "a/b", 3)


JOB = json.dumps(job())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("set.toml", TOML.replace("= 10", "= 'ten'"), ("set.toml:15", "num_repeats", "'ten'")),
        ("set.toml", TOML.replace("keep_tokens = 3", "keep_tokens = -1"), ("set.toml:28", "keep_tokens", "-1")),
        ("set.toml", TOML.replace("batch_size = 4", "batch_size = "), ("set.toml:9", "is not TOML")),
        ("set.toml", TOML.replace("resolution = 512", "resolution = [1, 2, 3]"), ("set.toml:8", "one side or two")),
        ("set.toml", TOML.replace("resolution = 512", "resolution = inf"), ("set.toml:8", "datasets[0].resolution")),
        ("set.toml", TOML.replace('image_dir = "more"', ""), ("set.toml:28", "path: field required")),
        ("set.toml", TOML.replace("keep_tokens = 3", 'image_dir = "x"'), ("set.toml:28", "is not TOML")),
        ("set.toml", 'title = "mine"\n', ("set.toml", "neither a dataset of kohya's", "CONFIG=set.toml")),
        ("set.toml", "# \N{CYRILLIC SMALL LETTER ZHE}\n".encode("cp1251"), ("set.toml", "is not UTF-8 (byte 2)")),
        ("job.yaml", yaml.safe_dump(job(train={"lr": "many"})), ("job.yaml:", "training.learning_rate", "'many'")),
        ("job.yaml", JOB.replace('"is_flux": true', '"arch": "wan21"'), ("job.yaml", "wan21 is not trained here")),
        ("job.yaml", JOB.replace("sd_trainer", "slider"), ("job.yaml", "slider", "sd_trainer")),
        ("job.yaml", JOB.replace('"process": [', '"process": [{"type": "x"}, '), ("job.yaml", "more than one entry")),
        ("x.yaml", "base_model: a/b\nadapter: lora\n", ("x.yaml", "neither a dataset of kohya's", "CONFIG=x.yaml")),
        ("x.yaml", "lora: {r: 8}\n", ("x.yaml", "CONFIG=x.yaml")),
    ],
)  # fmt: skip
def test_a_fault_in_a_file_is_told_with_its_line(here, refuses, name, text, words):
    (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with refuses(2, *words):
        loaded(name, "flux-lora")
