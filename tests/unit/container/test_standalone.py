"""The model that a launch names by its pins, where the box looks for it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from trainbox.container import standalone
from trainbox.errors import EngineError
from trainbox.host import paths, pipeline
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.run import DataSource, ModelSource, RunSpec

WEIGHTS, CONFIG = hashlib.sha256(b"weights").hexdigest(), hashlib.sha256(b"{}").hexdigest()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINBOX_ROOT", str(tmp_path))
    found = tmp_path / "model"
    found.mkdir()
    (found / "model.safetensors").write_bytes(b"weights")
    (found / "config.json").write_bytes(b"{}")
    return found


def of_hub(weights: str) -> ModelSource:
    return ModelSource(name="org/name", reference="org/name", files={"model.safetensors": weights, "config.json": ""})


def test_what_the_hub_did_not_tell_is_hashed_where_the_files_are(folder: Path) -> None:
    assert standalone.fill_model(of_hub(WEIGHTS)).files == {"model.safetensors": WEIGHTS, "config.json": CONFIG}


def test_a_file_that_is_not_what_its_hash_says_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(EngineError, match=r"model\.safetensors is not what its hash says"):
        standalone.fill_model(of_hub("0" * 64))


def test_a_model_whose_hashes_are_all_known_is_not_read_again(folder: Path) -> None:
    known = ModelSource(name="org/name", reference="org/name", files={"model.safetensors": "as recorded"})
    assert standalone.fill_model(known) == known


class Hub(BaseHTTPRequestHandler):
    """A hub that answers everything with `server.status`."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "words"), [(503, 4, "start again"), (404, 2, "HF_TOKEN"), (403, 2, "HF_TOKEN")]
)
def test_a_model_that_cannot_be_had_is_hopeless_only_where_it_is_and_the_record_says_so(
    tmp_path: Path, hub: Any, status: int, code: int, words: str
) -> None:
    hub.status = status
    for name in ("model", "output"):
        (tmp_path / name).mkdir()
    recipe = load_recipe(pipeline.recipe_folder("llm-lora"), Choices("llm-lora", model="org/name"))
    source = DataSource(files={}, rows={}, hash="")
    model = ModelSource(name="org/name", reference="org/name", revision="0" * 40)
    RunSpec(recipe=recipe, model=model, data=source).write(tmp_path / "output/spec.json")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(paths.SOURCE), "TRAINBOX_ROOT": str(tmp_path),
           "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HOME": str(tmp_path)}  # fmt: skip
    argv = [sys.executable, "-m", "trainbox.container", "train"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    record = json.loads((tmp_path / "output/run.json").read_text())
    (attempt,) = record["attempts"]
    assert (record["status"], attempt["error"]["place"]) == ("failed", "model.name")
    assert words in attempt["error"]["remedy"]
