"""Projects as `new` makes them: each trains at once, answers, and trains on the user's own data."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import ROOT, run
from PIL import Image

from trainbox.host import starting
from trainbox.host.engine import Docker

if TYPE_CHECKING:
    from trainbox.host.image import ImageFacts

STEPS = "training.max_steps=2 limits.cpus=1"


def rows_of_labels(folder: Path) -> str:
    with (folder / "mine.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("body", "kind"), *((f'He said "{n}, ay"', "ab"[n % 2]) for n in range(24))])
    return "mine.csv"


def pairs(folder: Path) -> str:
    (folder / "mine.json").write_text(json.dumps([{"body": f"Nr {n}", "kind": f"Number {n}."} for n in range(24)]))
    return "mine.json"


def chats(folder: Path) -> str:
    rows = [{"instruction": f"Number {n}?", "output": f"It is {n}."} for n in range(24)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "mine.jsonl"


def photos(folder: Path) -> str:
    (folder / "photos").mkdir()
    for number in range(12):
        Image.new("RGB", (200, 160), (number * 20, 90, 200 - number * 9)).save(folder / f"photos/{number}.png")
    return "photos"


def digits(folder: Path) -> str:
    """A table as the sample's script reads it."""
    lines = (ROOT / "recipes/custom-pytorch/sample/data/train.csv").read_text().splitlines()
    (folder / "mine.csv").write_text("\n".join(lines[:301]))
    return "mine.csv"


PROJECTS: dict[str, tuple[list[str], Callable[[Path], str], list[str], str]] = {
    "classification": (["random:distilbert"], rows_of_labels, ["FIELDS=text=body label=kind"], "(a 0."),
    "generation": (["random:t5", "translation"], pairs, ["FIELDS=input=body target=kind"], ""),
    "fine-tuning": (["random:llama"], chats, [], ""),
    "peft": (["random:llama", "qlora"], chats, [], ""),
    "image-lora": (["random:sdxl", "style"], photos, ["SUBJECT=red square", "REPEATS=2"], "image: "),
    "custom": (["", "pytorch"], digits, [], ""),
}


EXPECTED = {"plan": "^GPU +RTX 4090", "train": "trained  2 steps", "prepare": r"^rows +\d+ +\d"}


def typed_of(project: Path) -> list[list[str]]:
    """What its README says to type, from top to bottom: of each line the verb and what follows."""
    (block,) = re.findall(r"## Start\n\n```sh\n(.*?)```", (project / "README.md").read_text(), re.DOTALL)
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


@pytest.mark.parametrize("kind", PROJECTS)
def test_a_projects_readme_can_be_typed_from_top_to_bottom_with_the_users_own_data(kind: str, tmp_path: Path) -> None:
    words, make_data, options, said = PROJECTS[kind]
    run("new", kind, "mine", *words, f"--output={tmp_path}").says("mine: ")
    project = tmp_path / "mine"
    steps = "script.arguments.steps=2" if kind == "custom" else STEPS

    def make(*words: str) -> str:
        ended = run("make", *words, root=project)
        assert ended.code == 0, ended.text
        return ended.text

    source = make_data(project)
    for verb, *typed in typed_of(project):
        if verb in ("plan", "evaluate") and kind != "classification":  # what they tell is another test's
            continue
        more = {"train": [f"SET={steps}"], "prepare": [f"INPUT={source}", *options]}.get(verb, [])
        told = make(verb, *typed, *more)
        assert re.search({**EXPECTED, "infer": re.escape(said)}.get(verb, ""), told, re.MULTILINE), told
    record = json.loads((project / "output-2/run.json").read_text())
    assert record["status"] == "finished"


def test_the_readme_has_the_plan_where_the_image_is_here_and_the_model_can_be_sized(
    engine: Docker, tmp_path: Path
) -> None:
    engine.ensure("text-classifier")
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 30522, **sizes}))
    ended = run("new", "peft", "mine", str(tmp_path / "bert"), "lora", "--output", str(tmp_path))
    assert ended.code == 0, ended.text
    _, _, plan = (tmp_path / "mine/README.md").read_text().partition("## Plan")
    assert "BertForSequenceClassification" in plan
    assert re.search(r"VRAM +about \d\.\d GB .*; fits", plan)
    assert "## Start" in plan
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    ended = run("new", "peft", "other", str(tmp_path / "bert"), "lora", "--output", str(tmp_path))
    assert ended.code == 0, ended.text
    ended.says("no plan in", "its config.json has no hidden_size")
    assert "## Plan" not in (tmp_path / "other/README.md").read_text()


def test_transformers_knows_every_tiny_model_that_is_offered(image: ImageFacts) -> None:
    drawing = starting.ROUTES["image-lora"]
    offered = [name for family, names in starting.TINY.items() if family not in drawing for name in names]
    code = "import sys; from transformers import CONFIG_MAPPING as known; print(*({*sys.argv[1:]} - {*known}), sep='')"
    argv = ["docker", "run", "--rm", "--network=none", "--entrypoint=python", image.tag, "-c", code, *offered]
    assert subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300).stdout == "\n"
