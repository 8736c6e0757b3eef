"""A launch as a compose file: a service for each node, all on one machine, in the sandbox."""

from __future__ import annotations

import os
from typing import Any

import yaml

from trainbox.host.engine import PIDS, SCRATCH
from trainbox.host.launch import GRACE_SECONDS, RETRIES, Export, Form, Launch, dropped
from trainbox.spec.run import BOX_MODEL

WHY = {
    "gpu": "the machine has the GPUs that it has",
    "min_vram": "as for gpu",
    "max_price": "compose rents nothing",
    "spot": "compose rents nothing",
    "disk_gb": "compose counts no disk",
    "keep_alive_minutes": "the machine stays",
    "max_hours": "the run itself keeps its budget; compose has no wall clock",
    "region": "compose rents nothing",
    "outputs": "the run folder is this machine's",
    "others": "as for gpu",
}


def export(launch: Launch) -> Export:
    """The file. `docker compose up` runs it; secrets come from the environment of that command."""
    services = {f"node{rank}": _service(launch, rank) for rank in range(launch.nodes)}
    file: dict[str, Any] = {"services": services}
    if launch.nodes > 1:
        file["networks"] = {"nodes": {} if launch.box.network else {"internal": True}}
    text = yaml.safe_dump(_escaped(file), sort_keys=False, width=120)
    command = "up --exit-code-from node0" if launch.nodes == 1 else "up"
    lines = [
        *dropped(launch, WHY),
        f"exit codes: compose tells none apart: what fails begins again, {RETRIES} times",
    ]
    return Export(f"# {launch.name}: docker compose -f {FILE} {command}\n{text}", tuple(lines))


def _service(launch: Launch, rank: int) -> dict[str, Any]:
    box = launch.box
    return {
        "image": box.image,
        "command": list(box.command),
        "init": True,
        "user": f"{os.getuid()}:{os.getgid()}",
        **_network(launch),
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "read_only": True,
        "tmpfs": [SCRATCH],
        "shm_size": box.shm_size,
        "pids_limit": PIDS,
        **({"mem_limit": box.memory, "memswap_limit": box.memory} if box.memory else {}),
        **({"cpus": box.cpus} if box.cpus else {}),
        "environment": _environment(launch, rank),
        "volumes": _volumes(launch),
        "restart": f"on-failure:{RETRIES}",
        "stop_grace_period": f"{GRACE_SECONDS}s",
        **_gpus(launch, rank),
    }


def _network(launch: Launch) -> dict[str, Any]:
    if launch.nodes > 1:
        return {"networks": ["nodes"]}
    return {} if launch.box.network else {"network_mode": "none"}


def _environment(launch: Launch, rank: int) -> dict[str, str | None]:
    """A name without a value is passed on from the environment of compose."""
    nodes = {"NNODES": str(launch.nodes), "NODE_RANK": str(rank), "MASTER_ADDR": "node0"} if launch.nodes > 1 else {}
    return {**dict(sorted(launch.box.env.items())), **nodes, **dict.fromkeys(sorted(launch.box.secrets))}


def _volumes(launch: Launch) -> list[dict[str, Any]]:
    mounts = [
        {"type": "bind", "source": str(mount.source), "target": mount.target, "read_only": mount.read_only}
        for mount in launch.box.mounts
    ]
    own = any(mount.target == BOX_MODEL for mount in launch.box.mounts)
    return mounts if own else [*mounts, {"type": "volume", "target": BOX_MODEL}]


def _gpus(launch: Launch, rank: int) -> dict[str, Any]:
    """Each node has its own."""
    if not launch.gpu_count:
        return {}
    first = rank * launch.gpu_count
    ids = [str(number) for number in range(first, first + launch.gpu_count)]
    device = {"driver": "nvidia", "device_ids": ids, "capabilities": ["gpu"]}
    return {"deploy": {"resources": {"reservations": {"devices": [device]}}}}


def _escaped(value: Any) -> Any:
    """Compose would put a variable in the place of a `$`."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


FILE = "compose.yaml"
FORM = Form(FILE, export, shared=True)
