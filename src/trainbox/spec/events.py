"""What the box tells while it runs: one JSON object a line to the harness, a plain line to a person."""

from __future__ import annotations

import json
from typing import Any

MARK = "\x1e"
"""Starts a line that is an event (ASCII record separator); every other line is a library's own output."""

Event = dict[str, Any]


def encode(event: Event) -> str:
    """One line for the harness."""
    return MARK + json.dumps(event)  # in ASCII, which every terminal, log and pipe hands on as it is


def decode(line: str) -> Event | None:
    """The event of a line, or None where the line is something else."""
    if not line.startswith(MARK):
        return None
    try:
        event = json.loads(line[1:])
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def to_text(event: Event) -> str:
    """A plain line for a person; empty for events that only move a bar."""
    kind = event.get("event")
    if kind == "metrics":
        of = f"/{event['total']}" if event["total"] else ""
        return f"step {event['step']}{of}  {metrics_text(event['metrics'], every=event.get('every', False))}"
    if kind == "progress":
        done, total = event["done"], event.get("total")
        return f"{event['title']}: {done:,}{f'/{total:,}' if total else ''} {event.get('unit', '')}".rstrip()
    if kind == "sample":
        before = f"\n  before: {_one_line(event['before'])}" if event.get("before") is not None else ""
        return f"prompt: {event['prompt']}{before}\n  after:  {_one_line(event['after'])}"
    if kind == "error":
        place = f"{event['place']}: " if event.get("place") else ""
        return f"error: {place}{event['fault']}" + "".join(f"\n  {x}" for x in event.get("remedy", "").splitlines())
    return str(event.get("text", ""))


def metrics_text(metrics: dict[str, Any], *, every: bool = False) -> str:
    """`loss 1.234  eval_loss 1.1`: the figures worth a look (or every one), those of an evaluation all."""
    shown = {SHOWN.get(key, key): value for key, value in metrics.items() if every or key in SHOWN or _is_score(key)}
    return "  ".join(f"{name} {_figure(value)}" for name, value in shown.items())


SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "margin",
    "learning_rate": "lr",
    "epoch": "epoch",
    "tokens_per_second": "tokens/s",
    "images_per_second": "images/s",
}
"""The rest is in metrics.jsonl: a line has to fit a terminal."""


ASIDE = (
    "runtime", "per_second", "logits", "logps", "num_tokens", "entropy", "completions/", "clip_ratio", "time", "macro_",
)  # fmt: skip


def _is_score(key: str) -> bool:
    """A measure of the model in an evaluation, not of the machine."""
    return key.startswith(("eval_", "test_")) and not any(word in key for word in ASIDE)


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _one_line(text: str) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines() if line.strip())
