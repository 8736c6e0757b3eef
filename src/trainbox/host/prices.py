"""Prices of GPUs as SkyPilot's catalogues on this machine have them, kept in the cache over those of gpus.csv."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainbox.errors import EngineError
from trainbox.host import paths, ui
from trainbox.spec.gpus import catalogue, plain
from trainbox.spec.run import write_json

CATALOGUES = "~/.sky/catalogs"
"""Where SkyPilot keeps them: v8/<cloud>/vms.csv and the like, a line for each kind of machine and region."""


def known() -> dict[str, float]:
    """US dollars an hour by GPU, as last refreshed; empty where that never was."""
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
        return {str(name): float(each["usd_per_hour"]) for name, each in found["prices"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def refresh(folder: Path | None = None) -> None:
    """Take over the lowest on-demand price an hour of each GPU. Raises EngineError where there is no catalogue."""
    files = [file for cloud in _catalogues(folder) for file in sorted(cloud.glob("*.csv"))]
    if not files:
        remedy = "SkyPilot fetches them: .venv-cloud/bin/sky gpus list (the first make launch makes .venv-cloud)"
        raise EngineError("there are no catalogues of SkyPilot's", place=str(folder or CATALOGUES), remedy=remedy)
    names = {plain(gpu.skypilot[0]): gpu.name for gpu in catalogue()}
    lowest: dict[str, dict[str, Any]] = {}
    for path in files:
        for name, price in _offers(path):
            gpu = names.get(plain(name))
            if gpu and price < lowest.get(gpu, {}).get("usd_per_hour", float("inf")):
                lowest[gpu] = {"usd_per_hour": price, "cloud": path.parent.name}
    write_json(_file(), {"refreshed": time.strftime("%Y-%m-%d"), "prices": lowest})
    for gpu_ in catalogue():
        if new := lowest.get(gpu_.name):
            ui.say(f"{gpu_.name:<16} ${new['usd_per_hour']:.2f}/h on {new['cloud']} (gpus.csv: ${gpu_.price:.2f})")
    ui.say(f"prices: {_file()}")


Range = tuple[float, float]
"""US dollars an hour of the cheapest and of the dearest region."""


def offered(cloud: str, region: str | None = None, *, spot: bool = False) -> dict[tuple[str, int], Range]:
    """What a machine costs by accelerator and count, on a cloud or in one region; empty without its catalogue here."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for folder in _catalogues(None):
        for path in folder.glob("*.csv") if folder.name == cloud else ():
            for name, count, price, place in _machines(path, "SpotPrice" if spot else "Price"):
                if not region or region.partition("/")[0] == place:  # behind it a zone may be named
                    cheapest = found.setdefault((name, count), {})
                    cheapest[place] = min(price, cheapest.get(place, price))
    return {machine: (min(prices.values()), max(prices.values())) for machine, prices in found.items()}


def regions(cloud: str) -> set[str]:
    """A cloud's regions; empty without its catalogue here."""
    files = (path for folder in _catalogues(None) if folder.name == cloud for path in folder.glob("*.csv"))
    return {line["Region"] for path in files for line in _lines(path) if line.get("Region")}


def _catalogues(folder: Path | None) -> list[Path]:
    """The newest version's folder of each cloud."""
    folder = folder or Path(CATALOGUES).expanduser()
    versions = sorted(folder.glob("v*"), key=lambda path: int(path.name[1:]) if path.name[1:].isdigit() else 0)
    return sorted(path for path in versions[-1].glob("*") if path.is_dir()) if versions else []


def _offers(path: Path) -> list[tuple[str, float]]:
    """Accelerator and price of one, of each line that has both."""
    return [(name, round(price / count, 4)) for name, count, price, _ in _machines(path, "Price")]


def _machines(path: Path, column: str) -> Iterator[tuple[str, int, float, str]]:
    """Accelerator, how many, price and region."""
    for line in _lines(path):
        try:
            name, count, price = line["AcceleratorName"], float(line["AcceleratorCount"]), float(line[column])
        except (KeyError, TypeError, ValueError):  # a machine without a GPU, or sold as spot alone
            continue
        if name and count >= 1 and price > 0:
            yield name, int(count), price, line.get("Region") or ""


def _lines(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _file() -> Path:
    return paths.cache() / "prices.json"
