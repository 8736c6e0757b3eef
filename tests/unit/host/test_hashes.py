import hashlib
import json
from multiprocessing.pool import ThreadPool

import pytest

from trainbox.host import hashes

pytestmark = pytest.mark.usefixtures("own_cache")


def test_runs_at_the_same_time_keep_one_anothers_hashes(tmp_path):
    files = [tmp_path / str(number) for number in range(40)]
    for file in files:
        file.write_text(file.name)
    with ThreadPool(8) as pool:
        pool.map(lambda file: hashes.hash_files([file]), files)
    assert len(json.loads((tmp_path / "cache/hashes.json").read_text())) == len(files)


def test_a_long_hashing_is_shown_and_is_the_same(tmp_path, monkeypatch, capsys):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 1000)
    monkeypatch.setattr(hashes, "SHOWN_FROM", 1000)
    assert hashes.hash_files([file]) == {file: hashlib.sha256(b"x" * 1000).hexdigest()}
    assert "hashing files" in capsys.readouterr().out
    hashes.hash_files([file])
    assert capsys.readouterr().out == ""
