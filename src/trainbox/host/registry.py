"""Images in a registry: pushed by content tag, pulled by digest, by the engine and with the login that Docker keeps."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainbox.errors import ConfigError, EngineError
from trainbox.host import engine, image, kept, pipeline, ui
from trainbox.host.engine import Docker

STORE = "pushed.json"
"""In the cache: by content tag, where a registry has that image."""

REGISTRY = re.compile(r"(?=[^/]*[.:]|localhost)[A-Za-z0-9.-]+(:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*")
REFERENCE = re.compile(rf"{REGISTRY.pattern}@sha256:[0-9a-f]{{64}}")

ABSENT = "has no such image or repository"
FAULTS = {
    r"x509|certificate": ("its certificate is not trusted", "put its authority in /etc/docker/certs.d/{host}/ca.crt"),
    r"no basic auth credentials": ("you are not logged in", "docker login {host}"),
    r"unauthorized|authentication required": ("it refuses the login that Docker has for it", "docker login {host}"),
    r"denied|forbidden": ("this login may not do that there", "ask for the right, or: docker login {host}"),
    r"no space left": ("the disk is full", "make room where the engine keeps its images: docker system df"),
    r"HTTP status: 5\d\d|internal server error": (
        "fails on its own side; is its disk full?",
        "its log says why; the layers that it has are not sent again",
    ),
    r"manifest unknown|name unknown|not found": (ABSENT, "is the name right? some want a repository made first"),
    r"HTTP response to HTTPS": ("speaks plain HTTP", "give it TLS, or name it in the engine's insecure-registries"),
    r"refused|no such host|timeout|unreachable|\bEOF\b|reset|broken pipe|no route": (
        "does not answer",
        "is the name right, and is it up? the layers that it has are not sent again",
    ),
}  # fmt: skip
"""What the engine's words hold, the first that fits: the fault and the remedy."""


@dataclass(frozen=True)
class Pushed:
    """An image that a registry has now. Bytes are of layers, before they are compressed on the way."""

    tag: str
    """Its content tag on this machine."""
    reference: str
    """`registry/repository@sha256:...`, which is the same image wherever it is pulled."""
    sent: int
    skipped: int
    """Of layers that were there already, in this repository or another one of the registry."""
    seconds: float


def push(recipes: list[str], registry: str) -> list[Pushed]:
    """Build or look up the images of recipes and push each as `registry/recipe:content tag`.

    `registry` is `host[:port]/prefix`. Raises EngineError where it is out of reach, before anything is built.
    """
    registry, docker = checked(registry), _docker()
    reach(docker, registry, recipes[0])
    done = []
    for _, facts in pipeline.images(recipes, docker):
        done.append(push_image(docker, facts.tag, registry))
    if len(done) > 1:
        ui.say(
            f"all: {_amounts(sum(p.sent for p in done), sum(p.skipped for p in done), sum(p.seconds for p in done))}"
        )
    return done


def reach(docker: Docker, registry: str, recipe: str) -> None:
    """Raise EngineError where a registry is out of reach or refuses the login."""
    with contextlib.suppress(_NoSuchImageError):
        _digest(docker, f"{registry}/{recipe}:latest")


def push_image(docker: Docker, tag: str, registry: str) -> Pushed:
    """Push one image by its content tag (`trainbox/recipe:hash`), remember and print its digest."""
    repository, version = f"{registry}/{_recipe(tag)}", tag.rpartition(":")[2]
    docker.client.api.tag(tag, repository, version)
    size, started = int((docker.inspect(tag) or {})["Size"]), time.monotonic()
    try:
        moved = _move(docker, "push", repository, version)
    except KeyboardInterrupt:
        ui.warn(f"{repository}: stopped; the layers that it has are not sent again")
        raise
    done = Pushed(
        tag, f"{repository}@{moved.digest}", moved.bytes, max(0, size - moved.bytes), time.monotonic() - started
    )
    kept.add(STORE, {tag: done.reference})
    ui.say(f"{done.reference}: {_amounts(done.sent, done.skipped, done.seconds)}")
    return done


def pushed(tag: str) -> str | None:
    """Where a registry has the image of a content tag, as last pushed or pulled: `registry/repository@sha256:...`."""
    return kept.read(STORE).get(tag)


def pull(recipes: list[str], registry: str) -> None:
    """Pull the images that the sources stand for, so that nothing need be built here."""
    registry, docker = checked(registry), _docker()
    missing = []
    for recipe, tags in pipeline.each(
        recipes, lambda name: list(image.tags(name, docker, pipeline.environment_of(name)))
    ):
        for tag in tags:
            repository, version = f"{registry}/{recipe}", tag.rpartition(":")[2]
            with contextlib.suppress(_NoSuchImageError):
                _pull(docker, f"{repository}@{_digest(docker, f'{repository}:{version}')}", tag)
                break
        else:
            missing.append(recipe)
    if missing:
        names = " ".join(missing)
        raise EngineError(
            f"has no image of these sources for {names}",
            place=registry,
            remedy=f'where they are built: make push RECIPE="{names}" REGISTRY={registry}\n'
            "or name a digest: make pull IMAGE=registry/repository@sha256:...",
        )


def pull_image(reference: str) -> None:
    """Pull one image by digest and give it the content tag that it was built as."""
    if not REFERENCE.fullmatch(reference):
        raise ConfigError(f"{reference!r} is not registry/repository@sha256:...", place="IMAGE")
    docker = _docker()
    tag = _pull(docker, reference, "")
    if _recipe(tag) not in pipeline.recipe_names() or tag not in image.tags(
        _recipe(tag), docker, pipeline.environment_of(_recipe(tag))
    ):
        ui.warn(f"{tag} is not what this checkout makes: resume uses it for runs that it began, train builds another")


def _pull(docker: Docker, reference: str, expected: str) -> str:
    """Pull by digest, check what it says it is, and tag it."""
    repository, _, digest = reference.partition("@")
    started = time.monotonic()
    _move(docker, "pull", repository, digest)
    found = docker.inspect(reference) or {}
    labels = found["Config"].get("Labels") or {}
    tag, recipe = (str(labels.get(f"org.trainbox.{name}", "")) for name in ("tag", "recipe"))
    own = re.fullmatch(rf"trainbox/{re.escape(recipe)}:[0-9a-f]{{16}}", tag)
    if not own or (expected and tag != expected):
        is_, wanted = tag if own else "no image of Trainbox's", expected or "one of Trainbox's"
        remedy = f"it was left under that name; to remove it: docker image rm {reference}"
        raise EngineError(f"is {is_}, not {wanted}", place=reference, remedy=remedy)
    docker.client.api.tag(found["Id"], *tag.split(":"))
    kept.add(STORE, {tag: reference})
    ui.say(f"{tag}: pulled in {time.monotonic() - started:.0f} s as {reference}")
    return tag


# The engine and its words


class Moved:
    """Reads the engine's events of a push or pull: shows how far it is, knows what went over the line in the end."""

    DONE = re.compile("Pushed|Pull complete|Layer already exists|Already exists|Mounted from")

    def __init__(self, progress: ui.Progress) -> None:
        self._progress = progress
        self._layers: dict[str, bool] = {}
        self._moved: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self.digest = ""

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one event. Raises EngineError with the engine's own words where it is an error."""
        if "error" in event:
            raise EngineError(str(event["error"]))
        layer, status, far = event.get("id", ""), str(event.get("status", "")), event.get("progressDetail") or {}
        if status in ("Pushing", "Downloading") and "total" in far:
            self._sizes[layer], self._moved[layer] = far["total"], min(far["current"], far["total"])
        elif status in ("Pushed", "Download complete"):
            self._moved[layer] = self._sizes.get(layer, 0)
        if layer:
            self._layers[layer] = bool(self.DONE.match(status))
        self.digest = (event.get("aux") or {}).get("Digest", self.digest)
        retrying = f", {status.lower()}" if status.startswith("Retrying") else ""
        note = f"{sum(self._layers.values())}/{len(self._layers)} layers{retrying}"
        self._progress.update(completed=self.bytes, total=sum(self._sizes.values()) or None, note=note)

    @property
    def bytes(self) -> int:
        """Over the line until now."""
        return sum(self._moved.values())


def _move(docker: Docker, way: str, repository: str, version: str) -> Moved:
    """Push or pull `repository:version` to its end. Raises EngineError by the registry's name."""
    login = _login(repository)
    with _patient(docker), ui.Progress(f"{way} {repository}", unit="B") as progress:
        moved = Moved(progress)
        call = getattr(docker.client.api, way)
        with _told(repository, login):
            for event in call(repository, version, stream=True, decode=True, auth_config=login):
                moved.take(event)
    return moved


def _digest(docker: Docker, reference: str) -> str:
    """The digest that a registry has for a tag. Raises _NoSuchImageError, or another EngineError."""
    login = _login(reference)
    with _told(reference, login):
        found: str = docker.client.api.inspect_distribution(reference, auth_config=login)["Descriptor"]["digest"]
        return found


class _NoSuchImageError(EngineError):
    """The registry answers, and has no such image."""


@contextlib.contextmanager
def _told(reference: str, login: Mapping[str, Any]) -> Iterator[None]:
    """What the engine or the line to it raises, as an error that says what to do."""
    from docker.errors import APIError, DockerException
    from requests.exceptions import RequestException

    host = reference.partition("/")[0]
    try:
        yield
    except (EngineError, DockerException, RequestException) as error:
        words = str(getattr(error, "explanation", None) if isinstance(error, APIError) else error)
        found = next((known for pattern, known in FAULTS.items() if re.search(pattern, words, re.IGNORECASE)), None)
        fault, remedy = found or ("the engine could not do it", "")
        kind = _NoSuchImageError if fault == ABSENT else EngineError
        if "refuses the login" in fault and not login:
            fault = "you are not logged in"
        raise kind(fault, place=host, remedy=f"{remedy.format(host=host)}\n{words}".strip()) from None


def _login(reference: str) -> dict[str, Any]:
    """Docker's own login for the registry, out of its configuration or credential store; empty where it has none."""
    import docker.auth
    from docker.errors import DockerException

    host, _ = docker.auth.resolve_repository_name(reference)
    try:
        login: dict[str, Any] = docker.auth.load_config().resolve_authconfig(host) or {}
    except DockerException as error:
        remedy = f"see ~/.docker/config.json, or: docker login {host}"
        raise EngineError(f"Docker's credential store fails: {error}", place=host, remedy=remedy) from None
    return login


@contextlib.contextmanager
def _patient(docker: Docker) -> Iterator[None]:
    """A registry may be silent for minutes while it stores a layer of gigabytes."""
    api = docker.client.api
    before, api.timeout = api.timeout, None
    try:
        yield
    finally:
        api.timeout = before


def _docker() -> Docker:
    found = engine.pick("docker")
    assert isinstance(found, Docker)  # noqa: S101 (pick raises where there is none)
    return found


def checked(registry: str) -> str:
    """The registry without a slash at its end. Raises ConfigError where it is no `host[:port]/prefix`."""
    wanted = registry.rstrip("/")
    if not REGISTRY.fullmatch(wanted):
        fault = f"{registry!r} is not host[:port]/prefix" if registry else "is needed"
        remedy = "e.g. REGISTRY=registry.example/me, after docker login"
        raise ConfigError(fault, place="REGISTRY", remedy=remedy)
    return wanted


def _recipe(tag: str) -> str:
    return tag.removeprefix("trainbox/").partition(":")[0]


def _amounts(sent: int, skipped: int, seconds: float) -> str:
    return f"sent {ui.size(sent)}, skipped {ui.size(skipped)} already there, in {seconds:.0f} s (layers, uncompressed)"
