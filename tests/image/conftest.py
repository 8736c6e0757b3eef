"""The real engine, the real images, and runs that several tests look at; skipped where no engine can run."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import PLAIN, run, training

from trainbox.errors import EngineError
from trainbox.host import engine as engines

if TYPE_CHECKING:
    from trainbox.host.image import ImageFacts


@pytest.fixture(scope="session")
def engine() -> engines.Docker:
    """The engine of this machine, brought up where it can be."""
    try:
        picked = engines.pick("docker")
    except EngineError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    assert isinstance(picked, engines.Docker)
    return picked


@pytest.fixture(scope="session")
def image(engine: engines.Docker) -> ImageFacts:
    """The demo recipe's image, looked up or built."""
    return engine.ensure("llm-qlora")


@pytest.fixture(scope="session")
def straight(engine: engines.Docker, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Outputs of uninterrupted runs by recipe and settings, each trained once for all tests and workers. Read only."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "straight"
    shared.mkdir(exist_ok=True)

    def get(recipe: str, settings: str = PLAIN) -> Path:
        output = shared / hashlib.sha256(f"{recipe} {settings}".encode()).hexdigest()[:12]
        with output.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (output / "run.json").exists():
                ended = run(*training(recipe, output, settings))
                output.with_suffix(".txt").write_text(ended.text)
                assert ended.code == 0, ended.text
        return output

    return get


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tarfile.TarFile]:
    """Opens an npm package of this version and sha256."""

    def fetch(name: str, sha256: str) -> tarfile.TarFile:
        folder = tmp_path_factory.mktemp("npm")
        pack = ["npm", "pack", "--silent", "--fetch-retries=5", name]
        fetched = shutil.which("npm") and subprocess.run(pack, cwd=folder, capture_output=True, text=True, check=False)
        if not fetched or fetched.returncode:
            assert not os.environ.get("CI"), f"npm cannot fetch {name}: {fetched}"
            pytest.skip(f"npm cannot fetch {name}")
        (path,) = folder.glob("*.tgz")
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        return tarfile.open(path)

    return fetch
