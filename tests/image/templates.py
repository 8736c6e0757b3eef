"""Run in the image: what is learned through the chat templates of many models (TRL's copies), as JSON."""

import json
import sys
from pathlib import Path

import trl
from transformers.utils import logging

from trainbox.container.models import byte_tokenizer
from trainbox.container.text import IGNORED, ChatEncoder
from trainbox.spec.recipe.llm import SftRecipe
from trainbox.spec.run import DataSource, ModelSource, RunSpec

logging.set_verbosity_error()
CHAT = [
    {"role": "system", "content": "Speak like a pilot."},
    {"role": "user", "content": "Where is the harbour?"},
    {"role": "assistant", "content": "To the north."},
    {"role": "user", "content": "And the lighthouse?"},
    {"role": "assistant", "content": "To the south."},
]
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if loop.last and s is defined %}[INST] {{ s }}\n\n{{ m.content }}[/INST]{% else %}[INST] {{ m.content }}[/INST]"
    "{% endif %}{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""As Mistral 7B v0.3 does it: the system prompt goes to the last message, if that is the user's."""


SPEC = RunSpec(
    date="2026-01-02",
    recipe=SftRecipe(),
    model=ModelSource(name="none", reference="none"),
    data=DataSource(files={}, hash="", rows={}),
)


def learned(template: str) -> dict[str, object]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    (row,) = ChatEncoder(SPEC, tokenizer).encode([("row 1", {"messages": CHAT})])
    runs, before = [], False
    for label in row.labels.tolist():
        if label != IGNORED:
            runs = [*runs[:-1], [*runs[-1], label]] if before else [*runs, [label]]
        before = label != IGNORED
    return {"spans": [tokenizer.decode(run) for run in runs], "unlearned": row.unlearned, "lost": row.lost}


found = {"mistral-v0.3": learned(MISTRAL)}
for file in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
    try:
        found[file.stem] = learned(file.read_text())
    except Exception as error:
        found[file.stem] = {"error": str(error)[:100]}
json.dump(found, sys.stdout)
