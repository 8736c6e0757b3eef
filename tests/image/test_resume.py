"""A run that is killed, stopped or damaged, and resumed, is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import (
    PACKED,
    PLAIN,
    RECIPES,
    ROOT,
    STEADY,
    Command,
    Ended,
    assert_same_run,
    containers,
    copy_checkout,
    kill_now,
    last_step,
    run,
    training,
    without_end,
)

from trainbox.host.engine import Docker
from trainbox.spec import record
from trainbox.spec.checkpoint import SEAL, newest_complete
from trainbox.spec.run import RunSpec

# Neither the steps between two logs nor those between two evaluations divide those between two checkpoints.
UNEVEN = (
    "training.max_steps=24 training.logging_steps=5 training.eval_steps=3 training.save_steps=4 limits.cpus=1 "
    "training.gradient_accumulation_steps=3 training.gradient_checkpointing=true lora.dropout=0.2"
)
PISSA = f"{PLAIN} lora.init_lora_weights=pissa lora.loraplus_lr_ratio=16"
# Its weights have other names in memory than in their files.
VARIED = (
    f"{PLAIN} model.name=random:vit augmentation.color_jitter=0.3 classification.mixup_alpha=0.2 "
    "classification.label_smoothing=0.1 training.gradient_checkpointing=true training.gradient_accumulation_steps=2"
)
# Nothing is cached; what varies, is trained, or is kept beside the weights does and is.
LIVELY = (
    f"{PLAIN} data.cache=false diffusion.train_text_encoders=true diffusion.text_encoder_learning_rate=2e-3 "
    "diffusion.ema_decay=0.9 diffusion.noise_offset=0.05 data.shuffle_caption=true data.caption_tag_dropout_rate=0.2 "
    "data.keep_tokens=1 data.caption_dropout_rate=0.2 training.gradient_checkpointing=true "
    "training.gradient_accumulation_steps=2 training.dataloader_num_workers=0"
)
QUANTISED = f"{PLAIN} peft.method=qlora diffusion.ema_decay=0.9"
# Nothing improves, so that the second evaluation, at step 8, is the last.
STOPPED_EARLY = f"{PLAIN} training.early_stopping_patience=1 training.learning_rate=1e-12"
# Where an epoch ends: 116 rows are 15 steps, the last of which is saved, with an evaluation that draws numbers;
# 170 pairs are 11 steps, the last of which is not full.
EPOCH_ENDS = {
    "llm-lora": f"{PLAIN} lora.dropout=0.2 training.per_device_train_batch_size=8 "
    "training.gradient_accumulation_steps=1 training.eval_strategy=epoch training.max_steps=20 training.save_steps=15",
    "llm-preference": f"{PLAIN} preference.method=orpo training.per_device_train_batch_size=8 "
    "training.gradient_accumulation_steps=2 training.max_steps=12 training.save_steps=8",
}
# Far from its end when a signal arrives.
SLOW = f"{PLAIN} training.gradient_accumulation_steps=40"
BY_EPOCH = f"{STEADY} training.save_strategy=epoch training.max_steps=-1 training.num_train_epochs=2"


@pytest.fixture
def moment() -> random.Random:
    """Where to kill; the seed is printed, so that a failure can be repeated."""
    seed = int(os.environ.get("TRAINBOX_TEST_SEED") or time.time_ns() % 2**32)
    print(f"TRAINBOX_TEST_SEED={seed}")
    return random.Random(seed)


def kill(command: Command, step: int, delay: float) -> bool:
    """SIGKILL to everything in the container, at some moment after this step; False where it had done all before."""
    box = command.wait_for_container()
    command.wait_for_step(step)
    time.sleep(delay)
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        kill_now(box)
    ended = command.end()
    if record.finished(command.output):
        return False
    assert ended.code == command.code_of(5), ended.text
    ended.says("killed by signal 9", "make resume")
    return True


def some(moment: random.Random, step: int) -> tuple[int, float]:
    """Somewhere in the time from one checkpoint to the next."""
    return moment.randint(step, step + 3), moment.uniform(0, 0.1)


def resume(output: Path) -> None:
    ended = run("make", "resume", OUTPUT=str(output))
    assert ended.code == 0, ended.text
    assert "going on from checkpoint-" in ended.text


def test_there_are_recipes() -> None:
    assert {"llm-full", "llm-lora", "llm-qlora"} <= set(RECIPES)


@pytest.mark.parametrize(
    ("recipe", "settings", "again"),
    [
        *[(recipe, PLAIN, False) for recipe in RECIPES],
        ("llm-lora", PACKED, True),
        ("llm-qlora", UNEVEN, False),
        ("llm-lora", PISSA, False),
        ("image-classifier", VARIED, False),
        ("sdxl-lora", LIVELY, False),
        ("flux-lora", QUANTISED, False),
    ],
    ids=[
        *RECIPES,
        "packed, killed twice",
        "uneven, with gradient checkpointing",
        "PiSSA and LoRA+",
        "ViT, mixup",
        "SDXL with text encoders, nothing cached",
        "FLUX in 4 bits",
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(
    recipe: str, settings: str, again: bool, straight: Callable[..., Path], moment: random.Random, tmp_path: Path
) -> None:
    reference, output = straight(recipe, settings), tmp_path / "out"
    start = training(recipe, output, settings, "--overwrite=1")
    # The steps of some are so short that a busy machine lets one end before the kill comes.
    assert any(kill(Command(*start, output=output), *some(moment, 5)) for _ in range(3))
    if again:
        assert kill(Command("make", "resume", output=output, OUTPUT=str(output)), *some(moment, 13))
    resume(output)
    assert_same_run(output, reference)
    assert containers(output) == []


@pytest.mark.parametrize("recipe", EPOCH_ENDS)
def test_resumed_at_or_before_an_epoch_s_end_it_is_the_same_run(
    recipe: str, straight: Callable[..., Path], tmp_path: Path
) -> None:
    reference, output = straight(recipe, EPOCH_ENDS[recipe]), tmp_path / "out"
    without_end(reference, output)
    resume(output)
    assert_same_run(output, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_resume_ends_the_same(
    number: signal.Signals, straight: Callable[..., Path], tmp_path: Path
) -> None:
    # Between two checkpoints; and inside an epoch where the epoch's end is when to evaluate and save.
    step, settings = (6, STEADY) if number == signal.SIGTERM else (5, BY_EPOCH)
    reference, output = straight("llm-lora", settings), tmp_path / "out"
    command = Command(*training("llm-lora", output, settings), output=output)
    command.wait_for_step(step)
    command.process.send_signal(number)
    ended = command.end()
    assert ended.code == 75, ended.text
    stopped = last_step(output)
    ended.says("finishing this step", f"checkpoint-{stopped} is saved", f"make resume OUTPUT={output}")
    assert newest_complete(output) == (output / f"checkpoint-{stopped}", [])
    assert containers(output) == []
    resume(output)
    assert_same_run(output, reference)


def test_ctrl_c_of_make_saves_the_step_and_leaves_no_container(tmp_path: Path) -> None:
    output = tmp_path / "out"
    wanted = {"RECIPE": "llm-full", "PROFILE": "tiny", "OUTPUT": str(output), "SET": SLOW}
    command = Command("make", "train", output=output, **wanted)
    command.wait_for_step(5)
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does: to make, Python and all below
    ended = command.end()
    ended.says("finishing this step", "is saved")
    assert newest_complete(output)[0] == output / f"checkpoint-{last_step(output)}"
    assert containers(output) == []


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    output = tmp_path / "out"
    # A step of many passes, long enough for both signals; no step goes beyond an epoch.
    slow = "training.gradient_accumulation_steps=600 training.logging_steps=1 limits.cpus=1 training.max_steps=4"
    data = tmp_path / "data.jsonl"
    data.write_text((ROOT / "recipes/llm-lora/sample/train.jsonl").read_text() * 30)
    command = Command(*training("llm-lora", output, slow, f"--data={data}"), output=output)
    command.wait_for_step(1)
    command.process.send_signal(signal.SIGTERM)
    log = output / "logs/train.log"
    command.wait_until(lambda: "once more to stop at once" in log.read_text())
    time.sleep(1.5)  # sooner, the second would be the first one's echo
    command.process.send_signal(signal.SIGTERM)
    ended = command.end()
    assert ended.code == 5, ended.text
    ended.says("once more to stop at once", "killed by signal 15")
    assert newest_complete(output) == (None, [])
    assert containers(output) == []


def test_a_stop_before_the_first_step_leaves_no_container_and_a_second_process_is_refused_until_then(
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    command = Command(*training("llm-lora", output), output=output)
    box = command.wait_for_container()
    box.pause()
    second = run(*training("llm-lora", output, PLAIN, "--overwrite=1"))
    box.unpause()
    assert second.code == 2
    second.says(str(output), "another process trains into it right now", "OUTPUT=")
    command.process.send_signal(signal.SIGTERM)
    ended = command.end()
    assert ended.code == 5
    ended.says("killed by signal 15")
    assert containers(output) == []


def test_damaged_and_unsealed_checkpoints_are_skipped_by_name(straight: Callable[..., Path], tmp_path: Path) -> None:
    reference, output = straight("llm-lora"), tmp_path / "out"
    shutil.copytree(reference, output)
    for name in ("run.json", "result.json"):
        (output / name).unlink()
    shutil.rmtree(output / "final")
    weights = output / "checkpoint-24" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (output / "checkpoint-20" / SEAL).unlink()
    ended = run("make", "resume", OUTPUT=str(output))
    assert ended.code == 0, ended.text
    ended.says(
        "skipped: checkpoint-24 is damaged: adapter_model.safetensors has changed",
        "skipped: checkpoint-20 is incomplete: it was never sealed",
        "going on from checkpoint-16",
    )
    assert_same_run(output, reference)


@pytest.mark.parametrize("settings", [PLAIN, STOPPED_EARLY], ids=["max_steps", "stopped early"])
def test_a_run_killed_between_its_last_checkpoint_and_its_end_does_no_step_more(
    settings: str, straight: Callable[..., Path], tmp_path: Path
) -> None:
    reference, output = straight("llm-lora", settings), tmp_path / "out"
    assert last_step(reference) == (8 if settings == STOPPED_EARLY else 24)
    shutil.copytree(reference, output)
    for name in ("run.json", "result.json"):
        (output / name).unlink()
    shutil.rmtree(output / "final")
    resume(output)
    assert_same_run(output, reference)


def test_a_killed_harness_leaves_a_training_that_saves_and_stops(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = Command(*training("llm-full", output, SLOW), output=output)
    box = command.wait_for_container()
    command.wait_for_step(2)
    command.process.kill()
    assert box.wait()["StatusCode"] == 75
    box.remove()
    assert newest_complete(output)[0] == output / f"checkpoint-{last_step(output)}"


# What has changed since


@dataclass(frozen=True)
class Interrupted:
    """A stopped run whose checkout, data and model are its own, to be changed."""

    root: Path
    output: Path
    data: Path
    model: Path

    def resume(self, *more: str) -> Ended:
        return run("resume", f"--output={self.output}", *more, root=self.root)


@pytest.fixture(scope="module")
def interrupted(
    engine: Docker, straight: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Interrupted]:
    folder = tmp_path_factory.mktemp("interrupted")
    it = Interrupted(copy_checkout(folder / "checkout"), folder / "out", folder / "data.jsonl", folder / "model")
    change_source(it.root, f"an image of its own, that may be removed: {os.getpid()}")
    shutil.copy(ROOT / "recipes/llm-lora/sample/train.jsonl", it.data)
    shutil.copytree(RunSpec.read(straight("llm-lora") / "spec.json").model.reference, it.model)
    arguments = training("llm-lora", it.output, STEADY, f"--data={it.data}", f"--model={it.model}")
    command = Command(*arguments, output=it.output, root=it.root)
    command.wait_for_step(5)
    command.process.terminate()
    ended = command.end()
    assert ended.code == 75, ended.text
    yield it
    engine.client.images.remove(image_of(it), force=True)


def image_of(it: Interrupted) -> str:
    return str(RunSpec.read(it.output / "spec.json").origin["image"]["id"])


def change_source(root: Path, comment: str) -> None:
    with (root / "src/trainbox/__init__.py").open("a") as file:
        file.write(f"# {comment}\n")


CHANGES: dict[str, tuple[Callable[[Interrupted], Path], str, str, str]] = {
    "data": (lambda it: it.data, "litres", "liters", "data was "),
    "base model": (lambda it: it.model / "config.json", "1e-06", "1e-05", "base model was "),
    "recipe": (lambda it: it.root / "recipes/llm-lora/recipe.yaml", "{r: 4,", "{r: 8,", "lora.r was 4, is now 8"),
    "spec": (lambda it: it.output / "spec.json", '"seed": 42', '"seed": 43', "spec.json was edited"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_resume_refuses_when_something_has_changed_and_names_it(what: str, interrupted: Interrupted) -> None:
    where, old, new, told = CHANGES[what]
    file = where(interrupted)
    before = file.read_bytes()
    assert old.encode() in before
    file.write_bytes(before.replace(old.encode(), new.encode()))
    try:
        ended = interrupted.resume()
    finally:
        file.write_bytes(before)
    assert ended.code == 2, ended.text
    ended.says("no longer the run that was interrupted", told, "FORCE=1")


def test_resume_refuses_another_image_and_goes_on_by_force(engine: Docker, interrupted: Interrupted) -> None:
    engine.client.images.remove(image_of(interrupted), force=True)
    change_source(interrupted.root, f"another image: {os.getpid()}")
    ended = interrupted.resume()
    assert ended.code == 2, ended.text
    ended.says("no longer the run that was interrupted", "image was ", "FORCE=1")
    ended = interrupted.resume("--force=1")
    assert ended.code == 0, ended.text
    ended.says("resuming although this differs", "image was ", "going on from checkpoint-")
    assert last_step(interrupted.output) == 24
