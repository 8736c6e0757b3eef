"""Answers of a causal language model, many at a time."""

from __future__ import annotations

from typing import Any

import torch

from trainbox.container.text import end_of_turn
from trainbox.spec.formats import Message


def answers(
    model: Any, tokenizer: Any, conversations: list[list[Message]] | list[str], max_new_tokens: int
) -> list[str]:
    """The greedy answer to each conversation, or what each plain text goes on with."""
    # Texts of uneven length end together, so that what follows each is its answer.
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        if isinstance(conversations[0], str):
            inputs = tokenizer(conversations, padding=True, return_tensors="pt")
            inputs.pop("token_type_ids", None)
        else:
            inputs = tokenizer.apply_chat_template(
                conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
    finally:
        tokenizer.padding_side = side
    inputs = inputs.to(model.device)
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
    said = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def stop_at_end_of_turn(model: Any, tokenizer: Any) -> None:
    """Answers end where the chat template ends a turn: that is what is learned, and some bases have another eos."""
    configured = model.generation_config.eos_token_id
    ends = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    ends.add(end_of_turn(tokenizer))
    model.generation_config.eos_token_id = sorted(token for token in ends if token is not None)
