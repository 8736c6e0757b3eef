"""What is learned of a conversation, through the chat templates of the models that people train."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from trainbox.host.image import ImageFacts

ODD = {"gemma", "gemma_training", "idefics3", "smolvlm", "llava_next"}
"""Refuse a system message, or want images."""


@pytest.fixture(scope="module")
def found(image: ImageFacts) -> dict[str, Any]:
    script = Path(__file__).with_name("templates.py")
    mount = f"type=bind,source={script},target=/templates.py,readonly"
    argv = [
        "docker",
        "run",
        "--rm",
        "--network=none",
        "--mount",
        mount,
        "--entrypoint=python",
        image.tag,
        "/templates.py",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300)
    texts: dict[str, Any] = json.loads(done.stdout)
    return texts


def plain(found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: each for name, each in found.items() if name.removesuffix("_training") not in ODD and "error" not in each
    }


def test_no_template_is_refused_but_those_that_refuse_a_system_message_or_want_images(found: dict[str, Any]) -> None:
    assert {name.removesuffix("_training") for name, each in found.items() if "error" in each} <= ODD
    assert len(plain(found)) > 40


def test_every_answer_is_learned_and_nothing_that_the_user_says(found: dict[str, Any]) -> None:
    for name, each in plain(found).items():
        spans = each["spans"]
        assert [answer in span for answer, span in zip(["To the north.", "To the south."], spans, strict=True)] == [
            True,
            True,
        ], name
        assert not any(asked in "".join(spans) for asked in ("harbour", "lighthouse", "pilot")), name
        assert each["unlearned"] == 0, name


def test_the_end_of_a_turn_is_learned_with_it(found: dict[str, Any]) -> None:
    without = {name for name, each in plain(found).items() for span in each["spans"] if not span.endswith((">", "]"))}
    # GLM ends an answer with the next turn's first token, which a warning says; gpt-oss its earlier ones otherwise.
    assert without == {"glm4moe", "gptoss", "gptoss_training"}


def test_a_system_message_that_the_template_leaves_out_is_counted(found: dict[str, Any]) -> None:
    assert found["mistral-v0.3"]["lost"] == 1
    assert found["qwen3"]["lost"] == 0
