"""`make lock`: refresh every lock file and pin, and say what changed."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainbox.errors import ConfigError, EngineError
from trainbox.host import image, paths, shell, ui

if TYPE_CHECKING:
    from trainbox.host.engine import Docker

Source = tuple[Path, tuple[Path, ...]]
"""A requirements file, and the locks that it must agree with."""


def lock(docker: Docker | None = None) -> list[str]:
    """Refresh all locks to the newest versions allowed, and the root's digest; prints and returns what changed."""
    sources = list(find_sources())
    changes = []
    with ui.Progress("locking", total=len(sources), unit="steps") as progress:
        for number, (source, constraints) in enumerate(sources):
            progress.update(completed=number, note=str(source.relative_to(paths.REPO)))
            changes += _refresh(source, constraints)
        progress.update(completed=len(sources))
    changes += _refresh_pin(docker) if docker else []
    for line in changes or ["nothing changed"]:
        ui.say(line)
    return changes


def find_sources() -> Iterator[Source]:
    """Every requirements file, each after those that constrain it."""
    base = paths.REPO / "docker/base"
    yield paths.REPO / "requirements.in", ()
    yield paths.REPO / "requirements-cloud.in", ()
    yield base / "installer.in", ()
    yield base / "requirements-torch.in", ()
    yield base / "requirements.in", (base / "requirements-torch.lock",)
    for source in sorted((paths.REPO / "recipes").glob("*/requirements.in")):
        yield source, (base / "requirements.lock",)
    for source in sorted((paths.REPO / "recipes").glob("*/job.in")):
        yield source, (base / "requirements-torch.lock",)


def compile_argv(source: Path, constraints: tuple[Path, ...]) -> list[str]:
    """The whole `uv pip compile` line, run in the source's folder so that no path of this machine gets in.

    A file of overrides beside the source, such as job.overrides, beats what packages ask of one another.
    """
    # What goes over the base is for the image alone; all else may be installed without one (ENGINE=local) too.
    where = ["--upgrade", "--universal", "--python-version", "3.11"]
    if _is_job(source):
        where = ["--python-version", image.PYTHON, "--python-platform", "x86_64-manylinux_2_40"]
    return [
        str(Path(sys.executable).parent / "uv"), "pip", "compile", "--quiet", *where,
        "--generate-hashes", "--no-emit-index-url", "--no-header",
        *[part for file in constraints for part in ("--constraint", os.path.relpath(file, source.parent))],
        *(["--override", f"{source.stem}.overrides"] if overridden(source) else []),
        source.name, "--output-file", f"{source.stem}.lock",
    ]  # fmt: skip


def read_versions(lock_file: Path) -> dict[str, str]:
    """Package -> version (several, when they differ by platform)."""
    versions: dict[str, str] = {}
    for name, version in re.findall(
        r"^([\w.-]+)==([^\s;\\]+)", lock_file.read_text() if lock_file.exists() else "", re.M
    ):
        versions[name] = f"{versions[name]}, {version}" if versions.get(name, version) != version else version
    return versions


# What is laid over the base


def lock_job(source: Path, *more: Path) -> Path:
    """The lock of a project's requirements.txt, made at its first build and kept beside it until the file changes.

    A file that has hashes is its own lock. Raises ConfigError where a file cannot be read, EngineError where it cannot
    be resolved beside the base's torch.
    """
    try:
        text = source.read_text(encoding="utf-8")
        mark = _mark(source, *more)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", place=str(source), remedy="see gpu.jsonc") from None
    if "--hash=" in text and not more:
        return source
    target = source.with_suffix(".lock")
    before = target.read_text(encoding="utf-8") if target.exists() else ""
    if before and not before.startswith(f"# {source.name} sha256:"):
        remedy = "name a file with hashes as it is, or move this one away: Trainbox writes its own there"
        raise ConfigError("is another tool's lock, or has no hashes", place=str(target), remedy=remedy)
    if not before.startswith(mark):
        ui.say(f"{'locking' if not target.exists() else 'locking anew'} {source}: keep {target.name}")
        _compile_over_base(source, *more)
    return target


def _compile_over_base(source: Path, *more: Path) -> None:
    """Resolve, preferring the versions that the base has, and keep what it does not have in that very version."""
    target, base = source.with_suffix(".lock"), paths.REPO / "docker/base"
    with tempfile.TemporaryDirectory(prefix="trainbox-") as folder:
        staged = Path(folder, target.name)
        # uv keeps to the versions of the file that it is to write wherever they fit.
        staged.write_text("".join(f"{name}=={version}\n" for name, version in base_versions().items()))
        torch = base / "requirements-torch.lock"
        kept = Path(folder, torch.name)
        kept.write_text(_less(torch.read_text(encoding="utf-8"), overridden(source)), encoding="utf-8")
        argv = [*compile_argv(source, (kept,))[:-1], str(staged), *map(str, more)]
        try:
            shell.run(argv, cwd=source.parent)
        except EngineError as error:
            remedy = f"{error.remedy}\nthe base's torch stays as it is: loosen what asks for another"
            raise EngineError("cannot be resolved", place=str(source), remedy=remedy) from None
        shown, real = (os.path.relpath(file, source.parent) for file in (kept, torch))
        own = _without_base(staged.read_text(encoding="utf-8").replace(shown, real))
        staged.write_text(f"{_mark(source, *more)}; what the base image has is not here\n{own}", encoding="utf-8")
        shutil.copyfile(staged, target)


def overridden(source: Path) -> set[str]:
    """The packages that a requirements file has in another version than its packages, or the base, ask for."""
    file = source.with_suffix(".overrides")
    lines = file.read_text(encoding="utf-8") if file.exists() else ""
    return set(re.findall(r"^[\w.-]+", lines, re.M))


def _less(lock_text: str, names: set[str]) -> str:
    """A lock without these packages."""
    entries = re.split(r"(?m)^(?=[A-Za-z0-9])", lock_text)
    return "".join(entry for entry in entries if entry.partition("==")[0] not in names)


def _mark(source: Path, *more: Path) -> str:
    content = b"".join(file.read_bytes() for each in (source, *more) for file in _with_included(each))
    return f"# {source.name} sha256:{hashlib.sha256(content).hexdigest()}"


def _with_included(source: Path) -> Iterator[Path]:
    """A requirements file and those that its outcome depends on besides."""
    yield source
    for name in re.findall(r"(?m)^\s*(?:-[rc]|--requirement|--constraint)[ =]?\s*(\S+)", source.read_text("utf-8")):
        yield from _with_included(source.parent / name)
    if (file := source.with_suffix(".overrides")).exists():
        yield file


def _without_base(lock_text: str) -> str:
    entries = re.split(r"(?m)^(?=[A-Za-z0-9])", lock_text)
    known = {f"{name}=={version}" for name, version in base_versions().items()}
    return "".join(entry for entry in entries if entry.split(maxsplit=1)[:1] and entry.split()[0] not in known)


@functools.cache
def base_versions() -> dict[str, str]:
    """Package -> version in the base image."""
    from packaging.markers import Marker

    here = {"python_version": image.PYTHON, "python_full_version": f"{image.PYTHON}.0"}
    here |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    here |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    lines = (paths.REPO / "docker/base/requirements.lock").read_text(encoding="utf-8")
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)(?: ; ([^\\\n]+))?", lines, re.M)
    return {name: version for name, version, marker in found if not marker or Marker(marker).evaluate(here)}


def _is_job(source: Path) -> bool:
    """Whether a requirements file is for /opt/job."""
    return source.suffix == ".txt" or source.name == "job.in"


def _refresh(source: Path, constraints: tuple[Path, ...]) -> list[str]:
    target = source.with_suffix(".lock")
    before = read_versions(target)
    if _is_job(source):
        _compile_over_base(source)
    else:
        shell.run(compile_argv(source, constraints), cwd=source.parent)
    after = read_versions(target)
    name = target.relative_to(paths.REPO)
    changed = sorted(package for package in before | after if before.get(package) != after.get(package))
    return [
        f"{name}: {package} {before.get(package, '(new)')} -> {after.get(package, '(gone)')}" for package in changed
    ]


def _refresh_pin(docker: Docker) -> list[str]:
    before = image.read_pins()["root"]
    after = image.pin_root(docker)
    if after is None:
        ui.warn("no image registry is reachable: the root image's digest stays as it is")
    return (
        [f"docker/pins.json: {before['image']} {before['digest'] or '(new)'} -> {after}"]
        if after not in (None, before["digest"])
        else []
    )
