"""The images: base, recipe's packages, source; each named by the hash of all that goes in."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shlex
import string
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trainbox.errors import ConfigError, EngineError
from trainbox.host import paths, shell, ui
from trainbox.host.environment import Environment
from trainbox.spec.run import SETUP, write_text

if TYPE_CHECKING:
    from trainbox.host.engine import Docker

PYTHON = "3.13"
"""The images' Python, Debian 13's."""

NONE = Environment()

EPOCH = 1735689600  # 2025-01-01, as in docker/rootfs/build and docker/base/install
"""The time that all files carry, so that the same input makes a bit-identical layer."""

NET_VARIABLES = (
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL",
)  # fmt: skip
"""Settings of the host that a build step needs to reach its package index, and that no layer keeps."""

CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT")
CA_FILES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
"""Where the host's certificate authorities are: the first of these that is there, the variables first."""


@dataclass(frozen=True)
class ImageFacts:
    """An image as the record has it: `root` is what its root file system came from, `locks` are sha256 by file."""

    tag: str
    id: str
    layers: tuple[str, ...]
    root: str
    locks: Mapping[str, str]
    labels: Mapping[str, str]
    digests: tuple[str, ...] = ()
    """Where registries have it: `registry/repository@sha256:...` of each that it was pushed to or pulled from."""


Files = Mapping[str, Path | bytes]
"""A build's context by name: files of this machine, or what is made on the way."""


@dataclass(frozen=True)
class Build:
    """One `docker build` as a value: the files of its context by their name in it, and its build arguments."""

    name: str
    files: Files
    args: Mapping[str, str]

    @functools.cached_property
    def tag(self) -> str:
        """Hash of the files' names, modes and bytes and of the arguments, the parent's tag among them."""
        digest = _hash_files(self.files)
        digest.update(json.dumps(self.args, sort_keys=True).encode())
        return f"trainbox/{self.name}:{digest.hexdigest()[:16]}"


def ensure(recipe: str, docker: Docker, own: Environment = NONE) -> ImageFacts:
    """The recipe's image: looked up by its tag (one call to the engine), or built, parents first."""
    for tag in tags(recipe, docker, own) if not own.root else ():
        if found := docker.inspect(tag):
            return _facts(recipe, tag, found, own)
    builds = plan(recipe, _pinned(own.root, docker) if own.root else _resolve_root(docker), own)
    for number, build in enumerate(builds):
        if docker.inspect(build.tag) is None:
            # Only the last image carries these, and no tag depends on them: the same files are the same image.
            extra = {"REVISION": _revision(), "TAG": build.tag} if number == len(builds) - 1 else {}
            _build(build, docker, extra)
    return _facts(recipe, builds[-1].tag, docker.inspect(builds[-1].tag) or {}, own)


def expected_tag(recipe: str, own: Environment = NONE) -> str:
    """The tag that the sources have now, built or not."""
    return plan(recipe, own.root or next(_known_roots()), own)[-1].tag


def tags(recipe: str, docker: Docker, own: Environment = NONE) -> Iterator[str]:
    """The tags that the sources have now: one for each root that the image may stand on."""
    for root in [_pinned(own.root, docker)] if own.root else _known_roots():
        yield plan(recipe, root, own)[-1].tag


def is_near(recipe: str, docker: Docker) -> bool:
    """Whether all of a recipe's image but its last layers is here: the rest is built in seconds."""
    return any(docker.inspect(plan(recipe, root)[1].tag) for root in _known_roots())


def plan(recipe: str, root: str, own: Environment = NONE) -> tuple[Build, ...]:
    """The chained builds of a recipe on a root image: base, packages, what is the project's own if any, source."""
    docker, folder, package = paths.REPO / "docker", paths.REPO / "recipes" / recipe, paths.SOURCE / "trainbox"
    if not (folder / "Dockerfile").is_file():
        raise ConfigError(
            "has no Dockerfile",
            place=f"recipes/{recipe}",
            remedy="copy another recipe's: it only adds requirements.lock to the base",
        )
    base = Build("base", _files(docker / "base"), {"ROOT": root, **_cuda_args()})
    below = _files(folder, skip=("recipe.yaml", "gpu.jsonc", "README.md", "sample"))
    packages = Build(f"{recipe}-deps", below, {"BASE": base.tag})
    parents = [base, packages]
    if files := own.files:
        parents.append(Build(f"{recipe}-env", files, {"BASE": packages.tag}))
    source: dict[str, Path | bytes] = {
        "Dockerfile": docker / "source/Dockerfile",
        **_files(package, into="trainbox/", skip=("host",)),
        **_files(folder, into="recipe/", only=("recipe.yaml", "sample")),
    }
    if own.start:
        source[f"recipe/{SETUP}"] = json.dumps([step.model_dump() for step in own.start]).encode()
    return *parents, Build(recipe, source, {"BASE": parents[-1].tag, "RECIPE": recipe})


def variables() -> dict[str, str]:
    """The environment that the image's ENV lines give, for those who come into it by ssh, past them."""
    text = "".join((paths.REPO / "docker" / name / "Dockerfile").read_text() for name in ("base", "source"))
    lines = re.findall(r"(?m)^ENV ((?:.*\\\n)*.*)", text)
    pairs = (word.partition("=") for line in lines for word in shlex.split(line.replace("\\\n", " ")))
    values = {name: string.Template(value).safe_substitute(_cuda_args()) for name, _, value in pairs}
    return {name: value for name, value in values.items() if "$" not in value}


def hash_locks(recipe: str, own: Environment = NONE) -> dict[str, str]:
    """sha256 of each lock file that goes into a recipe's image, by path in the repository; a project's own by name."""
    files = [*(paths.REPO / "docker/base").glob("*.lock"), *(paths.REPO / "recipes" / recipe).glob("*.lock")]
    named = {str(file.relative_to(paths.REPO)): file for file in sorted(files)}
    named |= {own.lock.name: own.lock} if own.lock else {}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in named.items()}


def read_pins() -> dict[str, dict[str, str]]:
    """docker/pins.json: the root image and its digest (empty until a registry gives it), and what CUDA needs."""
    pins: dict[str, dict[str, str]] = json.loads(_pins_file().read_text())
    return pins


def pin_root(docker: Docker) -> str | None:
    """Ask the registry for the root image's digest and write it down; None where no registry is reachable."""
    pins = read_pins()
    digest = docker.registry_digest(pins["root"]["image"])
    if digest and digest != pins["root"]["digest"]:
        old, new = (f'"digest": "{value}"' for value in (pins["root"]["digest"], digest))
        write_text(_pins_file(), _pins_file().read_text().replace(old, new, 1))  # another process may be reading it
    return digest


# The context


def context(files: Files) -> bytes:
    """The build context as a tar that depends on the files' names, modes and bytes alone."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        folders = {str(parent) for name in files for parent in Path(name).parents if parent.name}
        for name in sorted({*folders, *files}):
            entry = tarfile.TarInfo(name)
            entry.mtime = EPOCH
            if name in folders:
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
            else:
                data = _content(files[name])
                entry.size, entry.mode = len(data), _mode(files[name])
                tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _files(folder: Path, *, into: str = "", skip: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> dict[str, Path]:
    """A folder's files by name in the context; `skip` and `only` name its direct children."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        wanted = inner.parts[0] not in skip and (not only or inner.parts[0] in only)
        if wanted and path.is_file() and "__pycache__" not in inner.parts:
            found[into + inner.as_posix()] = path
    return found


def _hash_files(files: Files) -> Any:
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        data = _content(file)
        digest.update(f"{name}\0{_mode(file):o}\0{len(data)}\0".encode() + data)
    return digest


def _content(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _mode(file: Path | bytes) -> int:
    """Executable or not, as git keeps it: the rest of the mode differs between clones."""
    return 0o755 if isinstance(file, Path) and file.stat().st_mode & 0o100 else 0o644


# The root file system


def _known_roots() -> Iterator[str]:
    """The roots that an image made here earlier may stand on."""
    pins = read_pins()["root"]
    if pins["digest"]:
        yield f"{pins['image']}@{pins['digest']}"
    yield _bootstrapped_root()


def _bootstrapped_root() -> str:
    inputs = {"build": paths.REPO / "docker/rootfs/build", "packages": paths.REPO / "docker/base/packages.txt"}
    return f"trainbox/root:{_hash_files(inputs).hexdigest()[:16]}"


def _resolve_root(docker: Docker) -> str:
    """The official image by digest where a registry is reachable, else one bootstrapped from Debian packages."""
    pins = read_pins()["root"]
    if pins["digest"] and docker.registry_digest(f"{pins['image']}@{pins['digest']}"):
        return f"{pins['image']}@{pins['digest']}"
    if not pins["digest"] and (digest := pin_root(docker)):
        ui.say(f"image: {pins['image']} is now pinned in docker/pins.json")
        return f"{pins['image']}@{digest}"
    tag = _bootstrapped_root()
    if docker.inspect(tag) is None:
        ui.say("image: no image registry is reachable; making the root file system from Debian packages")
        _import_root(tag, _bootstrap(tag), docker)
    return tag


def _pinned(root: str, docker: Docker) -> str:
    """A project's own root by digest: as it is here, else as its registry has it."""
    if "@" in root:
        return root
    here = docker.inspect(root)
    digest = docker.registry_digest(root) if here is None else None
    if here is None and digest is None:
        remedy = f"docker pull {root}, or leave it away: Debian 13 is used"
        raise EngineError(f"{root} is neither here nor in a registry", place="environment.base_image", remedy=remedy)
    return f"{root}@{digest}" if digest else next(iter((here or {}).get("RepoDigests") or [root]))


def _bootstrap(tag: str) -> Path:
    """The root file system as a tar, cached by what it is made from."""
    out = paths.cache() / "rootfs" / f"{tag.rpartition(':')[2]}.tar"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(f".{os.getpid()}.part.tar")
        argv = [str(paths.REPO / "docker/rootfs/build"), str(part), str(paths.REPO / "docker/base/packages.txt")]
        shell.show("root file system", argv)
        part.rename(out)
    return out


def _import_root(tag: str, tar: Path, docker: Docker) -> None:
    shell.show("root file system: import", [*docker.builder, "import", str(tar), tag])


# One build


def build_argv(build: Build, builder: list[str], secrets: Mapping[str, Path], extra: Mapping[str, str]) -> list[str]:
    """The whole `docker build` line; its context comes on standard input."""
    root = build.args.get("ROOT", "")
    labels = [f"org.trainbox.root={root}"] if "@" in root else []
    args = sorted({**build.args, **extra}.items())
    return [
        *builder, "build", "--progress=plain", "--tag", build.tag,
        *[part for name, value in args for part in ("--build-arg", f"{name}={value}")],
        *[part for label in labels for part in ("--label", label)],
        *[part for name, path in sorted(secrets.items()) for part in ("--secret", f"id={name},src={path}")],
        # A proxy or package index of this very host is out of reach from a container's own network.
        *(["--network", "host"] if any(_is_loopback(value) for value in net_settings().values()) else []),
        "-",
    ]  # fmt: skip


def _build(build: Build, docker: Docker, extra: Mapping[str, str]) -> None:
    # Newer clients read the last two: the same times in the image's own record, and no attestation (it has the time).
    env = {"DOCKER_BUILDKIT": "1", "SOURCE_DATE_EPOCH": str(EPOCH), "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    with _build_secrets() as secrets, ui.Progress(f"image {build.tag}") as progress:
        log = BuildLog(progress)
        argv = build_argv(build, docker.builder, secrets, extra)
        if shell.stream(argv, log.take, env=env, stdin=context(build.files)):
            raise EngineError("the build failed; its last lines:", place=build.tag, remedy="\n".join(log.last_lines()))


class BuildLog:
    """Reads BuildKit's plain progress: shows which step runs, keeps what the failed one said."""

    STEP = re.compile(r"#(\d+) \[(?:\S+ )?(\d+)/(\d+)\] (.*)")
    STATE = re.compile(r"#(\d+) (DONE|CACHED|ERROR)")
    OUTPUT = re.compile(r"#(\d+) \d+\.\d+ (.*)")

    def __init__(self, progress: ui.Progress) -> None:
        self._progress = progress
        self._steps: dict[str, int] = {}
        self._lines: deque[str] = deque(maxlen=100)
        self._said: dict[str, deque[str]] = {}
        self._failed = ""

    def take(self, line: str) -> None:
        """Take one line of the build's output."""
        self._lines.append(line)
        if step := self.STEP.match(line):
            number, at, total, command = step.groups()
            self._steps[number], self._said[number] = int(at), deque([_short(command)], maxlen=100)
            self._progress.update(completed=int(at) - 1, total=int(total), note=_short(command))
        elif (state := self.STATE.match(line)) and state[1] in self._steps:
            self._end_step(*state.groups())
        elif (output := self.OUTPUT.match(line)) and output[1] in self._steps:
            self._said[output[1]].append(output[2])
            self._progress.update(note=_short(output[2]))

    def last_lines(self) -> list[str]:
        """What the failed step said; the proxy in use too, a common cause."""
        lines = shell.tail(list(self._said.get(self._failed, self._lines))).splitlines()
        proxy = next((value for name, value in net_settings().items() if name.lower() == "https_proxy"), "")
        return [*lines, *([f"the build used the proxy {_without_password(proxy)}: is it right?"] if proxy else [])]

    def _end_step(self, number: str, state: str) -> None:
        if state == "ERROR":
            self._failed = number
        else:
            self._progress.update(completed=self._steps[number])


@contextlib.contextmanager
def _build_secrets() -> Iterator[dict[str, Path]]:
    """What a build needs of the host to reach the network, as BuildKit secrets: no layer or history keeps them."""
    with tempfile.TemporaryDirectory(prefix="trainbox-") as folder:
        secrets = {"ca": bundle} if (bundle := ca_bundle()) else {}
        if settings := net_settings():
            secrets["net"] = Path(folder, "net")
            secrets["net"].touch(mode=0o600)
            secrets["net"].write_text("".join(f"export {name}={_quoted(value)}\n" for name, value in settings.items()))
        yield secrets


def ca_bundle() -> Path | None:
    """The host's certificate authorities, those of a company's proxy among them."""
    named = [os.environ.get(name, "") for name in CA_VARIABLES]
    return next((Path(file) for file in (*named, *CA_FILES) if Path(file).is_file()), None)


def net_settings() -> dict[str, str]:
    """Proxies and package indexes that the host has set; they may hold passwords."""
    return {name: os.environ[name] for name in NET_VARIABLES if os.environ.get(name)}


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
    return "://" in url and (host == "localhost" or host == "::1" or host.startswith("127."))


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", url)


def _short(text: str) -> str:
    """One line of a step, without its mounts."""
    return " ".join(re.sub(r"--mount=\S+ ", "", text).split())[:80]


# Facts


def _facts(recipe: str, tag: str, found: Mapping[str, Any], own: Environment) -> ImageFacts:
    layers, labels = tuple(found["RootFS"]["Layers"]), found["Config"].get("Labels") or {}
    root = labels.get("org.trainbox.root") or f"rootfs:{layers[0]}"
    return ImageFacts(tag, found["Id"], layers, root, hash_locks(recipe, own), labels, digests(found))


def digests(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Where registries have an image that the engine describes so. (Newer engines list its local name too.)"""
    return tuple(sorted(name for name in found.get("RepoDigests") or () if not name.startswith("trainbox/")))


def _cuda_args() -> dict[str, str]:
    cuda = read_pins()["cuda"]
    capabilities = cuda["compute_capabilities"]
    joined = capabilities if isinstance(capabilities, str) else " ".join(capabilities)
    return {"CUDA_VERSION": cuda["version"], "MIN_DRIVER": cuda["min_driver"], "COMPUTE_CAPABILITIES": joined}


def _revision() -> str:
    """The checkout's git revision; empty when it has changes of its own, or is no checkout."""
    git = ["git", "-C", str(paths.REPO)]
    with contextlib.suppress(EngineError):
        if not shell.run([*git, "status", "--porcelain"]).stdout.strip():
            return shell.run([*git, "rev-parse", "HEAD"]).stdout.strip()
    return ""


def _pins_file() -> Path:
    return paths.REPO / "docker/pins.json"
