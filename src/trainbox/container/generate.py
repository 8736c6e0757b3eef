"""Answers from a model: for samples, one prompt, or a chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainbox.container.base_model import load_for_merge, load_for_use
from trainbox.container.report import emit
from trainbox.container.text import end_of_turn
from trainbox.errors import ConfigError
from trainbox.spec.checkpoint import share
from trainbox.spec.formats import Message
from trainbox.spec.recipe import Peft, SftRecipe
from trainbox.spec.run import BOX_MODEL, BOX_SPEC, RunSpec, box


def answer(model: Any, tokenizer: Any, prompt: str | list[Message], max_new_tokens: int) -> str:
    """The greedy answer to a prompt, or to a conversation so far."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def stop_at_end_of_turn(model: Any, tokenizer: Any) -> None:
    """Answers end where the chat template ends a turn: that is what is learned, and some bases have another eos."""
    configured = model.generation_config.eos_token_id
    ends = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    ends.add(end_of_turn(tokenizer))
    model.generation_config.eos_token_id = sorted(token for token in ends if token is not None)


def _recipe() -> SftRecipe:
    """The recipe of the run that trained the folder, where the harness knows it."""
    path = box(BOX_SPEC)
    recipe = RunSpec.read(path).recipe if path.exists() else SftRecipe(peft=Peft(method="full"))
    assert isinstance(recipe, SftRecipe)  # noqa: S101
    return recipe


def _adapted(load: Callable[[SftRecipe, Path, Any], Any], folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a trained folder: a whole model, or an adapter over the base at /model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = (folder / "adapter_config.json").exists()
    model = load(_recipe(), box(BOX_MODEL) if adapter else folder, AutoModelForCausalLM)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    stop_at_end_of_turn(model, tokenizer)
    return model, tokenizer


def infer(folder: Path, prompt: str | None, max_new_tokens: int) -> None:
    """Answer one prompt, or chat until the end of the input."""
    model, tokenizer = _adapted(load_for_use, folder)
    if prompt:
        emit("answer", text=answer(model, tokenizer, prompt, max_new_tokens))
        return
    history: list[Message] = []
    emit("note", text="chat: an empty line forgets what was said, Ctrl-D ends")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            history = []
            continue
        history.append({"role": "user", "content": line})
        reply = answer(model, tokenizer, history, max_new_tokens)
        history.append({"role": "assistant", "content": reply})
        emit("answer", text=reply)


def merge(folder: Path, target: Path) -> None:
    """Write adapter + base as one model into an empty folder. Source: PEFT's merge_and_unload."""
    if not (folder / "adapter_config.json").exists():
        fault = "is no adapter: there is nothing to merge"
        raise ConfigError(fault, place=folder.name, remedy="a fully fine-tuned model is whole as it is")
    emit("stage", text="loading base and adapter")
    model, tokenizer = _adapted(load_for_merge, folder)
    model = model.merge_and_unload(progressbar=False, safe_merge=True)
    emit("stage", text="writing the merged model")
    model.save_pretrained(str(target))
    model.generation_config.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    share(target)
    emit("result", text=f"merged {json.dumps(sorted(path.name for path in target.iterdir()))}")
