"""All printing: rich bars on a terminal, plain lines without one."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from trainbox.errors import TrainboxError

Unit = Literal["B", "steps", "rows"]

PLAIN_SECONDS = 5.0
"""Without a terminal, at most one line of progress in this time."""

QUIET_SECONDS = 30.0
"""... and at least one in this time, though there be no news."""


def say(text: str) -> None:
    """Print a line for the person (above a running bar, which rich sees to)."""
    print(text, flush=True)  # noqa: T201


def warn(text: str) -> None:
    """Print a line that the person should not miss."""
    _print_error(f"warning: {text}", "33")


def aside(*, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Where a file's text is to be all of stdout, what is told on the way goes to stderr."""
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


def fail(error: TrainboxError) -> None:
    """Print `error: place: fault`, the remedy indented below it."""
    _print_error(f"error: {error}", "31")


class Progress:
    """A step under way: a bar, its rate and the remaining time; plain lines where there is no terminal.

    `total` may be unknown at first, or for good; `unit` is what is counted.
    """

    def __init__(self, title: str, total: float | None = None, unit: Unit = "steps") -> None:
        self._meter = Meter(total, unit)
        self._title = title
        self._show: _Bar | _Lines = _Bar(title) if sys.stdout.isatty() else _Lines(title)

    def __enter__(self) -> Self:
        self._show.start()
        return self

    def update(
        self, completed: float | None = None, total: float | None = None, note: str = "", title: str = ""
    ) -> None:
        """Show how far it is; whatever is not given stays."""
        self._meter.update(completed, total, note)
        self._show.draw(self._meter, title or self._title)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._show.stop(self._meter, done=kind is None)


class Meter:
    """What is done, of how much, how fast and for how long still; pure but for its clock."""

    def __init__(self, total: float | None, unit: Unit, clock: Callable[[], float] = time.monotonic) -> None:
        self.completed, self.total, self.unit, self.note = 0.0, total, unit, ""
        self._clock, self._started = clock, clock()
        self._first: tuple[float, float] | None = None

    def update(self, completed: float | None, total: float | None, note: str) -> None:
        """Take over what is given."""
        if completed is not None:
            # The rate counts from the first report: a resumed run starts at step 500, not at 0.
            self._first = self._first or (self._clock(), completed)
            self.completed = completed
        self.total = self.total if total is None else total
        self.note = note or self.note

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def text(self) -> str:
        """`12/60 steps, 0.7 steps/s, 1:08 left, loss 1.23`; only the parts that are known."""
        return ", ".join(part for part in (self._amount(), *self._speed(), self.note) if part)

    def _amount(self) -> str:
        if not self.completed and self.total is None:
            return ""
        if self.unit == "B":
            return size(self.completed) + (f" of {size(self.total)}" if self.total else "")
        return f"{self.completed:g}" + (f"/{self.total:g}" if self.total else "") + f" {self.unit}"

    def _speed(self) -> list[str]:
        if self._first is None or self.completed <= self._first[1]:
            return []
        seconds = max(self._clock() - self._first[0], 1e-6)
        rate = (self.completed - self._first[1]) / seconds
        speed = (
            f"{size(rate)}/s"
            if self.unit == "B"
            else f"{rate:.{0 if rate >= 100 else 1 if rate >= 1 else 2}f} {self.unit}/s"
        )
        left = [] if self.total is None else [f"{_time((self.total - self.completed) / rate)} left"]
        return [speed, *left]


class _Bar:
    def __init__(self, title: str) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        text = TextColumn("{task.fields[tail]}", markup=False)
        self._rich: RichProgress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            text,
        )
        self._task = self._rich.add_task(title, total=None, tail="")

    def start(self) -> None:
        self._rich.start()

    def draw(self, meter: Meter, title: str) -> None:
        tail = " ".join(meter.text().split())
        self._rich.update(self._task, completed=meter.completed, total=meter.total, tail=tail, description=title)

    def stop(self, meter: Meter, *, done: bool) -> None:
        if done and meter.total is None:
            self._rich.update(self._task, total=1, completed=1)
        self._rich.stop()


class _Lines:
    """A line when there is news, at most every PLAIN_SECONDS; a sign of life every QUIET_SECONDS."""

    def __init__(self, title: str) -> None:
        self._title = self._line = title
        self._stopped = threading.Event()
        self._speaker = threading.Thread(target=self._speak, daemon=True)

    def start(self) -> None:
        say(f"{self._title} ...")
        self._speaker.start()

    def draw(self, meter: Meter, title: str) -> None:
        self._line = f"{title}: {meter.text()}"

    def stop(self, meter: Meter, *, done: bool) -> None:
        self._stopped.set()
        self._speaker.join()
        if done:
            say(f"{self._title}: done in {_time(meter.elapsed())}")

    def _speak(self) -> None:
        started = spoken = time.monotonic()
        said = self._title
        while not self._stopped.wait(PLAIN_SECONDS):
            now = time.monotonic()
            if self._line != said or now - spoken >= QUIET_SECONDS:
                said, spoken = self._line, now
                say(f"{said} ({_time(now - started)})")


def _print_error(text: str, colour: str) -> None:
    print(f"\033[{colour}m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)  # noqa: T201


def size(count: float) -> str:
    """Bytes as a person reads them: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
