"""LoRAs of diffusion models: what other tools make of them, what is cached, what is learned, what is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import DRAWING, PLAIN, ROOT, inside, metrics, run, training
from PIL import Image

from trainbox.host.engine import Docker

SAMPLE = ROOT / "recipes/sd15-lora/sample"
TEXTS = f"{PLAIN} diffusion.train_text_encoders=true"
EVERYWHERE = (
    r"lora.target_modules='.*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|proj|net\.2|conv1|conv2|conv|conv_shortcut"
    r"|time_emb_proj|linear_1|linear_2)|conv_in|conv_out'"
)
SETTINGS = {"sdxl-lora": f"{TEXTS} {EVERYWHERE}", "sd15-lora": TEXTS}
"""Where CLIP can be trained along, it is; SDXL, whose modules are renamed, in all of them."""


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """A copy of the sample, to be changed."""
    return Path(shutil.copytree(SAMPLE, tmp_path / "cats"))


OUTSIDE = """
import json, sys
import numpy, torch
from diffusers import DiffusionPipeline

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")

def changes(pipe):
    found = {}
    for part in PARTS:
        for name, module in getattr(pipe, part, torch.nn.Module()).named_modules():
            if getattr(module, "lora_A", None):
                (own,) = module.lora_A
                up, down = module.lora_B[own].weight.detach(), module.lora_A[own].weight.detach()
                found[f"{part}.{name}"] = module.scaling[own] * up.flatten(1) @ down.flatten(1)
    return found

def image(pipe):
    more = {"height": 128, "width": 128, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    return pipe("a cat", **more, output_type="np").images[0]

told, of = {}, {}
for kind in ("pytorch_lora_weights", "lora-kohya"):
    pipe = DiffusionPipeline.from_pretrained("/model")
    untrained = image(pipe)
    pipe.load_lora_weights("/reference/final", weight_name=kind + ".safetensors")
    of[kind] = changes(pipe)
    drawn = image(pipe)
    told[kind] = {"changed": float(numpy.abs(drawn - untrained).max()), "modules": sorted(of[kind])}
    told[kind]["again"] = float(numpy.abs(image(pipe) - drawn).max())
first, second = of.values()
told["apart"] = max((first[name] - second[name]).abs().max().item() for name in first)
told["largest"] = max(each.abs().max().item() for each in first.values())
assert not [name for name in sys.modules if name.startswith("trainbox")]
print(json.dumps(told))
"""


# The tiny FLUX is too narrow for diffusers' reader of kohya's files, which knows the real widths by heart.
@pytest.mark.parametrize("recipe", [recipe for recipe in DRAWING if recipe != "flux-lora"])
def test_plain_diffusers_loads_both_formats_and_they_change_the_image_alike(
    recipe: str, straight: Callable[..., Path], engine: Docker, tmp_path: Path
) -> None:
    output = straight(recipe, SETTINGS.get(recipe, PLAIN))
    told = json.loads(inside(engine, output, tmp_path / "out", OUTSIDE).splitlines()[-1])
    ours, kohya = told["pytorch_lora_weights"], told["lora-kohya"]
    assert ours["modules"] == kohya["modules"]
    assert any(name.startswith("text_encoder.") for name in ours["modules"]) == (recipe in SETTINGS)
    assert min(ours["changed"], kohya["changed"]) > 0.01
    assert ours["again"] == kohya["again"] == 0  # no dropout of the training is left in it
    assert told["apart"] < 2e-3 * told["largest"]  # kohya's is in float16


FLUX = """
import json, re, torch
from accelerate import init_empty_weights
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from pathlib import Path
from trainbox.container.families import Flux
from trainbox.container.lora_files import save_kohya

with init_empty_weights():
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
model.add_adapter(LoraConfig(r=4, lora_alpha=TWO, target_modules=Flux.targets))
torch.manual_seed(0)
for module in model.modules():
    for side in (module.lora_A, module.lora_B) if hasattr(module, "lora_A") else ():
        side["default"].weight = torch.nn.Parameter(torch.randn(side["default"].weight.shape))
save_kohya(Flux(), {"transformer": model}, Path("/output/kohya.safetensors"), {})
theirs = FluxPipeline.lora_state_dict("/output/kohya.safetensors")
ours = get_peft_model_state_dict(model)
apart = {}
for name in {key.partition(".lora_")[0] for key in ours}:
    made = [state[f"{at}{name}.lora_B.weight"].float() @ state[f"{at}{name}.lora_A.weight"].float()
            for state, at in ((ours, ""), (theirs, "transformer."))]
    apart[name] = ((made[0] * TWO / 4 - made[1]).abs().max() / made[0].abs().max()).item()
print(json.dumps({"apart": apart, "left": len(theirs) - len(ours)}))
"""


@pytest.mark.parametrize("alpha", [2, 16])
def test_the_fused_matrices_of_flux_are_read_back_as_they_were_at_its_real_width(
    alpha: int, straight: Callable[..., Path], engine: Docker, tmp_path: Path
) -> None:
    script = FLUX.replace("TWO", str(alpha))
    told = json.loads(inside(engine, straight("flux-lora"), tmp_path / "out", script).splitlines()[-1])
    assert told["left"] == 0
    assert {"single_transformer_blocks.0.proj_mlp", "transformer_blocks.0.attn.add_k_proj"} <= told["apart"].keys()
    assert max(told["apart"].values()) < 2e-3 * alpha


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def test_the_file_for_other_tools_says_what_made_it_and_is_the_same_for_the_same_run(
    straight: Callable[..., Path], tmp_path: Path
) -> None:
    reference, again = straight("sdxl-lora"), tmp_path / "again"
    assert run(*training("sdxl-lora", again)).code == 0
    for name in ("lora-kohya.safetensors", "pytorch_lora_weights.safetensors", "samples.png"):
        assert (again / "final" / name).read_bytes() == (reference / "final" / name).read_bytes(), name
    about = header(reference / "final/lora-kohya.safetensors")["__metadata__"]
    record = json.loads((reference / "run.json").read_text())
    assert about["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (about["ss_network_dim"], about["ss_network_alpha"], about["ss_steps"]) == ("4", "2.0", "24")
    assert about["ss_seed"] == str(record["seed"])
    assert json.loads(about["ss_tag_frequency"])["10_chelsea cat"]["a photo of chelsea cat"] == 7
    assert json.loads(about["ss_dataset_dirs"]) == {"10_chelsea cat": {"img_count": 10, "n_repeats": 10}}
    assert len(about["ss_new_sd_model_hash"]) == 64
    names = header(reference / "final/lora-kohya.safetensors").keys()
    assert any(name.startswith("lora_unet_input_blocks_") and name.endswith(".alpha") for name in names)
    card = (reference / "final/README.md").read_text()
    assert "![samples](samples.png)" in card
    assert "a cat on the moon" in card


def test_samples_are_drawn_before_at_the_way_and_at_the_end_and_the_tracker_has_them(tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = (
        "training.max_steps=6 training.save_steps=6 sample.every=2 training.report_to=tensorboard limits.cpus=1 "
        """sample.prompts='["a cat", "the [trigger] on a boat", "a dog"]' """
        "data.trigger_word=chelsea sample.width=96"
    )
    ended = run(*training("sd15-lora", output, settings))
    assert ended.code == 0, ended.text
    drawn = sorted((output / "samples").iterdir())
    assert [path.name for path in drawn] == [f"step-{step:06d}.png" for step in (0, 2, 4, 6)]
    assert {Image.open(path).size for path in drawn} == {(3 * 96, 128)}
    assert len({path.read_bytes() for path in drawn}) == 4
    assert (output / "final/samples.png").read_bytes() == drawn[-1].read_bytes()
    (events,) = (output / "logs/tensorboard").rglob("events*")
    assert events.read_bytes().count(b"\x89PNG\r\n") == 3
    assert "chelsea on a boat" in (output / "final/README.md").read_text()


def encoded(text: str) -> dict[str, bool]:
    return {what: f"encoding {what}" in text for what in ("images", "captions")}


def items(cache: Path) -> set[str]:
    return {path.name for path in (cache / "prepared/items").glob("*.safetensors")}


def test_only_what_changed_is_encoded_again(cats: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()

    def train(number: int) -> tuple[dict[str, bool], set[str]]:
        before = items(cache)
        settings = "training.max_steps=2 training.save_steps=2 data.flip_aug=false sample.prompts=[]"
        ended = run(
            *training("sd15-lora", tmp_path / f"out-{number}", settings, f"--data={cats}"), TRAINBOX_CACHE=str(cache)
        )
        assert ended.code == 0, ended.text
        return encoded(ended.text), items(cache) - before

    first, made = train(1)
    assert first == {"images": True, "captions": True}
    assert len(made) == 12 + 12 + 1  # images, captions, and none at all
    assert train(2) == ({"images": False, "captions": False}, set())
    (cats / "10_chelsea cat/03.txt").write_text("a photo of chelsea cat with a hat\n")
    third, made = train(3)
    assert (third, len(made)) == ({"images": False, "captions": True}, 1)
    Image.open(cats / "10_chelsea cat/03.jpg").rotate(90, expand=True).save(cats / "10_chelsea cat/03.jpg")
    fourth, made = train(4)
    assert (fourth, len(made)) == ({"images": True, "captions": False}, 1)


def test_a_run_without_caches_learns_the_same(straight: Callable[..., Path], tmp_path: Path) -> None:
    settings = f"{PLAIN} data.cache=false"
    cached, live = metrics(straight("sd15-lora")), metrics(straight("sd15-lora", settings))
    for one, other in zip(cached, live, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("recipe", ["sd15-lora", "flux-lora"])
def test_the_loss_on_fixed_noise_of_a_single_image_falls_by_half(recipe: str, tmp_path: Path) -> None:
    photo = Image.open(SAMPLE / "10_chelsea cat/05.jpg")
    (tmp_path / "one/1_cat").mkdir(parents=True)
    (tmp_path / "same").mkdir()
    photo.save(tmp_path / "one/1_cat/cat.png")
    photo.save(tmp_path / "same/cat.png", compress_level=1)  # the same image twice would be refused
    (tmp_path / "same/cat.txt").write_text("cat")
    settings = (
        f"data.validation_file={tmp_path / 'same'} data.caption_dropout_rate=0 training.max_steps=120 "
        "training.learning_rate=1e-2 lora.r=32 lora.alpha=32 training.eval_steps=10 training.warmup_steps=10 "
        "sample.prompts=[] training.per_device_train_batch_size=1 data.resolution=64 limits.cpus=1"
    )
    output = tmp_path / "out"
    given = ("--profile=demo", f"--data={tmp_path / 'one'}", f"--output={output}", f"--set={settings}")
    ended = run("train", f"--recipe={recipe}", *given)
    assert ended.code == 0, ended.text
    losses = [line["eval_loss"] for line in metrics(output) if "eval_loss" in line]
    assert losses[-1] < losses[0] / 2


def test_images_of_the_class_are_as_many_as_those_of_the_subject(cats: Path, tmp_path: Path) -> None:
    shutil.copytree(cats / "validation", cats / "regularization/1_cat")
    shutil.rmtree(cats / "validation")
    output = tmp_path / "out"
    settings = "training.max_steps=2 training.save_steps=2 training.per_device_train_batch_size=4 sample.prompts=[]"
    ended = run(*training("sd15-lora", output, settings, f"--data={cats}"))
    assert ended.code == 0, ended.text
    about = header(output / "final/lora-kohya.safetensors")["__metadata__"]
    assert (about["ss_num_train_images"], about["ss_num_reg_images"]) == ("200", "2")


def test_a_dataset_of_kohyas_and_a_job_of_ai_toolkit_train_as_they_are(cats: Path, tmp_path: Path) -> None:
    (cats / "10_chelsea cat").rename(cats / "photos")
    toml, job = tmp_path / "set.toml", tmp_path / "job.yaml"
    toml.write_text(
        "[[datasets]]\nresolution = 128\nmin_bucket_reso = 64\nbatch_size = 2\ncolor_aug = true\n"
        "[[datasets.subsets]]\nimage_dir = 'cats/photos'\nnum_repeats = 3\nclass_tokens = 'cat'\n"
    )
    process = {
        "type": "sd_trainer", "network": {"type": "lora", "linear": 8, "linear_alpha": 8}, "save": {"save_every": 2},
        "datasets": [{"folder_path": str(cats / "photos"), "default_caption": "a cat", "resolution": [64, 128]}],
        "train": {"steps": 2, "lr": 1e-3}, "model": {"name_or_path": "random:flux", "is_flux": True},
        "sample": {"sample_every": 2, "prompts": []},
    }  # fmt: skip
    job.write_text(json.dumps({"job": "extension", "config": {"process": [process]}}))
    tiny = "training.max_steps=2 training.save_steps=2 sample.prompts=[] data.min_bucket_reso=64"
    first = run(*training("sd15-lora", tmp_path / "a", tiny, f"--data={toml}"))
    second = run(*training("flux-lora", tmp_path / "b", f"{tiny} data.bucket_reso_steps=16", f"--data={job}"))
    for ended in (first, second):
        assert ended.code == 0, ended.text
    first.says("datasets[0].color_aug = true: has no counterpart")
    about = [header(tmp_path / name / "final/lora-kohya.safetensors")["__metadata__"] for name in ("a", "b")]
    assert about[0]["ss_num_train_images"] == "30"
    assert (about[1]["ss_num_train_images"], about[1]["ss_network_dim"]) == ("20", "8")


def test_a_prompt_draws_an_image_and_what_cannot_be_drawn_is_told(
    straight: Callable[..., Path], tmp_path: Path
) -> None:
    final, target = straight("sd15-lora") / "final", tmp_path / "cat.png"
    asked = {"CHECKPOINT": str(final), "PROMPT": "a cat", "OUTPUT": str(target)}
    assert run("make", "infer", **asked).code == 0
    assert Image.open(target).size == (128, 128)
    for given, words in (
        (asked, ("is there already",)),
        ({**asked, "OUTPUT": str(tmp_path / "cat.jpg")}, ("cat.jpg", ".png")),
        ({"CHECKPOINT": str(final)}, ("PROMPT", "name one")),
    ):
        ended = run("make", "infer", **given)
        assert ended.code == 2
        ended.says(*words)


MERGED = """
import json, numpy, torch
from diffusers import DiffusionPipeline

def image(folder, adapter=None):
    pipe = DiffusionPipeline.from_pretrained(folder)
    if adapter:
        pipe.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors")
    more = {"height": 128, "width": 128, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    return pipe("a cat", **more, output_type="np").images[0]

one = image("/reference/merged")
print(json.dumps([float(numpy.abs(one - image("/model", *own)).max()) for own in ((), ("/reference/final",))]))
"""


def test_a_merged_model_draws_as_base_and_adapter(
    straight: Callable[..., Path], engine: Docker, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(straight("sdxl-lora", TEXTS), tmp_path / "run"))
    assert run("make", "merge", CHECKPOINT=str(output / "final")).code == 0
    base, adapted = json.loads(inside(engine, output, tmp_path / "out", MERGED).splitlines()[-1])
    assert base > 0.01
    assert adapted < 1e-3


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("sd15-lora", "model.name=random:vit", ("model.name", "not trained here", "StableDiffusionPipeline")),
        ("flux-lora", "diffusion.min_snr_gamma=5", ("diffusion", "follows a flow")),
        ("z-image-lora", "diffusion.train_text_encoders=true", ("diffusion.train_text_encoders", "none that can be")),
        ("flux-lora", "data.bucket_reso_steps=24 data.resolution=144", ("data.bucket_reso_steps", "multiple of 16")),
        ("sdxl-lora", "lora.target_modules=[nothing]", ("lora.target_modules", "match no module", "to_q")),
    ],
)
def test_what_does_not_go_with_the_model_is_told(
    recipe: str, settings: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    ended = run(*training(recipe, tmp_path / "out", settings))
    assert ended.code == 2, ended.text
    ended.says(*words)
