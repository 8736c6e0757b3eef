"""Every error a person can cause or meet, and the exit code of its kind."""

from __future__ import annotations

INTERRUPTED = 75
"""Exit code of a run that was stopped with its checkpoint saved (EX_TEMPFAIL of sysexits.h)."""


class TrainboxError(Exception):
    """An error told to the person, without a traceback.

    `place` is where (`file:line`, or a dotted key), `fault` what is wrong there and `remedy` what to do next.
    """

    exit_code = 5
    kind = "training"

    def __init__(self, fault: str, *, place: str = "", remedy: str = "") -> None:
        super().__init__(fault)
        self.place, self.fault, self.remedy = place, fault, remedy

    def __str__(self) -> str:
        first = f"{self.place}: {self.fault}" if self.place else self.fault
        return first + "".join(f"\n  {line}" for line in self.remedy.splitlines())


class ConfigError(TrainboxError):
    """The recipe, a profile, an override or an option is wrong."""

    exit_code = 2
    kind = "config"


class DataError(TrainboxError):
    """The data is absent, unreadable or of the wrong shape."""

    exit_code = 3
    kind = "data"


class EngineError(TrainboxError):
    """The container engine, an image or a download is at fault."""

    exit_code = 4
    kind = "engine"


class TrainingError(TrainboxError):
    """The run itself failed: diverged, could not save, or met a bug."""


class HardwareError(TrainboxError):
    """The machine cannot hold or start the run: memory, driver, a GPU that is absent."""

    exit_code = 6
    kind = "hardware"


class Interrupted(TrainboxError):  # noqa: N818 (it is no error to the person)
    """Stopped on request, with a checkpoint that `resume` goes on from."""

    exit_code = INTERRUPTED
    kind = "interrupted"


KINDS: dict[str, type[TrainboxError]] = {
    error.kind: error for error in (ConfigError, DataError, EngineError, TrainingError, HardwareError, Interrupted)
}
"""By the `kind` that crosses the wall in `result.json`."""
