import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbox.spec import checkpoint
from trainbox.spec.checkpoint import SEAL, all_checkpoints, fault_of, hash_folder, newest_complete, publish, step_of


def stage(output, name="aside", **files):
    staged = output / name
    (staged / "rank").mkdir(parents=True)
    for file, text in (files or {"weights": "w"}).items():
        (staged / file).write_text(text)
    (staged / "rank" / "rng").write_text("r")
    return staged


@pytest.fixture
def saved(tmp_path):
    """A folder with the complete checkpoints 5, 10 and 100."""
    for step in (5, 10, 100):
        publish(stage(tmp_path, weights=f"w{step}"), tmp_path / f"checkpoint-{step}")
    return tmp_path


def test_a_published_checkpoint_is_complete_and_its_staging_is_gone(saved):
    assert [path.name for path in all_checkpoints(saved)] == ["checkpoint-5", "checkpoint-10", "checkpoint-100"]
    assert not any(fault_of(path) for path in all_checkpoints(saved))
    assert not (saved / "aside").exists()
    seal = json.loads((saved / "checkpoint-10" / SEAL).read_text())
    assert seal == {"step": 10, "files": hash_folder(saved / "checkpoint-10")}
    assert set(seal["files"]) == {"weights", "rank/rng"}


def test_publishing_a_step_again_replaces_it(saved):
    publish(stage(saved, weights="new"), saved / "checkpoint-10")
    assert (saved / "checkpoint-10" / "weights").read_text() == "new"
    assert fault_of(saved / "checkpoint-10") == ""


@pytest.mark.parametrize(
    ("name", "step"),
    [("checkpoint-7", 7), ("checkpoint-0", 0), ("checkpoint-", -1), ("checkpoint-7.tmp", -1), ("final", -1)],
)
def test_the_step_is_in_the_name(tmp_path, name, step):
    assert step_of(tmp_path / name) == step


def test_the_newest_complete_checkpoint_is_by_step_not_by_name(saved):
    assert newest_complete(saved) == (saved / "checkpoint-100", [])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: (path / SEAL).unlink(), "is incomplete: it was never sealed"),
        (lambda path: (path / SEAL).write_text(""), "is damaged: its seal cannot be read"),
        (lambda path: (path / SEAL).write_bytes(b"\0" * 99), "is damaged: its seal cannot be read"),
        (lambda path: (path / SEAL).write_text("[]"), "is damaged: its seal cannot be read"),
        (lambda path: (path / SEAL).write_text('{"files": [[1, 2]]}'), "is damaged: its seal cannot be read"),
        (lambda path: (path / "weights").unlink(), "is damaged: weights is missing"),
        (lambda path: (path / "weights").write_text("x100"), "is damaged: weights has changed"),
        (lambda path: (path / "weights").write_text(""), "is damaged: weights has changed"),
        (lambda path: (path / "rank" / "rng").write_text("x"), "is damaged: rank/rng has changed"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_by_name(saved, damage, fault):
    damage(saved / "checkpoint-100")
    assert newest_complete(saved) == (saved / "checkpoint-10", [f"checkpoint-100 {fault}"])


def test_a_file_that_the_disk_does_not_give_is_damage(saved, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "hash_file", fail)
    assert fault_of(saved / "checkpoint-5") == "is damaged: rank/rng cannot be read (Input/output error)"


def test_a_folder_without_a_complete_checkpoint_gives_none(tmp_path):
    assert newest_complete(tmp_path) == (None, [])
    stage(tmp_path, "checkpoint-3")
    (tmp_path / "checkpoint-4").write_text("a file")
    found, skipped = newest_complete(tmp_path)
    assert found is None
    assert skipped == ["checkpoint-4 does not exist", "checkpoint-3 is incomplete: it was never sealed"]


@pytest.mark.parametrize("stop_at", ["hash_folder", "write_json", "_sync"])
def test_a_kill_at_any_instant_leaves_the_previous_one_usable(saved, monkeypatch, stop_at):
    def killed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, stop_at, killed)
    with pytest.raises(KeyboardInterrupt):
        publish(stage(saved), saved / "checkpoint-200")
    monkeypatch.undo()
    assert newest_complete(saved) == (saved / "checkpoint-100", [])


def test_everything_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(checkpoint, "_sync", lambda path: order.append(path.name))
    publish(stage(tmp_path), tmp_path / "checkpoint-1")
    assert set(order[:-2]) == {"weights", "rank", "rng", SEAL}
    assert order[-2:] == ["aside", tmp_path.name]


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_flipped_byte_in_a_seal_never_passes_a_changed_file(tmp_path, at, byte):
    if not (tmp_path / "checkpoint-1").exists():
        publish(stage(tmp_path), tmp_path / "checkpoint-1")
        (tmp_path / "seal").write_bytes((tmp_path / "checkpoint-1" / SEAL).read_bytes())
        (tmp_path / "checkpoint-1" / "weights").write_text("flipped")
    seal = bytearray((tmp_path / "seal").read_bytes())
    seal[at % len(seal)] = byte
    (tmp_path / "checkpoint-1" / SEAL).write_bytes(seal)
    assert fault_of(tmp_path / "checkpoint-1") or b"weights" not in seal


@given(seal=st.binary() | st.text().map(str.encode))
def test_any_bytes_as_a_seal_are_told_not_raised(tmp_path, seal):
    with suppress(FileExistsError):
        stage(tmp_path, "checkpoint-1")
    (tmp_path / "checkpoint-1" / SEAL).write_bytes(seal)
    assert fault_of(tmp_path / "checkpoint-1").startswith("is damaged")
