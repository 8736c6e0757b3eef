"""Models and data sets on this machine, at a pinned revision: the only step that uses the network."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainbox.errors import ConfigError, EngineError, HardwareError
from trainbox.host import hashes, paths, shell, ui
from trainbox.host.box import Box, Mount
from trainbox.host.secrets import secret
from trainbox.spec import rows
from trainbox.spec.reading import SPLIT_NAMES
from trainbox.spec.recipe.custom import CustomModel
from trainbox.spec.recipe.sections import Model
from trainbox.spec.run import UNWANTED, ModelSource, hash_json, write_json
from trainbox.spec.source import HUB_NAME

if TYPE_CHECKING:
    from trainbox.host.engine import Docker, Local

PYPI = re.compile(r"pypi:(?P<package>[\w.-]+)==(?P<version>[\w.]+)/(?P<path>.*[^/])/?")
PLACES = {"model": "model.name", "dataset": "data.path"}
PIPELINE = "model_index.json"
"""What a diffusion model has instead of config.json: its parts, each in a folder."""
FACTS = ".trainbox.json"
"""In a cached folder, written last: which revision it is. A folder without it is not complete."""


def check_model(model: Model | CustomModel, *, drawing: bool | None = False) -> None:
    """Find what is wrong with a model before anything is built; a hub's is looked up there. Raises ConfigError.

    `drawing` says that a diffusion model is wanted; None: either kind.
    """
    name, folder = model.name, Path(model.name).expanduser()
    if name.startswith("random:"):
        return
    if name.startswith("pypi:"):
        if not PYPI.fullmatch(name):
            raise ConfigError(f"{name!r} is not pypi:PACKAGE==VERSION/FILE.gguf or .../FOLDER", place="model.name")
        if not model.sha256:
            raise ConfigError("is needed for a model from a package", place="model.sha256", remedy="pin its hash")
    elif folder.is_dir():
        _check_folder(folder, drawing=drawing)
    elif folder.is_file() and drawing:
        remedy = "make a folder of it once: diffusers' from_single_file, then save_pretrained"
        raise ConfigError("is a single file", place=str(folder), remedy=remedy)
    elif not HUB_NAME.fullmatch(name) or folder.exists():
        raise ConfigError(f"{name!r} is neither a folder nor a hub name", place="model.name", remedy="check MODEL=")
    else:
        _, info = _find(name, model.revision, "model", "")
        if info:
            files = [file.rfilename for file in info.siblings]
            _check_kind(name, {"config.json", PIPELINE} & set(files), drawing=drawing)
            _model_files(name, files)


def _check_kind(place: str, files: set[str], *, drawing: bool | None) -> None:
    """Text and image classifiers are one model, diffusion models several beside one another."""
    if drawing and "config.json" in files and PIPELINE not in files:
        remedy = "name one of diffusers' pipelines, such as stabilityai/stable-diffusion-xl-base-1.0"
        raise ConfigError(f"is no diffusion model: it has no {PIPELINE}", place=place, remedy=remedy)
    if drawing is False and PIPELINE in files and "config.json" not in files:
        remedy = "a diffusion model goes with the recipes sdxl-lora, sd15-lora, flux-lora, z-image-lora"
        raise ConfigError("is a diffusion model", place=place, remedy=remedy)


def _check_folder(folder: Path, *, drawing: bool | None = False) -> None:
    found = {name for name in ("config.json", PIPELINE) if (folder / name).is_file()}
    _check_kind(str(folder), found, drawing=drawing)
    if found:
        return
    if (folder / "adapter_config.json").is_file():
        remedy = f"make it whole first: make merge CHECKPOINT={folder}"
        raise ConfigError("is an adapter, not a model", place=str(folder), remedy=remedy)
    remedy = "name a folder that `save_pretrained` wrote, or a hub name"
    raise ConfigError(f"is no model: it has no config.json or {PIPELINE}", place=str(folder), remedy=remedy)


def model(
    wanted: Model | CustomModel, engine: Docker | Local, image: str, timeout: float | None = None
) -> tuple[ModelSource, Path]:
    """The model's folder on this machine and its pins; downloaded, converted or made where it is not there yet.

    `timeout`, in seconds, is for a download from the hub.
    """
    folder = Path(wanted.name).expanduser()
    revision = None
    if folder.is_dir():
        folder = folder.resolve()
    elif wanted.name.startswith(("random:", "pypi:")):
        folder = _made(wanted, engine, image)
    else:
        folder, revision = _from_hub(wanted.name, wanted.revision, timeout)
    hub = revision is not None
    files = hashes.hash_folder(folder)
    return ModelSource(
        name=wanted.name, reference=wanted.name if hub else str(folder), revision=revision, files=files
    ), folder


def of_hub(name: str) -> bool:
    """Whether a model's name is the hub's: neither made, nor a folder here."""
    return bool(name) and not name.startswith(("random:", "pypi:")) and not Path(name).expanduser().exists()


def resolve(wanted: Model | CustomModel) -> ModelSource:
    """A hub model's pins without its weights: the commit, and of each file that a run loads the sha256.

    The hub tells it of large files; that of a small one is empty until the file is there.
    """
    commit, info = _find(wanted.name, wanted.revision, "model", "")
    pinned = ModelSource(name=wanted.name, reference=wanted.name, revision=commit)
    folder = _folder(wanted.name, commit, "model", "")
    if (folder / FACTS).exists():
        return pinned.model_copy(update={"files": hashes.hash_folder(folder)})
    known = {file.rfilename: file.lfs.sha256 if file.lfs else "" for file in info.siblings}
    return pinned.model_copy(update={"files": {name: known[name] for name in _model_files(wanted.name, list(known))}})


def configs(wanted: Model, into: Path) -> Path:
    """The folder of a model's configuration alone: of a hub model no weights are downloaded. Raises ConfigError.

    `wanted.name` is a folder, a config.json by its path (copied to `into`), or a hub name.
    """
    path = Path(wanted.name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return path.resolve()
    if path.is_file():
        shutil.copy(path, into / "config.json")
        return into
    if not HUB_NAME.fullmatch(wanted.name):
        remedy = "name a folder, a config.json, or a hub name"
        raise ConfigError(f"{wanted.name!r} is neither here nor a hub name", place="model.name", remedy=remedy)
    commit, info = _find(wanted.name, wanted.revision, "model", "")
    whole, folder = (_folder(wanted.name, commit, kind, "") for kind in ("model", "config"))
    if (whole / FACTS).exists():
        return whole
    if not (folder / FACTS).exists():
        _fetch(wanted.name, info, "model", _config_files, folder, wanted.revision, None)
    return folder


def _config_files(files: list[str]) -> list[str]:
    return [file for file in files if re.fullmatch(r"([\w-]+/)?(config|model_index|scheduler_config)\.json", file)]


# Made here


def _made(wanted: Model | CustomModel, engine: Docker | Local, image: str) -> Path:
    """A random model, or one out of a package: a folder as it is, a GGUF file converted."""
    slug = re.sub(r"[^\w.-]+", "--", wanted.name)
    folder = paths.cache() / "models" / f"{slug}-{hash_json([wanted.name, wanted.sha256])[:8]}"
    if (folder / FACTS).exists():
        return folder
    aside = staged(folder)
    package = aside.with_name(f"{aside.name}-package")
    source = None
    if match := PYPI.fullmatch(wanted.name):
        source = _from_package(match, str(wanted.sha256), package)
    if source and source.is_dir():
        shutil.copytree(source, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*UNWANTED))
        _check_folder(aside)
    else:
        _make_in_box(wanted.name, source, aside, engine, image)
    shutil.rmtree(package, ignore_errors=True)
    return publish(aside, folder, {"name": wanted.name, "sha256": wanted.sha256})


def _make_in_box(name: str, source: Path | None, target: Path, engine: Docker | Local, image: str) -> None:
    """A random model, or one from a GGUF file; made in the box, without a network."""
    from trainbox.host.watch import Watcher

    mounts: tuple[Mount, ...] = (Mount(target, "/output", read_only=False),)
    command: tuple[str, ...] = ("make-model", name)
    if source:
        mounts = (*mounts, Mount(source, f"/source/{source.name}"))
        command = (*command, "--source", f"/source/{source.name}")
    with Watcher() as watcher:
        finished = engine.run(Box(image=image, command=command, mounts=mounts, env=watcher.env), watcher.on_line)
    watcher.raise_for(finished)


def _from_package(match: re.Match[str], sha256: str, into: Path) -> Path:
    """A file or folder of a package, checked against its hash by pip."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    requirement = into / "requirements.txt"
    requirement.write_text(f"{match['package']}=={match['version']} --hash=sha256:{sha256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--progress-bar=off"]
    argv = [*pip, "--only-binary=:all:", "--require-hashes", "-r", str(requirement), "-d", str(into)]
    shell.show(f"downloading {match['package']} {match['version']}", argv)
    (wheel,) = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        wanted = [name for name in names if name == match["path"] or name.startswith(f"{match['path']}/")]
        if not wanted:
            fault = f"{match['path']} is not in {wheel.name}"
            raise ConfigError(fault, place="model.name", remedy=", ".join(names[:8]))
        archive.extractall(into, wanted)
    return into / match["path"]


# From the hub


def _from_hub(name: str, revision: str | None, timeout: float | None) -> tuple[Path, str]:
    return _snapshot(name, revision, "model", lambda files: _model_files(name, files), timeout=timeout)


def _model_files(name: str, files: list[str]) -> list[str]:
    wanted = [file for file in files if not _matches(file, UNWANTED)]
    if PIPELINE in files:
        wanted = _pipeline_files(wanted)
    if not any(file.endswith(".safetensors") for file in wanted):
        fault = f"{name} has no weights as .safetensors; pickled ones and other formats are not loaded"
        raise ConfigError(fault, place=PLACES["model"], remedy="look for a revision or a copy that has them")
    return wanted


def _pipeline_files(files: list[str]) -> list[str]:
    """The parts of a diffusion model in full precision: not their variants, nor all of them once more in one file."""
    parts = [file for file in files if "/" in file or not file.endswith(".safetensors")]
    variant = re.compile(r"\.(fp16|fp8|bf16|non_ema)[.-]")
    return [file for file in parts if not variant.search(file) and not file.startswith("safety_checker/")]


def dataset(name: str, revision: str | None) -> tuple[Path, str]:
    """A hub data set's folder and commit: a repository, or with one name more, its folder of that name."""
    parts = name.split("/")
    # `glue/sst2` may be a repository, or the part `sst2` of `glue`.
    splits = {1: (1,), 2: (2, 1), 3: (2,)}[len(parts)]
    faults = []
    for count in splits:
        try:
            return _part("/".join(parts[:count]), "/".join(parts[count:]), revision)
        except (ConfigError, EngineError) as fault:
            faults.append(fault)
    raise faults[0]


def _part(repository: str, part: str, revision: str | None) -> tuple[Path, str]:
    folder, commit = _snapshot(repository, revision, "dataset", lambda files: _rows(repository, part, files), part)
    return folder / part, commit


def _rows(repository: str, part: str, files: list[str]) -> list[str]:
    known = [f for f in files if Path(f).suffix.lower() in rows.READERS and Path(f).name.lower() != "readme.md"]
    parts = sorted({Path(file).parts[0] for file in known if _has_train(file)})
    remedy = f"name one: DATA={repository}/{parts[0]}" if parts else ""
    if part:
        wanted = [file for file in known if file.startswith(f"{part}/")]
        fault = f"{repository} has no folder {part!r} with data" + (f", but {', '.join(parts)}" if parts else "")
    else:
        wanted = known if len(parts) < 2 else []
        fault = f"{repository} holds several data sets: {', '.join(parts)}" if parts else ""
    if not wanted:
        raise ConfigError(fault or f"{repository} holds no file that Trainbox reads", place="data.path", remedy=remedy)
    return wanted


def _has_train(file: str) -> bool:
    """Whether a file below a folder says that it is for training: then the folder is a data set of its own."""
    return any(set(re.split(r"[^a-z]+", part.lower())) & set(SPLIT_NAMES["train"]) for part in Path(file).parts[1:])


def _matches(file: str, patterns: list[str]) -> bool:
    from fnmatch import fnmatch

    return any(fnmatch(file, pattern) for pattern in patterns)


Choose = Callable[[list[str]], list[str]]
"""Of a repository's files those to download; raises ConfigError where they are not what is needed."""


def snapshot(name: str, revision: str | None, allow: list[str], timeout: float) -> tuple[Path, str]:
    """A hub repository's files that match the globs, and its commit. Raises EngineError where it takes longer."""

    def choose(files: list[str]) -> list[str]:
        found = [file for file in files if not allow or _matches(file, allow)]
        if not found:
            remedy = f"it has {', '.join(files[:8])}"
            raise ConfigError(f"no file matches {', '.join(allow) or 'anything'}", place="allow", remedy=remedy)
        return found

    return _snapshot(name, revision, "model", choose, f"allow-{hash_json(allow)[:8]}" if allow else "all", timeout)


def _snapshot(
    name: str, revision: str | None, kind: str, choose: Choose, part: str = "", timeout: float | None = None
) -> tuple[Path, str]:
    commit, info = _find(name, revision, kind, part)
    folder = _folder(name, commit, kind, part)
    if not (folder / FACTS).exists():
        _fetch(name, info, kind, choose, folder, revision, timeout)
    return folder, commit


def _folder(name: str, commit: str, kind: str, part: str) -> Path:
    slug = name.replace("/", "--") + (f"+{part}" if part else "")
    return paths.cache() / f"{kind}s" / f"{slug}@{commit}"


@functools.cache
def _find(name: str, revision: str | None, kind: str, part: str) -> tuple[str, Any]:
    """The commit that a branch or tag stands for, and what the hub says of it: None where the copy here must do."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision) and (_folder(name, revision, kind, part) / FACTS).exists():
        return revision, None
    try:
        info = _hub_info(name, revision, kind, part)
    except EngineError:
        commit = _kept(_folder(name, "*", kind, part), revision)
        if commit is None:
            raise
        ui.warn(f"the hub cannot be reached: using {name} at the commit downloaded before, {commit}")
        return commit, None
    return str(info.sha), info


def _kept(folders: Path, revision: str | None) -> str | None:
    """The newest commit downloaded for the same branch or tag."""
    found = []
    for facts in folders.parent.glob(f"{folders.name}/{FACTS}"):
        known = json.loads(facts.read_text())
        if revision in (known.get("revision"), known.get("commit")):
            found.append((facts.stat().st_mtime, str(known["commit"])))
    return max(found)[1] if found else None


def _hub_info(name: str, revision: str | None, kind: str, part: str) -> Any:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    place = PLACES[kind]
    api = _api()
    try:
        info = api.repo_info(name, revision=revision, repo_type=kind, files_metadata=True)
        # Anyone may look at a gated repository, not all may have its files.
        if info.gated and not (_folder(name, str(info.sha), kind, part) / FACTS).exists():
            api.auth_check(name, repo_type=kind)
    except GatedRepoError:
        raise _gated(name, place) from None
    except RevisionNotFoundError:
        raise ConfigError(f"{name} has no revision {revision!r}", place=place) from None
    except RepositoryNotFoundError:
        remedy = "check the name; a private or gated one needs HF_TOKEN"
        raise ConfigError(f"{name!r} is neither here nor on the hub", place=place, remedy=remedy) from None
    except HfHubHTTPError as error:
        raise _refused(name, error) from None
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "check the network and https_proxy; or use a local folder: MODEL=... (DATA=...)"
        raise EngineError(f"the hub cannot be reached: {why}", place=name, remedy=remedy) from None
    return info


def _api() -> Any:
    from huggingface_hub import HfApi

    # False, not None: without a token of ours none is sent, not one that lies elsewhere on the machine.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=secret("HF_TOKEN") or False)


def _gated(name: str, place: str) -> ConfigError:
    remedy = "accept its licence on its hub page, then put HF_TOKEN=... into ~/.config/trainbox/secrets.env"
    return ConfigError(
        f"{name} is gated: it wants an account that has accepted its licence", place=place, remedy=remedy
    )


def _refused(name: str, error: Any) -> EngineError:
    """What the hub answered, and what to do about it."""
    shut = error.response.status_code in (401, 403)
    remedy = "see that HF_TOKEN is one that may read it" if shut else "try again later: it goes on where it stopped"
    return EngineError(f"the hub answers: {str(error).splitlines()[0]}", place=name, remedy=remedy)


def _fetch(
    name: str, info: Any, kind: str, choose: Choose, folder: Path, revision: str | None, timeout: float | None
) -> None:
    """Download the wanted files; whole or not at all, and resumable: the hub's client goes on in the same folder."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    files = choose(list(sizes))
    total = sum(sizes[file] for file in files)
    part = folder.with_name(f".{folder.name}.part")
    missing, free = total - _held(part), shutil.disk_usage(paths.cache()).free
    if missing > free:
        needs = f"{name} needs {missing / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise HardwareError(needs, place=str(paths.cache()), remedy="free space, or set TRAINBOX_CACHE=")
    part.mkdir(parents=True, exist_ok=True)
    disable_progress_bars()
    try:
        with ui.Progress(f"downloading {name}", total=total, unit="B") as progress, _Gauge(part, progress):
            _api().snapshot_download(
                name, revision=info.sha, repo_type=kind, local_dir=part, allow_patterns=files,
                tqdm_class=_until(timeout),
            )  # fmt: skip
    except GatedRepoError:
        raise _gated(name, PLACES[kind]) from None
    except HfHubHTTPError as error:
        raise _refused(name, error) from None
    except _OutOfTime:
        remedy = "run the same command again: it goes on where it stopped; or raise its timeout"
        raise EngineError(f"no end within its timeout of {timeout:g} s", place=name, remedy=remedy) from None
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "run the same command again: it goes on where it stopped"
        raise EngineError(f"the download broke off: {why}", place=name, remedy=remedy) from None
    shutil.rmtree(part / ".cache", ignore_errors=True)
    publish(part, folder, {"name": name, "commit": info.sha, "revision": revision})


class _OutOfTime(Exception):  # noqa: N818
    pass


def _until(timeout: float | None) -> Any:
    """A bar for the hub's client, which moves it with every chunk: the one place where a download can be ended."""
    from huggingface_hub.utils.tqdm import tqdm

    end = time.monotonic() + timeout if timeout else float("inf")

    class Until(tqdm):
        def update(self, n: float | None = 1) -> Any:
            if time.monotonic() > end:
                raise _OutOfTime
            return super().update(n)

    return Until


class _Gauge:
    """Moves a bar by what has arrived in a folder."""

    def __init__(self, folder: Path, progress: ui.Progress) -> None:
        self._folder, self._progress, self._over = folder, progress, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self._progress.update(completed=_held(self._folder))


def _held(folder: Path) -> int:
    """Bytes in a folder, the begun files among them."""
    return sum(_size(path) for path in folder.rglob("*"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # renamed just now
        return 0


def staged(folder: Path) -> Path:
    """An empty folder beside it, to be filled and published."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def publish(aside: Path, folder: Path, facts: dict[str, Any]) -> Path:
    """Give a filled folder its name; `facts` say what it is and make it count as complete."""
    write_json(aside / FACTS, {**facts, "time": time.strftime("%Y-%m-%dT%H:%M:%S")})
    try:
        aside.rename(folder)
    except OSError:  # there is one
        if (folder / FACTS).exists():  # another process was quicker, and may be using it already
            shutil.rmtree(aside)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    return folder
