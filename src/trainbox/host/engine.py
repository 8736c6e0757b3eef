"""The engines that run a box: Docker (or Podman behind its socket), or this machine itself."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainbox.errors import ConfigError, EngineError, HardwareError
from trainbox.host import daemon, shell, ui
from trainbox.host.box import KILLED, Box, Finished, Mount
from trainbox.host.environment import Environment
from trainbox.host.image import NONE, ImageFacts
from trainbox.host.image import ensure as ensure_image
from trainbox.host.local import Local

__all__ = ["Box", "Docker", "Finished", "Local", "Mount", "pick", "start"]

PATIENCE = 600
"""Seconds that an engine may take to answer: its disk may be busy with gigabytes of another image."""
DOCKER_FAILED = 125
"""Exit code of `docker run` when it, not the command in the container, is at fault."""


def pick(wanted: str = "auto") -> Docker | Local:
    """The engine to use: `docker`, `local`, or `auto`: Docker where it runs or can be made to, else local."""
    if wanted not in ("auto", "docker", "local"):
        raise ConfigError(f"{wanted!r} is none of auto, docker, local", place="ENGINE")
    if wanted == "local":
        return _local("ENGINE=local")
    client, fault = connect()
    if client is None and not daemon.elsewhere() and daemon.can_start():
        daemon.start()
        client, fault = connect()
    if client is not None:
        return Docker(client)
    if wanted == "docker" or daemon.elsewhere():
        raise EngineError(
            fault,
            place="docker",
            remedy="start it, or as root on Debian or Ubuntu: make engine\nor train without a container: ENGINE=local",
        )
    return _local(fault)


def pick_dry(wanted: str = "auto") -> Docker | Local:
    """The engine that `pick` would use if nothing had to be installed or started for it."""
    client, _ = connect() if wanted != "local" else (None, "")
    return Docker(client) if client is not None else Local()


def start() -> None:
    """Install and start a container engine, unless one answers already (`make engine`)."""
    client, fault = connect()
    if client is None:
        daemon.check_can_start(fault)
        daemon.start()
        client, fault = connect()
    if client is None:
        raise EngineError(fault, place="docker")
    facts = Docker(client).facts
    ui.say(f"engine: {facts['engine']} {facts['version']} answers")


def connect() -> tuple[Any, str]:
    """A client of the engine that DOCKER_HOST or the current docker context names; or None and why not."""
    import docker
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    address = daemon.address()
    try:
        client = docker.DockerClient(base_url=address, timeout=60) if address else docker.from_env(timeout=60)
        client.ping()
        client.api.timeout = PATIENCE
    except (DockerException, RequestException) as error:
        where = address or os.environ.get("DOCKER_HOST") or "the default socket"
        denied = "PermissionError" in str(error) or "Permission denied" in str(error)
        return None, f"no container engine answers at {where}" + (
            ": this user may not use it (on Debian: sudo adduser $USER docker, then log in again)" if denied else ""
        )
    return client, ""


SCRATCH = "/tmp:rw,exec,nosuid,nodev,mode=1777"  # noqa: S108
"""The one place of a box's root that can be written: memory."""
PIDS = 4096
"""Processes and threads that a box may have."""


def sandbox_flags(box: Box, user: str, network: str) -> list[str]:
    """What of `docker run` seals a box, on any machine; an empty `network` is the engine's own."""
    # Memory with swap: left out, Docker allows as much swap again.
    memory = ["--memory", box.memory, "--memory-swap", box.memory] if box.memory else []
    return [
        "--user", user, *(["--network", network] if network else []),
        "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
        "--read-only", "--tmpfs", SCRATCH, "--shm-size", box.shm_size,
        "--pids-limit", str(PIDS), *memory, *(["--cpus", f"{box.cpus:g}"] if box.cpus else []),
    ]  # fmt: skip


class Docker:
    """A Docker engine, or Podman through its Docker socket."""

    name = "docker"

    def __init__(self, client: Any) -> None:
        self.client = client

    def ensure(self, recipe: str, own: Environment = NONE) -> ImageFacts:
        """The recipe's image with what the project has of its own, looked up or built."""
        return ensure_image(recipe, self, own)

    def argv(self, box: Box, scratch: Path | None = None) -> list[str]:
        """The whole `docker run` line; `scratch` is the run's private folder (see `_scratch`), absent in a dry run."""
        return [
            "docker", "run", "--label", "org.trainbox=run",
            *(["--cidfile", f"{scratch}/id"] if scratch else []), *_terminal_flags(box),
            *self._sandbox_flags(box), *(["--gpus", box.gpus] if box.gpus else []),
            *[part for mount in box.mounts for part in ("--mount", bind(mount))],
            *[part for name, value in sorted(box.env.items()) for part in ("--env", f"{name}={value}")],
            *(["--env-file", f"{scratch or ''}/secrets"] if box.secrets else []),
            box.image, *box.command,
        ]  # fmt: skip

    def run(self, box: Box, on_line: Callable[[str], None] = ui.say) -> Finished:
        """Run the box to its end and remove its container; signals to this process reach it."""
        from docker.errors import APIError

        # What a killed host process left behind; a container of today may be another process's, about to be read.
        with contextlib.suppress(APIError):  # the engine does this for one caller at a time
            self.client.api.prune_containers({"label": "org.trainbox=run", "until": "24h"})
        last: deque[str] = deque(maxlen=15)
        with _scratch(box) as scratch:
            argv = self.argv(box, scratch)
            try:
                code = shell.attach(argv) if box.interactive else shell.stream(argv, _also(last, on_line))
                return self._finish(_container_id(scratch), code, list(last))
            finally:
                self._remove(_container_id(scratch))

    def inspect(self, image: str) -> dict[str, Any] | None:
        """What the engine knows of an image (one call), or None."""
        from docker.errors import NotFound

        with contextlib.suppress(NotFound):
            found: dict[str, Any] = self.client.api.inspect_image(image)
            return found
        return None

    def registry_digest(self, image: str) -> str | None:
        """The digest that the registry has for an image, or None where no registry is reachable."""
        from docker.errors import DockerException
        from requests.exceptions import RequestException

        with contextlib.suppress(DockerException, RequestException):
            return str(self.client.api.inspect_distribution(image)["Descriptor"]["digest"])
        return None

    @functools.cached_property
    def builder(self) -> list[str]:
        """The first client on PATH that can build with BuildKit against this engine, whatever its version."""
        tried = [[client] for client in _on_path("docker")]
        for client in tried:
            if self._can_build(client):
                return client
        raise EngineError(
            "no client here can build with BuildKit against this engine",
            place="docker build",
            remedy=f"tried: {', '.join(client[0] for client in tried) or 'none is on PATH'}\n"
            "install the buildx plugin (docker-buildx-plugin, or Debian's docker-buildx or docker.io)",
        )

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        """The engine and its version, for the record."""
        version = self.client.version()
        engine = next((part["Name"] for part in version.get("Components") or []), "Engine")
        return {
            "engine": "Docker" if engine == "Engine" else engine,
            "version": version["Version"],
            "api": version["ApiVersion"],
        }

    @functools.cached_property
    def _security(self) -> set[str]:
        options = self.client.info().get("SecurityOptions") or []
        return {part.removeprefix("name=") for option in options for part in option.split(",")}

    def _sandbox_flags(self, box: Box) -> list[str]:
        # A rootless engine maps its uid 0 to the caller; any other uid would own nothing here.
        user = "0:0" if "rootless" in self._security else f"{os.getuid()}:{os.getgid()}"
        return [
            # An init: signals reach the command even before it handles them. (Podman has one only where installed.)
            *(["--init"] if self.facts["engine"] == "Docker" else []),
            *sandbox_flags(box, user, "" if box.network else "none"),
            # SELinux would deny bind mounts that carry no container label, and relabelling the user's data is worse.
            *(["--security-opt", "label=disable"] if "selinux" in self._security else []),
        ]

    def _can_build(self, client: list[str]) -> bool:
        from docker.errors import DockerException

        tag = "trainbox/probe"
        argv = [*client, "build", "--tag", tag, "-"]
        dockerfile = "FROM scratch\nLABEL org.trainbox=probe\n"
        done = shell.run(argv, check=False, env={"DOCKER_BUILDKIT": "1"}, stdin=dockerfile, timeout=PATIENCE)
        if done.returncode == 0:
            with contextlib.suppress(DockerException):  # another process's probe has the same name
                self.client.api.remove_image(tag, force=True)
        return done.returncode == 0

    def _finish(self, container: str, code: int, last: list[str]) -> Finished:
        """Ask the engine, not its client, how it ended: only the engine knows of an out-of-memory kill."""
        state = self._state(container, wait=code != DOCKER_FAILED)
        if state["Status"] != "created":
            return Finished(state["ExitCode"], bool(state.get("OOMKilled")))
        if code > 128:  # a signal, before the container started
            return Finished(code, False)
        raise _start_failed(last)

    def _state(self, container: str, *, wait: bool) -> dict[str, Any]:
        """The container's state once it has ended; `created` when it never came to be."""
        if not container:
            return {"Status": "created"}
        if wait and self.client.api.inspect_container(container)["State"]["Status"] != "created":
            self.client.api.wait(container, timeout=None)
        late = time.monotonic() + 1
        while True:
            found = self.client.api.inspect_container(container)
            state: dict[str, Any] = found["State"]
            # The engine may hear of the end before it hears that it was for want of memory.
            limited = bool(found["HostConfig"]["Memory"]) and state["ExitCode"] == KILLED
            if not limited or state.get("OOMKilled") or time.monotonic() > late:
                return state
            time.sleep(0.1)

    def _remove(self, container: str) -> None:
        from docker.errors import DockerException

        if container:
            with contextlib.suppress(DockerException):
                self.client.api.remove_container(container, force=True, v=True)


def _local(why: str) -> Local:
    ui.warn(
        f"running without a container ({why}): the same locked packages, but no sandbox around the\n"
        "  training (it can reach the network and your files) and not the exact image"
    )
    return Local()


def _start_failed(last: list[str]) -> EngineError | HardwareError:
    text = shell.tail(last)
    if "could not select device driver" in text or "nvidia-container-cli" in text:
        return HardwareError(
            "the engine cannot hand GPUs to a container",
            place="docker run",
            remedy="install the NVIDIA Container Toolkit and restart the engine, or train on the CPU: "
            f"GPUS=none\n{text}",
        )
    return EngineError("the container could not be started", place="docker run", remedy=text)


def _terminal_flags(box: Box) -> list[str]:
    return [] if not box.interactive else ["--interactive", *(["--tty"] if sys.stdin.isatty() else [])]


def bind(mount: Mount) -> str:
    """A `--mount` value; it is read as CSV, so a path with a comma or a quote is quoted."""
    fields = [
        "type=bind",
        f"source={mount.source}",
        f"target={mount.target}",
        *(["readonly"] if mount.read_only else []),
    ]
    return ",".join('"' + f.replace('"', '""') + '"' if "," in f or '"' in f else f for f in fields)


@contextlib.contextmanager
def _scratch(box: Box) -> Iterator[Path]:
    """A folder of mode 0700, for as long as the run: the box's secrets go in, Docker writes the container's id."""
    with tempfile.TemporaryDirectory(prefix="trainbox-") as folder:
        secrets = Path(folder, "secrets")
        secrets.touch(mode=0o600)
        for name, value in box.secrets.items():
            if "\n" in value:
                raise ConfigError("its value has more than one line", place=name)
        secrets.write_text("".join(f"{name}={value}\n" for name, value in box.secrets.items()))
        yield Path(folder)


def _container_id(scratch: Path) -> str:
    file = scratch / "id"
    return file.read_text() if file.exists() else ""


def _also(last: deque[str], on_line: Callable[[str], None]) -> Callable[[str], None]:
    def take(line: str) -> None:
        last.append(line)
        on_line(line)

    return take


def _on_path(program: str) -> list[str]:
    folders = os.environ.get("PATH", "").split(os.pathsep)
    found = [Path(folder, program) for folder in folders if folder]
    return [str(path) for path in found if path.is_file() and os.access(path, os.X_OK)]
