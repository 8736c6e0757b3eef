from __future__ import annotations

import errno
from pathlib import Path

import pytest

from trainbox.container import distributed
from trainbox.container.saving import Metrics, saving
from trainbox.errors import ConfigError, TrainingError


def raised(error: Exception, output: Path) -> BaseException:
    with pytest.raises(Exception) as caught, saving(output, "checkpoint-4"):  # noqa: PT011
        raise error
    return caught.value


def test_a_full_disk_is_told_with_the_checkpoint_that_is_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    full = OSError(errno.ENOSPC, "No space left on device")
    told = raised(full, tmp_path)
    assert isinstance(told, TrainingError)
    assert (told.fault, told.__cause__) == ("the disk is full while saving checkpoint-4", full)
    assert "checkpoint-2" in told.remedy


def test_figures_are_dropped_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINBOX_ROOT", str(tmp_path))
    (tmp_path / "output").mkdir()
    file = tmp_path / "output/metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step"')
    with file.open() as meanwhile:
        Metrics().begin(1)
        assert meanwhile.read() == '{"step": 1}\n{"step": 2}\n{"step"'  # a kill in between would leave this
    assert file.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), ConfigError("a fault of the person's")])
def test_other_errors_pass_as_they_are_and_never_are_their_own_cause(error: Exception, tmp_path: Path) -> None:
    assert raised(error, tmp_path) is error
    assert error.__cause__ is None


def test_a_lost_process_is_seen_behind_other_errors_and_a_circle_of_causes_ends() -> None:
    outer, inner = RuntimeError("cannot go on"), ConnectionError("Connection reset by peer")
    outer.__cause__ = inner
    assert distributed.is_lost_peer(outer)
    inner = ValueError("unpack requires a buffer of 8 bytes")
    outer.__cause__, inner.__cause__ = inner, outer
    assert not distributed.is_lost_peer(outer)
    inner.__cause__ = inner
    assert not distributed.is_lost_peer(inner)
