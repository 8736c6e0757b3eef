"""What SkyPilot itself does in an image at boot. Runs in SkyPilot's environment: `python sky_commands.py WAY ...`."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import sky
from sky.provision import docker_utils
from sky.provision.runpod import utils as runpod


def rented_machine(image: str, container: str, *options: str) -> None:
    """AWS, GCP, Azure, Lambda and the like: a virtual machine that starts the image with its Docker and sets it up.

    `container` stands for the machine.
    """

    def on_machine(command: str, **_: Any) -> tuple[int, str, str]:
        argv = ["docker", "exec", container, "bash", "-c", command]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        sys.stderr.write(f"$ {command}\n{done.stdout}{done.stderr}\n")
        return done.returncode, done.stdout, done.stderr

    config = {
        "image": image,
        "container_name": "sky_container",
        "pull_before_run": False,
        "disable_automatic_runtime_detection": True,
        "run_options": ["--shm-size=64m", *options],
    }
    runner: Any = SimpleNamespace(run=on_machine, close_cached_connection=lambda: None)
    machine = docker_utils.DockerInitializer(config, runner, "/dev/null")
    machine._check_docker_installed = lambda: None  # type: ignore[method-assign]  # it is, and has no user to admit
    print(machine.initialize())


def runpod_command(key: str) -> None:
    """RunPod: what is appended to the image's entrypoint."""
    asked: dict[str, Any] = {}
    api = SimpleNamespace(create_pod=lambda **fields: asked.update(fields) or {"id": "pod"})
    runpod.runpod = SimpleNamespace(runpod=api)
    launch: Any = runpod.launch
    launch("c", "head", "cpu3c-2-4", "CA", "CA-1", 10, "image", None, key, None, 0.0, None)
    print(asked["docker_args"])


def kubernetes_command(key: str) -> None:
    """Kubernetes: the first step of the pod's own command, which installs and starts the ssh server."""
    template = (Path(sky.__file__).parent / "templates/kubernetes-ray.yml.j2").read_text()
    begin, end = template.index("# Helper function to conditionally use sudo"), template.index("# STEP 2: ")
    step = jinja2.Template(textwrap.dedent(" " * 14 + template[begin:end])).render()
    step = re.sub(r"\) &\s*$", ")\n", step)
    print(step.replace("skypilot:ssh_public_key_content", key))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
