"""A launch as Kubernetes objects: an indexed Job, a volume for its files, and what the sandbox needs around it."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import yaml

from trainbox.errors import INTERRUPTED
from trainbox.host.box import Mount
from trainbox.host.launch import GRACE_SECONDS, HOPELESS, RETRIES, Export, Form, Launch, dropped
from trainbox.spec.gpus import Gpu
from trainbox.spec.machine import USABLE
from trainbox.spec.run import BOX_MODEL

UID = 1000
"""The image's own user: there are no files of the caller on the cluster."""
FILES = "/files"
"""Where the pod that takes and gives files has the whole volume."""
OUTPUT = PurePosixPath("output")
"""Where in the volume the run folder is."""
INDEX = "batch.kubernetes.io/job-completion-index"
START_SECONDS = 900
"""Beyond the budget, which the run itself keeps: to pull the image and to save."""

WHY = {
    "max_price": "a cluster has no price by the hour",
    "spot": "each cloud has a node label of its own for it: add it to the nodeSelector",
    "outputs": "the volume is a claim of the run's own",
    "others": "one kind of node is asked for, the first",
    "keep_alive_minutes": "the pods go at their end; nodes are the cluster's",
}


def export(launch: Launch) -> Export:
    """The objects, in one file; its first lines are the commands that bring files up, start, and bring them down."""
    objects = [*_volume(launch), *_network(launch), _job(launch)]
    lines = [
        "data, outputs: the cluster cannot see this machine's files: the file begins with the commands that copy them",
        *dropped(launch, WHY),
        *(["nodes: the volume must be ReadWriteMany: name a storageClassName that is"] if launch.nodes > 1 else []),
        *(["gpu: by its memory and compute capability, as GPU Feature Discovery labels nodes"] if launch.gpu else []),
    ]
    commands = "\n".join(f"#   {command}" for command in _commands(launch))
    # Through JSON, so that no two objects are one: YAML would write the second as a reference.
    text = yaml.safe_dump_all(json.loads(json.dumps(objects)), sort_keys=False, width=120)
    return Export(f"# {launch.name}, in this order:\n{commands}\n---\n{text}", tuple(lines))


def _commands(launch: Launch) -> Iterator[str]:
    name, pod, file = launch.name, f"{launch.name}-files", shlex.quote(str(launch.output / FILE))
    yield f"kubectl apply -f {file}"
    if launch.box.secrets:
        names = "|".join(sorted(launch.box.secrets))
        made = f"kubectl create secret generic {name} --from-env-file=/dev/stdin"  # no value on a command line
        yield f"env | grep -E '^({names})=' | {made}  # exported in your shell"
    yield f"kubectl wait --for=condition=Ready --timeout=1h pod/{pod}"
    for mount in launch.inputs:
        yield shlex.join(["kubectl", "cp", str(mount.source), f"{pod}:{FILES}/{_place(launch, mount)}"])
    spec = launch.output / "spec.json"
    yield shlex.join(["kubectl", "cp", str(spec), f"{pod}:{FILES}/{OUTPUT}/{spec.name}"])
    yield f"kubectl delete pod {pod}"
    yield f"""kubectl patch job {name} --patch '{{"spec": {{"suspend": false}}}}'"""
    yield f"kubectl logs --follow job/{name}"
    yield "# its end, and what it made:"
    # For one condition alone kubectl would wait for ever when the other one comes.
    ends = (
        f"kubectl wait --for=condition={each} --timeout=5s job/{name} 2>/dev/null" for each in ("Complete", "Failed")
    )
    yield f"until {' || '.join(ends)}; do sleep 5; done"
    yield f"kubectl apply -f {file} --selector app.kubernetes.io/component=files"
    yield f"kubectl wait --for=condition=Ready --timeout=1h pod/{pod}"
    yield shlex.join(["kubectl", "cp", f"{pod}:{FILES}/{OUTPUT}", str(launch.output)])
    yield shlex.join(["invoke", "verify", str(launch.output)])
    yield f"kubectl delete -f {file}  # the volume, too"
    if launch.box.secrets:
        yield f"kubectl delete secret {name}"


# What is around the job


def _volume(launch: Launch) -> Iterator[dict[str, Any]]:
    """A claim for inputs and output, and a pod that holds it while files are copied."""
    access = "ReadWriteMany" if launch.nodes > 1 else "ReadWriteOnce"
    storage = {"requests": {"storage": f"{launch.disk_gb}G"}}
    yield _object(launch, "v1", "PersistentVolumeClaim", "", {"accessModes": [access], "resources": storage})
    folders = sorted({str(PurePosixPath(FILES, _place(launch, mount)).parent) for mount in launch.inputs})
    made = shlex.join(["mkdir", "-p", *folders, f"{FILES}/{OUTPUT}"])
    container = {
        "name": "files",
        "image": launch.box.image,
        "command": ["sh", "-c", f"{made} && exec sleep infinity"],
        "securityContext": SEALED,
        "volumeMounts": [{"name": "files", "mountPath": FILES}],
    }
    spec = {**_pod(), "containers": [container], "volumes": [_claim(launch)]}
    yield _object(launch, "v1", "Pod", "files", spec)


def _network(launch: Launch) -> Iterator[dict[str, Any]]:
    """Several nodes find the first one by name; none of them reaches anything else."""
    ours = _labels(launch, "train")
    if launch.nodes > 1:
        spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": ours}
        yield _object(launch, "v1", "Service", "", spec)
    if not launch.box.network:
        peers = [{"podSelector": {"matchLabels": ours}}]
        names = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
        rules = {"ingress": [{"from": peers}], "egress": [{"to": peers}, names]} if launch.nodes > 1 else {}
        spec = {"podSelector": {"matchLabels": ours}, "policyTypes": ["Ingress", "Egress"], **rules}
        yield _object(launch, "networking.k8s.io/v1", "NetworkPolicy", "", spec)


def _object(launch: Launch, version: str, kind: str, component: str, spec: dict[str, Any]) -> dict[str, Any]:
    name = f"{launch.name}-{component}" if component else launch.name
    about = {"name": name, "labels": _labels(launch, component)}
    return {"apiVersion": version, "kind": kind, "metadata": about, "spec": spec}


def _labels(launch: Launch, component: str) -> dict[str, str]:
    whole = {"app.kubernetes.io/name": launch.name}
    return {**whole, "app.kubernetes.io/component": component} if component else whole


# The job


def _job(launch: Launch) -> dict[str, Any]:
    """Suspended until its files are there."""
    deadline = {"activeDeadlineSeconds": math.ceil(launch.max_hours * 3600) + START_SECONDS} if launch.max_hours else {}
    spec = {
        "suspend": True,
        "completionMode": "Indexed",
        "completions": launch.nodes,
        "parallelism": launch.nodes,
        "backoffLimit": RETRIES * launch.nodes,
        **deadline,
        "podFailurePolicy": {"rules": list(_rules())},
        "template": {
            "metadata": {"labels": _labels(launch, "train")},
            "spec": {
                **_pod(),
                **({"subdomain": launch.name} if launch.nodes > 1 else {}),
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": GRACE_SECONDS,
                **_placed(launch),
                "containers": [_container(launch)],
                "volumes": list(_volumes(launch)),
            },
        },
    }
    return _object(launch, "batch/v1", "Job", "", spec)


def _rules() -> Iterator[dict[str, Any]]:
    """An interrupted run begins again as often as it is; what is hopeless does not; the rest does a few times."""
    for action, codes in (("Ignore", [INTERRUPTED]), ("FailJob", list(HOPELESS))):
        yield {"action": action, "onExitCodes": {"containerName": "train", "operator": "In", "values": codes}}
    yield {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def _pod() -> dict[str, Any]:
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


SEALED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def _placed(launch: Launch) -> dict[str, Any]:
    """On which nodes."""
    region = {"nodeSelector": {"topology.kubernetes.io/region": launch.region}} if launch.region else {}
    if not launch.gpu_count:
        return region
    wanted = [*(_capability(launch.gpu) if launch.gpu else ()), *_memory(launch)]
    terms = {"nodeSelectorTerms": [{"matchExpressions": wanted}]}
    affinity = {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}}
    tolerated = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    return {**region, **(affinity if wanted else {}), "tolerations": tolerated}


def _capability(gpu: Gpu) -> Iterator[dict[str, Any]]:
    major, _, minor = gpu.capability.partition(".")
    for name, value in (("major", major), ("minor", minor)):
        yield {"key": f"nvidia.com/gpu.compute.{name}", "operator": "In", "values": [value]}


def _memory(launch: Launch) -> Iterator[dict[str, Any]]:
    """In MiB, as the driver counts it; the label is compared as greater, not as at least."""
    sold = max(launch.min_vram or 0, launch.gpu.memory if launch.gpu else 0)
    if sold:
        yield {"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": [str(int(sold * USABLE * 1024))]}


def _container(launch: Launch) -> dict[str, Any]:
    box = launch.box
    limits = {
        **({"cpu": f"{box.cpus:g}"} if box.cpus else {}),
        **({"memory": _quantity(box.memory)} if box.memory else {}),
        **({"nvidia.com/gpu": launch.gpu_count} if launch.gpu_count else {}),
    }
    return {
        "name": "train",
        "image": box.image,
        "args": list(box.command),
        "env": list(_environment(launch)),
        **({"resources": {"limits": limits}} if limits else {}),
        "securityContext": SEALED,
        "volumeMounts": list(_mounts(launch)),
    }


def _environment(launch: Launch) -> Iterator[dict[str, Any]]:
    for name, value in sorted(launch.box.env.items()):
        yield {"name": name, "value": value.replace("$(", "$$(")}
    for name in sorted(launch.box.secrets):
        key = {"name": launch.name, "key": name, "optional": True}
        yield {"name": name, "valueFrom": {"secretKeyRef": key}}
    if launch.nodes > 1:
        yield {"name": "NNODES", "value": str(launch.nodes)}
        yield {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}}
        yield {"name": "MASTER_ADDR", "value": f"{launch.name}-0.{launch.name}"}


def _mounts(launch: Launch) -> Iterator[dict[str, Any]]:
    for mount in launch.box.mounts:
        path = {"mountPath": mount.target, "subPath": _place(launch, mount)}
        yield {"name": "files", **path, **({"readOnly": True} if mount.read_only else {})}
    for volume in _scratch(launch):
        yield {"name": volume, "mountPath": SCRATCH[volume]}


SCRATCH = {"tmp": "/tmp", "shm": "/dev/shm", "model": BOX_MODEL}  # noqa: S108
"""Folders that are each attempt's own. A model that is not among the inputs is downloaded by the image."""


def _scratch(launch: Launch) -> list[str]:
    taken = {mount.target for mount in launch.box.mounts}
    return [name for name, target in SCRATCH.items() if target not in taken]


def _volumes(launch: Launch) -> Iterator[dict[str, Any]]:
    yield _claim(launch)
    for name in _scratch(launch):
        memory = {"medium": "Memory", "sizeLimit": _quantity(launch.box.shm_size)} if name == "shm" else {}
        yield {"name": name, "emptyDir": memory}


def _claim(launch: Launch) -> dict[str, Any]:
    return {"name": "files", "persistentVolumeClaim": {"claimName": launch.name}}


def _place(launch: Launch, mount: Mount) -> str:
    """Where in the volume a mount is: what is written lies as in the run folder."""
    if mount.read_only:
        return f"inputs{mount.target}"
    return str(OUTPUT / mount.source.relative_to(launch.output))


def _quantity(size: str) -> str:
    """Docker's `8g` is 2 to the 30th bytes, as Kubernetes' `8Gi`."""
    number, unit = re.fullmatch(r"(\d+)([a-z]?)", size.lower()).groups()  # type: ignore[union-attr]
    return f"{number}{unit.upper()}i" if unit in tuple("kmgt") else number


FILE = "k8s.yaml"
FORM = Form(FILE, export)
