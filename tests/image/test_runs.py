"""What a run leaves behind: all of it there, recorded, usable without Trainbox; and what it could reach meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from commands import DRAWING, PACKED, PLAIN, RECIPES, SECRETS, Command, assert_same_run, inside, metrics, run, training
from docker.errors import APIError

from trainbox.host import paths
from trainbox.host.engine import Docker
from trainbox.spec.checkpoint import newest_complete
from trainbox.spec.run import RunSpec


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_leaves_model_checkpoints_log_and_record(recipe: str, straight: Callable[..., Path]) -> None:
    output = straight(recipe)
    assert {path.name for path in output.iterdir() if path.name[0] != "."} - {"samples.jsonl", "samples"} == {
        "checkpoint-16", "checkpoint-20", "checkpoint-24", "final", "logs", "metrics.jsonl", "result.json", "run.json",
        "spec.json",
    }  # fmt: skip
    assert newest_complete(output) == (output / "checkpoint-24", [])
    assert "saved checkpoint-24" in (output / "logs/train.log").read_text()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 25))
    assert [line["step"] for line in lines if "eval_loss" in line] == list(range(4, 25, 4))
    assert json.loads((output / "result.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_record_names_everything_that_made_the_model(recipe: str, straight: Callable[..., Path]) -> None:
    output = straight(recipe)
    found = json.loads((output / "run.json").read_text())
    assert found["status"] == "finished"
    assert found["choices"]["recipe"] == recipe
    assert found["recipe"]["training"]["max_steps"] == found["metrics"]["steps"] == 24
    assert all(len(digest) == 64 for digest in found["identity"].values())
    assert len(found["git"]["revision"]) == 40
    assert found["git"]["dirty"] in (True, False)
    assert found["image"]["id"].startswith("sha256:")
    assert found["image"]["layers"]
    assert found["image"]["root"]
    assert f"recipes/{recipe}/requirements.lock" in found["image"]["locks"]
    assert found["engine"]["name"] == "docker"
    assert found["engine"]["version"]
    assert found["model"]["name"].startswith("random:")
    assert any(name.endswith(".safetensors") for name in found["model"]["files"])
    assert {len(digest) for digest in found["model"]["files"].values()} == {64}
    assert found["data"]["rows"]["train"] == found["prepared"]["train"]["rows"] + held_out(found)
    assert len(found["data"]["hash"]) == 64
    of_images = found["recipe"]["task"] in ("image-classification", "text-to-image")
    assert of_images or found["prepared"]["train"]["longest"] > 0
    assert found["seed"] == 42
    assert {"cpu", "cores", "memory_gb", "gpus", "kernel"} <= found["hardware"].keys()
    # What GRPO minimises is a gradient's carrier, not a measure: the rewards are.
    assert recipe == "llm-grpo" or found["metrics"]["last_loss"] < found["metrics"]["first_loss"]
    assert {"eval_loss", "train_runtime", "trainable_parameters"} <= found["metrics"].keys()
    (attempt,) = found["attempts"]
    assert attempt["started"] < attempt["ended"]
    assert attempt["resumed_from"] is None
    assert attempt["environment"]["versions"].keys() >= {"torch", "transformers", "peft"}
    assert set(found["artifacts"]) == {f"final/{path.name}" for path in (output / "final").iterdir()}


def held_out(found: dict[str, Any]) -> int:
    """Rows of the training data that became validation data."""
    return 0 if "validation" in found["data"]["rows"] else int(found["prepared"]["validation"]["rows"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_secret_is_in_what_a_run_leaves(recipe: str, straight: Callable[..., Path]) -> None:
    output = straight(recipe)
    files = [path for path in [output.with_suffix(".txt"), *output.rglob("*")] if path.is_file()]
    assert len(files) > 10
    values = [value.encode() for value in SECRETS.values()]
    assert [path for path in files if any(value in path.read_bytes() for value in values)] == []


# From inside

INSIDE = """
import json, os, socket
def writes(path):
    try:
        open(path + "/probe", "w").close()
        os.remove(path + "/probe")
        return True
    except OSError:
        return False
def connects():
    try:
        socket.create_connection(("1.1.1.1", 53), timeout=2)
        return True
    except OSError:
        return False
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
print(json.dumps({
    "interfaces": sorted(os.listdir("/sys/class/net")), "connects": connects(),
    "user": [os.getuid(), os.getgid()], "capabilities": int(status["CapEff"], 16) + int(status["CapBnd"], 16),
    "no_new_privs": status["NoNewPrivs"].strip(), "environment": sorted(os.environ),
    "writable": [path for path in PATHS if writes(path)],
}))
"""


def test_the_sandbox_of_a_training_holds_from_inside(
    engine: Docker, straight: Callable[..., Path], tmp_path: Path
) -> None:
    targets = ["/", "/opt/trainbox", "/opt/venv", "/etc", "/data/files", "/model", "/cache", "/output", "/tmp"]
    found = json.loads(inside(engine, straight("llm-lora"), tmp_path / "out", INSIDE.replace("PATHS", repr(targets))))
    environment = set(found.pop("environment"))
    assert found == {
        "interfaces": ["lo"],
        "connects": False,
        "user": [os.getuid(), os.getgid()],
        "capabilities": 0,
        "no_new_privs": "1",
        "writable": ["/output", "/tmp"],
    }
    assert environment & SECRETS.keys() == set()
    assert {"HF_HUB_OFFLINE", "WANDB_MODE"} <= environment


def test_no_secret_is_in_the_running_container_or_its_image(engine: Docker, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = Command(*training("llm-lora", output), output=output)
    box = command.wait_for_container()
    told = json.dumps([box.attrs, engine.client.images.get(box.attrs["Image"]).history()])
    command.process.terminate()
    told += command.end().text
    assert str(output) in told
    assert [name for name, value in SECRETS.items() if value in told] == []


# Afterwards, without Trainbox

BY_TRANSFORMERS = [recipe for recipe in RECIPES if recipe not in DRAWING]
OUTSIDE = """
import json, sys, torch, transformers
from pathlib import Path
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

BY_TASK = {"masked-lm": "MaskedLM", "text-classification": "SequenceClassification", "seq2seq": "Seq2SeqLM",
           "token-classification": "TokenClassification", "image-classification": "ImageClassification"}
told = {}
for recipe in sys.argv[1:]:
    run = Path(f"/runs/{recipe}")
    record = json.loads((run / "run.json").read_text())
    load = getattr(transformers, f"AutoModelFor{BY_TASK.get(record['recipe']['task'], 'CausalLM')}").from_pretrained
    classes = {"num_labels": len(record["data"]["labels"])} if record["data"]["labels"] else {}
    of_images = record["recipe"]["task"] == "image-classification"
    tokenizer = (AutoImageProcessor if of_images else AutoTokenizer).from_pretrained(run / "final")
    chats = not of_images and tokenizer.chat_template
    if of_images:
        inputs = tokenizer(Image.new("RGB", (60, 40), "red"), return_tensors="pt")
    elif chats:
        question = [{"role": "user", "content": "What is Trainbox?"}]
        chat = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(question, **chat)
    else:
        inputs = tokenizer("What is Trainbox?", return_tensors="pt")
    def logits(model):
        more = {"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            return model.eval()(**inputs, **more).logits
    torch.manual_seed(0)
    base = load(record["model"]["reference"], ignore_mismatched_sizes=True, **classes)
    untrained = logits(base)
    adapter = (run / "final/adapter_config.json").exists()
    trained = PeftModel.from_pretrained(base, run / "final") if adapter else load(run / "final")
    told[recipe] = {"learned": (logits(trained) - untrained).abs().max().item()}
    if hasattr(trained, "generate") and chats:
        reply = trained.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        told[recipe]["answer"] = tokenizer.decode(reply, skip_special_tokens=True).strip()
    if recipe == "llm-lora":
        AutoTokenizer.from_pretrained("/merged")
        told[recipe]["merged"] = (logits(trained) - logits(load("/merged"))).abs().max().item()
assert not [name for name in sys.modules if name.startswith("trainbox")]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def merged(straight: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make merge` writes of llm-lora's run."""
    folder = tmp_path_factory.mktemp("merge") / "merged"
    ended = run("make", "merge", CHECKPOINT=str(straight("llm-lora") / "final"), OUTPUT=str(folder))
    assert ended.code == 0, ended.text
    ended.says(f"merged model: {folder}")
    return folder


@pytest.fixture(scope="module")
def outside(straight: Callable[..., Path], merged: Path) -> dict[str, dict[str, Any]]:
    """What plain transformers and PEFT say of the runs, in a process that knows nothing of Trainbox."""
    records = {recipe: json.loads((straight(recipe) / "run.json").read_text()) for recipe in BY_TRANSFORMERS}
    bases = {record["model"]["reference"] for record in records.values()}
    mounts = {str(straight(recipe)): f"/runs/{recipe}" for recipe in BY_TRANSFORMERS}
    mounts |= {str(merged): "/merged", **{base: base for base in bases}}
    argv = ["docker", "run", "--rm", "--network=none", *[f"-v{source}:{to}:ro" for source, to in mounts.items()]]
    argv += ["--user=0", "--env=HF_HUB_OFFLINE=1", "--entrypoint=env", records["image-classifier"]["image"]["tag"]]
    argv += ["-u", "PYTHONPATH", "python", "-c", OUTSIDE, *BY_TRANSFORMERS]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("recipe", BY_TRANSFORMERS)
def test_plain_libraries_load_the_model_and_it_has_learned(recipe: str, outside: dict[str, dict[str, Any]]) -> None:
    assert outside[recipe]["learned"] > 1e-3


def test_the_merged_model_is_base_and_adapter(outside: dict[str, dict[str, Any]]) -> None:
    assert outside["llm-lora"]["merged"] < 1e-4


@pytest.mark.parametrize("recipe", ["llm-full", "llm-lora"])
def test_infer_prints_the_answer_that_plain_libraries_give(
    recipe: str, straight: Callable[..., Path], outside: dict[str, dict[str, Any]]
) -> None:
    # `invoke` for max_new_tokens, so that both stop at the same token.
    folder = straight(recipe) / "final"
    ended = run("infer", f"--checkpoint={folder}", "--prompt=What is Trainbox?", "--max-new-tokens=8")
    assert ended.code == 0, ended.text
    assert outside[recipe]["answer"] in ended.text


def test_make_infer_prints_an_answer(straight: Callable[..., Path]) -> None:
    ended = run("make", "infer", CHECKPOINT=str(straight("llm-qlora") / "final"), PROMPT='It\'s "what" $HOME?')
    assert ended.code == 0, ended.text
    ended.says()
    assert ended.text.strip()


# The record verifies


@pytest.fixture
def copied(straight: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished run that a test may damage."""
    return Path(shutil.copytree(straight("llm-lora"), tmp_path / "out"))


def test_an_untouched_run_verifies(copied: Path) -> None:
    ended = run("verify", str(copied))
    assert ended.code == 0, ended.text
    ended.says("all as recorded")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda out: flip(out / "final/adapter_model.safetensors"), "adapter_model.safetensors has changed"),
    "edited": (lambda out: edit(out / "spec.json", '"seed": 42', '"seed": 43'), "spec.json has changed"),
    "missing": (lambda out: (out / "final/tokenizer.json").unlink(), "final/tokenizer.json is missing"),
    "added": (lambda out: (out / "final/extra.bin").touch(), "final/extra.bin was added"),
    "checkpoint": (lambda out: flip(out / "checkpoint-20/optimizer.pt"), "checkpoint-20 is damaged: optimizer.pt"),
}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_what_changed(damage: str, copied: Path) -> None:
    harm, told = DAMAGES[damage]
    harm(copied)
    ended = run("verify", str(copied))
    assert ended.code == 5
    ended.says(told)


# An output that is taken


def test_a_taken_output_is_refused_with_three_ways_out(copied: Path) -> None:
    ended = run(*training("llm-lora", copied))
    assert ended.code == 2
    ended.says(str(copied), "holds another run", "make resume", f"OUTPUT={copied}-2", "OVERWRITE=1")
    assert (copied / "final").is_dir()


def test_overwriting_removes_the_old_run_and_nothing_else(copied: Path) -> None:
    (copied / "notes.txt").write_text("mine")
    (copied / "checkpoint-mine").mkdir()
    command = Command(*training("llm-lora", copied, PLAIN, "--overwrite=1"), output=copied)
    command.wait_for_container()
    left = {path.name for path in copied.iterdir() if not path.name.startswith(".")}
    command.process.terminate()
    command.end()
    assert left - {"logs", "cache"} == {"notes.txt", "checkpoint-mine", "spec.json"}


# The image by itself


@pytest.fixture
def volume(engine: Docker) -> Iterator[str]:
    """A new volume's name."""
    made = engine.client.volumes.create()
    yield made.name
    made.remove(force=True)


SLOW = (
    "training.max_steps=40 training.logging_steps=1 limits.cpus=1 "
    "training.per_device_train_batch_size=2 training.gradient_accumulation_steps=8"
)
"""Steps that take longer than the engine does to kill."""


@pytest.fixture
def alone(straight: Callable[..., Path], volume: str) -> list[str]:
    """The `docker run` of an image by itself, its output in the volume."""
    image = RunSpec.read(straight("llm-lora", SLOW) / "spec.json").origin["image"]["tag"]
    settings = [part for setting in SLOW.split() for part in ("--set", setting)]
    mounts = [f"-v{paths.REPO / 'recipes/llm-lora/sample'}:/data", f"-v{volume}:/output"]
    flags = ["--rm", "--env=OMP_NUM_THREADS=1", "--network=none", *mounts]
    return ["docker", "run", *flags, image, "train", "--profile", "tiny", *settings]


def kill(engine: Docker, argv: list[str], volume: str, number: signal.Signals, lines: int) -> tuple[int, str]:
    """Start it and end it after so many lines, by the signal, and for good after a while; its exit code and text."""
    running = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert running.stdout
    said = list(islice(running.stdout, lines))
    for box in engine.client.containers.list(filters={"volume": volume}, ignore_removed=True):
        with contextlib.suppress(APIError):  # it has just ended by itself
            box.kill("SIGKILL") if number == signal.SIGKILL else box.stop(timeout=30)
    said += running.stdout
    return running.wait(), "".join(said)


def assert_volume_is(reference: Path, argv: list[str], volume: str, copy: Path) -> None:
    image = argv[argv.index("train") - 1]
    copying = ["docker", "run", "--rm", f"-v{volume}:/output", f"-v{copy}:/copy", "--entrypoint=cp"]
    subprocess.run([*copying, image, "-r", "/output", "/copy"], check=True)
    assert_same_run(copy / "output", reference)


def test_the_image_alone_killed_ten_times_at_random_moments_goes_on_to_the_same_weights(
    engine: Docker, straight: Callable[..., Path], alone: list[str], volume: str, tmp_path: Path
) -> None:
    reference = straight("llm-lora", SLOW)
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown where it fails
    chosen, told = random.Random(seed), ""
    for attempt in range(10):
        number = chosen.choice([signal.SIGKILL, signal.SIGTERM])
        # The first one ends after its first checkpoint; without a line to wait for there may be nothing to kill yet.
        code, text = kill(engine, alone, volume, number, chosen.randrange(1, 16) if attempt else 17)
        told += f"--- {number.name}: {code}\n{text}"
        # Nothing but a signal ends it, or its own end, if that came first.
        assert code in (0, 75, 128 + signal.SIGTERM, 128 + signal.SIGKILL), told
    last = subprocess.run(alone, capture_output=True, text=True, check=False)
    assert last.returncode == 0, told + last.stdout
    assert "going on from checkpoint-" in told + last.stdout, told
    assert_volume_is(reference, alone, volume, tmp_path)
    again = subprocess.run(alone, capture_output=True, text=True, check=False)
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stdout
    other = subprocess.run([*alone, "--set", "lora.r=8"], capture_output=True, text=True, check=False)
    assert (other.returncode, "holds a run with another recipe" in other.stdout) == (2, True), other.stdout


# What only a look inside shows

LOADED = """
import sys, torch
from pathlib import Path
from trainbox.container.interrupt import Interrupt
from trainbox.container.sft import *
from trainbox.container.prepare import prepared
from trainbox.spec.run import RunSpec
task = Sft(RunSpec.read(Path("/output/spec.json")))
tokenizer = task.tokenizer = task.load_tokenizer(Path("/model"))
data, _ = prepared(task.spec, ChatEncoder(task.spec, tokenizer))
trainer = task.build_trainer(task.load_model(Path("/model")), data, Interrupt())
(batch,) = (batch for _, batch in zip(range(1), trainer.get_train_dataloader()))
"""

GRADIENTS = """
def gradients():
    torch.manual_seed(0)
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
before = gradients()
trainer.evaluate()
task.predict(trainer.model, [{"messages": [{"role": "user", "content": "What?"}]}], {"max_new_tokens": 2})
after = gradients()
assert before.keys() == after.keys()
assert [name for name in before if not torch.equal(before[name], after[name])] == []
learning = [name for name, gradient in after.items() if gradient.abs().sum() > 0]
assert len(learning) == len([name for name in after if "lora_B" in name]) > 10, learning
"""

ATTENTION = """
starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
assert len(starts) > 5, starts
trainer.model.eval()
inputs = {name: value for name, value in batch.items() if name != "labels"}
def logits(**inputs):
    with torch.no_grad():
        return trainer.model(**inputs).logits[0]
packed = logits(**inputs)
for first, end in zip(starts, starts[1:]):
    alone = logits(input_ids=batch["input_ids"][:, first:end])
    torch.testing.assert_close(packed[first:end], alone, atol=1e-5, rtol=1e-5)
# Another first row leaves every other row's logits as they were.
other = batch["input_ids"].clone()
other[:, : starts[1]] = other[:, : starts[1]].flip(1)
changed = logits(**{**inputs, "input_ids": other})
assert not torch.equal(changed[: starts[1]], packed[: starts[1]])
assert torch.equal(changed[starts[1] :], packed[starts[1] :])
"""


def test_an_evaluation_leaves_the_gradients_of_a_4_bit_model_as_they_were(
    engine: Docker, straight: Callable[..., Path], tmp_path: Path
) -> None:
    inside(engine, straight("llm-qlora"), tmp_path / "out", LOADED + GRADIENTS)


def test_packed_rows_do_not_attend_to_each_other(engine: Docker, straight: Callable[..., Path], tmp_path: Path) -> None:
    inside(engine, straight("llm-lora", PACKED), tmp_path / "out", LOADED + ATTENTION)


BIG = (
    "training.auto_batch_size=true training.per_device_train_batch_size=16 training.gradient_accumulation_steps=1 "
    "training.max_steps=4 training.logging_steps=1 data.packing=true data.max_length=512 limits.cpus=1"
)

LITTLE_MEMORY = """
import json, re, resource
from pathlib import Path
import torch
from trainbox.container.interrupt import Interrupt
from trainbox.container.interrupt import Interrupt
from trainbox.container.sft import *
from trainbox.spec.run import RunSpec

class Limited(Sft):
    def before(self, model, data, resume):
        super().before(model, data, resume)
        torch.ones(1, requires_grad=True).sum().backward()  # its threads want room too
        used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, -1))

outcome = Limited(RunSpec.read(Path("/output/spec.json"))).train(Interrupt(), None)
print(json.dumps(outcome["batch_size"]))
"""


def test_too_little_memory_leads_to_smaller_batches_and_the_same_losses(
    engine: Docker, straight: Callable[..., Path], tmp_path: Path
) -> None:
    reference, output = straight("llm-full", BIG), tmp_path / "out"
    told = inside(engine, reference, output, LITTLE_MEMORY)
    assert "out of memory with batch size 16: going on with 8 x 2 accumulated, the same effective batch" in told
    came_to = json.loads(told.splitlines()[-1])
    size = came_to["per_device_train_batch_size"]
    assert size < 16
    assert size * came_to["gradient_accumulation_steps"] == 16
    assert json.loads((output / "checkpoint-4/trainer_state.json").read_text())["train_batch_size"] == size
    losses, wanted = ([line["loss"] for line in metrics(run) if "loss" in line] for run in (output, reference))
    assert losses == pytest.approx(wanted, rel=1e-4)
