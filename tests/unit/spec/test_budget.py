"""How long a run may go on."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from trainbox.errors import ConfigError
from trainbox.spec import record
from trainbox.spec.budget import allowance, raised
from trainbox.spec.recipe.sections import Budget
from trainbox.spec.run import write_json


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A run of two attempts, of half an hour and of a quarter."""
    start = datetime(2026, 1, 2, tzinfo=UTC)
    lengths = (timedelta(minutes=30), timedelta(minutes=15))
    attempts = [{"started": start.isoformat(), "ended": (start + length).isoformat()} for length in lengths]
    write_json(tmp_path / "run.json", {"attempts": attempts})
    return tmp_path


@pytest.mark.parametrize(
    ("budget", "seconds", "limit"),
    [
        (Budget(max_hours=1), 15 * 60, "budget.max_hours"),
        (Budget(max_usd=2, usd_per_hour=2), 15 * 60, "budget.max_usd"),
        (Budget(max_hours=1, max_usd=4, usd_per_hour=2), 15 * 60, "budget.max_hours"),
        (Budget(max_hours=3, max_usd=2, usd_per_hour=2), 15 * 60, "budget.max_usd"),
        (Budget(), float("inf"), ""),
    ],
)
def test_what_is_left_is_the_tightest_limit_less_all_attempts(output, budget, seconds, limit):
    allowed = allowance(budget, output)
    assert (allowed.seconds, allowed.limit) == (seconds, limit)
    assert allowed.seconds_left <= seconds


def test_a_new_run_has_all_of_it(tmp_path):
    assert allowance(Budget(max_hours=2), tmp_path).seconds == 7200


def test_what_is_used_up_is_refused_with_the_setting_that_goes_on(output):
    with pytest.raises(ConfigError) as refused:
        allowance(Budget(max_hours=0.75), output)
    assert refused.value.place == "budget.max_hours"
    assert "0.75 h" in refused.value.fault
    assert refused.value.remedy == 'allow more: SET="budget.max_hours=1.5"'


def test_dollars_without_a_price_are_refused(output):
    with pytest.raises(ConfigError, match="no price"):
        allowance(Budget(max_usd=2), output)


def test_a_raised_limit_is_twice_the_old(output):
    assert raised(allowance(Budget(max_usd=4, usd_per_hour=1), output)) == "budget.max_usd=8"


def test_an_attempt_that_was_killed_counts_until_its_last_sign_of_life(output):
    began = datetime.now(UTC) - timedelta(minutes=9)
    record.begin(output, began)
    os.utime(output / record.BEGUN, (0, began.timestamp()))
    (output / "metrics.jsonl").touch()
    os.utime(output / "metrics.jsonl", (0, (began + timedelta(minutes=6)).timestamp()))
    assert allowance(Budget(max_hours=1), output).seconds == pytest.approx(9 * 60)
    record.begin(output, datetime.now(UTC))  # the next one does not forget it
    assert [attempt["status"] for attempt in record.lost(output)] == ["killed", "killed"]
