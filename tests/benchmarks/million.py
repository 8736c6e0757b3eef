"""A million short rows: prepared in flat memory, found again by the next run."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

from jobs import Figure, Measured, sample_turns, small_model, train

from trainbox.host import paths, rundir
from trainbox.spec.events import Event

SETTINGS = [
    "training.max_steps=1", "training.gradient_accumulation_steps=1", "training.gradient_checkpointing=false",
    "training.bf16=false", "lora.r=8", "data.max_length=128",
]  # fmt: skip


def million(folder: Path, repeats: int) -> list[Figure]:
    """The run up to the report on its data, and to its one step; 1,000,000 rows against 10,000."""
    model = small_model()
    few = train(SETTINGS, model, _write_rows(folder / "few.jsonl", 10_000), folder / "few")
    rows = _write_rows(folder / "many.jsonl", 1_000_000)
    many = train(SETTINGS, model, rows, folder / "many")
    again = _again(model, rows, folder)
    seconds = _prepared(many) - _started(many)
    return [
        Figure("1,000,000 rows: peak while preparing", "MB", [_peak(many)], "<= 1.5x", [_peak(few)]),
        Figure("1,000,000 rows: peak of the whole run", "MB", [_whole(many)], "<= 1.5x", [_whole(few)]),
        Figure("1,000,000 rows: preparing", "s", [seconds], ""),
        Figure("1,000,000 rows: preparing", "rows/s", [1_000_000 / seconds], ""),
        Figure("1,000,000 rows: data ready, second run", "s", [again], "", [_prepared(many)]),
    ]


def _write_rows(path: Path, count: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number, chat in enumerate(itertools.islice(sample_turns(), count)):
            asked, answered = chat[0]["content"], chat[1]["content"]
            file.write(json.dumps({"instruction": f"{asked} ({number})", "output": answered}) + "\n")
    return path


def _again(model: Path, rows: Path, folder: Path) -> float:
    """Publish the tokenised data as a run's end does, run again, and remove it from the shared cache."""
    (made,) = (folder / "many" / "cache").iterdir()
    rundir.keep_prepared(folder / "many")
    try:
        second = train(SETTINGS, model, rows, folder / "again")
    finally:
        shutil.rmtree(paths.cache() / "prepared" / made.name)
    second.first(lambda event: event.get("text", "").startswith("tokenised data found"))  # raises where it was not
    return _prepared(second)


def _is_report(event: Event) -> bool:
    return event.get("event") == "data"


def _prepared(run: Measured) -> float:
    return run.first(_is_report).seconds


def _started(run: Measured) -> float:
    """When the first rows were encoded, less the half second to the first word of it."""
    return run.first(lambda event: event.get("event") == "progress").seconds - 0.5


def _peak(run: Measured) -> float:
    return run.first(_is_report).peak / 1e6


def _whole(run: Measured) -> float:
    return run.lines[-1].peak / 1e6
