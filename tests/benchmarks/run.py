"""The figures that the README quotes: run.py [NAME...] [--repeats N]; without names, all but cold-build.

Each benchmark runs ours and its baseline in turn and compares medians; run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import classifier
import diffusion
import harness
import images
import million
import pushing
import training
from jobs import Figure
from rich.console import Console
from rich.table import Table

BENCHMARKS: dict[str, Callable[[Path, int], list[Figure]]] = {
    "speed": training.speed,
    "packing": training.packing,
    "classifier": classifier.classifier,
    "images": images.images,
    "diffusion": diffusion.diffusion,
    "harness": harness.harness,
    "million": million.million,
    "push": pushing.push,
    "cold-build": harness.cold_build,
}
"""By name, in order; each gets a folder of its own and how often to repeat."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(BENCHMARKS):
        parser.error(f"{', '.join(unknown)}: none of {', '.join(BENCHMARKS)}")
    figures: list[Figure] = []
    try:
        for name in asked.names or [name for name in BENCHMARKS if name != "cold-build"]:
            started = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="trainbox-bench-") as folder:
                figures += BENCHMARKS[name](Path(folder), asked.repeats)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    finally:  # what was measured before a failure is worth its minutes
        show(figures)


def show(figures: list[Figure]) -> None:
    """One table; medians, with the least and the greatest sample."""
    table = Table()
    for title in ("figure", "unit", "ours", "baseline", "ratio", "target", "met?"):
        table.add_column(title, justify="left" if title in ("figure", "unit") else "right", no_wrap=True)
    for figure in figures:
        ratio = f"{figure.ratio:.2f}x" if figure.ratio else ""
        met = "" if figure.met is None else "yes" if figure.met else "NO"
        table.add_row(
            figure.name, figure.unit, _spread(figure.ours), _spread(figure.baseline), ratio, figure.target, met
        )
    # As wide as the table: cut off in a pipe, it would say nothing.
    Console(width=160).print(table)


def _spread(samples: list[float]) -> str:
    if not samples:
        return ""
    low, middle, high = (f"{value:.3g}" if value < 100 else f"{value:,.0f}"
                         for value in (min(samples), statistics.median(samples), max(samples)))  # fmt: skip
    return middle if low == high else f"{middle} ({low}..{high})"


if __name__ == "__main__":
    main()
