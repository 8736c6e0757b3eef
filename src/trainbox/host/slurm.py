"""A launch as a batch script of Slurm: one task on each node, which runs the image there in the sandbox."""

from __future__ import annotations

import contextlib
import math
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from trainbox.errors import ConfigError, EngineError
from trainbox.host import shell, ui
from trainbox.host.engine import bind, sandbox_flags
from trainbox.host.launch import GRACE_SECONDS, HOPELESS, RETRIES, Export, Form, Launch, Started, State, dropped
from trainbox.host.secrets import secret
from trainbox.spec import record
from trainbox.spec.run import BOX_MODEL

LOG = "slurm.log"
"""In the run folder: what the job says, over all its attempts."""
CODES = ".ended"
"""In the run folder, with a task's number behind it: the exit code of each task of an attempt."""
START_MINUTES = 15
"""Beyond the budget, which the run itself keeps: to pull the image and to save."""

WHY = {
    "gpu": "each cluster names its GPUs by itself: SBATCH_GRES=gpu:NAME:COUNT or SBATCH_CONSTRAINT=... at sbatch",
    "min_vram": "as for gpu",
    "max_price": "a cluster has no price by the hour",
    "spot": "a partition whose jobs may be preempted: SBATCH_PARTITION=... at sbatch",
    "disk_gb": "few clusters count it (--tmp)",
    "keep_alive_minutes": "the nodes are given back when the job ends",
    "region": "the cluster is where it is",
    "outputs": "the run folder is the cluster's, too",
    "others": "as for gpu",
}


def export(launch: Launch) -> Export:
    """The script. It wants Docker on the nodes, and the run folder and inputs there by the same paths as here."""
    lines = [
        "docker: needed on the nodes, for this user; Podman by DOCKER=podman; Apptainer and Pyxis are not written for",
        *dropped(launch, WHY),
    ]
    if launch.nodes > 1:
        lines.append("sandbox: several nodes talk over the host's own network (--network host)")
    return Export(SCRIPT.format(**_parts(launch)), tuple(lines))


# --kill-on-bad-exit=0: a node that sees another one die says so and saves what it can, by itself.
SCRIPT = """\
#!/bin/bash
# Submit with sbatch; SBATCH_PARTITION=, SBATCH_ACCOUNT= and the like are as Slurm knows them.
{options}

set -u
save() {{ scancel --signal=TERM "$SLURM_JOB_ID"; }} # to the containers, not to this script
again=yes
trap save TERM # the time limit comes: the job is requeued, and goes on from its checkpoint
trap 'again=; save' INT # invoke stop
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node have two
CODES={codes}
rm -f "$CODES"-*
export MASTER_ADDR MASTER_PORT CODES NNODES={nodes} DOCKER=${{DOCKER:-docker}}

node=$(cat <<'NODE'
name=trainbox-$SLURM_JOB_ID-$SLURM_PROCID
$DOCKER rm --force "$name" >/dev/null 2>&1 # of an attempt whose node was lost
trap : TERM # the container has it, too
$DOCKER run --rm --name "$name" \\
{docker}
code=$?
echo "$code" >"$CODES-$SLURM_PROCID"
exit "$code"
NODE
)
srun --kill-on-bad-exit=0 --wait={grace} bash -c "$node" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal ends the waiting, not the step
wait "$step"
code=$?
trap - TERM INT

# srun tells the highest code alone: of a node that fails before they meet, the others are killed.
hopeless() {{ cat "$CODES"-* 2>/dev/null | grep -qxE '{hopeless}'; }}
spent() {{ grep -q '"place": "budget\\.' {result} 2>/dev/null; }}
killed() {{ [ "$code" -gt 128 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {retries} ]; }}
if [ "$again" ] && ! hopeless && ! spent && {{ [ "$code" = 75 ] || killed; }}; then
    echo "ended with exit code $code: requeued, to go on from its newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
rm -f "$CODES"-*
exit "$code"
"""


def _parts(launch: Launch) -> dict[str, object]:
    return {
        "options": "\n".join(f"#SBATCH --{option}" for option in _options(launch)),
        "nodes": launch.nodes,
        "docker": "\n".join(f"    {line}{end}" for line, end in _continued(list(_docker(launch)))),
        "grace": GRACE_SECONDS,
        "retries": RETRIES,
        "codes": shlex.quote(str(launch.output / CODES)),
        "result": shlex.quote(str(launch.output / record.RESULT)),
        "hopeless": "|".join(map(str, HOPELESS)),
    }


def _options(launch: Launch) -> Iterator[str]:
    box = launch.box
    yield f"job-name={launch.name}"
    yield f"nodes={launch.nodes}"
    yield "ntasks-per-node=1"
    if launch.gpu_count:
        yield f"gres=gpu:{launch.gpu_count}"
    if box.cpus:
        yield f"cpus-per-task={math.ceil(box.cpus)}"
    if box.memory:
        yield f"mem={box.memory.upper().removesuffix('B')}"
    if launch.max_hours:
        yield f"time={math.ceil(launch.max_hours * 60) + START_MINUTES}"
    yield "requeue"
    yield f"signal=B:TERM@{GRACE_SECONDS}"
    yield 'output="{}"'.format(str(launch.output / LOG).replace("%", "%%"))
    yield "open-mode=append"


def _docker(launch: Launch) -> Iterator[str]:
    """The rest of `docker run`, a line for each thing, quoted for a shell."""
    box = launch.box
    network = "host" if launch.nodes > 1 else "" if box.network else "none"
    yield "--init --label org.trainbox=run"
    yield shlex.join(sandbox_flags(box, "USER", network)).replace("--user USER", '--user "$(id -u):$(id -g)"')
    if launch.gpu_count:
        yield """--gpus "\\"device=${SLURM_STEP_GPUS:-$SLURM_JOB_GPUS}\\"\""""
    for mount in box.mounts:
        yield shlex.join(["--mount", bind(mount)])
    if not any(mount.target == BOX_MODEL for mount in box.mounts):
        yield f"--mount type=volume,target={BOX_MODEL}"
    for name, value in sorted(box.env.items()):
        yield shlex.join(["--env", f"{name}={value}"])
    for name in sorted(box.secrets):
        yield f"--env {name}"
    if launch.nodes > 1:
        yield '--env NNODES --env NODE_RANK="$SLURM_PROCID" --env MASTER_ADDR --env MASTER_PORT'
    yield shlex.join([box.image, *box.command])


def _continued(lines: list[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, 1):
        yield line, "" if number == len(lines) else " \\"


# A job


def through_skypilot() -> bool:
    """Whether SkyPilot is to reach the cluster: it knows one, and sbatch is not here."""
    return not shutil.which("sbatch") and Path("~/.slurm/config").expanduser().is_file()


def access(launch: Launch) -> None:
    """Raise EngineError where no cluster is here or answers, ConfigError where it has too few nodes."""
    if not shutil.which("sbatch"):
        raise EngineError(
            "sbatch is not on PATH: this machine submits to no Slurm cluster",
            place="CLOUD=slurm",
            remedy="run it where sbatch is, or write the script (AS=slurm) and submit it there;\n"
            "SkyPilot is asked where ~/.slurm/config tells it of a cluster",
        )
    done = shell.run(["sinfo", "--noheader", "--format=%D"], check=False)
    if done.returncode:
        raise _silent("sinfo", done)
    nodes = sum(int(word) for word in done.stdout.split())
    if launch.nodes > nodes:
        fault = f"{launch.nodes} nodes are asked for, the cluster has {nodes}"
        raise ConfigError(fault, place="distributed.nodes", remedy="`sinfo` lists them")


def _silent(program: str, done: shell.Result) -> EngineError:
    said = shell.tail(done.stderr.splitlines()) or f"failed with exit code {done.returncode}"
    return EngineError(said, place=program, remedy="see that the cluster's slurmctld answers: scontrol ping")


def start(launch: Launch, script: Path) -> Started:
    """Submit it. Raises EngineError with what sbatch said."""
    secrets = {name: value for name in launch.box.secrets if (value := secret(name))}
    done = shell.run(["sbatch", "--parsable", str(script.absolute())], check=False, env=secrets)
    if done.returncode:
        raise EngineError(
            shell.tail(done.stderr.splitlines()).removeprefix("sbatch: error: "),
            place="sbatch",
            remedy=f"asked for: {', '.join(_options(launch))}\n"
            "`sinfo` shows what there is; SBATCH_PARTITION=, SBATCH_ACCOUNT=, SBATCH_TIMELIMIT= choose from it",
        )
    return {"name": launch.name, "job": done.stdout.strip().partition(";")[0]}


ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "GONE")


def status(started: Started, output: Path) -> str:
    """What Slurm says of the job; once it has forgotten it, what the run's record says."""
    state, more = _state(started)
    if state == "GONE":
        return f"job {started['job']}: ended; {record.read(output, missing_ok=True).get('status', 'never began')}"
    return f"job {started['job']}: {state.lower()}{more}"


def _state(started: Started) -> tuple[str, str]:
    argv = ["squeue", "--noheader", "--states=all", f"--jobs={started['job']}", "--format=%T|%M|%l|%R"]
    done = shell.run(argv, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise _silent("squeue", done)
    state, _, rest = (done.stdout.strip() or "GONE|").partition("|")
    used, limit, where = rest.split("|", 2) if rest else ("", "", "")
    return state, f" for {used} of {limit}, {where}" if state == "RUNNING" else f" {where}".rstrip()


def state(started: Started, output: Path) -> State:
    """Whether the job goes on."""
    if "job" not in started:
        return "gone"
    return "over" if _state(started)[0] in ENDED else "going"


def logs(started: Started, output: Path) -> None:
    """Print the job's log, as long as the job goes on."""
    printed = 0
    while True:
        over = _state(started)[0] in ENDED
        with contextlib.suppress(FileNotFoundError), (output / LOG).open(encoding="utf-8", errors="replace") as file:
            file.seek(printed)
            for line in file:
                ui.say(line.rstrip("\n"))
            printed = file.tell()
        if over:
            return
        time.sleep(2)


def stop(started: Started, output: Path) -> None:
    """Let it save and end; a job that does not within the grace time, or waits in the queue, is cancelled."""
    job = str(started["job"])
    if _state(started)[0] == "RUNNING":
        shell.run(["scancel", "--batch", "--signal=INT", job])
        ui.say(f"job {job}: asked to save and end; its log: {output / LOG}")
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end and _state(started)[0] not in ENDED:
            time.sleep(1)
    if _state(started)[0] not in ENDED:
        shell.run(["scancel", job])


def fetch(started: Started, output: Path) -> None:
    """Nothing to do: the run folder is the cluster's, too."""


FORM = Form("slurm.sh", export, start, status, logs, stop, fetch, access=access, state=state, shared=True)
