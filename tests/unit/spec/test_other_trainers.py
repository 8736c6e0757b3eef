"""A run in another trainer's words: whole commands and files as they are documented, every field told or refused."""

import json
import re
import tomllib
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import ValidationError

from trainbox.spec.other_trainers import (
    TRANSLATIONS,
    Folder,
    Job,
    batches_of,
    kinds_of,
    prompts_of,
    steps_of,
    warmup_steps,
)
from trainbox.spec.recipe.other_trainer import AiToolkitRecipe, KohyaRecipe
from trainbox.spec.recipe.sections import Section

FIXED = {
    "caption_dropout_rate": 0.05, "caption_tag_dropout_rate": 0.0, "shuffle_caption": False, "keep_tokens": 0,
    "flip_aug": False,
}  # fmt: skip


def job(**more):
    folders = (Folder("/x/images/00_10_cat", 10, False, FIXED), Folder("/x/images/01_1_cat", 1, True, FIXED))
    plain = {
        "model": "/model",
        "files": "/x/files",
        "output": "/x/made",
        "folders": folders,
        "steps": 1500,
        "epoch": 100,
    }
    return Job(**{**plain, "prompts": ("a cat on the moon",), **more})


def kohya(**sections):
    return KohyaRecipe.model_validate(sections)


def toolkit(**sections):
    return AiToolkitRecipe.model_validate(sections)


def argv(recipe, **more):
    return TRANSLATIONS[recipe.task].argv(recipe, job(**more))


def files(recipe, **more):
    return TRANSLATIONS[recipe.task].files(recipe, job(**more))


# --- sd-scripts


def test_the_whole_command_of_sd_scripts_is_the_documented_one():
    recipe = kohya(
        lora={"r": 32, "alpha": 16},
        training={"learning_rate": 1e-4, "max_steps": 1500, "per_device_train_batch_size": 1, "save_steps": 250,
                  "gradient_checkpointing": True, "optim": "adamw_8bit", "dataloader_num_workers": 2},
        diffusion={"min_snr_gamma": 5},
    )  # fmt: skip
    assert argv(recipe) == [
        "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process=1", "--num_processes=1", "--num_machines=1",
        "--mixed_precision=bf16", "--dynamo_backend=no", "sdxl_train_network.py",
        "--pretrained_model_name_or_path=/model", "--tokenizer_cache_dir=/x/files/tokenizers",
        "--dataset_config=/x/files/dataset.toml", "--network_module=networks.lora", "--network_dim=32",
        "--network_alpha=16.0", "--network_train_unet_only",
        "--learning_rate=0.0001", "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=45",
        "--max_train_steps=1500", "--max_grad_norm=1.0", "--seed=42", "--max_data_loader_n_workers=2",
        "--persistent_data_loader_workers", "--optimizer_type=AdamW8bit",
        "--optimizer_args", "weight_decay=0.0", "betas=0.9,0.999", "eps=1e-08",
        "--output_dir=/x/made", "--output_name=lora", "--save_model_as=safetensors", "--save_precision=fp16",
        "--save_every_n_steps=250", "--save_state",
        "--mixed_precision=bf16", "--sdpa", "--gradient_checkpointing", "--cache_latents",
        "--min_snr_gamma=5.0", "--prior_loss_weight=1.0",
        "--sample_prompts=/x/files/prompts.json", "--sample_every_n_steps=250",
    ]  # fmt: skip


def test_sd_scripts_goes_on_at_the_step_of_its_state():
    assert argv(kohya(), resume="/output/checkpoint-250/state", step=250)[-3:] == [
        "--resume=/output/checkpoint-250/state", "--skip_until_initial_step", "--initial_step=250",
    ]  # fmt: skip


def test_captions_that_never_vary_are_encoded_once():
    fixed = (Folder("/x/images/00_10_cat", 10, False, {**FIXED, "caption_dropout_rate": 0.0}),)
    assert "--cache_text_encoder_outputs" in argv(kohya(), folders=fixed)
    assert "--cache_text_encoder_outputs" not in argv(kohya())
    assert "--cache_text_encoder_outputs" not in argv(kohya(diffusion={"train_text_encoders": True}), folders=fixed)
    trained = argv(kohya(diffusion={"train_text_encoders": True, "text_encoder_learning_rate": 1e-5}))
    assert "--text_encoder_lr=1e-05" in trained
    assert "--network_train_unet_only" not in trained


def test_the_data_set_is_in_kohyas_words_with_an_epoch_as_long_as_the_run():
    recipe = kohya(data={"resolution": [512, 1024]}, training={"per_device_train_batch_size": 2})
    tree = tomllib.loads(files(recipe)["dataset.toml"])
    subset = {"image_dir": "/x/images/00_10_cat", "num_repeats": 160, "is_reg": False, **FIXED}
    regular = {"image_dir": "/x/images/01_1_cat", "num_repeats": 16, "is_reg": True, **FIXED}
    common = {"batch_size": 2, "enable_bucket": True, "min_bucket_reso": 256, "max_bucket_reso": 2048,
              "bucket_reso_steps": 64, "subsets": [subset, regular]}  # fmt: skip
    assert tree == {
        "general": {"caption_extension": ".txt"},
        "datasets": [{"resolution": 512, **common}, {"resolution": 1024, **common}],
    }


def test_paths_with_quotes_are_whole_in_the_toml():
    folder = (Folder('/x/a "big" cat\\é', 1, False, FIXED),)
    tree = tomllib.loads(files(kohya(), folders=folder)["dataset.toml"])
    assert tree["datasets"][0]["subsets"][0]["image_dir"] == '/x/a "big" cat\\é'


def test_the_samples_of_sd_scripts():
    sample = {"negative_prompt": "blurry", "width": 768, "seed": 7, "guidance_scale": 5, "num_inference_steps": 20}
    assert json.loads(files(kohya(sample=sample))["prompts.json"]) == [
        {"prompt": "a cat on the moon", "negative_prompt": "blurry", "width": 768, "height": 1024, "seed": 7,
         "scale": 5.0, "sample_steps": 20},
    ]  # fmt: skip
    assert list(files(kohya(), prompts=())) == ["dataset.toml"]
    assert not any("sample" in option for option in argv(kohya(), prompts=()))


# --- ai-toolkit


def test_the_whole_job_of_ai_toolkit_is_the_documented_one():
    recipe = toolkit(
        training={"learning_rate": 1e-4, "max_steps": 2000, "per_device_train_batch_size": 1, "save_steps": 250,
                  "gradient_checkpointing": True, "optim": "adamw_8bit", "dataloader_num_workers": 2},
        data={"resolution": [512, 768, 1024]},
        diffusion={"ema_decay": 0.99},
        peft={"method": "qlora"},
        quantization={"quant_type": "int8"},
        sample={"guidance_scale": 4, "num_inference_steps": 20},
    )  # fmt: skip
    dataset = {
        "folder_path": "/x/images/00_10_cat", "caption_ext": "txt", "caption_dropout_rate": 0.05,
        "token_dropout_rate": 0.0, "shuffle_tokens": False, "keep_tokens": 0, "flip_x": False, "num_repeats": 10,
        "is_reg": False, "cache_latents": True, "resolution": [512, 768, 1024], "buckets": True,
        "bucket_tolerance": 64, "num_workers": 2, "prefetch_factor": 2,
    }  # fmt: skip
    assert argv(recipe, steps=2000) == ["run.py", "/x/files/config.yaml"]
    assert yaml.safe_load(files(recipe, steps=2000)["config.yaml"]) == {
        "job": "extension",
        "config": {
            "name": "lora",
            "process": [
                {
                    "type": "sd_trainer",
                    "training_folder": "/x/made",
                    "device": "cuda:0",
                    "network": {"type": "lora", "linear": 16, "linear_alpha": 16.0},
                    "save": {"dtype": "float32", "save_every": 250, "max_step_saves_to_keep": 4, "push_to_hub": False},
                    "datasets": [
                        dataset,
                        {**dataset, "folder_path": "/x/images/01_1_cat", "num_repeats": 1, "is_reg": True},
                    ],
                    "train": {
                        "batch_size": 1, "steps": 2000, "gradient_accumulation": 1, "train_unet": True,
                        "train_text_encoder": False, "gradient_checkpointing": True, "noise_scheduler": "flowmatch",
                        "timestep_type": "sigmoid", "optimizer": "adamw8bit",
                        "optimizer_params": {"weight_decay": 0.0, "betas": [0.9, 0.999]}, "lr": 0.0001,
                        "lr_scheduler": "constant_with_warmup", "lr_scheduler_params": {"num_warmup_steps": 60},
                        "max_grad_norm": 1.0, "reg_weight": 1.0, "ema_config": {"use_ema": True, "ema_decay": 0.99},
                        "dtype": "bf16", "skip_first_sample": True, "disable_sampling": False,
                    },
                    "model": {"name_or_path": "/model", "is_flux": True, "quantize": True, "qtype": "qint8",
                              "qtype_te": "qint8"},
                    "sample": {
                        "sampler": "flowmatch", "sample_every": 250, "width": 1024, "height": 1024,
                        "prompts": ["a cat on the moon"], "neg": "", "seed": 42, "walk_seed": False,
                        "guidance_scale": 4.0, "sample_steps": 20, "format": "png",
                    },
                }
            ],
        },
    }  # fmt: skip


def test_without_loaders_of_its_own_nothing_is_fetched_ahead():
    (process,) = yaml.safe_load(files(toolkit())["config.yaml"])["config"]["process"]
    assert (process["datasets"][0]["num_workers"], process["datasets"][0]["prefetch_factor"]) == (0, None)


# --- every field


BY_TRAINBOX = {
    "task", "description", "model.name", "model.revision", "model.sha256", "data.path", "data.revision", "data.columns",
    "data.subsets", "data.max_upscale", "data.max_unreadable", "data.min_images", "data.trigger_word",
    "data.caption_extension", "data.caption_prefix", "data.caption_suffix", "data.caption_dropout_rate",
    "data.caption_tag_dropout_rate", "data.shuffle_caption", "data.keep_tokens", "data.flip_aug",
    "training.num_train_epochs", "training.max_steps", "training.bf16", "training.fp16", "training.logging_steps",
    "training.save_total_limit", "training.deterministic", "training.report_to", "sample.prompts",
    "diffusion.prediction_type",
    "limits.memory", "limits.cpus", "limits.shm_size", "limits.preflight", "budget.max_usd", "budget.usd_per_hour",
    "budget.max_hours", "trainer.repository", "trainer.revision",
}  # fmt: skip
"""What Trainbox does by itself, or hands over in the job: images, captions, steps, precision."""
REFUSED_BEFORE = {
    "lora.bias", "lora.modules_to_save", "lora.use_rslora", "lora.use_dora", "lora.loraplus_lr_ratio",
    "training.neftune_noise_alpha",
}  # fmt: skip
"""By every recipe of diffusion models."""
OTHER: dict[Any, Any] = {bool: True, int: 3, float: 0.25, str: "other"}
TOGETHER = {
    "lora.r": {"lora.alpha": 64},
    "quantization.quant_type": {"peft.method": "qlora"},
    "peft.method": {"quantization.quant_type": "int8"},
    "diffusion.text_encoder_learning_rate": {"diffusion.train_text_encoders": True},
    "training.warmup_ratio": {},
}
"""Fields that count only with others."""
VALUES = {
    "lora.r": 64, "lora.alpha": 32, "data.resolution": 512, "data.min_bucket_reso": 128, "data.max_bucket_reso": 1536,
    "data.bucket_reso_steps": 32, "quantization.quant_type": "int8", "peft.method": "qlora", "sample.width": 512,
    "sample.height": 512, "training.warmup_steps": 11, "training.save_strategy": "no", "training.optim": "adamw_8bit",
    "training.lr_scheduler_type": "constant", "model.attn_implementation": "eager",
    "training.eval_strategy": "steps", "training.metric_for_best_model": "eval_loss_of_another",
}  # fmt: skip


def leaves(section, prefix=""):
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def another(key, field):
    """Some value that is not the default."""
    if key in VALUES:
        return VALUES[key]
    kinds = [field.annotation, *get_args(field.annotation)]
    for kind in kinds:
        if get_origin(kind) is not None and str(get_origin(kind)) == "typing.Literal":
            return next(value for value in get_args(kind) if value != field.default)
    if isinstance(field.default, bool):
        return not field.default
    plain = next(kind for each in kinds for kind in (each, *get_args(each)) if kind in OTHER)
    return OTHER[plain]


def tree_of(settings):
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, leaf = key.partition(".")
        tree.setdefault(section, {})[leaf] = value
    return tree


def said(recipe):
    return argv(recipe), files(recipe)


@pytest.mark.parametrize("cls", [KohyaRecipe, AiToolkitRecipe])
def test_every_field_changes_what_the_trainer_is_told_or_is_refused_by_its_name(cls):
    for key, field in leaves(cls):
        if key in BY_TRAINBOX:
            continue
        more = TOGETHER.get(key, {})
        settings = {**more, key: another(key, field)}
        if cls is AiToolkitRecipe and key == "lora.alpha":
            settings["lora.r"] = 32
        if key in REFUSED_BEFORE or (key in cls.LIMITS and settings[key] not in cls.LIMITS[key][0]):
            with pytest.raises(ValidationError, match=re.escape(key)):
                cls.model_validate(tree_of({key: settings[key]}))
        else:
            assert said(cls.model_validate(tree_of(settings))) != said(cls()), key


@pytest.mark.parametrize("cls", [KohyaRecipe, AiToolkitRecipe])
def test_a_limit_is_of_a_field_that_is_there_and_holds_its_default(cls):
    known = dict(leaves(cls))
    for key, (values, remedy) in cls.LIMITS.items():
        assert known[key].default in values, key
        assert remedy


@pytest.mark.parametrize(
    ("build", "sections", "words"),
    [
        (kohya, {"training": {"gradient_accumulation_steps": 4}}, "raise training.per_device_train_batch_size"),
        (kohya, {"diffusion": {"ema_decay": 0.99}}, "RECIPE=sdxl-lora keeps a moving average"),
        (kohya, {"peft": {"method": "qlora"}}, "peft.method qlora (but lora)"),
        (kohya, {"data": {"bucket_reso_steps": 16}}, "multiple of 32"),
        (kohya, {"training": {"optim": "adafactor", "adam_beta1": 0.5}}, "has no training.adam_beta1"),
        (kohya, {"training": {"optim": "sgd"}}, "sd-scripts does not honour training.optim sgd"),
        (toolkit, {"lora": {"r": 32}}, "set lora.alpha=32"),
        (toolkit, {"training": {"seed": 7}}, "it has no seed; RECIPE=flux-lora has"),
        (toolkit, {"peft": {"method": "qlora"}}, "quantization.quant_type=int8"),
        (toolkit, {"sample": {"prompts": ["a cat --w 512"]}}, "takes what follows -- for an option"),
    ],
)
def test_what_a_trainer_does_not_honour_is_told_with_what_to_do(build, sections, words):
    with pytest.raises(ValidationError, match=r"(?s).*") as caught:
        build(**sections)
    assert words in str(caught.value)


# --- what both share


def test_images_are_grouped_by_folder_and_by_how_they_vary():
    plain = {"num_repeats": 1, "is_reg": False, **FIXED}
    examples = [
        {"image": "/d/a/1.jpg", **plain},
        {"image": "/d/b/1.jpg", **plain},
        {"image": "/d/a/2.jpg", **plain},
        {"image": "/d/a/3.jpg", **plain, "flip_aug": True},
    ]
    assert [[each["image"] for each in group] for group in kinds_of(examples)] == [
        ["/d/a/1.jpg", "/d/a/2.jpg"],
        ["/d/b/1.jpg"],
        ["/d/a/3.jpg"],
    ]


def test_an_epoch_has_a_batch_for_each_bucket_and_resolution_and_no_images_of_the_class(tmp_path):
    from PIL import Image

    examples = []
    for number, size in enumerate([(64, 64), (64, 64), (64, 64), (128, 64)]):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", size).save(path)
        examples.append({"image": str(path), "num_repeats": 2, "is_reg": False})
    examples.append({**examples[0], "is_reg": True})
    data = {"resolution": [64, 128], "min_bucket_reso": 32, "max_bucket_reso": 256, "bucket_reso_steps": 32}
    recipe = kohya(data=data, training={"per_device_train_batch_size": 4})
    assert batches_of(examples, recipe.data, 4) == 2 * (2 + 1)
    assert steps_of(recipe.training, 6) == 18
    assert steps_of(kohya(training={"max_steps": 7}).training, 6) == 7


def test_the_learning_rate_rises_as_long_as_in_the_other_recipes():
    def steps(of, **training):
        return warmup_steps(kohya(training=training).training, of)

    assert steps(1500) == 45
    assert steps(1500, warmup_steps=100) == 100
    assert steps(100, warmup_steps=60) == 10
    assert steps(1500, warmup_ratio=0) == 0


def test_samples_show_the_prompts_else_the_captions_of_the_first_images():
    captions = [{"caption": f"cat {number % 5}", "is_reg": number == 0} for number in range(9)]
    assert prompts_of(kohya(), captions) == ("cat 1", "cat 2", "cat 3", "cat 4")
    assert prompts_of(kohya(sample={"prompts": []}), captions) == ()
    told = kohya(sample={"prompts": ["[trigger] sleeps"]}, data={"trigger_word": "ohwx"})
    assert prompts_of(told, captions) == ("ohwx sleeps",)
