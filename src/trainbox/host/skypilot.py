"""SkyPilot, which rents machines: a launch as its task, and its command `sky` in an environment of its own.

A run without OUTPUTS= is a job on a cluster: one machine (or several), kept until its outputs are here and checked,
and stopped or taken down by SkyPilot once it has been idle for keep_alive_minutes. With OUTPUTS= a bucket or a volume
is /output, so the run outlives its machine: it is a managed job, started again on another one after a preemption and
after exit code 75. That is all the difference; the image, its entrypoint and spec.json are those of every other run.

Into its container SkyPilot comes by ssh, as root, past ENTRYPOINT and ENV, and starts `run` on each node in a shell
whose PATH begins with a Python of its own: so `run` says the image's variables, links what was uploaded to where the
box has it, and calls the entrypoint, which gives up root by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainbox.errors import INTERRUPTED, ConfigError, EngineError
from trainbox.host import image, paths, shell, ui
from trainbox.host.box import Mount
from trainbox.host.launch import Export, Launch, Started, State
from trainbox.host.local import UV, locked
from trainbox.host.secrets import secret
from trainbox.spec import record
from trainbox.spec.load import nearest
from trainbox.spec.run import BOX_OUTPUT

FILE = "sky.yaml"
UPLOADED = "/tmp/trainbox"  # noqa: S108
"""Where uploads go, each below its path in the box: whoever trains can read it, unlike root's home."""
DOCKER_LOGIN = ("SKYPILOT_DOCKER_USERNAME", "SKYPILOT_DOCKER_PASSWORD", "SKYPILOT_DOCKER_SERVER")
"""SkyPilot's variables for a private registry: secrets, taken from the environment where all are set."""

BUCKET = "/mnt/bucket"
"""Where a whole bucket is; SkyPilot mounts no part of one in a way that can be written at random and cached."""

NOTICES = ("aws", "azure", "gcp")
"""Clouds that tell a spot machine, in ways that container/notices.py knows, before they take it back."""


@dataclass(frozen=True)
class Cloud:
    """What SkyPilot can do on a cloud."""

    stops: bool = True
    """Stop a machine and keep its disk; else it can only be taken down."""
    idles: bool = True
    """Do so by itself when it is idle."""
    spot: bool = True
    nodes: bool = True
    """Several of them in one run."""
    buckets: bool = True
    """As /output."""


CLOUDS = {
    "aws": Cloud(),
    "azure": Cloud(),
    "do": Cloud(spot=False),
    "fluidstack": Cloud(stops=False, spot=False),
    "gcp": Cloud(),
    "kubernetes": Cloud(stops=False, spot=False),
    "lambda": Cloud(stops=False, spot=False),
    "mithril": Cloud(),
    "nebius": Cloud(),
    "paperspace": Cloud(spot=False),
    "runpod": Cloud(stops=False, nodes=False, buckets=False),
    "seeweb": Cloud(spot=False, nodes=False, buckets=False),
    "slurm": Cloud(stops=False, idles=False, spot=False, buckets=False),
    "ssh": Cloud(stops=False, spot=False),
    "vast": Cloud(nodes=False, buckets=False),
    "yotta": Cloud(stops=False, idles=False, spot=False, nodes=False, buckets=False),
}
"""Those of SkyPilot 0.14 that run a container image; a test compares this with its own table."""

BUCKETS = {
    "s3": ["aws", "s3", "sync", "--no-progress"],
    "gs": ["gcloud", "storage", "rsync", "--recursive"],
}
"""How a bucket comes down, by its scheme."""


REGION = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""With a zone, where one is named."""
BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
"""What S3 and Google's storage allow both, but for Google's long names with dots."""
VOLUME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


def check(launch: Launch) -> None:
    """Raise ConfigError for what the launch's cloud cannot do."""
    name = launch.cloud
    if name not in CLOUDS:
        remedy = "\n".join(filter(None, [nearest(name, list(CLOUDS)), f"clouds: {', '.join(CLOUDS)}"]))
        raise ConfigError(f"there is no cloud {name!r}", place="CLOUD", remedy=remedy)
    cloud = CLOUDS[name]
    if launch.region and not REGION.fullmatch(launch.region):
        raise ConfigError(f"{launch.region!r} is no region", place="CLOUD", remedy=f"e.g. {name}/us-east-1, or {name}")
    if launch.spot and not cloud.spot:
        raise ConfigError(
            f"{name} has no spot machines", place="SPOT", remedy="leave SPOT=1 out, or name another CLOUD"
        )
    if launch.nodes > 1 and not cloud.nodes:
        remedy = 'distributed.nodes=1 with more GPUs (GPU="4x ..."), or name another CLOUD'
        raise ConfigError(f"{name} has no several nodes in one run", place="distributed.nodes", remedy=remedy)
    if launch.outputs:
        _check_outputs(launch.outputs, name, cloud)


def _check_outputs(outputs: str, name: str, cloud: Cloud) -> None:
    scheme, found, path = outputs.partition("://")
    if found and scheme not in BUCKETS:
        remedy = f"name a bucket ({', '.join(f'{each}://' for each in BUCKETS)}) or a SkyPilot volume"
        raise ConfigError(f"{outputs!r} is no bucket that can be fetched from", place="OUTPUTS", remedy=remedy)
    wanted, own = (BUCKET_NAME, path.partition("/")[0]) if found else (VOLUME, scheme)
    if not wanted.fullmatch(own):
        kind, example = ("bucket", "s3://my-bucket/folder") if found else ("volume", "my-volume")
        raise ConfigError(f"{own!r} is no {kind}'s name", place="OUTPUTS", remedy=f"e.g. OUTPUTS={example}")
    if found and not cloud.buckets:
        remedy = "name a volume (`sky volumes apply` makes one), or leave OUTPUTS out"
        raise ConfigError(f"{name} mounts no buckets", place="OUTPUTS", remedy=remedy)
    if not found and name not in ("kubernetes", "runpod"):
        remedy = "name a bucket: OUTPUTS=s3://..., or leave OUTPUTS out"
        raise ConfigError(f"{name} has no SkyPilot volumes", place="OUTPUTS", remedy=remedy)


# The task


def export(launch: Launch) -> Export:
    """The launch as SkyPilot's task file."""
    command = shlex.join(["sky", *_launching(launch, launch.output / FILE)])
    return Export(f"# {command}\n{_yaml(task(launch))}", tuple(_dropped(launch)))


def _launching(launch: Launch, file: Path) -> list[str]:
    """The arguments of `sky` that start it: a managed job where its outputs outlive the machine."""
    verb = ["jobs", "launch", "--name"] if launch.outputs else ["launch", "--cluster"]
    return [*verb, launch.name, "--yes", "--detach-run", *_flags((*launch.box.secrets, *_logins())), str(file)]


def _dropped(launch: Launch) -> Iterator[str]:
    yield "box: read-only root, dropped capabilities and no network: SkyPilot starts the container, with its own flags"
    if launch.box.memory or launch.box.cpus:
        yield "limits.memory, limits.cpus: the machine's own; they choose one without a GPU"
    if launch.keep_alive_minutes and (launch.outputs or not CLOUDS[launch.cloud].idles):
        why = "a managed job lets its machine go at its end" if launch.outputs else f"{launch.cloud} cannot"
        yield f"keep_alive_minutes: {why}"
    if _taken_down(launch):
        minutes = launch.keep_alive_minutes
        yield f"outputs: go with the machine, taken down after {minutes} idle minutes: fetch before, or name OUTPUTS="
    if any(_needs_copy(mount, launch) for mount in launch.inputs if mount.source.exists()):
        yield "data: by hand, `sky` leaves out links and what a .gitignore names; make launch does not"
    if launch.max_price and launch.cloud in ("kubernetes", "slurm", "ssh"):
        yield f"max_price: {launch.cloud} has no prices"


def _yaml(tree: Mapping[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Scripts as blocks of lines."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def task(launch: Launch) -> dict[str, Any]:
    """The launch as SkyPilot's task, secrets by name alone."""
    scheme = "://" in launch.outputs
    names = [*launch.box.secrets, *_logins()]
    uploads = {f"{UPLOADED}{mount.target}": str(mount.source) for mount in launch.inputs}
    bucket = {"source": "/".join(launch.outputs.split("/")[:3]), "mode": "MOUNT_CACHED"}
    tree = {
        "name": launch.name,
        "resources": _resources(launch),
        "num_nodes": launch.nodes,
        "config": {"docker": {"run_options": [f"--shm-size={launch.box.shm_size}"]}},
        "envs": dict(sorted({**launch.box.env, **_notice(launch)}.items())),
        "secrets": dict.fromkeys(names),
        "volumes": {BOX_OUTPUT: launch.outputs} if launch.outputs and not scheme else {},
        "file_mounts": {
            f"{UPLOADED}/spec.json": str(launch.output / "spec.json"),
            **uploads,
            **({BUCKET: bucket} if scheme else {}),
        },
        "run": run(launch),
    }
    return {name: value for name, value in tree.items() if value not in ({}, [])}


def _logins() -> tuple[str, ...]:
    return DOCKER_LOGIN if all(map(os.environ.get, DOCKER_LOGIN)) else ()


def _flags(names: Iterable[str]) -> list[str]:
    """That the secrets of these names are sent."""
    return [part for name in names for part in ("--secret", name)]


def _notice(launch: Launch) -> dict[str, str]:
    """Where the image hears that its machine is taken back. SkyPilot's own containers are in the machine's network."""
    return {"TRAINBOX_NOTICE": launch.cloud} if launch.spot and launch.cloud in NOTICES else {}


def _resources(launch: Launch) -> dict[str, Any]:
    cloud = CLOUDS[launch.cloud]
    tree: dict[str, Any] = {
        "infra": f"{launch.cloud}/{launch.region}" if launch.region else launch.cloud,
        "image_id": f"docker:{launch.box.image}",
        "disk_size": launch.disk_gb,
        **({"use_spot": True} if launch.spot else {}),
        # SkyPilot's is of one machine.
        **({"max_hourly_cost": round(launch.max_price / launch.nodes, 4)} if launch.max_price else {}),
    }
    if launch.outputs:
        tree["job_recovery"] = {"recover_on_exit_codes": [INTERRUPTED]}
    elif launch.keep_alive_minutes and cloud.idles:
        tree["autostop"] = {"idle_minutes": launch.keep_alive_minutes, "down": _taken_down(launch)}
    return tree | _machine(launch)


def _taken_down(launch: Launch) -> bool:
    """Whether its machine goes, with its disk, once it is idle. A spot machine is nowhere stopped."""
    cloud = CLOUDS[launch.cloud]
    idle = bool(launch.keep_alive_minutes) and cloud.idles and not launch.outputs
    return idle and (launch.spot or not cloud.stops)


def _machine(launch: Launch) -> dict[str, Any]:
    """GPUs that would do, the preferred one first; without any, a machine as large as the recipe's limits."""
    choices = [f"{name}:{count}" for gpu, count in launch.choices for name in gpu.skypilot]
    if len(choices) == 1:
        return {"accelerators": choices[0]}
    if choices:
        return {"ordered": [{"accelerators": each} for each in dict.fromkeys(choices)]}
    memory = launch.box.memory
    return {
        "cpus": f"{launch.box.cpus or 2:g}+",
        **({"memory": f"{_gb(memory):g}+"} if memory else {}),
    }


def _gb(memory: str) -> float:
    """Docker's `8g` in GB."""
    factor = {"k": 2**-20, "m": 2**-10, "g": 1.0, "b": 2**-30}
    return float(memory[:-1]) * factor[memory[-1].lower()] if memory[-1].isalpha() else float(memory) / 2**30


def run(launch: Launch) -> str:
    """What each node does. Bash; SkyPilot adds lines of its own, so nothing here may end the shell."""
    links = [f"place {shlex.quote(mount.target)}" for mount in launch.inputs]
    return "\n".join(
        [
            "(",
            "set -e",
            *(f"export {name}={shlex.quote(value)}" for name, value in image.variables().items()),
            *([] if "OMP_NUM_THREADS" in launch.box.env else ["unset OMP_NUM_THREADS  # Ray's 1"]),
            "export NNODES=$SKYPILOT_NUM_NODES NODE_RANK=$SKYPILOT_NODE_RANK MASTER_PORT=29500",
            'export MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n1)',
            "# What was uploaded, where the box has it.",
            f"chmod -R a+rX {UPLOADED}",
            "place() {",
            '  mkdir -p "$(dirname "$1")"; if [ -d "$1" ] && [ ! -L "$1" ]; then rmdir "$1"; fi',
            f'  ln -sfn "{UPLOADED}$1" "$1"',
            "}",
            *links,
            *_in_bucket(launch),
            *_keep(launch),
            "# A bucket or volume may hold this run already: then it goes on. Another one's is left alone.",
            f"mark={BOX_OUTPUT}/.launch",
            f'if [ "$(cat $mark 2>/dev/null || echo {launch.name})" != {launch.name} ]; then',
            f'  echo "error: {BOX_OUTPUT} holds another run, $(cat $mark): give this one an OUTPUTS= of its own"',
            "  exit 2",
            "fi",
            f"if [ ! -e {BOX_OUTPUT}/spec.json ]; then",
            f"  cp {UPLOADED}/spec.json {BOX_OUTPUT}/spec.json; echo {launch.name} > $mark",
            f"  chown --reference={BOX_OUTPUT} {BOX_OUTPUT}/spec.json $mark 2>/dev/null || true",
            "fi",
            f"cd {BOX_OUTPUT}",
            f"exec python -m trainbox.container {shlex.join(launch.box.command)}",
            ")",
        ]
    )


def _in_bucket(launch: Launch) -> Iterator[str]:
    """The run's own folder of a bucket as /output."""
    if "://" in launch.outputs:
        prefix = [part for part in launch.outputs.split("/")[3:] if part]
        kept = shlex.quote("/".join([BUCKET, *prefix, launch.name]))
        yield f"mkdir -p {kept}; [ -L {BOX_OUTPUT} ] || rmdir {BOX_OUTPUT}; ln -sfn {kept} {BOX_OUTPUT}"


def _keep(launch: Launch) -> Iterator[str]:
    """A job's own folders as parts of /output, which is what comes back."""
    for mount in launch.box.mounts:
        if not mount.read_only and mount.target != BOX_OUTPUT:
            kept = shlex.quote(f"{BOX_OUTPUT}/{mount.source.relative_to(launch.output)}")
            shown = shlex.quote(mount.target)
            yield f"mkdir -p {kept} $(dirname {shown}); ln -sfn {kept} {shown}"
            yield f"chown --reference={BOX_OUTPUT} {BOX_OUTPUT}/outputs {kept} 2>/dev/null || true"


# The command


def folder() -> Path:
    """The environment of SkyPilot's own: `.venv-cloud` in the checkout."""
    return paths.REPO / ".venv-cloud"


def ensure() -> Path:
    """The environment from requirements-cloud.lock, made where it is absent or of an older lock."""
    venv, lock = folder(), paths.REPO / "requirements-cloud.lock"
    with locked(venv):
        ready = venv / ".ready"
        if not ready.exists() or ready.read_text(encoding="utf-8") != lock.read_text(encoding="utf-8"):
            shutil.rmtree(venv, ignore_errors=True)
            shell.run([*UV, "venv", "--quiet", "--seed", "--python", sys.executable, str(venv)])
            argv = [*UV, "pip", "sync", "--require-hashes", "--python", str(venv / "bin/python"), str(lock)]
            shell.show("making .venv-cloud from requirements-cloud.lock: SkyPilot, half a GB (once)", argv)
            ready.write_text(lock.read_text(encoding="utf-8"), encoding="utf-8")
    return venv


def _program(name: str) -> str:
    """The person's own `sky`, `aws`..., with the providers that they installed; else that of .venv-cloud, made now."""
    return shutil.which(name) or str(ensure() / "bin" / name)


def _environment() -> dict[str, str]:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(folder() / "bin")])
    return {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PATH": path}


def _ask(*argv: str) -> shell.Result:
    """Run `sky` and return what it says."""
    return shell.run([_program("sky"), *argv], check=False, env=_environment())


def _do(*argv: str, env: Mapping[str, str] | None = None) -> int:
    """Run `sky` on this terminal and return its exit code."""
    return shell.attach([_program("sky"), *argv], env={**_environment(), **(env or {})})


def _answer(*argv: str) -> Any:
    """The JSON that `sky` answers. Raises EngineError where it fails or says none: then nothing is known of a run."""
    done = _ask(*argv)
    found = _json(_plain(done.stdout))
    if done.returncode or found is None:
        said = shell.tail(_plain(f"{done.stdout}\n{done.stderr}").splitlines())
        remedy = f"{said}\nhow its server is: sky api status (sky is in {folder().name}/bin); then again"
        raise EngineError(f"has no answer (exit code {done.returncode})", place=f"sky {argv[0]}", remedy=remedy)
    return found


def _json(text: str) -> Any:
    """The JSON at the end of what `sky` says, below lines about its server."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line[:1] in "[{":
            with contextlib.suppress(ValueError):
                return json.loads("\n".join(lines[number:]))
    return None


def access(launch: Launch) -> None:
    """Raise ConfigError in SkyPilot's own words where it may not use the cloud."""
    cloud = launch.cloud
    enabled = _json(_ask("check", cloud, "--output", "json").stdout)
    if f'"{cloud}"' in json.dumps(enabled).lower():
        return
    said = [line.strip() for line in _plain(_ask("check", cloud).stdout).splitlines()]
    reasons = [
        line for line in said if line and not line.startswith(("Checking", "🎉", "Using", "To enable", "If any"))
    ]
    extra = f'packages of a cloud: {folder().name}/bin/python -m pip install "skypilot[{cloud}]"'
    remedy = "\n".join([*reasons, extra, f"then: sky check {cloud} (sky is in {folder().name}/bin)"])
    raise ConfigError(f"SkyPilot has no access to {cloud}", place="CLOUD", remedy=remedy)


def _plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# A launched run


def start(launch: Launch, file: Path) -> Started:
    """Rent the machines and submit the run; returns once it is queued there. Raises EngineError where it is not."""
    values = {name: secret(name) or "" for name in launch.box.secrets}
    with _uploads(launch, file) as ready:
        code = _do(*_launching(launch, ready), env=values)
    if code:
        remedy = "SkyPilot says why above; it may rent a machine all the same: make status\nend it: make stop FORCE=1"
        raise EngineError(f"was not launched (exit code {code})", place=launch.name, remedy=remedy)
    return {"name": launch.name, "cloud": launch.cloud, "outputs": launch.outputs}


@contextlib.contextmanager
def _uploads(launch: Launch, file: Path) -> Iterator[Path]:
    """The task file with every upload as plain files: SkyPilot skips links, and what a .gitignore names."""
    aside = launch.output / ".upload"
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        for number, mount in enumerate(launch.inputs):
            if _needs_copy(mount, launch):
                copy = aside / str(number)
                shutil.copytree(mount.source, copy, symlinks=False, copy_function=_link)
                (copy / ".skyignore").touch()
                tree["file_mounts"][f"{UPLOADED}{mount.target}"] = str(copy)
        aside.mkdir(exist_ok=True)
        (aside / FILE).write_text(_yaml(tree), encoding="utf-8")
        yield aside / FILE
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _needs_copy(mount: Mount, launch: Launch) -> bool:
    """Whether a folder holds what SkyPilot would leave out; a managed job's, what a .gitignore above it names, too."""
    names = (".gitignore", ".skyignore")
    return mount.source.is_dir() and (
        bool(launch.outputs) or any(path.is_symlink() or path.name in names for path in mount.source.rglob("*"))
    )


def _link(source: str, target: str) -> str:
    """A second name for a file where the disk allows it, else a copy."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _state(started: Started) -> str:
    """The run's state in SkyPilot's words, as `RUNNING`; `STOPPED` of its machine; empty where it knows neither."""
    if started["outputs"]:
        jobs = _answer("jobs", "queue", "--all", "--refresh", "--output", "json")  # of a stopped controller, too
        return next((str(job["status"]) for job in jobs if job.get("job_name") == started["name"]), "")
    clusters = _answer("status", str(started["name"]), "--output", "json")
    cluster = next((str(each["status"]) for each in clusters if each.get("name") == started["name"]), "")
    if cluster != "UP":
        return cluster
    said = _plain(_ask("logs", str(started["name"]), "--status").stdout)
    return next((line.rpartition(": ")[2] for line in said.splitlines() if line.startswith("Job ")), "UP")


OVER = ("SUCCEEDED", "FAILED", "FAILED_SETUP", "FAILED_DRIVER", "FAILED_PRECHECKS", "FAILED_NO_RESOURCE",
        "FAILED_CONTROLLER", "CANCELLED", "STOPPED")  # fmt: skip
"""States in which nothing runs any more."""


def state(started: Started, output: Path) -> State:
    """Whether something of the run goes on."""
    found = _state(started)
    return "gone" if not found else "over" if found in OVER else "going"


def status(started: Started, output: Path) -> str:
    """One line: how the run is, and its machine."""
    found = _state(started)
    if not found:
        return f"{started['name']}: SkyPilot knows of no such {'job' if started['outputs'] else 'machine'} any more"
    return f"{started['name']}: {found} on {started['cloud']}"


WORKING = ("PENDING", "SETTING_UP", "RUNNING", "UP")
"""States of a machine's job that can be cancelled; UP: its state is not known."""

IDLE = "15"
"""Minutes after which a machine that was started to give its outputs is stopped again."""

STOPPED_READING = 130
"""Exit code after Ctrl-C, which ends what is shown, not the run."""


def logs(started: Started, output: Path) -> None:
    """Print what the run says, to its end."""
    name = str(started["name"])
    verb = ["jobs", "logs", "--name", name] if started["outputs"] else ["logs", name]
    code = _do(*verb)
    if code not in (0, STOPPED_READING):
        raise EngineError(f"ended with exit code {code}", place=name, remedy="make fetch brings what it left")


def stop(started: Started, output: Path) -> None:
    """End the run: its processes get SIGTERM and half a minute to save; what goes to a bucket is waited for."""
    name = str(started["name"])
    if started["outputs"]:
        if state(started, output) == "going":
            _require(_do("jobs", "cancel", "--name", name, "--yes", "--graceful"), name)
            _wait_for_end(started, output)
    elif _state(started) in WORKING:
        _require(_do("cancel", name, "--all", "--yes"), name)
        _wait_for_record(name)


def _require(code: int, name: str) -> None:
    if code:
        raise EngineError(f"sky ended with exit code {code}", place=name, remedy="what it says is above")


GRACE = 35
"""Seconds after which SkyPilot has killed what did not end."""
UPLOAD = 3600
"""Seconds that a managed job has to end, with its checkpoints sent to a bucket."""
POLL = 5


def _wait_for_record(name: str) -> None:
    """Until the run has said how it ended, or was killed."""
    end = time.monotonic() + GRACE
    said = f"test -e {BOX_OUTPUT}/{record.RESULT} && ! test -e {BOX_OUTPUT}/{record.BEGUN}"  # written first, gone last
    with ui.Progress("waiting for the run to save") as progress:
        while time.monotonic() < end:
            if shell.run(["ssh", name, said], check=False).returncode == 0:
                return
            progress.update()
            time.sleep(1)


def _wait_for_end(started: Started, output: Path) -> None:
    """Until a managed job is over, and all that it wrote is where it stays."""
    end = time.monotonic() + UPLOAD
    with ui.Progress("waiting for the run to save and its machine to go") as progress:
        while state(started, output) == "going":
            if time.monotonic() > end:
                fault = f"was asked to end, and still goes on after {UPLOAD // 60} minutes"
                raise EngineError(fault, place=str(started["name"]), remedy="look: make status; again: make stop")
            progress.update()
            time.sleep(POLL)


def fetch(started: Started, output: Path) -> None:
    """Bring /output into the run folder; what is here already is not sent again."""
    name = str(started["name"])
    if not started["outputs"]:
        found = _state(started)
        if not found:
            remedy = f"forget it: make stop FORCE=1 OUTPUT={output}; what was fetched before is there"
            raise EngineError("its machine is gone, with what was on it", place=name, remedy=remedy)
        if found == "STOPPED":
            ui.say(f"{name}: its machine was stopped when idle; it is started to give its outputs")
            # Without, it would never be stopped again.
            _require(_do("start", name, "--yes", "--idle-minutes-to-autostop", IDLE), name)
        _copy(name, output)
    elif "://" in (outputs := str(started["outputs"])):
        scheme = outputs.partition("://")[0]
        program, *flags = BUCKETS[scheme]
        argv = [_program(program), *flags, f"{outputs.rstrip('/')}/{name}", str(output)]
        if shell.attach(argv, env=_environment()):
            raise EngineError(
                "the bucket did not come down", place=outputs, remedy=f"again: make fetch OUTPUT={output}"
            )
    else:
        _from_volume(started, output)


def _copy(name: str, output: Path) -> None:
    """From the cluster's head, by the ssh name that `sky status` has written."""
    argv = ["rsync", "-rltz", "--partial", "--exclude=.launch", f"{name}:{BOX_OUTPUT}/", f"{output}/"]
    shell.show(f"fetching {BOX_OUTPUT} of {name}", argv)


def _from_volume(started: Started, output: Path) -> None:
    """A machine without a GPU mounts the volume for as long as it takes."""
    name = f"{started['name']}-fetch"
    tree = yaml.safe_load((output / FILE).read_text(encoding="utf-8"))
    kept = {key: tree["resources"][key] for key in ("infra", "image_id", "disk_size")}
    reader = {
        "name": name,
        "resources": {**kept, "cpus": "2+", "autostop": {"idle_minutes": 10, "down": True}},
        "secrets": dict.fromkeys(_logins()),
        "volumes": tree["volumes"],
    }
    file = output / f".{FILE}"
    file.write_text(_yaml(reader), encoding="utf-8")
    try:
        _require(_do("launch", "--cluster", name, "--yes", *_flags(_logins()), str(file)), name)
        _copy(name, output)
    finally:
        file.unlink()
        _do("down", name, "--yes")


def let_go(started: Started, output: Path) -> None:
    """Give the machines back; a managed job does so itself at its end, its bucket or volume stays."""
    name = str(started["name"])
    if started["outputs"]:
        if state(started, output) == "going":
            raise EngineError("goes on, and costs", place=name, remedy=f"end it: sky jobs cancel --name {name}")
    elif _state(started):
        _require(_do("down", name, "--yes"), name)
    else:
        ui.warn(f"{name}: SkyPilot knows of no such machine; if it was asked for one just now, see later: sky status")
