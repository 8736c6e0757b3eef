"""`new`: a project folder with recipe, data, a way to prepare more, and the commands; it trains at once."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.prompt import InvalidResponse, Prompt

from trainbox.errors import ConfigError, TrainboxError
from trainbox.host import download, importing, planning, ui
from trainbox.host.data import HUB_NAME
from trainbox.host.describing import takes_adapter
from trainbox.host.pipeline import recipe_folder
from trainbox.host.project import COLUMNS, SCRIPT, Project, about_line, write_whole
from trainbox.spec import source
from trainbox.spec.asking import read_config
from trainbox.spec.foreign import Overrides
from trainbox.spec.load import Choices, is_path, load_recipe, nearest
from trainbox.spec.recipe.sections import Model
from trainbox.spec.rows import READERS
from trainbox.spec.tree import Tree, merge, read_tree, read_yaml

# What can be started


@dataclass(frozen=True)
class Kind:
    """A kind of project."""

    about: str
    argument: str
    """What ARG is."""
    choices: tuple[str, ...] = ()
    """What it may be, the default first; none: a number."""


TASKS: dict[str, dict[str, str]] = {
    "text-generation": {"decoder": "llm-full"},
    "text-classification": {"encoder": "text-classifier", "decoder": "text-classifier"},
    "token-classification": {"encoder": "token-classifier"},
    "image-classification": {"image": "image-classifier"},
    "question-answering": {"seq2seq": "seq2seq", "decoder": "llm-full"},
    "summarization": {"seq2seq": "seq2seq", "decoder": "llm-full"},
    "translation": {"seq2seq": "seq2seq", "decoder": "llm-full"},
    "preference": {"decoder": "llm-preference"},
    "fill-mask": {"encoder": "text-pretrain"},
}
"""The recipes of fine-tuning, by transformers' names of the tasks and family of the model; the first is the default."""
PREFIXES = {"summarization": "summarize: ", "translation": "translate English to German: "}
"""What T5 wants before an input."""
KINDS = {
    "classification": Kind("labels for texts or images", "NUM_CLASSES"),
    "generation": Kind("one text from another", "TYPE", tuple(COLUMNS)),
    "fine-tuning": Kind("all weights of a model", "TASK", tuple(TASKS)),
    "peft": Kind("an adapter over a model", "METHOD", ("lora", "qlora", "prefix-tuning", "adapter")),
    "image-lora": Kind("a LoRA of a diffusion model", "PROFILE", ("character", "style", "object")),
    "custom": Kind("a script of your own", "FRAMEWORK", ("pytorch", "jax")),
}
ROUTES: dict[str, dict[str, str]] = {
    "classification": {"encoder": "text-classifier", "decoder": "text-classifier", "image": "image-classifier"},
    "generation": {"seq2seq": "seq2seq", "decoder": "llm-lora"},
    "peft": {
        "encoder": "text-classifier",
        "decoder": "llm-lora",
        "seq2seq": "seq2seq",
        "image": "image-classifier",
    },
    "image-lora": {"sdxl": "sdxl-lora", "sd15": "sd15-lora", "flux": "flux-lora", "z-image": "z-image-lora"},
}
"""The recipes of the other kinds, by family of the model; the first is the default."""
FAMILIES = {
    "flux": r"flux",
    "z-image": r"z-?image",
    "sd15": r"sd-?v?1|stable-?diffusion-?v?-?1|^StableDiffusionPipeline$",
    "sdxl": r"sdxl|stable-?diffusion-?xl|pony|illustrious|noob",
    "image": r"\bvit\b|resnet|resnext|swin|convnext|\bbeit|\bdeit|dino|mobilenet|mobilevit|efficientnet|regnet|levit",
    "seq2seq": r"(?<![a-z])(m|by|flan-)?t5|bart\b|bart-|pegasus|marian|opus-mt|m2m|nllb|\bled\b|prophetnet",
    "encoder": r"bert|minilm|mpnet|electra|xlnet|\bbge\b|\be5\b|ernie|xlm-r",
    "decoder": r"llama|mi[sx]tral|qwen|gemma|\bphi|smollm|gpt|falcon|bloom|\bopt\b|olmo|deepseek|granite|pythia",
}
"""What tells a model's family, in its hub name, or the type that its config.json names."""
TINY: dict[str, tuple[str, ...]] = {
    **{family: (family,) for family in ("flux", "z-image", "sd15", "sdxl")},
    "image": ("vit", "resnet", "swin", "convnext", "beit", "dinov2", "regnet", "mobilenet_v2"),
    "seq2seq": ("t5", "mt5", "bart", "mbart", "pegasus", "marian"),
    "encoder": (
        "bert", "roberta", "distilbert", "albert", "deberta", "deberta-v2", "electra", "mpnet", "xlm-roberta",
        "modernbert",
    ),
    "decoder": (
        "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "gpt2", "gpt_neox",
        "falcon", "bloom", "opt", "olmo2", "granite",
    ),
}  # fmt: skip
"""The types of `random:TYPE` that are known to be made, by family; transformers' names of them."""
MODELS = {"peft": "FacebookAI/roberta-base"}
"""Base models, where not the recipe's own."""
NAMELESS = "gpt|bloom|falcon|opt|phi"
"""Language models whose projections have other names than Llama's."""
PREFIXLESS = "distilbert|albert|deberta"
"""Models that prefix-tuning is not for."""
ALLOWED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def start(kind: str, name: str, model: str, argument: str, config: str = "", parent: Path | None = None) -> Path:
    """Make the project folder `parent`/`name`, whole or not at all; asks for what is missing on a terminal.

    Raises ConfigError for what cannot be started.
    """
    parent = parent or Path()
    kind = answer(kind, "Kind", next(iter(KINDS)) if asking() else None, lambda text: _known(text, KINDS, "KIND"))
    name = answer(name, "Name of the project", None, lambda text: _free_name(text, parent))
    overrides = importing.read(config) if config else Overrides()
    argument = argument or _argument_of(config, overrides, kind)
    argument = answer(argument, KINDS[kind].argument, _default(kind), lambda text: _checked_argument(text, kind))
    default = str(overrides.tree.get("model", {}).get("name") or default_model(kind, argument, overrides, config))
    model = answer(model, "Base model", default, lambda text: _checked_model(text, kind, argument))
    project = plan_project(kind, name, model, argument, overrides, config)
    folder = parent / name
    write_whole(project, folder)
    _add_plan(project, folder)
    ui.say(f"{folder}: {about_line(project)}")
    ui.say(f"train it: make -C {folder} train")
    return folder


def _add_plan(project: Project, folder: Path) -> None:
    """Put the plan into the README where it takes seconds; else that names the command."""
    choices = Choices(project.recipe, config=str(folder / "recipe.yaml"))
    readme = folder / "README.md"
    try:
        if not planning.at_hand(choices):
            return
        page = planning.page(choices, whole=False)
    except TrainboxError as error:
        ui.say(f"no plan in {readme}, `make plan` makes one: {str(error).splitlines()[0]}")
        return
    plan = f"## Plan\n\nFor the sample; `make plan` reckons for your data.\n\n```text\n{page}\n```\n\n## Start\n"
    readme.write_text(readme.read_text(encoding="utf-8").replace("## Start\n", plan, 1), encoding="utf-8")


# What is asked for


def asking() -> bool:
    """Whether somebody is there to answer."""
    return sys.stdin.isatty()


class _Question(Prompt):
    """Asks again until the answer is a good one."""

    def __init__(self, text: str, check: Callable[[str], str]) -> None:
        super().__init__(text)
        self._check = check

    def process_response(self, value: str) -> str:
        """The answer. Raises InvalidResponse, which rich shows before it asks again."""
        try:
            return self._check(value.strip())
        except ConfigError as error:
            raise InvalidResponse(str(error).replace("[", r"\[")) from None


def answer(given: str, question: str, default: str | None, check: Callable[[str], str]) -> str:
    """What was given, is answered on a terminal, or is the default, checked. Raises ConfigError where there is none."""
    if given:
        return check(given)
    if not asking():
        return check(default or "")
    try:
        return str(_Question(question, check)(default=... if default is None else default))
    except EOFError:
        raise ConfigError("has no answer", place=question) from None


def _known(text: str, known: Mapping[str, Any] | Sequence[str], place: str) -> str:
    if text in known:
        return text
    fault = f"{text!r} is not known" if text else "is needed"
    remedy = "\n".join(filter(None, [nearest(text, known), f"known: {', '.join(known)}"]))
    raise ConfigError(fault, place=place, remedy=remedy)


def _free_name(text: str, parent: Path) -> str:
    if not ALLOWED.fullmatch(text):
        fault = f"{text!r} cannot be a project's name" if text else "is needed"
        remedy = "letters, digits and . _ - are allowed, a letter or digit first, 64 at most"
        more = "\nfor another folder: OUTPUT=folder" if "/" in text else ""
        raise ConfigError(fault, place="NAME", remedy=remedy + more)
    if (parent / text).exists() or (parent / text).is_symlink():
        raise ConfigError("is there already", place=str(parent / text), remedy="take another name, or remove it")
    return text


def _default(kind: str) -> str:
    return KINDS[kind].choices[0] if KINDS[kind].choices else "2"


def _checked_argument(text: str, kind: str) -> str:
    asked = KINDS[kind]
    if asked.choices:
        return _known(text, asked.choices, asked.argument)
    if not re.fullmatch(r"\d{1,6}", text) or int(text) < 2:
        raise ConfigError(f"{text!r} is no number of labels", place=asked.argument, remedy="a whole number, 2 at least")
    return str(int(text))


def _checked_model(text: str, kind: str, argument: str) -> str:
    """A model by its form, of a family that the kind can train; a folder as an absolute path."""
    if kind == "custom" and not text:
        return ""
    (name, revision), routes = split_revision(text), _routes(kind, argument)
    if is_path(name):
        name = os.path.realpath(name)
        download.check_model(Model(name=name), drawing={"image-lora": True, "custom": None}.get(kind, False))
    elif name.startswith("random:"):
        _check_tiny(name, [each for known in (TINY if kind == "custom" else routes) for each in TINY[known]])
    elif not re.fullmatch(r"pypi:.+", name) and not source.HUB_NAME.fullmatch(name):
        remedy = "a folder that is there, org/name of a hub, or random:TYPE (a tiny untrained one)"
        raise ConfigError(f"{text!r} is neither a folder nor a hub name", place="MODEL", remedy=remedy)
    family = family_of(name)
    if family and family not in routes and kind != "custom":
        others = sorted(key for key, known in ROUTES.items() if family in known)
        remedy = f"{kind} is for: {', '.join(routes)}; for this model: {', '.join(others)}"
        raise ConfigError(
            f"is of the family {family}, which {kind} {argument} does not train", place=text, remedy=remedy
        )
    return f"{name}@{revision}" if revision else name


def _check_tiny(name: str, offered: Sequence[str]) -> None:
    model_type = name.removeprefix("random:")
    if model_type not in [known for kinds in TINY.values() for known in kinds]:
        remedy = "\n".join(filter(None, [nearest(model_type, offered), f"known: {', '.join(offered)}"]))
        raise ConfigError(f"{name!r} is no tiny model that is known", place="MODEL", remedy=remedy)


def split_revision(text: str) -> tuple[str, str]:
    """`org/name@revision` in two; a path that is there is a whole."""
    name, _, revision = (text, "", "") if is_path(text) else text.partition("@")
    return name, revision


def family_of(model: str) -> str:
    """What a model is, by its name or its config.json; empty where nothing tells."""
    told = model.partition("@")[0]
    if is_path(model):
        config = read_config(Path(model), "config.json") or read_config(Path(model), download.PIPELINE)
        told = str(config.get("model_type") or config.get("_class_name") or "").replace("_", "-")
        told = re.sub("(?<=[a-z])(?=[A-Z])", "-", told)  # StableDiffusionXLPipeline
    return next((family for family, words in FAMILIES.items() if re.search(words, told, re.IGNORECASE)), "")


def _routes(kind: str, argument: str) -> dict[str, str]:
    if kind == "custom":
        return {"any": f"custom-{argument}"}
    routes = TASKS[argument] if kind == "fine-tuning" else ROUTES[kind]
    return {**routes, "decoder": "llm-qlora"} if (kind, argument) == ("peft", "qlora") else routes


def _recipe_of(kind: str, argument: str, model: str, overrides: Overrides, config: str) -> str:
    routes = _routes(kind, argument)
    possible = [name for name in overrides.recipes if name in routes.values()]
    if overrides.recipes and not possible:
        others = [key for key, known in ROUTES.items() if overrides.recipes[0] in known.values()]
        remedy = f"start it so: invoke new {others[0]} NAME --config {config}" if others else ""
        fault = f"is for recipe {overrides.recipes[0]}, which {kind} does not make"
        raise ConfigError(fault, place=overrides.origin.get("recipe", config), remedy=remedy)
    by_model = routes.get(family_of(model), "")
    return by_model if by_model and by_model in (possible or [by_model]) else [*possible, *routes.values()][0]


def default_model(kind: str, argument: str, overrides: Overrides, config: str) -> str:
    """The base model that a kind's recipe has."""
    recipe = _recipe_of(kind, argument, "", overrides, config)
    return MODELS.get(kind) or load_recipe(recipe_folder(recipe), Choices(recipe)).model.name


def _argument_of(config: str, overrides: Overrides, kind: str) -> str:
    """ARG as a configuration says it: its number of labels, its task, its method."""
    found = read_tree(Path(config), config)[0].get("model") if config else {}
    model = found if isinstance(found, dict) else {}
    kinds = [name for name in COLUMNS if str(model.get("task_type", "")).lower().startswith(name[:6])]
    tasks = [name for name, routes in TASKS.items() if {*overrides.recipes} & {*routes.values()}]
    found_by: dict[str, list[Any]] = {
        "classification": [model.get("num_labels")],
        "generation": kinds,
        "fine-tuning": [name for name in kinds if name in tasks] + tasks,
        "peft": [overrides.tree.get("peft", {}).get("method")],
    }
    known = found_by.get(kind) or [None]
    return str(known[0] or "")


# What it changes of the recipe


BROUGHT = ("path", "revision", "validation_file", "test_file", "columns")
"""What a configuration says about the user's data; a project has data of its own."""


def plan_project(kind: str, name: str, model: str, argument: str, overrides: Overrides, config: str) -> Project:
    """The recipe, and what is laid over it. Raises ConfigError where the two do not go together."""
    recipe = _recipe_of(kind, argument, model, overrides, config)
    if kind != "custom" and not family_of(model):
        ui.warn(f"{model}: its name does not tell what it is; taken for one that recipe {recipe} trains")
    whole = read_yaml(recipe_folder(recipe) / "recipe.yaml", recipe)[0]
    profiles = whole.get("profiles") or {}
    own = merge(_of_kind(kind, argument, recipe, model, profiles), _of_model(model, profiles) if model else {})
    if kind == "custom":
        own = merge({"script": {**whole["script"], "folder": SCRIPT}}, own)
    brought, options = _brought(overrides.tree.get("data", {}), config)
    sections = ("model", "peft") if kind == "peft" else ("model",)
    asked: Tree = {section: own[section] for section in sections if section in own}
    tree = merge(merge(own, {**overrides.tree, "data": options}), asked)
    tree["data"] = {"path": "dataset" if kind == "image-lora" else "data", **tree.get("data", {})}
    tree = {**{section: tree[section] for section in ("model", "data", "peft") if section in tree}, **tree}
    origin = dict.fromkeys(tree, config or f"new {kind}")
    loaded = load_recipe(recipe_folder(recipe), Choices(recipe), Overrides(tree, {**origin, **overrides.origin}))
    return Project(name, kind, argument, recipe, tree, loaded, brought)


def _of_kind(kind: str, argument: str, recipe: str, model: str, profiles: Tree) -> Tree:
    tree: Tree = {}
    method = {"peft": argument, "fine-tuning": "full"}.get(kind, "")
    if kind == "image-lora":
        return dict(profiles[argument])
    if method == "prefix-tuning" and re.search(PREFIXLESS, model, re.IGNORECASE):
        remedy = "BERT and RoBERTa have them; or another METHOD: lora, adapter"
        raise ConfigError("has no keys and values of the past for a prefix", place=model, remedy=remedy)
    if kind == "peft" and not takes_adapter(model):
        remedy = "train it whole: invoke new classification NAME MODEL; a ViT, BEiT or Swin takes an adapter"
        raise ConfigError("is convolutional: an adapter has no place in it", place=model, remedy=remedy)
    if method:
        tree["peft"] = {"method": method}
    if recipe.startswith("llm-") and method == "prefix-tuning":
        tree["training"] = {"gradient_checkpointing": False}
    if recipe.startswith("llm-") and method != "full" and re.search(NAMELESS, model, re.IGNORECASE):
        tree["lora"] = {"target_modules": "all-linear"}
    if recipe == "seq2seq" and argument in PREFIXES and re.search("t5", model, re.IGNORECASE):
        tree["data"] = {"prefix": PREFIXES[argument]}
    return tree


def _of_model(model: str, profiles: Tree) -> Tree:
    """The model, with what the recipe's profile for it says: one for trying out trains in seconds."""
    name, revision = split_revision(model)
    owner = next((key for key, each in profiles.items() if each.get("model", {}).get("name") == name), "")
    owner = "tiny" if name.startswith("random:") else owner
    if name.startswith("pypi:") and not owner:
        remedy = "start with another, then set model.name and model.sha256 in recipe.yaml"
        raise ConfigError("is in no profile of the recipe, so its hash is not known", place=name, remedy=remedy)
    profile = profiles[owner] if owner else {}
    return merge(profile, {"model": {"name": name, **({"revision": revision} if revision else {})}})


def _brought(data: Tree, config: str) -> tuple[Tree, Tree]:
    """What a configuration says of data: where it is, less what is not there; and its other options."""
    brought = {key: data[key] for key in BROUGHT if data.get(key)}
    options = {key: value for key, value in data.items() if key not in BROUGHT}
    path = str(brought.get("path", ""))
    if path and not is_path(path) and HUB_NAME.fullmatch(path) and Path(path).suffix.lower() not in READERS:
        return {}, data  # a hub's, which stays where it is
    for key in ("path", "validation_file", "test_file"):
        if key in brought and not is_path(str(brought[key])):
            ui.warn(f"{config}: {key} {brought.pop(key)} is not there; `make prepare INPUT=` brings your data")
    return brought, options
