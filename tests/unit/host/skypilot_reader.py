"""Run by the Python of .venv-cloud: what SkyPilot itself makes of tasks and command lines. JSON in, JSON out."""

from __future__ import annotations

import ast
import copy
import json
import os
import sys
from pathlib import Path

import sky
from sky import check, global_user_state
from sky.clouds import CloudImplementationFeatures as Feature
from sky.clouds.cloud import CloudCapability
from sky.optimizer import Optimizer
from sky.utils import registry

KNOWN = ("catalog/data_fetchers", "utils/gpu_names.py", "catalog/__init__.py")
"""Where SkyPilot names accelerators as its catalogues do."""
FEATURES = {"stops": Feature.STOP, "idles": Feature.AUTOSTOP, "spot": Feature.SPOT_INSTANCE,
            "nodes": Feature.MULTI_NODE, "buckets": Feature.STORAGE_MOUNTING}  # fmt: skip


def parse(config: dict) -> dict:
    """The task as SkyPilot understood it."""
    task = sky.Task.from_yaml_config(copy.deepcopy(config))
    task.validate_name()
    for mount in (task.storage_mounts or {}).values():
        mount._validate_storage_spec(mount.name)
    return {
        "nodes": task.num_nodes,
        "accelerators": [each.accelerators for each in task.resources],
        "autostop": [each.autostop_config and each.autostop_config.to_yaml_config() for each in task.resources],
        "max_hourly_cost": [each.max_hourly_cost for each in task.resources],
        "recovery": [each.job_recovery for each in task.resources],
        "uploads": sorted(task.file_mounts or {}),
        "storage": {path: [mount.source, mount.mode.value] for path, mount in (task.storage_mounts or {}).items()},
        "secrets": sorted(ref.name for ref in task._managed_secret_refs),
    }


def optimize(config: dict) -> dict:
    """The machine that its optimizer chooses from the catalogues of this HOME, or why none."""
    task = sky.Task.from_yaml_config(copy.deepcopy(config))
    dag = sky.Dag()
    dag.add(task)
    try:
        best = Optimizer.optimize(dag, quiet=True).tasks[0].best_resources
    except sky.exceptions.ResourcesUnavailableError as error:
        return {"fault": str(error)}
    return {"machine": best.instance_type, "spot": best.use_spot, "price": best.get_cost(3600)}


def command(argv: list[str]) -> str:
    """What its command line has to say against this one; empty for nothing."""
    import click
    from sky.client.cli.command import cli

    group, context, rest = cli, None, list(argv)
    try:
        while isinstance(group, click.Group):
            context = group.make_context(rest[0] if context else "sky", rest[1:] if context else rest, parent=context)
            rest = [*context.protected_args, *context.args] if hasattr(context, "protected_args") else context.args
            _, group, _ = group.resolve_command(context, rest)
        group.make_context(rest[0], rest[1:], parent=context)
    except click.ClickException as error:
        return error.format_message()
    return ""


def names() -> list[str]:
    """All accelerators that SkyPilot's own source names."""
    root = Path(sky.__file__).parent
    files = [
        file for each in KNOWN for file in ((root / each).glob("*.py") if (root / each).is_dir() else [root / each])
    ]
    trees = [ast.parse(file.read_text()) for file in files]
    return sorted({node.value for tree in trees for node in ast.walk(tree)
                   if isinstance(node, ast.Constant) and isinstance(node.value, str)})  # fmt: skip


def features() -> dict[str, dict[str, bool]]:
    """What each cloud that runs a container image can do, by its own table."""
    found = {}
    for name, cloud in registry.CLOUD_REGISTRY.items():
        table = getattr(type(cloud), "_CLOUD_UNSUPPORTED_FEATURES", None)
        if table is None:
            table = cloud._unsupported_features_for_resources(sky.Resources())
        by_hand = name == "slurm"  # with the Pyxis plugin it runs images
        if Feature.DOCKER_IMAGE not in table or by_hand:
            found[name] = {ours: theirs not in table for ours, theirs in FEATURES.items()}
    return found


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    # As after a `sky check` that found credentials for these.
    global_user_state.set_allowed_clouds(check._get_workspace_allowed_clouds("default"), "default")
    global_user_state.set_enabled_clouds(asked["clouds"], CloudCapability.COMPUTE, "default")
    os.environ.update(asked["env"])
    answer = {
        "parsed": {name: parse(config) for name, config in asked["tasks"].items()},
        "chosen": {name: optimize(config) for name, config in asked["choose"].items()},
        "commands": {" ".join(argv): command(argv) for argv in asked["commands"]},
        "names": names(),
        "features": features(),
    }
    Path(sys.argv[1]).write_text(json.dumps(answer))
