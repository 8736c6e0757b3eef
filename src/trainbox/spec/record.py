"""The record of a run, output/run.json: what exactly made the model, and whether it is still what it was."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainbox.errors import ConfigError
from trainbox.spec.checkpoint import hash_folder
from trainbox.spec.run import RunSpec, hash_json, write_json

RESULT = "result.json"
RECORD = "run.json"
BEGUN = ".attempt.json"
"""There while an attempt goes on, and after one that was killed before it could say how it ended."""


def write_result(output: Path, spec: RunSpec, outcome: dict[str, Any]) -> None:
    """Write result.json (this attempt) and run.json (the whole run, with every attempt that led here)."""
    final = output / "final"
    artifacts = {f"final/{name}": digest for name, digest in hash_folder(final).items()} if final.is_dir() else {}
    result = outcome | {"artifacts": artifacts}
    write_json(output / RESULT, result)
    attempts = [*_read(output / RECORD).get("attempts", []), *_read(output / BEGUN).get("lost", []), _attempt(result)]
    write_json(output / RECORD, _record(spec, result, attempts))
    (output / BEGUN).unlink(missing_ok=True)


def begin(output: Path, started: datetime) -> None:
    """Note that an attempt begins; those that were killed before it are kept for the record."""
    write_json(output / BEGUN, {"started": started.isoformat(), "lost": lost(output)})


def lost(output: Path) -> list[dict[str, Any]]:
    """Attempts that never said how they ended, and are not in the record: each until its last sign of life."""
    begun = _read(output / BEGUN)
    if not begun:
        return []
    signs = [output / BEGUN, output / "metrics.jsonl", *output.glob("checkpoint-*")]
    last = max(path.stat().st_mtime for path in signs if path.exists())
    ended = datetime.fromtimestamp(last, UTC).isoformat()
    return [*begun.get("lost", []), {"status": "killed", "started": begun["started"], "ended": ended}]


def _attempt(result: dict[str, Any]) -> dict[str, Any]:
    keys = ("status", "exit_code", "started", "ended", "resumed_from", "world", "strategy", "environment", "error")
    return {key: result[key] for key in keys if key in result}


def _record(spec: RunSpec, result: dict[str, Any], attempts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "status": result["status"],
        "choices": spec.choices,
        "recipe": spec.recipe.model_dump(mode="json"),
        "identity": spec.identity,
        "spec_sha256": hash_json(spec.model_dump(mode="json")),
        "model": spec.model.model_dump(mode="json"),
        "data": spec.data.model_dump(mode="json"),
        "seed": spec.recipe.training.seed,
        **spec.origin,
        "metrics": result.get("metrics", {}),
        "prepared": result.get("prepared", {}),
        **{key: result[key] for key in ("batch_size", "evaluation") if key in result},
        "attempts": attempts,
        "artifacts": result["artifacts"],
    }


def finished(output: Path) -> bool:
    """Whether the run in this folder came to its end."""
    return _read(output / RECORD).get("status") == "finished"


def read(output: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """The record of a run. Raises ConfigError where there is none."""
    found = _read(output / RECORD)
    if not found and not missing_ok:
        raise ConfigError("holds no record (run.json)", place=str(output), remedy="name a run's folder: OUTPUT=...")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def changes(output: Path) -> list[str]:
    """What is no longer as the record says: a line for each artifact that changed, is missing or was added."""
    found = read(output)
    recorded: dict[str, str] = found.get("artifacts", {})
    final = output / "final"
    present = {f"final/{name}": digest for name, digest in hash_folder(final).items()} if final.is_dir() else {}
    lines = [f"{name} is missing" for name in recorded if name not in present]
    lines += [f"{name} has changed" for name in recorded if name in present and present[name] != recorded[name]]
    lines += [f"{name} was added" for name in present if name not in recorded]
    spec = output / "spec.json"
    if not spec.exists():
        lines.append("spec.json is missing")
    elif _hash_spec(spec) != found.get("spec_sha256"):
        lines.append("spec.json has changed")
    return lines


def _hash_spec(path: Path) -> str:
    try:
        return hash_json(RunSpec.read(path).model_dump(mode="json"))
    except ConfigError:
        return "no spec any more"
