"""A project folder: recipe, gpu.jsonc, data and the way to prepare more, the commands and a page about them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from trainbox.errors import ConfigError
from trainbox.host import describing, gpu_config, paths, preparing, ui
from trainbox.host.pipeline import recipe_folder
from trainbox.spec.gpu_config import NAME, GpuConfig, GpuType, read_gpu_config
from trainbox.spec.gpus import find_gpu
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.recipe.diffusion import TextToImageRecipe
from trainbox.spec.recipe.sections import Recipe
from trainbox.spec.tree import Tree, fields

RESULT = "output/final"
SECOND = "output-2"
"""The folder of a run beside the first one's."""
SCRIPT = "script"
"""The folder of a custom job's code."""
STARTER = Path(__file__).with_name("starter")
"""The files of a project that are nearly the same in all."""


COLUMNS = {
    "question-answering": ("question", "answer"),
    "summarization": ("document", "summary"),
    "translation": ("source", "target"),
}
"""What a pair is called, by type of generation."""


@dataclass(frozen=True)
class Project:
    """What is about to be written."""

    name: str
    kind: str
    argument: str
    recipe: str
    tree: Tree
    """What it changes of the recipe."""
    loaded: Recipe
    brought: Tree = field(default_factory=dict)
    """What a configuration says about the user's data: path, files, columns."""

    @property
    def names(self) -> dict[str, str]:
        """What the files call their columns."""
        pair = COLUMNS.get(self.argument) if self.loaded.task == "seq2seq" else None
        return dict(zip(("input", "target"), pair, strict=True)) if pair else {}

    @property
    def classes(self) -> int | None:
        """How many labels there are."""
        return int(self.argument) if self.kind == "classification" else None

    @property
    def data(self) -> str:
        """The folder of its data."""
        return preparing.data_folder(self.loaded)


# The folder


def write_whole(project: Project, folder: Path) -> None:
    """Write the project aside and put it where it belongs, or leave nothing."""
    aside = folder.with_name(f".{folder.name}.new")
    if aside.exists():
        remedy = "remove it, unless another `new` is at work"
        raise ConfigError("is there from an earlier start", place=str(aside), remedy=remedy)
    try:
        aside.mkdir(parents=True)
        for name, text in files_of(project).items():
            (aside / name).write_text(text, encoding="utf-8")
        _write_data(project, aside)
        _check(project, aside)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_data(project: Project, folder: Path) -> None:
    """The user's data where a configuration names it, else the recipe's sample."""
    target = folder / project.data
    if project.tree["data"]["path"] != project.data or getattr(project.loaded.data, "subsets", None):
        return  # a hub's, or folders that a configuration names
    if isinstance(project.loaded, CustomRecipe):
        _copy_job(project, folder)
        return
    if "path" not in project.brought:
        wanted = preparing.Wanted(names=project.names)
        found = preparing.read(project.loaded, str(recipe_folder(project.recipe) / "sample"), wanted)
        found = _of_classes(found, project.classes) if project.classes else found
        if "test" not in found and not isinstance(project.loaded, TextToImageRecipe):
            found |= {"test": found["validation"][1::2], "validation": found["validation"][::2]}
        preparing.write(project.loaded, found, target, wanted)
        preparing.mark_sample(target)
        return
    held_out = {key: str(project.brought[key]) for key in project.brought if key in ("validation_file", "test_file")}
    columns = project.brought.get("columns", {})
    wanted = preparing.Wanted(columns, project.names, held_out, classes=project.classes)
    found, notes = preparing.split(preparing.read(project.loaded, project.brought["path"], wanted), wanted)
    preparing.write(project.loaded, found, target, wanted)
    for line in notes:
        ui.say(line)


def _copy_job(project: Project, folder: Path) -> None:
    """The recipe's own job: its script and what that learns from."""
    root = recipe_folder(project.recipe)
    own: Any = load_recipe(root, Choices(project.recipe))
    shutil.copytree(root / own.data.path, folder / project.data)
    shutil.copytree(root / own.script.folder, folder / SCRIPT, ignore=shutil.ignore_patterns("__pycache__"))
    preparing.mark_sample(folder / project.data)


def _of_classes(found: dict[str, list[dict[str, Any]]], classes: int) -> dict[str, list[dict[str, Any]]]:
    """The sample's rows of the first labels, as many as there will be."""
    labels = sorted({label for rows in found.values() for example in rows for label in example["labels"]})[:classes]
    if len(labels) < classes:
        ui.warn(f"the sample has {len(labels)} labels: yours, {classes} of them, come with `make prepare INPUT=`")
    return {name: [row for row in rows if row["labels"][0] in labels] for name, rows in found.items()}


def _check(project: Project, folder: Path) -> None:
    """What was written is what `make train` takes."""
    read = preparing.project_recipe(folder)
    paths_apart: Any = {"data": {"path"}, "script": {"folder"}}
    expected = project.loaded.model_dump(mode="json", exclude=paths_apart)
    if read.model_dump(mode="json", exclude=paths_apart) != expected:
        raise AssertionError("recipe.yaml does not say what was meant")
    read_gpu_config(folder / NAME)


def files_of(project: Project) -> dict[str, str]:
    """Every file by its name, but for the data."""
    values = readme_values(project)
    script = (STARTER / "prepare_data.py").read_text(encoding="utf-8")
    for name, value in (("COLUMNS", dict(project.brought.get("columns", {}))), ("NAMES", project.names)):
        script = script.replace(f"{name}: dict[str, str] = {{}}", f"{name}: dict[str, str] = {_python(value)}")
    makefile = _filled("Makefile", values)
    if not values["asked"]:  # Trainbox refuses these verbs with the reason: only the script knows how to ask its model
        makefile = re.sub(r"^((?:infer|evaluate|merge): ready) ## .*", r"\1", makefile, flags=re.MULTILINE)
    return {
        "recipe.yaml": recipe_text(project),
        NAME: gpu_text(project),
        "prepare_data.py": script.replace("int | None = None", f"int | None = {project.classes}"),
        ".gitignore": (STARTER / "gitignore").read_text(encoding="utf-8"),
        "Makefile": makefile,
        "README.md": _filled("README.md", values),
    }


def _python(value: Mapping[str, str]) -> str:
    """As Python is written, in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _filled(name: str, values: Mapping[str, str]) -> str:
    text = describing.Page((STARTER / name).read_text(encoding="utf-8")).substitute(values)
    return re.sub(r"\n{3,}", "\n\n", text)


# recipe.yaml


SHOWN = (
    "data.max_length", "data.max_target_length", "data.resolution", "data.trigger_word", "peft.method", "lora.r",
    "lora.alpha", "training.num_train_epochs", "training.max_steps", "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps", "training.learning_rate", "training.weight_decay",
    "training.early_stopping_patience", "budget.max_usd", "budget.max_hours",
)  # fmt: skip
"""The fields most worth a change: a project shows them with the recipe's values."""


def recipe_text(project: Project) -> str:
    """What the project changes; as comments, what else is worth a change."""
    about = {name: _shortly(info) for name, info in fields(type(project.loaded))}
    values = project.loaded.model_dump(mode="json")
    lines = [
        f"# What this project changes of recipe {project.recipe}; what has a # is as the recipe has it.",
        f'# `invoke explain` lists every field. For a single run: make train SET="{_page(project)["setting"]}"',
        f"recipe: {project.recipe}",
    ]
    for section in dict.fromkeys([*project.tree, *(key.partition(".")[0] for key in SHOWN)]):
        own = project.tree.get(section, {})
        if not isinstance(own, dict):
            lines.append(f"{section}: {_said(own)}")
            continue
        known = [key.partition(".")[2] for key in SHOWN if key in about and key.startswith(f"{section}.")]
        more = {leaf: values[section][leaf] for leaf in known if leaf not in own}
        if own or more:
            lines.append(f"{section}:" if own else f"# {section}:")
            lines += [f"  {leaf}: {_said(value)}" for leaf, value in own.items()]
            lines += [f"#   {leaf}: {_said(value)}  # {about[f'{section}.{leaf}']}" for leaf, value in more.items()]
    return "\n".join(lines) + "\n"


def _shortly(info: FieldInfo) -> str:
    """What a field may be, or the first of what is said of it."""
    if get_origin(info.annotation) is Literal:
        return ", ".join(map(str, get_args(info.annotation)))
    return (info.description or "").partition("\n")[0].partition(". ")[0]


def _said(value: Any) -> str:
    """A value in a line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False)
    return str(text).removesuffix("...\n").strip()


# gpu.jsonc


TABLE = {
    8: {"qlora": ("RTX 4090", 1), "lora": ("A100 40GB", 1), "full": ("A100 80GB", 1)},
    13: {"qlora": ("A100 40GB", 1), "lora": ("A100 80GB", 1), "full": ("A100 80GB", 2)},
    34: {"qlora": ("A100 80GB", 1), "lora": ("A100 80GB", 2), "full": ("A100 80GB", 4)},
    70: {"qlora": ("A100 80GB", 2), "lora": ("A100 80GB", 4), "full": ("H100", 8)},
}
"""GPUs of language models by billions of parameters and method: what is usual, before `plan` computes it."""
HOURS: dict[int, tuple[float, ...]] = {8: (0.5, 1), 13: (1, 2), 34: (2, 4), 70: (4, 8)}
"""The time that they take for a thousand rows."""
USUAL: dict[str, tuple[str, tuple[float, ...]]] = {
    "sdxl-lora": ("20 images", (1 / 3,)),
    "flux-lora": ("20 images", (0.75,)),
    "image-classifier": ("1,000 images", (1 / 6,)),
}
"""The hours that others take, and for what."""


def usual_gpu(project: Project) -> tuple[str, int]:
    """A GPU that such runs are usually made on, and how many."""
    size = size_of(project)
    if not size:
        return ("A100 80GB", 1) if project.recipe == "flux-lora" else ("RTX 4090", 1)
    return TABLE[size].get(describing.method_of(project.loaded), TABLE[size]["lora"])


def size_of(project: Project) -> int:
    """The row of the table that a language model's name belongs to; 0 where it does not say its size."""
    billions = re.search(r"(\d+(?:\.\d+)?)b\b", project.loaded.model.name.replace("_", "-"), re.IGNORECASE)
    if not billions or not project.recipe.startswith("llm-"):
        return 0
    return next((size for size in TABLE if float(billions[1]) <= size * 1.1), max(TABLE))


def usual_time(project: Project) -> str:
    """How long such a run usually takes and what it costs; empty where nothing is usual."""
    name, count = usual_gpu(project)
    size = size_of(project)
    rows, hours = ("1,000 rows", HOURS[size]) if size else USUAL.get(project.recipe, ("", ()))
    if not hours:
        return ""
    price = find_gpu(name, NAME).price * count
    times = "-".join(f"{hour * 60:.0f} min" if hour < 1 else f"{hour:g} h" for hour in hours)
    return f"usually {times} for {rows}, ${'-'.join(f'{hour * price:.2f}' for hour in hours)}; "


def gpu_text(project: Project) -> str:
    """The project's gpu.jsonc."""
    name, count = usual_gpu(project)
    config = GpuConfig(gpu_types=[GpuType(type=name, count=count)], keep_alive_minutes=15)
    return gpu_config.text_of_project(project.name, config)


# README.md, Makefile


def about_line(project: Project) -> str:
    """The project in a line."""
    method = describing.METHODS[describing.method_of(project.loaded)]
    return ": ".join([_page(project)["about"], ", ".join(filter(None, [project.loaded.model.name, method]))])


def _page(project: Project) -> dict[str, str]:
    return describing.page_of(project.loaded, project.data, RESULT, project.names)


def readme_values(project: Project) -> dict[str, str]:
    """What fills the places of the README and the Makefile."""
    page = _page(project)
    second, test = f"CHECKPOINT={SECOND}/final", f"{project.data}/{page['test']}"
    name, count = usual_gpu(project)
    gpu = find_gpu(name, NAME)
    shown = f"{count} x {gpu.name}, {gpu.memory:g} GB each" if count > 1 else f"{gpu.name}, {gpu.memory:g} GB"
    return {
        **page,
        "name": project.name,
        "trainbox": str(paths.REPO),
        "about": f"{about_line(project)}.",
        "model": f"`{project.loaded.model.name}`" if project.loaded.model.name else "none",
        "recipe": project.recipe,
        "description": project.loaded.description,
        "method": describing.METHODS[describing.method_of(project.loaded)],
        "gpu": f"{shown}, about ${gpu.price * count:.2f}/h",
        "time": usual_time(project),
        "result": RESULT,
        "data": project.data,
        "named": f'Columns of other names are named: `FIELDS="{page["columns"]}"`.\n' if page["columns"] else "",
        "options": f'FIELDS="{page["columns"]}" ' if page["columns"] else 'SUBJECT="chelsea cat" ',
        "brought": f"INPUT={page['bring']}".ljust(34),
        "more": f"| `{SCRIPT}/` | the code that trains: yours in its place |\n" if SCRIPT in project.tree else "",
        "second": SECOND,
        "asked": f"\nmake infer {second} {page['ask']}\nmake evaluate {second} DATA={test}" if page["ask"] else "",
        "test": test,
    }
