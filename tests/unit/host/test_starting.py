import ast
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys

import pytest
import yaml

from trainbox.errors import ConfigError
from trainbox.host import data, describing, paths, pipeline, preparing, starting
from trainbox.spec.gpu_config import read_gpu_config
from trainbox.spec.load import Choices, load_recipe

PROJECTS = [
    ("classification", "", "", "text-classifier"),
    ("classification", "google/vit-base-patch16-224", "3", "image-classifier"),
    ("generation", "", "", "seq2seq"),
    ("generation", "openai-community/gpt2", "translation", "llm-lora"),
    ("fine-tuning", "", "", "llm-full"),
    *(("fine-tuning", "", task, next(iter(recipes.values()))) for task, recipes in starting.TASKS.items()),
    ("peft", "", "", "text-classifier"),
    ("peft", "meta-llama/Llama-3.1-8B-Instruct", "qlora", "llm-qlora"),
    ("peft", "Qwen/Qwen3-4B", "prefix-tuning", "llm-lora"),
    ("peft", "facebook/bart-base", "adapter", "seq2seq"),
    ("custom", "", "", "custom-pytorch"),
    ("custom", "", "jax", "custom-jax"),
    ("image-lora", "", "", "sdxl-lora"),
    ("image-lora", "black-forest-labs/FLUX.1-dev", "style", "flux-lora"),
    ("image-lora", "random:z-image", "object", "z-image-lora"),
]


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path / "cache"))
    # The plan is measured in the box: tests/image/test_new.py.
    monkeypatch.setattr(starting.planning, "at_hand", lambda choices: False)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(("kind", "model", "argument", "recipe"), PROJECTS)
def test_every_file_of_a_project_is_what_its_reader_takes(kind, model, argument, recipe):
    folder = starting.start(kind, "mine", model, argument).absolute()
    config = folder / "recipe.yaml"
    assert yaml.safe_load(config.read_text())["recipe"] == recipe
    loaded = load_recipe(pipeline.recipe_folder(recipe), Choices(recipe, config=str(config)))
    assert loaded.data.path == str(folder / preparing.data_folder(loaded))
    source, _ = data.check(loaded, folder)
    if kind == "custom":
        assert (source.formats, sorted(source.script_files)) == ({"files": 3}, ["train.py"])
    else:
        assert set(source.rows) == {"train", "validation", *(["test"] if kind != "image-lora" else [])}
        tested = re.search(r"^make evaluate .*\bDATA=(.*)$", (folder / "README.md").read_text(), re.MULTILINE)
        assert tested
        assert (folder / tested[1]).exists()
    gpus = read_gpu_config(folder / "gpu.jsonc")
    assert gpus.wanted
    assert gpus.project_id == "mine"
    assert gpus.min_vram is None
    ast.parse((folder / "prepare_data.py").read_text())
    dry = subprocess.run(["make", "-n", "train", "infer"], cwd=folder, capture_output=True, text=True, check=True)
    assert str(paths.REPO) in dry.stdout
    assert "@@" not in "".join(path.read_text() for path in folder.glob("*.*"))
    for block in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("kind", starting.KINDS)
def test_the_readme_begins_with_what_can_be_typed_from_top_to_bottom(kind):
    folder = starting.start(kind, "mine", "", "")
    (block,) = re.findall(r"## Start\n\n```sh\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    menu = subprocess.run(["make", "help"], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert {verb for verb, *_ in lines} <= {*re.findall(r"^ +(\w+)", menu, re.MULTILINE)}
    results = [next((word for word in words if "OUTPUT=" in word), "") for verb, *words in lines if verb == "train"]
    assert results == ["", "OUTPUT=output-2"]
    assert "resume" not in block
    assert all("CHECKPOINT=output-2/final" in words for verb, *words in lines if verb in ("infer", "evaluate"))


def test_a_project_of_a_script_offers_and_promises_nothing_that_only_a_known_model_allows():
    folder = starting.start("custom", "mine", "", "")
    menu = subprocess.run(["make", "help"], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert not re.search("^ +(infer|evaluate|merge)", menu, re.MULTILINE)
    assert "memory" not in menu
    (setting,) = re.findall('make train .*SET="(.*?)"', menu)
    assert load_recipe(pipeline.recipe_folder("custom-pytorch"), Choices("custom-pytorch", set=(setting,)))
    assert setting in (folder / "recipe.yaml").read_text()
    readme = (folder / "README.md").read_text()
    assert "cannot be sized" in readme
    assert not re.search("computes them|memory, GPU|make (infer|evaluate|merge)", readme)


def test_a_tiny_model_is_of_the_family_that_its_name_tells():
    found = {kind: starting.family_of(f"random:{kind}") for kinds in starting.TINY.values() for kind in kinds}
    assert found == {kind: family for family, kinds in starting.TINY.items() for kind in kinds}


def test_what_is_commented_out_in_the_recipe_are_the_recipes_own_values():
    config = starting.start("peft", "mine", "", "") / "recipe.yaml"
    choices = Choices("text-classifier", config=str(config))
    before = load_recipe(pipeline.recipe_folder("text-classifier"), choices)
    lines = config.read_text().splitlines()[2:]
    assert len([line for line in lines if line.startswith("#")]) > 5
    config.write_text("\n".join(line.removeprefix("# ").removeprefix("#") for line in lines))
    assert load_recipe(pipeline.recipe_folder("text-classifier"), choices) == before


def test_as_many_labels_as_asked_for_are_in_the_sample():
    folder = starting.start("classification", "mine", "", "3")
    labels = {line.rpartition(",")[2] for line in (folder / "data/train.csv").read_text().splitlines()[1:]}
    assert len(labels) == 3
    assert "CLASSES: int | None = 3" in (folder / "prepare_data.py").read_text()


def test_more_labels_than_the_sample_has_are_told(capsys):
    starting.start("classification", "mine", "", "50")
    assert "the sample has 4 labels: yours, 50 of them, come with `make prepare INPUT=`" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", pipeline.recipe_names())
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_recipe_has_a_page_whose_code_is_python_and_whose_ways_are_known(recipe, method):
    loaded = load_recipe(pipeline.recipe_folder(recipe), Choices(recipe))
    if hasattr(loaded, "peft"):
        loaded = loaded.model_copy(update={"peft": loaded.peft.model_copy(update={"method": method})})
    page = describing.page_of(loaded, "data", "output/final")
    ast.parse(page["code"])
    assert "output/final" in page["code"]
    assert "make train" in page["ways"]
    assert not [text for text in page.values() if "@@" in text]


def test_the_pairs_of_generation_have_the_names_of_their_type():
    folder = starting.start("generation", "mine", "", "summarization")
    assert set(json.loads((folder / "data/train.json").read_text())[0]) == {"document", "summary"}
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["prefix"] == "summarize: "


def test_an_image_lora_has_the_values_of_its_profile_and_kohyas_folders():
    folder = starting.start("image-lora", "mine", "", "style")
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (tree["lora"], tree["training"]["max_steps"]) == ({"r": 64, "alpha": 32}, 1000)
    assert (folder / "dataset/10_chelsea cat/01.txt").is_file()


@pytest.mark.parametrize(
    ("size", "method", "expected", "time"),
    [
        ("8B", "qlora", ("RTX 4090", 1), "30 min-1 h for 1,000 rows, $0.22-0.44"),
        ("7B", "lora", ("A100 40GB", 1), "30 min-1 h for 1,000 rows, $0.65-1.29"),
        ("13B", "lora", ("A100 80GB", 1), "1 h-2 h for 1,000 rows, $1.79-3.58"),
        ("34B", "qlora", ("A100 80GB", 1), "2 h-4 h"),
        ("70B", "lora", ("A100 80GB", 4), "4 h-8 h for 1,000 rows, $28.64-57.28"),
        ("1.5b", "qlora", ("RTX 4090", 1), "30 min-1 h"),
    ],
)
def test_the_usual_gpu_and_time_are_those_of_the_models_size(size, method, expected, time):
    folder = starting.start("peft", "mine", f"acme/llama-{size}-chat", method)
    wanted = read_gpu_config(folder / "gpu.jsonc").wanted
    assert [(gpu.type, gpu.count) for gpu in wanted] == [expected]
    assert time in (folder / "README.md").read_text()


REFUSED = [
    (("clasification", "a"), "KIND: 'clasification' is not known", "did you mean classification?"),
    (("peft", ""), "NAME: is needed", "letters, digits"),
    (("peft", "a/b"), "'a/b' cannot be a project's name", "OUTPUT=folder"),
    (("peft", ".."), "cannot be a project's name", "letters, digits"),
    (("peft", "a b"), "cannot be a project's name", "letters, digits"),
    (("peft", "a", "", "lorra"), "METHOD: 'lorra' is not known", "did you mean lora?"),
    (("generation", "a", "", "summarisation"), "is not known", "did you mean summarization?"),
    (("fine-tuning", "a", "", "text-clasification"), "is not known", "did you mean text-classification?"),
    (("classification", "a", "", "one"), "NUM_CLASSES: 'one' is no number", "2 at least"),
    (("classification", "a", "", "1"), "NUM_CLASSES: '1' is no number", "2 at least"),
    (("peft", "a", "no such/model/of mine"), "is neither a folder nor a hub name", "org/name"),
    (("classification", "a", "random:nope", "4"), "'random:nope' is no tiny model that is known", "known: bert, "),
    (("image-lora", "a", "random:fluxx"), "'random:fluxx' is no tiny model", "did you mean flux?"),
    (("peft", "a", "pypi:some==1/model.gguf"), "its hash is not known", "model.sha256"),
    (
        ("image-lora", "a", "google-bert/bert-base-cased"),
        "is of the family encoder",
        "for this model: classification, peft",
    ),
    (("generation", "a", "google-bert/bert-base-cased"), "is of the family encoder", "seq2seq, decoder"),
    (("peft", "a", "google/vit-base-patch16-224", "prefix-tuning"), "prefix-tuning is for text", ""),
    (("peft", "a", "microsoft/deberta-v3-base", "prefix-tuning"), "no keys and values of the past", "lora, adapter"),
    (("peft", "a", "microsoft/resnet-50"), "is convolutional", "invoke new classification"),
    (("custom", "a", "", "tensorflow"), "FRAMEWORK: 'tensorflow' is not known", "known: pytorch, jax"),
]


@pytest.mark.parametrize(("asked", "fault", "remedy"), REFUSED)
def test_what_cannot_be_started_is_refused_and_nothing_is_left(asked, fault, remedy, apart):
    kind, name, model, argument = (*asked, "", "")[:4]
    with pytest.raises(ConfigError) as caught:
        starting.start(kind, name, model, argument)
    assert fault in str(caught.value)
    assert remedy in str(caught.value)
    assert list(apart.iterdir()) == []


def test_a_folder_that_is_there_is_refused_and_stays_as_it_is(apart):
    (apart / "mine").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        starting.start("peft", "mine", "", "")
    assert [list(path.iterdir()) for path in apart.iterdir()] == [[]]


def test_a_failure_while_writing_leaves_nothing(apart, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparing, "write", full)
    with pytest.raises(OSError, match="No space left"):
        starting.start("peft", "mine", "", "")
    assert list(apart.iterdir()) == []


def test_a_models_folder_is_known_by_its_configuration_and_kept_absolute(apart):
    (apart / "own").mkdir()
    (apart / "own/config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    (apart / "own/model.safetensors").write_bytes(b"")
    (apart / "own/tokenizer.json").write_text("{}")
    tree = yaml.safe_load((starting.start("peft", "mine", "own", "") / "recipe.yaml").read_text())
    assert (tree["recipe"], tree["model"]["name"]) == ("seq2seq", str(apart / "own"))


def test_a_revision_goes_into_the_recipe():
    tree = yaml.safe_load(
        (starting.start("peft", "mine", "FacebookAI/roberta-base@main", "") / "recipe.yaml").read_text()
    )
    assert tree["model"] == {"name": "FacebookAI/roberta-base", "revision": "main"}


# Other tools' files


CLASSIFICATION = """
model: {name: FacebookAI/roberta-base, num_labels: 3, max_length: 256}
dataset: {train_file: mine.csv, text_column: body, label_column: kind}
training: {output_dir: ./results, num_epochs: 4, batch_size: 8, learning_rate: 3.0e-5, fp16: true}
optimizer: {name: adamw, betas: [0.9, 0.98], epsilon: 1.0e-6}
"""


def test_a_project_begins_with_the_values_of_a_classification_config_and_its_data(apart, capsys):
    (apart / "classification-config.yaml").write_text(CLASSIFICATION)
    rows = [f"{number} text,{label}" for number, label in enumerate(["a", "b", "c"] * 10)]
    (apart / "mine.csv").write_text("\n".join(["body,kind", *rows]))
    folder = starting.start("classification", "mine", "", "", "classification-config.yaml")
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert tree["model"]["name"] == "FacebookAI/roberta-base"
    assert tree["data"] == {"path": "data", "max_length": 256}
    assert tree["training"]["num_train_epochs"] == 4
    assert (folder / "data/train.csv").read_text().startswith("text,label\n")
    assert not (folder / "data" / preparing.SAMPLE).exists()


def test_what_a_config_says_and_a_project_does_not_take_over_is_told(apart, capsys):
    (apart / "classification-config.yaml").write_text(f"{CLASSIFICATION}weird: {{thing: 1}}\n")
    starting.start("classification", "mine", "", "", "classification-config.yaml")
    told = capsys.readouterr().err
    assert "classification-config.yaml: not carried over: weird.thing" in told
    assert "not carried over: training.output_dir" in told


def test_data_of_a_config_that_is_not_there_is_told_and_its_columns_are_kept(apart, capsys):
    (apart / "classification-config.yaml").write_text(CLASSIFICATION)
    folder = starting.start("classification", "mine", "", "", "classification-config.yaml")
    assert "path mine.csv is not there" in capsys.readouterr().err
    assert 'COLUMNS: dict[str, str] = {"text": "body", "label": "kind"}' in (folder / "prepare_data.py").read_text()
    assert (folder / "data" / preparing.SAMPLE).exists()


def test_generation_and_peft_configs_choose_recipe_type_and_method(apart):
    (apart / "generation-config.yaml").write_text(
        "model: {name: google-t5/t5-small, task_type: summarization}\n"
        "dataset: {input_column: article, target_column: highlights, max_target_length: 64}\n"
        "generation: {num_beams: 2}\n"
    )
    (apart / "peft-config.json").write_text(
        '{"base_model_name_or_path": "FacebookAI/roberta-base", "task_type": "TOKEN_CLS", "r": 4, "lora_alpha": 8}'
    )
    made = starting.start("generation", "one", "", "", "generation-config.yaml")
    tree = yaml.safe_load((made / "recipe.yaml").read_text())
    assert tree["data"] == {"path": "data", "prefix": "summarize: ", "max_target_length": 64}
    assert tree["generation"] == {"num_beams": 2}
    with pytest.raises(ConfigError, match="is for recipe token-classifier, which peft does not make"):
        starting.start("peft", "two", "", "", "peft-config.json")
    text = (apart / "peft-config.json").read_text()
    (apart / "peft-config.json").write_text(text.replace("TOKEN_CLS", "SEQ_CLS"))
    tree = yaml.safe_load((starting.start("peft", "two", "", "", "peft-config.json") / "recipe.yaml").read_text())
    assert (tree["recipe"], tree["lora"]["r"], tree["peft"]["method"]) == ("text-classifier", 4, "lora")


def test_fine_tuning_takes_its_task_from_a_config_and_an_argument_stands_over_it(apart):
    (apart / "tags.yaml").write_text("model: {name: google-bert/bert-base-cased, task_type: token-classification}\n")
    (apart / "peft-config.json").write_text('{"task_type": "SEQ_CLS", "method": "lora", "r": 4}')
    tree = yaml.safe_load((starting.start("fine-tuning", "one", "", "", "tags.yaml") / "recipe.yaml").read_text())
    assert (tree["recipe"], tree["model"]["name"]) == ("token-classifier", "google-bert/bert-base-cased")
    made = starting.start("peft", "two", "random:bert", "adapter", "peft-config.json")
    tree = yaml.safe_load((made / "recipe.yaml").read_text())
    assert (tree["peft"]["method"], tree["model"]["name"]) == ("adapter", "random:bert")


def test_folders_that_a_kohya_file_names_are_trained_where_they_are(apart):
    photos = pipeline.recipe_folder("sdxl-lora") / "sample/10_chelsea cat"
    (apart / "kohya.toml").write_text(
        f"[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = '{photos}'\nnum_repeats = 3\n"
    )
    folder = starting.start("image-lora", "mine", "", "style", "kohya.toml")
    data_of = yaml.safe_load((folder / "recipe.yaml").read_text())["data"]
    assert data_of["subsets"] == [{"path": str(photos), "num_repeats": 3}]
    assert data_of["resolution"] == 512


# On a terminal


def converse(argv, answers, cwd):
    """A command on a terminal of its own; each answer is typed when its question stands there."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execve(argv[0], argv, {**os.environ, "TERM": "dumb", "COLUMNS": "200"})
    seen, new, waiting = "", "", list(answers)
    while select.select([terminal], [], [], 60)[0]:
        try:
            piece = os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
            break
        seen, new = seen + piece, new + piece
        if waiting and waiting[0][0] in new:
            os.write(terminal, waiting.pop(0)[1].encode() + b"\n")
            new = ""
    else:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert not waiting, (waiting, seen)
    return os.waitstatus_to_exitcode(status), seen


def test_questions_are_asked_on_a_terminal_bad_answers_again_and_empty_ones_are_the_default(apart):
    argv = [sys.executable, "-m", "invoke", "--search-root", str(paths.REPO), "new", "peft"]
    answers = [
        ("Name of the project: ", "a/b"),
        ("Name of the project: ", "mine"),
        ("METHOD (lora): ", "lorra"),
        ("METHOD (lora): ", "adapter"),
        ("Base model (FacebookAI/roberta-base): ", ""),
    ]
    code, seen = converse(argv, answers, apart)
    assert code == 0, seen
    assert "a letter or digit first" in seen
    assert "did you mean lora?" in seen
    tree = yaml.safe_load((apart / "mine/recipe.yaml").read_text())
    assert (tree["peft"]["method"], tree["model"]["name"]) == ("adapter", "FacebookAI/roberta-base")


@pytest.mark.parametrize(
    "words", [["peft", "mine", "random:bert"], ["--kind", "peft", "--name", "mine", "--model", "random:bert"]]
)
def test_invoke_takes_arguments_by_place_or_by_name(words, apart):
    argv = [sys.executable, "-m", "invoke", "--search-root", str(paths.REPO), "new", *words]
    done = subprocess.run(argv, cwd=apart, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mine: A label for a text" in done.stdout


def test_without_a_checkout_the_makefile_says_what_to_do():
    folder = starting.start("peft", "mine", "", "")
    done = subprocess.run(
        ["make", "TRAINBOX=/nowhere", "train"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error: TRAINBOX=/nowhere: there is no checkout of Trainbox\n  name it: make TRAINBOX=" in done.stderr
