from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from trainbox.container import launch
from trainbox.errors import ConfigError, HardwareError
from trainbox.spec.distributed import World
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.recipe.llm import SftRecipe
from trainbox.spec.recipe.sections import Distributed, Training
from trainbox.spec.run import BOX_OUTPUT, OWN_FOLDER, box

TRAINING = Training(per_device_train_batch_size=4, gradient_accumulation_steps=4)


def recipe(**asked: object) -> SftRecipe:
    return SftRecipe(training=TRAINING, distributed=Distributed.model_validate(asked))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", OWN_FOLDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "count_gpus", lambda: 0)


def gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(launch, "count_gpus", lambda: number)


def test_one_process_unless_asked_for_more() -> None:
    assert launch.world_of(recipe()) == World(1, 1)
    assert launch.world_of(recipe(processes_per_node=2)) == World(1, 2)


def test_a_process_for_each_gpu_that_divides_the_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(monkeypatch, 4)
    assert launch.world_of(recipe()) == World(1, 4)
    assert launch.world_of(CustomRecipe()) == World(1, 1)
    assert launch.world_of(recipe(processes_per_node=2)) == World(1, 2)
    gpus(monkeypatch, 6)
    assert launch.world_of(recipe()) == World(1, 4)
    assert "4 of 6 GPUs are used: the effective batch of 16 cannot be divided among 6" in capsys.readouterr().out
    with pytest.raises(HardwareError, match="8 processes want a GPU each, and there are 6"):
        launch.world_of(recipe(processes_per_node=8))
    with pytest.raises(ConfigError, match="among 1, 2, 4, 8, 16 it can"):
        launch.world_of(recipe(processes_per_node=6))


def test_the_environment_says_which_node_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="NNODES is not set"):
        launch.world_of(recipe(nodes=2))
    monkeypatch.setenv("NNODES", "2")
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        launch.world_of(recipe(nodes=2))
    monkeypatch.setenv("MASTER_ADDR", "node0")
    assert launch.world_of(recipe(nodes=2)) == World(2, 1)
    monkeypatch.setenv("NODE_RANK", "2")
    with pytest.raises(ConfigError, match="none of 0 to 1"):
        launch.world_of(recipe())
    monkeypatch.setenv("NODE_RANK", "one")
    with pytest.raises(ConfigError, match="'one' is not a number"):
        launch.world_of(recipe())


def test_all_nodes_but_the_first_write_into_a_folder_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRAINBOX_ROOT", str(tmp_path))
    own = tmp_path / "output" / ".node-1"
    for name in ("checkpoint-4", "cache"):
        (own / name).mkdir(parents=True)
    (own / "spec.json").touch()
    launch.set_own_folder()
    assert box(BOX_OUTPUT) == tmp_path / "output"
    monkeypatch.setenv("NODE_RANK", "1")
    launch.set_own_folder()
    assert box(BOX_OUTPUT) == own
    assert box("/output/final") == own / "final"
    assert box("/outputs") == tmp_path / "outputs"
    assert [path.name for path in own.iterdir()] == ["cache"]
    del os.environ[OWN_FOLDER]


def lost(folder: Path, rank: int, fault: str) -> None:
    error = {"kind": "training", "place": "training", "fault": fault, "remedy": ""}
    (folder / f"{rank}.json").write_text(json.dumps({"error": error, "at": float(rank), "lost_peer": True}))


def test_processes_that_cannot_talk_though_none_is_gone_say_why_and_are_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    keeper = launch.Keeper(World(1, 2), tmp_path)
    keeper.note(0, {0: 5})
    lost(tmp_path, 0, "NCCL error: unhandled system error")
    assert keeper.first_error("").fault == "another process is gone"
    lost(tmp_path, 1, "Connection closed by peer")
    told = keeper.first_error("")
    assert (told.kind, told.fault) == ("training", "NCCL error: unhandled system error")


@pytest.mark.parametrize("others", [5, -signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL])
def test_a_killed_process_is_the_error_whoever_of_the_others_was_seen_to_end_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    keeper = launch.Keeper(World(1, 2), tmp_path)
    if others != 128 + signal.SIGTERM:  # it left before it could say anything
        lost(tmp_path, 0, "Connection closed by peer")
    if others > 0:  # it was seen here
        keeper._dead[0] = others, 1.0
    keeper._vanished, keeper._killed = {1}, {0, 1}
    keeper.note(1, {0: others, 1: -signal.SIGKILL})
    assert keeper.first_error("").place == "process 1"
