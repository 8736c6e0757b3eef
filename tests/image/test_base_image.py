"""The images themselves: trimmed as they are, all loads in the sandbox; nothing of this host is inside."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from trainbox.host import image as images
from trainbox.host.engine import Docker
from trainbox.host.image import Build, ImageFacts

SANDBOX = ["--read-only", "--network=none", "--cap-drop=ALL", "--user=12345:12345", "--tmpfs=/tmp:exec,mode=1777"]

FACTS = """
import json, torch
print(json.dumps({"version": torch.version.cuda, "flags": torch._C._cuda_getArchFlags().split()}))
"""

LIBRARIES = """
import ctypes, glob, site
import torch, triton, bitsandbytes, transformers, peft, trl, accelerate, datasets, gguf, sentencepiece
root = site.getsitepackages()[0]
for name in ("torch/lib/libtorch_cuda_linalg.so", "nvidia/cu13/lib/libnvrtc.so.*", "nvidia/cu13/lib/libcusolver.so.*",
             "nvidia/cudnn/lib/libcudnn_*.so.*", "nvidia/nccl/lib/libnccl.so.*", "bitsandbytes/libbitsandbytes_*.so"):
    found = glob.glob(f"{root}/{name}")
    assert found, name
    for library in found:
        ctypes.CDLL(library)
"""

COMPILE = """
import torch
step = torch.compile(lambda x: (x.sin() + x.cos()).sum())
x = torch.arange(1000.0)
torch.testing.assert_close(step(x), (x.sin() + x.cos()).sum())
"""

# The whole way to machine code for a GPU, its assembler included, works without one. (triton wants a file.)
KERNEL = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget

@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < n) * 2, i < n)

source = triton.compiler.ASTSource(double, {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"BLOCK": 64})
for capability in (75, 80, 90, 100, 120):
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""


@pytest.fixture(scope="module")
def builds(engine: Docker, image: ImageFacts) -> tuple[Build, Build, Build]:
    """The base's, the recipe's and the source's builds, on the root that the image stands on."""
    plans = [images.plan("llm-qlora", root) for root in images._known_roots()]
    return next(plan for plan in plans if plan[-1].tag == image.tag)


def run(tag: str, *command: str) -> str:
    argv = ["docker", "run", "--rm", *SANDBOX, f"--entrypoint={command[0]}", tag, *command[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", [LIBRARIES, COMPILE], ids=["libraries", "torch.compile"])
def test_what_is_left_works_in_the_sandbox(image: ImageFacts, script: str) -> None:
    run(image.tag, "python", "-c", script)


def test_triton_compiles_for_every_gpu(image: ImageFacts) -> None:
    run(image.tag, "sh", "-c", 'printf %s "$0" > /tmp/kernel.py && python /tmp/kernel.py', KERNEL)


def test_the_pinned_facts_are_torchs_own(image: ImageFacts) -> None:
    pins, torch = images.read_pins()["cuda"], json.loads(run(image.tag, "python", "-c", FACTS))
    assert torch["version"] == pins["version"]
    assert [f"{flag[3:-1]}.{flag[-1]}" for flag in torch["flags"]] == pins["compute_capabilities"].split()
    labels = {name: image.labels[f"org.trainbox.{name}"] for name in ("cuda", "min-driver", "compute-capabilities")}
    assert list(labels.values()) == [pins["version"], pins["min_driver"], pins["compute_capabilities"]]


def test_it_is_trimmed_and_compiled(image: ImageFacts) -> None:
    script = """
        cd /opt/venv/lib/python3*/site-packages
        find . -name '*.a' -o -type d -name tests -o -name 'libnvperf*' -o -name '*_rocm*.so'
        for module in torch transformers trl gguf; do
            ls $module/__pycache__/__init__.*.pyc >/dev/null || echo $module
        done
        ls /opt/trainbox/src/trainbox/container/__pycache__/__main__.*.pyc >/dev/null || echo trainbox
    """
    assert run(image.tag, "sh", "-c", script) == ""


def test_nothing_of_this_host_is_inside(image: ImageFacts) -> None:
    script = """
        grep -rlIE --exclude=*.py --exclude=*.pyc --exclude=*.so* -e 'BEGIN (CERTIFICATE|.*PRIVATE KEY)' \
            /etc /opt /usr /var /srv /home 2>/dev/null | grep -v ^/usr/share/ca-certificates/mozilla/ | sort
        ls -A /run/secrets /run/cache /usr/local/share/ca-certificates 2>/dev/null | grep -v :
        grep -c BEGIN /etc/ssl/certs/ca-certificates.crt
        find /usr/share/ca-certificates -name '*.crt' | wc -l
    """
    *files, inside, debians = run(image.tag, "sh", "-c", script).split()
    venv = "/opt/venv/lib/python3.13/site-packages"
    assert files == [
        "/etc/ssl/certs/ca-certificates.crt",
        f"{venv}/certifi/cacert.pem",
        f"{venv}/grpc/_cython/_credentials/roots.pem",
        "/usr/lib/python3/dist-packages/pip/_vendor/certifi/cacert.pem",  # Debian's pip, which SkyPilot looks for
    ]
    assert inside == debians
    record = docker("history", "--no-trunc", image.tag) + docker("image", "inspect", image.tag)
    secret = [*images.net_settings().values(), *filter(None, [os.environ.get("SSL_CERT_FILE")])]
    assert [value for value in secret if value in record] == []


def test_a_recipe_adds_megabytes(engine: Docker, builds: tuple[Build, Build, Build]) -> None:
    base, packages, source = (size(engine, build.tag) for build in builds)
    assert packages - base < 100e6
    assert source - packages < 20e6


def test_two_builds_of_the_source_are_the_same_layers(
    engine: Docker, image: ImageFacts, twin: str, builds: tuple[Build, Build, Build]
) -> None:
    build = builds[-1]
    args = [part for name, value in build.args.items() for part in ("--build-arg", f"{name}={value}")]
    argv = [*engine.builder, "build", "--no-cache", "--quiet", "--tag", twin, *args, "-"]
    env = {**os.environ, "DOCKER_BUILDKIT": "1"}
    subprocess.run(argv, input=images.context(build.files), env=env, check=True, capture_output=True)
    assert inspect(engine, twin)["RootFS"]["Layers"] == list(image.layers)


@pytest.fixture
def twin() -> Iterator[str]:
    """A tag of this test's own."""
    tag = f"trainbox-test/twin:{os.getpid()}"
    yield tag
    docker("image", "rm", "--force", tag)


def inspect(engine: Docker, tag: str) -> dict[str, Any]:
    found = engine.inspect(tag)
    assert found, tag
    return found


def size(engine: Docker, tag: str) -> int:
    return int(inspect(engine, tag)["Size"])


def docker(*args: str) -> str:
    return subprocess.run(["docker", *args], capture_output=True, text=True, check=True).stdout
