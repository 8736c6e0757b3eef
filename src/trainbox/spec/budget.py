"""How long a run may still go on: its recipe's `budget`, less what all its attempts so far have used."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from trainbox.errors import ConfigError
from trainbox.spec import record
from trainbox.spec.recipe.sections import Budget


@dataclass(frozen=True)
class Allowance:
    """What an attempt that begins now may use."""

    seconds: float
    """From its beginning; infinite without a budget."""
    limit: str = ""
    """The field that sets it, dotted."""
    most: float = 0.0
    """That field's value."""
    _began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        """Below 0 once it is used up."""
        return self.seconds - (time.monotonic() - self._began)

    @property
    def reason(self) -> str:
        """Why a run stops when nothing is left."""
        return f"the budget of {amount(self.limit, self.most)} is reached"


def allowance(budget: Budget, output: Path) -> Allowance:
    """What is left for an attempt that begins now in a run's folder.

    Raises ConfigError where nothing is, or where dollars are limited and the price of an hour is not known.
    """
    if budget.max_usd and not budget.usd_per_hour:
        remedy = 'say what an hour costs: SET="budget.usd_per_hour=0.44"'
        raise ConfigError("no price of this machine's GPU is known", place="budget.max_usd", remedy=remedy)
    used = seconds_used([*record.read(output, missing_ok=True).get("attempts", ()), *record.lost(output)])
    limits = [
        Allowance(seconds - used, f"budget.{name}", getattr(budget, name)) for name, seconds in _limits(budget).items()
    ]
    tightest = min(limits, key=lambda limit: limit.seconds, default=Allowance(float("inf")))
    if tightest.seconds <= 0:
        fault = f"{tightest.reason}: {used / 3600:.2g} h are used"
        raise ConfigError(fault, place=tightest.limit, remedy=f'allow more: SET="{raised(tightest)}"')
    return tightest


def _limits(budget: Budget) -> dict[str, float]:
    """Seconds that each limit comes to."""
    limits = {"max_hours": budget.max_hours, "max_usd": budget.max_usd and budget.max_usd / (budget.usd_per_hour or 1)}
    return {name: hours * 3600 for name, hours in limits.items() if hours}


def seconds_used(attempts: list[dict[str, Any]]) -> float:
    """What a run's attempts took in all."""
    return sum(
        (datetime.fromisoformat(attempt["ended"]) - datetime.fromisoformat(attempt["started"])).total_seconds()
        for attempt in attempts
        if "ended" in attempt and "started" in attempt
    )


def raised(allowed: Allowance) -> str:
    """A setting that allows twice as much."""
    return f"{allowed.limit}={allowed.most * 2:g}"


def amount(limit: str, value: float) -> str:
    """`$4` or `2 h`."""
    return f"${value:g}" if limit.endswith("usd") else f"{value:g} h"
