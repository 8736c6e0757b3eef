"""Every trained model can be asked, evaluated and merged, in its own image; the run that made it stays as it was."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import PLAIN, RECIPES, ROOT, Ended, run

from trainbox.spec.run import RunSpec

LEARNS = f"{PLAIN} training.learning_rate=2e-2"
"""By far enough for a tiny model's answers to change."""
OTHER = f"{PLAIN} training.learning_rate=1.5e-2"
NARROW = f"{LEARNS} lora.r=2"
TAGS = "training.max_steps=60 training.logging_steps=20 limits.cpus=1 training.learning_rate=5e-3"
LABELS = f"{TAGS} peft.method=lora training.learning_rate=2e-2"

DIGITS = ROOT / "recipes/image-classifier/sample/validation"

CHAT: list[dict[str, Any]] = [
    {"id": 1, "prompt": "Where does the Hesper lie?"},
    {"id": 2, "text": "no question", "instruction": "Convert to kilometres.", "input": "12 nautical miles"},
    {"id": 3, "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "an answer, left out"}]},
]
ROWS: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(("sft", "preference", "grpo"), CHAT),
    "masked-lm": [{"id": number, "text": f"The [MASK] carries {number} tons of [MASK]."} for number in range(3)],
    "text-classification": [
        {"id": number, "review": f"{number} crates are broken", "label": "of the file"} for number in range(3)
    ],
    "token-classification": [
        {"id": 1, "text": "Tom Alder's boat, in Dover."},
        {"id": 2, "tokens": ["Sam", "Quill", "waits"], "tags": "of the file"},
        {"id": 3, "sentence": "Nobody came."},
    ],
    "seq2seq": [{"id": number, "text": f"ETD {number} Hesper for Hull"} for number in range(3)],
    "text-to-image": [{"id": 1, "prompt": "a cat"}, {"id": 2, "caption": "a dog"}],
    "image-classification": [{"id": number, "path": f"{number}/04.png", "label": "of the file"} for number in range(3)],
}
"""Three rows for each task, with columns of their own, some named as a prediction's parts are."""


def use(verb: str, *arguments: object) -> Ended:
    ended = run(verb, *map(str, arguments))
    assert ended.code == 0, ended.text
    ended.says()
    return ended


def answers(folder: Path, rows: list[dict[str, Any]], tmp: Path, *more: object) -> list[dict[str, Any]]:
    """What infer says of these rows, as a file."""
    number = len(list(tmp.iterdir()))
    source, target = tmp / f"rows-{number}.jsonl", tmp / f"answers-{number}"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for image in [row["path"] for row in rows if "path" in row]:
        (tmp / image).parent.mkdir()
        shutil.copy(DIGITS / image, tmp / image)
    use("infer", f"--checkpoint={folder}", f"--input={source}", f"--output={target}", *more)
    if target.is_dir():  # with the images that were drawn
        target = target / "answers.jsonl"
    return [json.loads(line) for line in target.read_text().splitlines()]


def task_of(output: Path) -> str:
    task: str = RunSpec.read(output / "spec.json").recipe.task
    return task


# Every recipe


def check_text(said: dict[str, Any], row: dict[str, Any]) -> None:
    assert isinstance(said["text"], str)


def check_label(said: dict[str, Any], row: dict[str, Any]) -> None:
    assert said["label"] == max(said["probabilities"], key=said["probabilities"].__getitem__)
    assert set(said["probabilities"]) == {"berth", "cargo", "complaint", "weather"}
    assert sum(said["probabilities"].values()) == pytest.approx(1, abs=1e-4)


def check_digit(said: dict[str, Any], row: dict[str, Any]) -> None:
    assert said["label"] == max(said["probabilities"], key=said["probabilities"].__getitem__)
    assert set(said["probabilities"]) == set("0123456789")


def check_tags(said: dict[str, Any], row: dict[str, Any]) -> None:
    words = {1: ["Tom", "Alder", "'", "s", "boat", ",", "in", "Dover", "."], 2: ["Sam", "Quill", "waits"]}
    assert said["tokens"] == words.get(row["id"], ["Nobody", "came", "."])
    assert len(said["tags"]) == len(said["tokens"])
    text = row.get("text") or row.get("sentence") or " ".join(row["tokens"])
    assert [each["text"] for each in said["entities"]] == [
        text[each["start"] : each["end"]] for each in said["entities"]
    ]


def check_guesses(said: dict[str, Any], row: dict[str, Any]) -> None:
    assert [len(words) > 2 for words in said["guesses"]] == [True, True]
    assert all(0 < share <= 1 for words in said["guesses"] for share in words.values())


def check_image(said: dict[str, Any], row: dict[str, Any]) -> None:
    assert said == {"image": f"{row['id']:04d}.png"}


CHECKS = {
    "text-to-image": check_image,
    "text-classification": check_label,
    "token-classification": check_tags,
    "masked-lm": check_guesses,
    "image-classification": check_digit,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_row_of_a_file_is_answered_and_its_columns_are_kept(
    recipe: str, straight: Callable[..., Path], tmp_path: Path
) -> None:
    output = straight(recipe)
    rows = ROWS["masked-lm" if recipe == "llm-pretrain" else task_of(output)]
    found = answers(output / "final", rows, tmp_path, "--max-new-tokens=8")
    said = [row.pop("prediction") for row in found]
    assert found == rows
    for row, each in zip(rows, said, strict=True):
        CHECKS.get(task_of(output), check_text)(each, row)


PROMPTS = {
    "image-classifier": (PLAIN, str(DIGITS / "3/02.png"), r"^(\d) +\(\1 0\.\d\d, (\d 0\.\d\d(, )?){4}\)$"),
    "llm-pretrain": (PLAIN, "Nobody sails from", "."),
    "seq2seq": (PLAIN, "ETD 1900 Hesper for Hull", "."),
    "text-classifier": (PLAIN, "The showers are cold.", r"^(\w+) +\(\1 0\.\d\d, (\w+ 0\.\d\d(, )?){3}\)$"),
    "text-pretrain": (PLAIN, "The harbour is [MASK].", r" 0\.\d\d, \S+ 0\.\d\d"),
    "token-classifier": (TAGS, "Tom Alder came to Dover.", r"\[\w+\]\((PERSON|PORT|SHIP|DAY)\)"),
}
"""By recipe: settings, what is asked, how the answer looks."""


@pytest.mark.parametrize("recipe", PROMPTS)
def test_a_prompt_is_answered_for_a_person_to_read(recipe: str, straight: Callable[..., Path]) -> None:
    settings, prompt, pattern = PROMPTS[recipe]
    ended = run("make", "infer", CHECKPOINT=str(straight(recipe, settings) / "final"), PROMPT=prompt)
    assert ended.code == 0, ended.text
    ended.says()
    answer = ended.text.strip().splitlines()[-1]
    assert re.search(pattern, answer), answer
    if recipe == "token-classifier":  # the text, but for the marks of what was found
        assert re.sub(r"\[(.*?)\]\(\w+\)", r"\1", answer) == prompt


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_evaluation_of_the_validation_data_finds_the_loss_of_the_run(
    recipe: str, straight: Callable[..., Path], tmp_path: Path
) -> None:
    output = straight(recipe)
    if recipe == "llm-grpo":
        pytest.skip("answers are drawn anew")
    (data,) = (ROOT / "recipes" / recipe / "sample").glob("val*")
    target = tmp_path / "found.json"
    use("evaluate", f"--checkpoint={output / 'final'}", f"--data={data}", f"--output={target}").says("test_loss")
    found = json.loads(target.read_text())
    wanted = json.loads((output / "run.json").read_text())["metrics"]
    aside = ("runtime", "per_second", "num_tokens")  # of the machine, or counted since the run began
    names = [name for name in wanted if name.startswith("eval_") and not any(word in name for word in aside)]
    assert "eval_loss" in names
    told = {name: found["metrics"][name.replace("eval_", "test_")] for name in names}
    assert told == pytest.approx({name: wanted[name] for name in told}, abs=1e-3)
    assert found["data"]["rows"]["test"] > 0


# Language models

QUESTIONS = ["Hi", "Where does the Hesper lie, and for how many days will she be there?", "Convert 20 gallons.", "Why?"]


@pytest.fixture(scope="module")
def alone(straight: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each of two adapters says, asked one question at a time."""
    found = {}
    for name, settings in (("plain", LEARNS), ("other", OTHER)):
        rows = [{"prompt": question} for question in QUESTIONS]
        folder = straight("llm-lora", settings) / "final"
        said = answers(folder, rows, tmp_path_factory.mktemp(name), "--batch-size=1", "--max-new-tokens=12")
        found[name] = [row["prediction"]["text"] for row in said]
    assert found["plain"] != found["other"]
    assert len({*found["plain"], *found["other"]}) > 2, found
    return found


@pytest.fixture(scope="module")
def adapters(straight: Callable[..., Path]) -> list[str]:
    """Both as options, the first with a name that PEFT uses itself."""
    return [f"--adapter={n}={straight('llm-lora', s) / 'final'}" for n, s in (("lora", LEARNS), ("other", OTHER))]


def test_each_row_is_answered_by_the_adapter_it_names_as_by_that_alone(
    alone: dict[str, list[str]], adapters: list[str], tmp_path: Path
) -> None:
    rows = [{"prompt": question, "adapter": name} for question in QUESTIONS for name in ("lora", "other")]
    rows += [{"prompt": question} for question in QUESTIONS]
    found = answers(tmp_path, rows, tmp_path, *adapters, "--max-new-tokens=12")
    said = [row["prediction"]["text"] for row in found]
    assert said[0:8:2] == said[8:] == alone["plain"]
    assert said[1:8:2] == alone["other"]
    assert [row["adapter"] for row in found] == ["lora", "other"] * 4 + ["lora"] * 4


def converse(lines: list[str], *arguments: object) -> str:
    """What a person sees who types these lines."""
    argv = [sys.executable, "-m", "invoke", "infer", *map(str, arguments)]
    typed = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(argv, cwd=ROOT, input=typed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_conversation_switches_adapters_and_refuses_an_unknown_one(
    alone: dict[str, list[str]], adapters: list[str]
) -> None:
    lines = [QUESTIONS[0], "", f"@other {QUESTIONS[0]}", "", QUESTIONS[3], "@oter Hi", "", f"@lora {QUESTIONS[3]}"]
    text = converse(lines, *adapters, "--max-new-tokens=12")
    told = [line.strip() for line in text.partition("> ")[2].replace("> ", "\n").splitlines()]
    wanted = [alone["plain"][0], alone["other"][0], alone["other"][3], alone["plain"][3]]
    assert [line for line in told if line in wanted] == wanted, text
    assert "there is no adapter 'oter'" in text
    assert "did you mean" in text
    assert '{"event"' not in text


def test_a_chat_remembers_what_was_said_until_an_empty_line(
    straight: Callable[..., Path], alone: dict[str, list[str]], tmp_path: Path
) -> None:
    folder = straight("llm-lora", LEARNS) / "final"
    first, again = QUESTIONS[1], QUESTIONS[3]
    messages = [("user", first), ("assistant", alone["plain"][1]), ("user", again)]
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    (remembered,) = answers(folder, [row], tmp_path, "--max-new-tokens=12")
    text = converse([first, again, "", again], f"--checkpoint={folder}", "--max-new-tokens=12")
    told = [line.strip() for line in text.partition("> ")[2].replace("> ", "\n").splitlines() if line.strip()]
    wanted = [alone["plain"][1], remembered["prediction"]["text"], alone["plain"][3]]
    assert wanted[1] != wanted[2]
    assert told[:3] == [line for line in wanted if line], text


def test_a_checkpoint_and_a_copy_without_its_run_answer_as_the_final_adapter(
    straight: Callable[..., Path], alone: dict[str, list[str]], tmp_path: Path
) -> None:
    output = straight("llm-lora", LEARNS)
    copied = shutil.copytree(output / "final", tmp_path / "mine/adapter")
    rows = [{"prompt": question} for question in QUESTIONS]
    (tmp_path / "out").mkdir()
    for folder in (output / "checkpoint-24", copied):
        said = answers(folder, rows, tmp_path / "out", "--max-new-tokens=12")
        assert [row["prediction"]["text"] for row in said] == alone["plain"], folder


# Evaluation of an adapter that is no longer what the recipe says


def test_an_adapter_that_pissa_made_is_evaluated_as_what_it_is(straight: Callable[..., Path], tmp_path: Path) -> None:
    settings = f"{PLAIN} training.max_steps=8 training.learning_rate=1e-3 lora.init_lora_weights=pissa"
    output = straight("llm-lora", settings)
    data = ROOT / "recipes/llm-lora/sample/validation.jsonl"
    wanted = json.loads((output / "run.json").read_text())["metrics"]["eval_loss"]
    for name in ("final", "checkpoint-8"):
        target = tmp_path / f"{name}.json"
        use("evaluate", f"--checkpoint={output / name}", f"--data={data}", f"--output={target}")
        assert json.loads(target.read_text())["metrics"]["test_loss"] == pytest.approx(wanted, abs=1e-3), name


def test_a_label_that_was_not_learned_is_told_with_its_line(straight: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "new.csv"
    data.write_text("text,label\nrain is coming,weather\nrain again,wether\n")
    ended = run("evaluate", f"--checkpoint={straight('text-classifier') / 'final'}", f"--data={data}")
    assert ended.code == 3
    ended.says("new.csv:3: label 'wether' is not among the labels", "did you mean weather?")


# Merging

OUTSIDE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, first, narrow, *sums = sys.argv[1:]
def load(folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
def logits(model):
    ids = AutoTokenizer.from_pretrained(first)("Where does the Hesper lie?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits
def changes(model):
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {name: module.get_delta_weight("default") for name, module in layers.items()}
one, two = load(first), load(narrow)
told = {"learned": (logits(one) - logits(AutoModelForCausalLM.from_pretrained(base).eval())).abs().max().item()}
wanted = {name: 0.75 * change - 0.5 * changes(two)[name] for name, change in changes(one).items()}
for folder in sums:
    model = load(folder)
    found = changes(model)
    assert found.keys() == wanted.keys()
    apart = max((found[name] - wanted[name]).norm() / wanted[name].norm() for name in wanted)
    away = (logits(model) - logits(one)).abs().max().item()
    told[folder] = {"apart": float(apart), "from first": away, "r": model.peft_config["default"].r}
assert not [name for name in sys.modules if name.startswith("trainbox")]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def sums(straight: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What plain PEFT says of weighted sums of adapters."""
    folder = tmp_path_factory.mktemp("sums")
    plain, other, narrow = (straight("llm-lora", settings) / "final" for settings in (LEARNS, OTHER, NARROW))
    for name, second, weights in (("linear", other, "1 0"), ("cat", narrow, "0.75 -0.5"), ("svd", narrow, "0.75 -0.5")):
        pair = f"plain={plain} second={second}"
        more = {"ADAPTERS": pair, "WEIGHTS": weights, "COMBINATION": name, "OUTPUT": str(folder / name)}
        ended = run("make", "merge", **more)
        assert ended.code == 0, ended.text
        ended.says(f"merged adapter: {folder / name}")
    record = json.loads((plain.parent / "run.json").read_text())
    base = record["model"]["reference"]
    argv = [
        "docker",
        "run",
        "--rm",
        "--network=none",
        *[f"-v{path}:{path}:ro" for path in (base, plain, narrow, folder)],
    ]
    argv += ["--user=0", "--entrypoint=env", record["image"]["tag"], "-u", "PYTHONPATH", "python", "-c", OUTSIDE]
    argv += [base, str(plain), str(narrow), *(str(folder / name) for name in ("linear", "cat", "svd"))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return {Path(name).name: value for name, value in told.items()}


def test_a_sum_with_weights_one_and_nothing_is_the_first_adapter(sums: dict[str, Any]) -> None:
    assert sums["learned"] > 1e-2
    assert sums["linear"]["from first"] < 1e-5


def test_cat_adds_the_very_changes_of_adapters_of_any_rank_and_svd_nearly(sums: dict[str, Any]) -> None:
    assert sums["cat"]["apart"] < 1e-5
    assert sums["cat"]["r"] == 6
    assert sums["svd"]["apart"] < 0.5
    assert sums["svd"]["r"] == 4
    assert sums["cat"]["from first"] > 1e-2


def test_a_merged_classifier_is_a_whole_model_that_says_the_same(straight: Callable[..., Path], tmp_path: Path) -> None:
    final = straight("text-classifier", LABELS) / "final"
    merged = tmp_path / "elsewhere/merged"
    merged.parent.mkdir()
    use("merge", f"--checkpoint={final}", f"--output={merged}")
    assert (merged / "model.safetensors").exists()
    (tmp_path / "out").mkdir()
    rows = ROWS["text-classification"]
    before, after = (
        [row["prediction"]["probabilities"] for row in answers(folder, rows, tmp_path / "out")]
        for folder in (final, merged)
    )
    assert [max(each, key=each.__getitem__) for each in before] == [max(each, key=each.__getitem__) for each in after]
    for one, two in zip(before, after, strict=True):
        assert one == pytest.approx(two, abs=1e-4)
        assert max(one.values()) > 0.3  # it has learned something


# The runs stay as they were


@pytest.mark.parametrize("recipe", ["llm-lora", "text-classifier"])
def test_a_run_that_was_used_verifies(recipe: str, straight: Callable[..., Path], tmp_path: Path) -> None:
    output = Path(shutil.copytree(straight(recipe), tmp_path / "out"))
    before = {path.relative_to(output) for path in output.rglob("*")}
    data = next((ROOT / "recipes" / recipe / "sample").glob("val*"))
    use("evaluate", f"--checkpoint={output / 'final'}", f"--data={data}")
    use("infer", f"--checkpoint={output / 'final'}", "--prompt=Hi")
    added = {path.relative_to(output) for path in output.rglob("*")} - before
    assert {path.parts[0] for path in added} == {"evaluations"}
    assert len(added) == 2
    use("verify", f"--output={output}").says("all as recorded")
