import json

import pytest

from trainbox.errors import ConfigError
from trainbox.host import rundir

pytestmark = pytest.mark.usefixtures("own_cache")


def leave_run(output, status="interrupted"):
    (output / "checkpoint-4").mkdir(parents=True)
    (output / "run.json").write_text(json.dumps({"status": status, "recipe": {}}))
    (output / "spec.json").write_text('{"recipe": {}}')
    (output / "notes.txt").write_text("mine")


def test_a_folder_that_holds_a_run_is_refused_with_the_three_ways_out(tmp_path):
    leave_run(tmp_path / "o")
    with pytest.raises(ConfigError, match="interrupted") as caught, rundir.claim(tmp_path / "o", overwrite=False):
        pass
    for way in ("make resume", "OUTPUT=", "OVERWRITE=1"):
        assert way in caught.value.remedy


def names_in(output):
    return sorted(path.name for path in output.iterdir())


def test_overwriting_takes_away_the_run_and_nothing_else_and_only_when_the_new_one_starts(tmp_path):
    leave_run(tmp_path / "o", "finished")
    before = names_in(tmp_path / "o")
    with rundir.claim(tmp_path / "o", overwrite=True):
        assert names_in(tmp_path / "o") == [".lock", *before]
        rundir.clear(tmp_path / "o")
        assert names_in(tmp_path / "o") == [".lock", "notes.txt"]


def test_a_run_that_failed_before_its_first_checkpoint_is_in_nobodys_way(tmp_path):
    leave_run(tmp_path / "o", "failed")
    (tmp_path / "o" / "checkpoint-4").rmdir()
    with rundir.claim(tmp_path / "o", overwrite=False):
        rundir.clear(tmp_path / "o")
        assert not (tmp_path / "o" / "spec.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_somebodys_own_files_by_our_names_are_refused_and_left(tmp_path, overwrite):
    for name in ("logs/a.txt", "cache/b", "checkpoint-3/c", "spec.json", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = names_in(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"holds cache, checkpoint-3, logs, spec\.json") as caught,
        rundir.claim(tmp_path, overwrite=overwrite),
    ):
        pass
    assert "OUTPUT=" in caught.value.remedy
    rundir.clear(tmp_path)
    assert names_in(tmp_path) == before


def test_a_folder_with_other_files_is_taken_and_they_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with rundir.claim(tmp_path, overwrite=False):
        rundir.clear(tmp_path)
    assert names_in(tmp_path) == [".lock", "notes.txt"]


def test_a_run_that_never_began_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), rundir.claim(tmp_path / "o", overwrite=False):
        raise RuntimeError
    assert not (tmp_path / "o").exists()


def test_a_second_process_is_refused(tmp_path):
    def claimed():
        return rundir.claim(tmp_path / "o", overwrite=False)

    with claimed(), pytest.raises(ConfigError, match="another process"), claimed():
        pass


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), rundir.claim(tmp_path / "file" / "o", overwrite=False):
        pass


def test_tokenised_data_moves_to_the_shared_cache_and_half_made_data_does_not(tmp_path):
    whole, half = tmp_path / "o/cache/key", tmp_path / "o/cache/.other.tmp"
    for folder in (whole, half):
        folder.mkdir(parents=True)
    (whole / "stats.json").write_text("{}")
    (tmp_path / "cache/prepared").mkdir(parents=True)
    rundir.keep_prepared(tmp_path / "o")
    assert (tmp_path / "cache/prepared/key/stats.json").exists()
    assert [path.name for path in (tmp_path / "cache/prepared").iterdir()] == ["key"]
    assert not (tmp_path / "o/cache").exists()
