"""The training loop against the bare one: speed, start, memory, and what packing is worth."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from jobs import Figure, Measured, bare, sample_turns, small_model, train, write_chats

COMMON = [
    "lora.r=8", "lora.alpha=16", "lora.dropout=0", "lora.target_modules=[q_proj, v_proj]",
    "training.batch_size=4", "training.gradient_accumulation_steps=1", "training.gradient_checkpointing=false",
    "training.bf16=false", "training.fp16=false",
]  # fmt: skip
"""What the bare loop does; all else is the recipe's: deterministic kernels, schedule, watch on the loss, final save."""


def speed(folder: Path, repeats: int) -> list[Figure]:
    """512 chat rows, batch 4, at most 128 tokens, 60 steps, LoRA r 8 on q and v, fp32.

    Both loops draw four rows a step, pad them to the longest of the four and step AdamW. `all` learns every token,
    as the bare loop does; `answers`, our default, reads the same tokens but learns the assistant's.
    """
    model = small_model()
    rows = write_chats(folder / "rows.jsonl", itertools.islice(sample_turns(), 512))
    job = {"steps": 60, "max_length": 128, "batch_size": 4}
    settings = [*COMMON, "training.max_steps=60", "data.max_length=128"]
    runs: dict[str, list[Measured]] = {"bare": [], "answers": [], "all": []}
    for number in range(repeats):
        runs["bare"].append(bare(job, model, rows))
        for loss in ("answers", "all"):
            output = folder / f"speed-{loss}-{number}"
            runs[loss].append(train([*settings, f"data.loss_on={loss}"], model, rows, output))
    figures = []
    for loss in ("answers", "all"):
        name = f"loss on {loss}"
        figures += [
            _figure(f"{name}: speed", "steps/s", runs[loss], runs["bare"], steps_per_second, ">= 1.0x"),
            _figure(f"{name}: speed", "tokens/s", runs[loss], runs["bare"], tokens_per_second, ">= 1.0x"),
            _figure(f"{name}: CPU time", "s / 59 steps", runs[loss], runs["bare"], cpu_seconds, ""),
            _figure(f"{name}: start to first loss", "s", runs[loss], runs["bare"], first_loss, "<= 1.5x"),
            _figure(f"{name}: the same in CPU time", "s", runs[loss], runs["bare"], first_loss_cpu, ""),
            _figure(f"{name}: peak memory", "MB RSS", runs[loss], runs["bare"], lambda run: run.rss / 1e6, "<= 1.3x"),
        ]
    return figures


def packing(folder: Path, repeats: int) -> list[Figure]:
    """448 short chats and 64 long ones, shuffled, at most 512 tokens, batch 4: packed against padded, all learned.

    60 bare steps read 240 chats; the 20 packed steps read about as many tokens.
    """
    model = small_model()
    rows = write_chats(folder / "skewed.jsonl", skewed())
    runs: dict[str, list[Measured]] = {"bare": [], "ours": []}
    settings = [*COMMON, "training.max_steps=20", "data.max_length=512", "data.packing=true", "data.loss_on=all"]
    for number in range(repeats):
        runs["bare"].append(bare({"steps": 60, "max_length": 512, "batch_size": 4}, model, rows))
        runs["ours"].append(train(settings, model, rows, folder / f"packing-{number}"))
    name = "packing, few long rows: speed"
    return [
        _figure(name, "tokens/s", runs["ours"], runs["bare"], tokens_per_second, ">= 1.5x"),
        _figure(name, "tokens/CPU s", runs["ours"], runs["bare"], tokens_per_cpu_second, ""),
    ]


def skewed() -> Iterator[list[dict[str, str]]]:
    """One chat in eight has twelve turns, the others one."""
    turns = sample_turns()
    lengths = [12 if index % 8 == 0 else 1 for index in range(512)]
    chats = [list(itertools.chain(*itertools.islice(turns, length))) for length in lengths]
    random.Random(0).shuffle(chats)
    return iter(chats)


# What a run's lines say. The first step warms caches up, so speed counts from the second.


def logged(run: Measured) -> list[tuple[int, float, float, float]]:
    """(step, seconds, CPU seconds, non-padding tokens since step 1) of every logged loss."""
    found: list[tuple[int, float, float, float]] = []
    tokens = 0.0
    first = -1
    for line in run.lines:
        if line.event.get("event") == "metrics" and "loss" in line.event["metrics"]:
            rate = line.event["metrics"].get("tokens_per_second", 0)
            tokens += rate * (line.seconds - found[-1][1]) if found else 0
            found.append((line.event["step"], line.seconds, line.cpu, tokens))
        elif line.text.startswith('{"step"'):
            plain = json.loads(line.text)
            first = first if found else plain["tokens"]
            found.append((plain["step"], line.seconds, line.cpu, plain["tokens"] - first))
    return found


def steps_per_second(run: Measured) -> float:
    first, last = logged(run)[0], logged(run)[-1]
    return (last[0] - first[0]) / (last[1] - first[1])


def tokens_per_second(run: Measured) -> float:
    first, last = logged(run)[0], logged(run)[-1]
    return last[3] / (last[1] - first[1])


def cpu_seconds(run: Measured) -> float:
    return logged(run)[-1][2] - logged(run)[0][2]


def tokens_per_cpu_second(run: Measured) -> float:
    return logged(run)[-1][3] / cpu_seconds(run)


def first_loss(run: Measured) -> float:
    return logged(run)[0][1]


def first_loss_cpu(run: Measured) -> float:
    return logged(run)[0][2]


def _figure(name, unit, ours, baseline, read, target) -> Figure:
    return Figure(name, unit, [read(run) for run in ours], target, [read(run) for run in baseline])
