"""Tokenised data on disk: made once in one pass of flat memory, memory-mapped after."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainbox.container.report import Progress, emit
from trainbox.container.text import IGNORED, Encoded, Encoder, end_of_turn
from trainbox.errors import DataError
from trainbox.spec.dataset import hash_file, read_examples
from trainbox.spec.formats import Example
from trainbox.spec.run import BOX_CACHE, BOX_OUTPUT, RunSpec, box, hash_json, write_json

CHUNK = 500
"""Rows encoded at a time."""
PARALLEL_FROM = 20_000
"""Rows from which a process for each core pays for its start."""


@dataclass
class Stats:
    """What became of a split's rows."""

    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    sequences: int = 0
    unlearned: int = 0
    lost: int = 0

    def text(self, split: str, max_length: int) -> str:
        """One line for the log."""
        parts = [f"{split}: {self.rows:,} rows, {self.tokens:,} tokens ({self.learned:,} learned)"]
        parts.append(f"longest {self.longest:,}")
        if self.sequences != self.rows - self.dropped:
            parts.append(f"packed into {self.sequences:,} sequences")
        parts.append(f"{self.truncated:,} cut to {max_length:,} tokens, {self.dropped:,} dropped (no answer left)")
        return "; ".join(parts)

    def warnings(self, split: str) -> list[str]:
        """What the chat template did to the rows that the person would not expect."""
        lines = []
        if self.unlearned:
            lines.append(f"{split}: {self.unlearned:,} answers are not learned: the chat template hides them")
        if self.lost:
            lines.append(f"{split}: the chat template leaves out {self.lost:,} system or user messages")
        return lines


def prepared(spec: RunSpec, tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tokenised splits and what became of their rows.

    A split is a memory-mapped `datasets.Dataset`: input_ids, labels and, packed, seq_lengths.

    Taken from the cache where an earlier run left them, else made in `/output/cache`, from where the harness
    moves them to the cache that runs share.
    """
    key = _key(spec, tokenizer)
    folder = next((path for path in _places(key) if (path / "stats.json").is_file()), None)
    if folder is None:
        folder = _make(spec, tokenizer, box(BOX_OUTPUT) / "cache" / key)
    else:
        emit("note", text=f"tokenised data found in the cache ({key})")
    stats = json.loads((folder / "stats.json").read_text())
    for split, numbers in stats.items():
        known = Stats(**numbers)
        emit("data", text=known.text(split, spec.recipe.data.max_length), split=split, **numbers)
        for line in known.warnings(split):
            emit("warn", text=line)
    if end_of_turn(tokenizer) is None:
        emit("warn", text="the chat template ends an answer with no token of its own: answers will not know their end")
    return {split: _open(folder / f"{split}.arrow") for split in stats}, stats


def _key(spec: RunSpec, tokenizer: Any) -> str:
    """The same key, the same tokens: data, tokenizer, settings, libraries and the code of this step."""
    import tokenizers
    import transformers

    import trainbox

    root = Path(trainbox.__file__).parent
    code = [hash_file(root / name) for name in ("container/prepare.py", "container/text.py", "spec/formats.py")]
    date = spec.date if "strftime_now" in str(tokenizer.chat_template) else ""
    return hash_json([spec.prepared_key, date, transformers.__version__, tokenizers.__version__, code])[:24]


def _places(key: str) -> list[Path]:
    return [box(BOX_CACHE) / key, box(BOX_OUTPUT) / "cache" / key]


def _open(path: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(path))


def _make(spec: RunSpec, tokenizer: Any, folder: Path) -> Path:
    staged = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    stats = {}
    for split, examples, total in _splits(spec):
        stats[split] = asdict(_write_split(spec, tokenizer, examples, total, staged / f"{split}.arrow"))
    write_json(staged / "stats.json", stats)
    staged.rename(folder)
    return folder


def _splits(spec: RunSpec) -> Iterator[tuple[str, Iterable[tuple[str, Example]], int]]:
    """(name, rows, how many), the validation rows taken out of the training ones where the recipe says so."""
    data, rows = spec.recipe.data, spec.data.rows
    files = {split: [box(path) for path in paths] for split, paths in spec.data.files.items()}
    total = rows["train"]
    held: set[int] = set()
    if data.validation_split and "validation" not in files:
        count = max(1, round(total * data.validation_split))
        held = set(random.Random(spec.recipe.training.seed).sample(range(total), count))  # noqa: S311

    def train(keep_held: bool) -> Iterator[tuple[str, Example]]:
        rows = enumerate(read_examples(files["train"], data))
        return (row for index, row in rows if (index in held) == keep_held)

    yield "train", train(keep_held=False), total - len(held)
    if held:
        yield "validation", train(keep_held=True), len(held)
    for split in ("validation", "test"):
        if split in files:
            yield split, read_examples(files[split], data), rows[split]


def _write_split(spec: RunSpec, tokenizer: Any, examples: Any, total: int, path: Path) -> Stats:
    import pyarrow as pa

    data, stats = spec.recipe.data, Stats()
    tokens = pa.list_(pa.int32())
    schema = pa.schema({"input_ids": tokens, "labels": tokens})
    progress = Progress(f"tokenising {path.stem}", total)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for chunk in _encode_all(Encoder(tokenizer, data, spec.date), examples, total):
            kept = [row for row in (_fit(row, data.max_length, stats) for row in chunk) if row]
            ids, labels = zip(*kept, strict=True) if kept else ((), ())
            writer.write_batch(pa.record_batch([pa.array(ids, tokens), pa.array(labels, tokens)], schema=schema))
            progress.update(stats.rows)
    progress.update(stats.rows, last=True)
    if stats.rows == stats.dropped:
        raise DataError(
            f"no row of the {path.stem} data has any of its answer within {data.max_length} tokens",
            place="data.max_length",
            remedy=f'raise it: the longest row has {stats.longest} tokens, SET="data.max_length=..."',
        )
    stats.sequences = _pack(path, data.max_length) if data.packing else stats.rows - stats.dropped
    return stats


def _fit(row: Encoded, max_length: int, stats: Stats) -> tuple[np.ndarray, np.ndarray] | None:
    ids, labels = row.ids, row.labels
    stats.rows += 1
    stats.unlearned += row.unlearned
    stats.lost += row.lost
    stats.longest = max(stats.longest, len(ids))
    cut = len(ids) > max_length
    ids, labels = ids[:max_length], labels[:max_length]
    # The first token is never predicted, so its label does not count.
    learned = int((labels[1:] != IGNORED).sum())
    if not learned:
        stats.dropped += 1
        return None
    stats.truncated += cut
    stats.tokens += len(ids)
    stats.learned += learned
    return ids, labels


def _encode_all(encoder: Encoder, examples: Any, total: int) -> Iterator[list[Encoded]]:
    chunks = iter(lambda: list(itertools.islice(examples, CHUNK)), [])
    # A container's CPU limit is told by the harness; the machine's cores show in it all the same.
    workers = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    if total < PARALLEL_FROM or workers < 2:
        yield from map(encoder.encode, chunks)
        return
    # Workers are forked, so that they share the tokenizer; a window at a time keeps memory flat.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _encoder
    _encoder = encoder
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        while window := list(itertools.islice(chunks, workers * 4)):
            yield from pool.imap(_encode_in_worker, window)


_encoder: Encoder


def _encode_in_worker(chunk: list[tuple[str, Example]]) -> list[Encoded]:
    return _encoder.encode(chunk)


def _pack(path: Path, max_length: int) -> int:
    """Fill sequences with whole rows, best fit first (https://arxiv.org/abs/2404.10830); how many there are."""
    from trl import pack_dataset

    packed = pack_dataset(
        _open(path), max_length, "bfd", {"cache_file_name": str(path.with_suffix(".packed")), "batch_size": 10_000}
    )
    path.with_suffix(".packed").replace(path)
    return len(packed)
