"""What a person waits for around a training: the menu, a build, the box's first line."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from jobs import RECIPE, Figure, docker

from trainbox.host import image, paths


def harness(folder: Path, repeats: int) -> list[Figure]:
    """Each as typed, in a copy of the checkout; what its builds leave is removed."""
    repo = copy_of_checkout(folder)
    make = ["make", "--no-print-directory"]
    _call([*make, "build"], repo)
    listing = [
        _seconds(lambda: _call([".venv/bin/python", "-m", "invoke", "--list"], repo)) for _ in range(repeats * 3)
    ]
    unchanged = [_seconds(lambda: _call([*make, "build"], repo)) for _ in range(repeats)]
    first_lines = [first_line(repo, folder / f"output-{number}") for number in range(repeats + 1)][1:]
    edited = [after_edit(repo, number, [*make, "build"]) for number in range(repeats)]
    return [
        Figure("invoke --list", "s", listing, "<= 0.5"),
        Figure("make build, nothing changed", "s", unchanged, "<= 1.5"),
        Figure("make build, after a source edit", "s", edited, "<= 10"),
        Figure("make train to the box's first line", "s", first_lines, "<= 2"),
    ]


def cold_build(folder: Path, repeats: int) -> list[Figure]:
    """The base image from nothing: its root file system bootstrapped, every package downloaded, no layer cached."""
    docker().ensure(RECIPE)
    base = image.plan(RECIPE, next(root for root in image._known_roots() if docker().inspect(root)))[0]
    # A cache of packages under another name is an empty one, and makes every step another step.
    dockerfile = folder / "Dockerfile"
    cache = f"trainbox-bench-{os.getpid()}"
    dockerfile.write_text(base.files["Dockerfile"].read_text().replace("id=trainbox,", f"id={cache},"))
    cold = image.Build("bench-base", {**base.files, "Dockerfile": dockerfile}, base.args)
    before = _cached_steps()
    bootstrap = ["docker/rootfs/build", str(folder / "root.tar"), "docker/base/packages.txt"]
    root = _seconds(lambda: _call(bootstrap, paths.REPO))
    built = _seconds(lambda: image._build(cold, docker(), {}))
    docker().client.api.remove_image(cold.tag, force=True)
    kept: set[str] = set()
    while kept != (made := _cached_steps() - before):  # a step goes once those after it are gone
        kept = made
        for step in made:
            docker().client.api.prune_builds(filters={"id": step}, all=True)
    return [
        Figure("cold: root file system", "s", [root], ""),
        Figure("cold: base image", "s", [root + built], "<= 300"),
    ]


def _cached_steps() -> set[str]:
    return {record["ID"] for record in docker().client.df()["BuildCache"]}


def copy_of_checkout(folder: Path) -> Path:
    """The tracked files as they are now, with a copy of the virtual environment: `make` may make it anew."""
    repo = folder / "repo"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=paths.REPO, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(paths.REPO / name, repo / name)
    shutil.copytree(paths.REPO / ".venv", repo / ".venv", symlinks=True)
    os.utime(repo / ".venv" / ".ready")
    return repo


def after_edit(repo: Path, number: int, build: list[str]) -> float:
    """Seconds of a build after a comment was added to the box's source; its images are removed."""
    source = repo / "src/trainbox/container/text.py"
    before = source.read_text()
    source.write_text(f"{before}\n# {number} {time.time()}\n")
    try:
        return _seconds(lambda: _call(build, repo))
    finally:
        tags = subprocess.run([".venv/bin/python", "-c", TAGS], cwd=repo, capture_output=True, text=True, check=True)
        for tag in tags.stdout.split():
            docker().client.api.remove_image(tag, force=True)
        source.write_text(before)


TAGS = """
import sys; sys.path.insert(0, "src")
from trainbox.host import image, pipeline
print(*map(image.expected_tag, pipeline.recipe_names()))
"""


def first_line(repo: Path, output: Path) -> float:
    """Seconds from `make train` to the first line out of the box, which the log of the box has; then it is stopped."""
    log = output / "logs" / "train.log"
    started = time.monotonic()
    argv = ["make", "--no-print-directory", "train", "RECIPE=llm-qlora", "PROFILE=tiny", f"OUTPUT={output}"]
    process = subprocess.Popen(
        argv, cwd=repo, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not (log.exists() and log.stat().st_size):
        if process.poll() is not None:
            raise RuntimeError(f"{' '.join(argv)} ended before the box said anything")
        time.sleep(0.005)
    seconds = time.monotonic() - started
    os.killpg(process.pid, 15)
    process.wait()
    return seconds


def _call(argv: list[str], folder: Path) -> None:
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}\n{done.stdout}\n{done.stderr}")


def _seconds(work: Callable[[], None]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started
