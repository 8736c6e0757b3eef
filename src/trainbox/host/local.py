"""No container: the images' locked packages in a virtual environment of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from trainbox.host import paths, shell, ui
from trainbox.host.box import KILLED, SECRETS, Box, Finished, Mount
from trainbox.host.environment import Environment
from trainbox.host.image import NONE, PYTHON, ImageFacts, hash_locks
from trainbox.spec.run import BOX_JOB, BOX_WORKSPACE

UV = [str(Path(sys.executable).parent / "uv"), "--no-progress"]

IMAGE_VENV = Path("/opt/venv")
"""Where our images keep their packages; a rented machine that runs one of them already has it."""


class Local:
    """This machine as the engine; the box's paths become a folder of links, told by TRAINBOX_ROOT."""

    name = "local"

    def __init__(self) -> None:
        self.facts = {"engine": "local", "version": sys.version.split()[0], "api": ""}
        self._over: dict[str, tuple[Mount, ...]] = {}

    def ensure(self, recipe: str, own: Environment = NONE) -> ImageFacts:
        """The recipe's virtual environment, found or made; its path is the facts' tag."""
        locks = hash_locks(recipe)
        digest = hashlib.sha256(repr(sorted(locks.items())).encode()).hexdigest()
        files = [paths.REPO / "docker/base/requirements.lock", paths.REPO / "recipes" / recipe / "requirements.lock"]
        venv = IMAGE_VENV if _holds(IMAGE_VENV, files) else paths.cache() / "local" / digest[:16]
        if venv != IMAGE_VENV:
            with locked(venv):
                if not (venv / ".ready").exists():
                    _make(venv, files)
        self._over[str(venv)] = _over(venv, recipe, own)
        identity = hashlib.sha256(repr(sorted(hash_locks(recipe, own).items())).encode()).hexdigest()
        return ImageFacts(str(venv), f"local:{identity}", (), "local", hash_locks(recipe, own), {})

    def argv(self, box: Box) -> list[str]:
        """The command, run by the environment that `box.image` names."""
        return [f"{box.image}/bin/python", "-m", "trainbox.container", *box.command]

    def run(self, box: Box, on_line: Callable[[str], None] = ui.say) -> Finished:
        """Run the box to its end; signals to this process reach it. Limits and the network flag mean nothing here."""
        kills = _oom_kills()
        box = replace(box, mounts=(*box.mounts, *self._over.get(box.image, ())))
        with _mounted(box.mounts) as root:
            env = _environment(box, root)
            # `env -u` since the secrets of this process are not for every step.
            argv = ["env", *(f"-u{name}" for name in SECRETS if name not in box.secrets), *self.argv(box)]
            code = shell.attach(argv, env=env) if box.interactive else shell.stream(argv, on_line, env=env)
        return Finished(code, code == KILLED and _oom_kills() > kills)


def _holds(venv: Path, locks: list[Path]) -> bool:
    """Whether an environment already has the locked packages, as on a rented machine that runs our own image."""
    if not (venv / "bin/python").exists():
        return False
    files = [part for lock in locks for part in ("-r", str(lock))]
    argv = [*UV, "pip", "install", "--dry-run", "--offline", "--python", str(venv / "bin/python"), *files]
    done = shell.run(argv, check=False)
    return done.returncode == 0 and "Would install" not in done.stderr


def _make(venv: Path, locks: list[Path]) -> None:
    """Install the locks with uv; the mark at the end is what makes it count."""
    shutil.rmtree(venv, ignore_errors=True)
    shell.run([*UV, "venv", "--python", _python(), str(venv)])
    argv = [*UV, "pip", "sync", "--require-hashes", "--python", str(venv / "bin/python"), *map(str, locks)]
    shell.show("installing the locked packages (once, some GB)", argv)
    (venv / ".ready").touch()


def _over(venv: Path, recipe: str, own: Environment) -> tuple[Mount, ...]:
    """What an image has above its packages, as mounts: /opt/job, another trainer."""
    if own.root or own.apt or own.steps:
        ui.warn("gpu.jsonc: environment's base_image, apt packages and set-up steps are left to you: no container")
    trainer = (Mount(own.trainer[1], f"{BOX_WORKSPACE}/{own.trainer[0]}"),) if own.trainer else ()
    locks = [file for file in (paths.REPO / "recipes" / recipe / "job.lock", own.lock) if file and file.exists()]
    if not locks:
        return trainer
    digest = hashlib.sha256(b"".join([str(venv).encode(), *(file.read_bytes() for file in locks)])).hexdigest()
    job = paths.cache() / "local" / f"{digest[:16]}-job"
    with locked(job):
        if not (job / ".ready").exists():
            _make_over(job, venv, locks)
    return Mount(job, BOX_JOB), *trainer


def _make_over(job: Path, venv: Path, locks: list[Path]) -> None:
    """An environment whose own packages come first, then those of `venv`."""
    shutil.rmtree(job, ignore_errors=True)
    shell.run([*UV, "venv", "--python", str(venv / "bin/python"), str(job)])
    below, above = (next(folder.glob("lib/python3*/site-packages")) for folder in (venv, job))
    (above / "zz-base.pth").write_text(f"{below}\n")
    files = [part for lock in locks for part in ("-r", str(lock))]
    argv = [*UV, "pip", "install", "--no-deps", "--require-hashes", "--python", str(job / "bin/python"), *files]
    shell.show("installing the project's own packages", argv)
    (job / ".ready").touch()


def _python() -> str:
    """The Python of the images where there is one, else this process's own."""
    found = shell.run([*UV, "python", "find", "--no-python-downloads", PYTHON], check=False)
    return found.stdout.strip() if found.returncode == 0 else sys.executable


@contextlib.contextmanager
def _mounted(mounts: tuple[Mount, ...]) -> Iterator[Path]:
    """A folder in which each mount's target is a link to its source."""
    with tempfile.TemporaryDirectory(prefix="trainbox-") as folder:
        for mount in mounts:
            link = Path(folder + mount.target)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(mount.source.absolute())
        yield Path(folder)


def _environment(box: Box, root: Path) -> dict[str, str]:
    targets = tuple(mount.target for mount in box.mounts)

    def real(value: str) -> str:
        inside = any(value == target or value.startswith(f"{target}/") for target in targets)
        return f"{root}{value}" if inside else value

    hidden = {} if box.gpus == "all" else {"CUDA_VISIBLE_DEVICES": ",".join(_first_gpus(int(box.gpus or 0)))}
    env = {name: real(value) for name, value in box.env.items()}
    return {**hidden, **env, **box.secrets, "TRAINBOX_ROOT": str(root), "PYTHONPATH": str(paths.SOURCE)}


def _first_gpus(number: int) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:number] if visible else [str(each) for each in range(number)]


def _oom_kills() -> int:
    """How many processes this machine's kernel has killed for memory since it started."""
    file = Path("/proc/vmstat")
    lines = (line.split() for line in file.read_text().splitlines()) if file.exists() else ()
    return next((int(value) for name, value in lines if name == "oom_kill"), 0)


@contextlib.contextmanager
def locked(venv: Path) -> Iterator[None]:
    """Hold an environment while it is made; a second process waits for it."""
    venv.parent.mkdir(parents=True, exist_ok=True)
    with venv.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
