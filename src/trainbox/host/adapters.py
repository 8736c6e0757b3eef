"""What adapters there are below a folder: of which base, for what, how large and how good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainbox.errors import ConfigError
from trainbox.host import ui
from trainbox.spec import record
from trainbox.spec.checkpoint import step_of
from trainbox.spec.recipe import RECIPES

CONFIG = "adapter_config.json"
HEADER = ("adapter", "base", "task", "method", "MB", "steps", "metric")


def show(folder: Path) -> None:
    """Print a line for each adapter below a folder. Raises ConfigError where there is no such folder."""
    if not folder.is_dir():
        raise ConfigError("there is no such folder", place=str(folder), remedy="name a run's: OUTPUT=...")
    rows = [row for path in find(folder) if (row := _row(path))]
    if not rows:
        ui.say(f"{folder}: no adapter is below it; RECIPE=llm-qlora trains one")
        return
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    for row in (HEADER, *rows):
        ui.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def find(folder: Path) -> list[Path]:
    """The folders of adapters; of a run without a final one, its newest checkpoint."""
    found = {path.parent for path in folder.rglob(CONFIG) if not _is_hidden(path.relative_to(folder))}
    tops = {path for path in found if not found & set(path.parents)}  # PEFT keeps further adapters below the first
    finals = {path for path in tops if step_of(path) < 0}
    finished = {path.parent for path in finals}
    newest: dict[Path, Path] = {}
    for path in sorted(tops - finals, key=step_of):
        newest[path.parent] = path
    return sorted(finals | {path for run, path in newest.items() if run not in finished})


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _row(path: Path) -> tuple[str, ...] | None:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        base, kind = str(config["base_model_name_or_path"]), str(config["peft_type"])
    except (OSError, ValueError, KeyError, TypeError):
        ui.warn(f"{path / CONFIG}: is not PEFT's")
        return None
    run = record.read(path.parent, missing_ok=True)
    recipe, metrics = run.get("recipe", {}), run.get("metrics", {})
    base = run.get("model", {}).get("name") or base  # the name that was asked for, not where it was kept
    method = recipe.get("peft", {}).get("method") or kind.lower().replace("_", "-")
    rank = f" r={config['r']}" if config.get("r") else ""
    steps = step_of(path) if step_of(path) >= 0 else metrics.get("steps", "")
    task = recipe.get("task") or config.get("task_type") or ""
    return str(path), base, str(task), method + rank, _megabytes(path), str(steps), _metric(recipe, metrics)


def _megabytes(path: Path) -> str:
    size = sum(file.stat().st_size for file in path.glob("adapter_model*")) / 1e6
    return f"{size:.1f}" if size >= 1 else f"{size:.2g}"


def _metric(recipe: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The one that decides which checkpoint is best, else the task's first that was measured, else the loss."""
    wanted = str(recipe.get("training", {}).get("metric_for_best_model", "")).removeprefix("eval_")
    known = RECIPES[recipe["task"]].METRICS if recipe.get("task") in RECIPES else ()
    for name in (wanted, *known):
        for split in ("eval", "test"):
            if f"{split}_{name}" in metrics:
                return f"{split}_{name} {metrics[f'{split}_{name}']:.3f}"
    return f"loss {metrics['last_loss']:.3f}" if "last_loss" in metrics else ""
