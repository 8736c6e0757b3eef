"""Tokenised data on disk: made once in one pass of flat memory, memory-mapped after."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from trainbox.container.report import Progress, emit
from trainbox.errors import DataError
from trainbox.spec.dataset import hash_file, reader
from trainbox.spec.reading import Example
from trainbox.spec.run import BOX_CACHE, BOX_OUTPUT, RunSpec, box, hash_json, write_json

CHUNK = 500
"""Rows encoded at a time."""
PARALLEL_FROM = 20_000
"""Rows from which a process for each core pays for its start."""
TOKENS = pa.list_(pa.int32())

Placed = tuple[str, Example]
Stats = dict[str, int]
"""What became of a split's rows: rows, dropped, truncated, tokens, longest, and what a task counts besides."""


class Encoder:
    """What a task makes of its rows; a subclass for each."""

    columns: dict[str, Any] = {"input_ids": TOKENS, "labels": TOKENS}  # noqa: RUF012
    """Columns of the tokenised rows, with their Arrow types."""
    sources: ClassVar[tuple[str, ...]] = ("container/prepare.py", "spec/reading.py")
    """Files of this package that decide what a row becomes: where one changes, the cache no longer counts."""
    counts: ClassVar[tuple[str, ...]] = ()
    """What is counted besides rows, dropped, truncated, tokens and longest."""
    forks: ClassVar[bool] = False
    """Whether rows cost Python's time besides the tokenizer's, which has threads of its own: then processes pay."""
    depends_on: Any = None
    """What else decides what a row becomes; goes into the cache's key as JSON."""

    def __init__(self, spec: RunSpec, tokenizer: Any) -> None:
        self.data: Any = spec.recipe.data
        self.tokenizer = tokenizer

    def encode(self, rows: list[Placed]) -> Sequence[Any]:
        """Tokenise a batch of (place, example); may run in a process of its own, so arrays cross faster than lists."""
        raise NotImplementedError

    def keep(self, row: Any, stats: Stats) -> tuple[Any, ...] | None:
        """A tokenised row's values by column, counted in `stats`; None drops it."""
        raise NotImplementedError

    def finish(self, path: Path, stats: Stats) -> None:
        """The Arrow file is whole: pack it, or leave it as it is."""

    def describe(self, split: str, stats: Stats) -> str:
        """One line for the log."""
        parts = [f"{split}: {stats['rows']:,} rows, {stats['tokens']:,} tokens", f"longest {stats['longest']:,}"]
        return "; ".join([*parts, f"{stats['truncated']:,} cut to {self.data.max_length:,} tokens"])

    def warnings(self, split: str, stats: Stats) -> list[str]:
        """What became of the rows that the person would not expect."""
        return []


def prepared(spec: RunSpec, encoder: Encoder) -> tuple[dict[str, Any], dict[str, Stats]]:
    """The tokenised splits, each a memory-mapped `datasets.Dataset`, and what became of their rows.

    Taken from the cache where an earlier run left them, else made in `/output/cache`, from where the harness
    moves them to the cache that runs share.
    """
    key = _key(spec, encoder)
    folder = next((path for path in _places(key) if (path / "stats.json").is_file()), None)
    if folder is None:
        folder = _make(spec, encoder, box(BOX_OUTPUT) / "cache" / key)
    else:
        emit("note", text=f"tokenised data found in the cache ({key})")
    stats: dict[str, Stats] = json.loads((folder / "stats.json").read_text())
    for split, numbers in stats.items():
        emit("data", text=encoder.describe(split, numbers), split=split, **numbers)
        for line in encoder.warnings(split, numbers):
            emit("warn", text=line)
    return {split: open_arrow(folder / f"{split}.arrow") for split in stats}, stats


def _key(spec: RunSpec, encoder: Encoder) -> str:
    """The same key, the same tokens: data, tokenizer, settings, libraries and the code of this step."""
    import tokenizers
    import transformers

    import trainbox

    root = Path(trainbox.__file__).parent
    code = [hash_file(root / name) for name in encoder.sources]
    versions = [transformers.__version__, tokenizers.__version__]
    return hash_json([spec.prepared_key, encoder.depends_on, versions, code])[:24]


def _places(key: str) -> list[Path]:
    return [box(BOX_CACHE) / key, box(BOX_OUTPUT) / "cache" / key]


def open_arrow(path: Path) -> Any:
    """A memory-mapped `datasets.Dataset`."""
    from datasets import Dataset

    return Dataset.from_file(str(path))


def _make(spec: RunSpec, encoder: Encoder, folder: Path) -> Path:
    staged = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    stats = {}
    for split, rows, total in splits_of(spec):
        stats[split] = _write_split(encoder, rows, total, staged / f"{split}.arrow")
    write_json(staged / "stats.json", stats)
    staged.rename(folder)
    return folder


def splits_of(spec: RunSpec) -> Iterator[tuple[str, Iterable[Placed], int]]:
    """(name, rows, how many), the validation rows taken out of the training ones where the recipe says so."""
    data, rows, recipe = spec.recipe.data, spec.data.rows, spec.in_box
    files = {split: [box(path) for path in paths] for split, paths in spec.data.files.items()}
    if "train" in files:
        total, held = rows["train"], set[int]()
        if data.validation_split and "validation" not in files:
            count = max(1, round(total * data.validation_split))
            held = set(random.Random(spec.recipe.training.seed).sample(range(total), count))  # noqa: S311

        def train(keep_held: bool) -> Iterator[Placed]:
            rows = enumerate(reader(recipe).read(files["train"]))
            return (row for index, row in rows if (index in held) == keep_held)

        yield "train", train(keep_held=False), total - len(held)
        if held:
            yield "validation", train(keep_held=True), len(held)
    for split in ("validation", "test"):
        if split in files:
            yield split, reader(recipe).read(files[split]), rows[split]


def _write_split(encoder: Encoder, rows: Iterable[Placed], total: int, path: Path) -> Stats:
    schema = pa.schema(encoder.columns)
    stats = dict.fromkeys(("rows", "dropped", "truncated", "tokens", "longest", *encoder.counts), 0)
    progress = Progress(f"tokenising {path.stem}", total)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for chunk in _encode_all(encoder, iter(rows), total):
            kept = [values for values in (encoder.keep(row, stats) for row in chunk) if values]
            stats["rows"] += len(chunk)
            stats["dropped"] += len(chunk) - len(kept)
            columns = zip(*kept, strict=True) if kept else ((),) * len(schema)
            arrays = [pa.array(values, kind) for values, kind in zip(columns, schema.types, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            progress.update(stats["rows"])
    progress.update(stats["rows"], last=True)
    if stats["rows"] == stats["dropped"]:
        raise DataError(
            f"no row of the {path.stem} data has anything to learn within {encoder.data.max_length} tokens",
            place="data.max_length",
            remedy=f'raise it: the longest row has {stats["longest"]} tokens, SET="data.max_length=..."',
        )
    encoder.finish(path, stats)
    return stats


def _encode_all(encoder: Encoder, rows: Iterator[Placed], total: int) -> Iterator[Sequence[Any]]:
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    # A container's CPU limit is told by the harness; the machine's cores show in it all the same.
    workers = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    if not encoder.forks or total < PARALLEL_FROM or workers < 2:
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


def _encode_in_worker(chunk: list[Placed]) -> Sequence[Any]:
    return _encoder.encode(chunk)
