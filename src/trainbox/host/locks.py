"""`make lock`: refresh every lock file and pin, and say what changed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

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
    yield base / "installer.in", ()
    yield base / "requirements-torch.in", ()
    yield base / "requirements.in", (base / "requirements-torch.lock",)
    for source in sorted((paths.REPO / "recipes").glob("*/requirements.in")):
        yield source, (base / "requirements.lock",)


def compile_argv(source: Path, constraints: tuple[Path, ...]) -> list[str]:
    """The whole `uv pip compile` line, run in the source's folder so that no path of this machine gets in."""
    return [
        str(Path(sys.executable).parent / "uv"), "pip", "compile", "--quiet", "--upgrade", "--universal",
        "--python-version", "3.11", "--generate-hashes", "--no-emit-index-url", "--no-header",
        *[part for file in constraints for part in ("--constraint", os.path.relpath(file, source.parent))],
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


def _refresh(source: Path, constraints: tuple[Path, ...]) -> list[str]:
    target = source.with_suffix(".lock")
    before = read_versions(target)
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
