"""Models, and recipes for them, whose needs and costs were published: what a plan is measured by.

Where a source does not say with which settings its figure goes, those it ships are taken; `note` says which.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from trainbox.spec.recipe import RECIPES
from trainbox.spec.recipe.sections import Recipe

MODELS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
"""Configurations of well-known models: files by path."""


FACTS = Path(__file__).with_name("facts.jsonl")
"""What was measured of the cases in their images; an image test measures them again."""


class Case(NamedTuple):
    """A model and a recipe."""

    model: str
    task: str
    settings: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return RECIPES[self.task].model_validate(self.settings)


ALL = "all-linear"
SMALL = {"r": 8, "target_modules": ALL}
"""LoRA as most guides start."""
MINIMAL = {"gradient_checkpointing": True, "per_device_train_batch_size": 1}


def _llm(model: str, method: str, training: dict[str, Any], length: int, lora: dict[str, Any] | None = None) -> Case:
    dtype = {"model": {"dtype": "bfloat16"}} if method == "pure-bf16" else {}
    settings = {"peft": {"method": "full" if dtype else method}, "training": training, "data": {"max_length": length}}
    return Case(model, "sft", {**settings, **dtype, **({"lora": lora} if lora else {})})


DEFAULT = {"gradient_checkpointing": True}
"""Trainbox's own: batch 4, 2048 tokens, rank 64."""
REPEATED = {"data": {"resolution": 1024}, "training": {**MINIMAL, "gradient_accumulation_steps": 1}}


def _lora_of(model: str, **more: Any) -> Case:
    merged = {key: {**REPEATED.get(key, {}), **more.get(key, {})} for key in {**REPEATED, **more}}
    return Case(model, "text-to-image", {"peft": {"method": "lora"}, **merged})


CASES: dict[str, Case] = {
    # 16 bits or 4, as Trainbox trains by default
    "7B qlora": _llm("mistral-7b", "qlora", DEFAULT, 2048),
    "7B lora": _llm("mistral-7b", "lora", DEFAULT, 2048),
    "7B full": _llm("mistral-7b", "pure-bf16", DEFAULT, 2048),
    "8B qlora": _llm("llama-3.1-8b", "qlora", DEFAULT, 2048),
    "8B lora": _llm("llama-3.1-8b", "lora", DEFAULT, 2048),
    "8B full": _llm("llama-3.1-8b", "pure-bf16", DEFAULT, 2048),
    "13B qlora": _llm("llama-2-13b", "qlora", DEFAULT, 2048),
    "13B lora": _llm("llama-2-13b", "lora", DEFAULT, 2048),
    "13B full": _llm("llama-2-13b", "pure-bf16", DEFAULT, 2048),
    "34B qlora": _llm("codellama-34b", "qlora", DEFAULT, 2048),
    "34B lora": _llm("codellama-34b", "lora", DEFAULT, 2048),
    "34B full": _llm("codellama-34b", "pure-bf16", DEFAULT, 2048),
    "70B qlora": _llm("llama-3.1-70b", "qlora", DEFAULT, 2048),
    "70B lora": _llm("llama-3.1-70b", "lora", DEFAULT, 2048),
    "70B full": _llm("llama-3.1-70b", "pure-bf16", DEFAULT, 2048),
    # The least that a method can do with: one row of 512 tokens, rank 8
    "3B qlora least": _llm("llama-3.2-3b", "qlora", MINIMAL, 512, SMALL),
    "3B lora least": _llm("llama-3.2-3b", "lora", MINIMAL, 512, SMALL),
    "7B qlora least": _llm("mistral-7b", "qlora", MINIMAL, 512, SMALL),
    "7B lora least": _llm("mistral-7b", "lora", MINIMAL, 512, SMALL),
    "7B full least": _llm("mistral-7b", "full", MINIMAL, 512),
    "8B qlora least": _llm("llama-3.1-8b", "qlora", MINIMAL, 512, SMALL),
    "8B lora least": _llm("llama-3.1-8b", "lora", MINIMAL, 512, SMALL),
    "14B qlora least": _llm("qwen2.5-14b", "qlora", MINIMAL, 512, SMALL),
    "14B lora least": _llm("qwen2.5-14b", "lora", MINIMAL, 512, SMALL),
    "phi-4 qlora least": _llm("phi-4", "qlora", MINIMAL, 512, SMALL),
    "phi-4 lora least": _llm("phi-4", "lora", MINIMAL, 512, SMALL),
    "34B qlora least": _llm("codellama-34b", "qlora", MINIMAL, 512, SMALL),
    "34B lora least": _llm("codellama-34b", "lora", MINIMAL, 512, SMALL),
    "70B qlora least": _llm("llama-3.1-70b", "qlora", MINIMAL, 512, SMALL),
    "70B lora least": _llm("llama-3.1-70b", "lora", MINIMAL, 512, SMALL),
    # torchtune's and litgpt's own configurations
    "torchtune lora": _llm("llama-3.1-8b", "lora", {**MINIMAL, "per_device_train_batch_size": 2}, 256, SMALL),
    "torchtune qlora": _llm("llama-3.1-8b", "qlora", {**MINIMAL, "per_device_train_batch_size": 2}, 256, SMALL),
    "litgpt lora": _llm("llama-3.1-8b", "lora", {"per_device_train_batch_size": 1}, 512, {"r": 32}),
    "litgpt qlora": _llm("llama-3.1-8b", "qlora", {"per_device_train_batch_size": 2}, 512, {"r": 32}),
    # Images: 10 epochs of 10 repeats, batch 1
    "sdxl": _lora_of("sdxl", training={"max_steps": 2000}),
    "sdxl 100 images": _lora_of("sdxl", training={"max_steps": 10000, "save_steps": 1000}),
    "sdxl, encoders kept": _lora_of("sdxl", data={"cache": False}, training={"gradient_checkpointing": False}),
    "flux": _lora_of("flux", training={"max_steps": 2000}, data={"resolution": [512, 768, 1024]}),
    "flux int8": _lora_of("flux", peft={"method": "qlora"}, quantization={"quant_type": "int8"}),
    "flux nf4": _lora_of("flux", peft={"method": "qlora"}),
    "flux, encoders kept": _lora_of("flux", data={"cache": False}),
    "vit": Case("vit-base", "image-classification", {}),
    "resnet": Case("resnet-50", "image-classification", {}),
    # Other kinds of training
    "sd15": _lora_of("sd15", data={"resolution": 512}),
    "smollm2": _llm("smollm2-135m", "lora", {}, 512),
    "qwen3-4b": _llm("qwen3-4b", "qlora", DEFAULT, 2048),
    "gemma-2-9b": _llm("gemma-2-9b", "qlora", DEFAULT, 2048),
    "gpt2": _llm("gpt2", "lora", {}, 512, SMALL),
    "mixtral": _llm("mixtral-8x7b", "qlora", DEFAULT, 2048),
    "dpo": Case("smollm2-135m", "preference", {"peft": {"method": "lora"}, "data": {"max_length": 512}}),
    "grpo": Case("smollm2-135m", "grpo", {"peft": {"method": "lora"}, "data": {"max_length": 512}}),
    "prefix-tuning": _llm("smollm2-135m", "prefix-tuning", {}, 512),
    "ia3": _llm("smollm2-135m", "adapter", {}, 512),
    "bert": Case("bert-base", "token-classification", {"data": {"max_length": 256}}),
    "roberta": Case("roberta-base", "text-classification", {"peft": {"method": "lora"}, "data": {"max_length": 256}}),
    "distilbert": Case("distilbert-base", "masked-lm", {"data": {"max_length": 256}}),
    "albert": Case("albert-base", "text-classification", {"data": {"max_length": 256}}),
    "deberta": Case("deberta-v3-base", "token-classification", {"data": {"max_length": 256}}),
    "t5-small": Case("t5-small", "seq2seq", {}),
    "bart-base": Case("bart-base", "seq2seq", {}),
}

IMAGES = {"text-to-image": "sdxl-lora", "image-classification": "image-classifier"}
"""Recipes whose image has a task's libraries; that of text-classifier has those of all others."""


def alike() -> dict[str, str]:
    """For each case the first one with the same facts: batch, quantisation and checkpointing do not change them."""
    first: dict[str, str] = {}
    found = {}
    for name, case in CASES.items():
        said = case.recipe.model_dump(mode="json", include={"peft", "lora", "data", "preference", "grpo"})
        said["peft"]["method"] = said["peft"]["method"].replace("qlora", "lora")
        said["data"].pop("cache", None)
        kind = json.dumps([case.model, case.task, case.recipe.model.dtype, said])
        found[name] = first.setdefault(kind, name)
    return found


def by_image(names: set[str]) -> dict[str, list[str]]:
    """These cases by the recipe in whose image they are measured."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(IMAGES.get(CASES[name].task, "text-classifier"), []).append(name)
    return found
