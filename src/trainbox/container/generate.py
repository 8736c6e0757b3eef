"""Answers of a causal language model, many at a time."""

from __future__ import annotations

from typing import Any

import torch

from trainbox.container.text import end_of_turn
from trainbox.errors import DataError
from trainbox.spec.asking import Question


def answers(model: Any, tokenizer: Any, questions: list[Question], max_new_tokens: int) -> list[str]:
    """The greedy answer to each conversation, or what each plain text goes on with."""
    chats = "messages" in questions[0]
    texts = [_up_to_the_answer(tokenizer, question) if chats else question["text"] for question in questions]
    # Texts of uneven length end together, so that what follows each is its answer.
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        inputs = tokenizer(texts, add_special_tokens=not chats, padding=True, return_tensors="pt")
    finally:
        tokenizer.padding_side = side
    inputs.pop("token_type_ids", None)
    inputs = inputs.to(model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():  # in inference mode, weights that are gathered here could not be trained after
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


def _up_to_the_answer(tokenizer: Any, question: Question) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                question["messages"], tools=question.get("tools"), add_generation_prompt=True, tokenize=False
            )
        )
    except Exception as error:  # a template is a program and may raise anything
        raise DataError(f"the model's chat template refuses it: {error}", place="messages") from error


def stop_at_end_of_turn(model: Any, tokenizer: Any) -> None:
    """Answers end where the chat template ends a turn: that is what is learned, and some bases have another eos."""
    configured = model.generation_config.eos_token_id
    ends = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    ends.add(end_of_turn(tokenizer))
    model.generation_config.eos_token_id = sorted(token for token in ends if token is not None)
