"""What gpu.jsonc's `download` names, on this machine: whole or not at all, pinned, shared between runs, resumable."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainbox.errors import ConfigError, EngineError, HardwareError, TrainboxError
from trainbox.host import download, hashes, image, paths, shell, ui
from trainbox.host.box import Box, Mount
from trainbox.host.secrets import secret
from trainbox.host.watch import Watcher
from trainbox.spec.dataset import hash_file
from trainbox.spec.gpu_config import Download
from trainbox.spec.load import is_path
from trainbox.spec.run import BOX_OUTPUT, BOX_WORKSPACE, hash_json
from trainbox.spec.source import expanded, name_of

if TYPE_CHECKING:
    from trainbox.host.engine import Docker, Local

COMMIT = re.compile("[0-9a-f]{40}")
CHUNK = 2**20
GIT_ENV = {"GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1", "LC_ALL": "C"}
"""No question, no large files unasked, and words that can be recognised."""
NOT_BY_COMMIT = ("did not receive expected object", "not our ref", "unadvertised object")
"""What git says where a server hands out no commit that is no branch's newest, or does not have it."""


def fetch(wanted: list[Download], engine: Docker | Local, tag: str) -> tuple[tuple[Mount, ...], list[dict[str, str]]]:
    """Have all of them; the mounts that show them below /workspace, and what the record keeps of each."""
    mounts, pins = [], []
    for number, each in enumerate(wanted):
        try:
            path, pin = STRATEGIES[each.strategy](each, engine, tag)
        except TrainboxError as error:
            error.place = f"download[{number}] ({told(each)})"
            raise
        mounts.append(Mount(path, f"{BOX_WORKSPACE}/{each.place}"))
        pins.append(pin_of(each, pin))
    return tuple(mounts), pins


def pin_of(wanted: Download, pin: str) -> dict[str, str]:
    """What the record keeps of a download."""
    return {"strategy": wanted.strategy, "source": told(wanted), "target": wanted.place, "pin": pin}


def told(wanted: Download) -> str:
    """The source as it may be shown and kept: of a script, in which a key may stand in any form, its hash alone."""
    return f"script {hash_json(wanted.source)[:16]}" if wanted.strategy == "script" else plain(wanted.source)


# git


def git(repository: str, revision: str, timeout: float = 3600, *, lfs: bool = False) -> tuple[Path, str]:
    """The files of a commit and its name, without the history. Raises EngineError or ConfigError."""
    here = expanded(repository)
    source = str(Path(here).resolve()) if is_path(here) else repository
    commit = revision if COMMIT.fullmatch(revision) else _commit_of(source, revision)
    folder = paths.cache() / "git" / f"{name_of(source)}-{hash_json([source, lfs])[:8]}@{commit}"
    if (folder / download.FACTS).exists():
        return folder, commit
    staged = download.staged(folder)
    try:
        with ui.Progress(f"cloning {name_of(source)} at {commit[:12]}"):
            _clone(source, commit, staged, time.monotonic() + timeout, lfs=lfs)
        return download.publish(staged, folder, {"name": plain(repository), "commit": commit}), commit
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _commit_of(source: str, revision: str) -> str:
    """The commit that a branch or tag stands for now; an annotated tag's is the one below it."""
    lines = _git(["ls-remote", "--", source], Path(), 60, source).splitlines()
    known = {name: commit for commit, _, name in (line.partition("\t") for line in lines)}
    names = ("HEAD",) if revision == "HEAD" else (
        f"refs/tags/{revision}^{{}}", f"refs/tags/{revision}", f"refs/heads/{revision}", revision,
    )  # fmt: skip
    commit = next((known[name] for name in names if name in known), None)
    if commit is None:
        raise ConfigError(f"has no branch or tag {revision!r}", place=plain(source))
    return commit


def _clone(source: str, commit: str, into: Path, deadline: float, *, lfs: bool) -> None:
    def run(*arguments: str) -> str:
        return _git(list(arguments), into, deadline - time.monotonic(), source)

    run("init", "--quiet", ".")
    try:
        run("fetch", "--quiet", "--depth", "1", "--", source, commit)
    except EngineError as error:
        if not any(sign in str(error) for sign in NOT_BY_COMMIT):
            raise
        run("fetch", "--quiet", "--tags", "--", source, "+refs/heads/*:refs/remotes/origin/*")
    try:
        run("-c", "advice.detachedHead=false", "checkout", "--quiet", commit)
    except EngineError:
        raise ConfigError(f"has no commit {commit}", place=plain(source), remedy="check the revision") from None
    if (into / ".gitmodules").exists():
        run("submodule", "update", "--quiet", "--init", "--recursive", "--depth", "1")
    if lfs:
        run("lfs", "pull", "--", source)
    for inner in [*into.rglob(".git")]:
        shutil.rmtree(inner) if inner.is_dir() else inner.unlink()


def _git(arguments: list[str], folder: Path, timeout: float, source: str) -> str:
    if timeout <= 0:
        raise EngineError("no end within its timeout", place=plain(source))
    try:
        done = shell.run(["git", *arguments], check=False, env=GIT_ENV, cwd=folder, timeout=timeout)
    except EngineError as error:
        if "no end after" not in error.fault:
            raise
        raise EngineError("no end within its timeout", place=plain(source), remedy="raise download[].timeout") from None
    if done.returncode:
        said = plain(shell.tail(done.stderr.splitlines(), 5))
        remedy = f"{said}\ncheck the address, and that this machine may read it"
        raise EngineError("git cannot fetch it", place=plain(source), remedy=remedy)
    return done.stdout


def _by_git(wanted: Download, engine: Any, tag: str) -> tuple[Path, str]:
    return git(wanted.source, wanted.revision or "HEAD", wanted.timeout, lfs=wanted.strategy == "git-lfs")


# http


NO_LOGIN = "no login is sent but what the address itself holds: user:password@ before the host, or a key behind a ?"


def http(
    address: str, sha256: str | None, timeout: float, headers: dict[str, str] | None = None, login: str = NO_LOGIN
) -> tuple[Path, str]:
    """A file by its address, and its sha256. A broken download goes on where it stopped; a wrong sum is thrown away.

    `login` is what to do where the server wants one.
    """
    name = name_of(address)
    folder = paths.cache() / "files" / hash_json([address, sha256])[:24]
    if (folder / download.FACTS).exists():
        return folder / name, _digest_of(folder)
    part = folder.with_name(f".{folder.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.with_suffix(".lock").open("w") as lock:  # another run may want the same file
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / download.FACTS).exists():
            return folder / name, _digest_of(folder)
        _fill(part, address, headers or {}, time.monotonic() + timeout, login)
        found = hash_file(part)
        if sha256 and found != sha256:
            part.unlink()
            fault = f"has the sha256 {found}, not {sha256}: nothing of it is kept"
            raise EngineError(fault, place=plain(address), remedy="check the address and download[].sha256")
        staged = download.staged(folder)
        part.rename(staged / name)
        return download.publish(staged, folder, {"name": plain(address), "sha256": found}) / name, found


def _digest_of(folder: Path) -> str:
    return str(json.loads((folder / download.FACTS).read_text())["sha256"])


def _fill(part: Path, address: str, headers: dict[str, str], deadline: float, login: str) -> None:
    """Append what is missing of a file; one that is another by now begins anew."""
    import requests

    seen = part.with_suffix(".seen")  # what told this version of the file apart
    version = seen.read_text() if seen.exists() else ""
    held = part.stat().st_size if part.exists() and version else 0
    # As it is: a length that is packed on the way says nothing of the file.
    wanted = {**headers, "Accept-Encoding": "identity"}
    wanted |= {"Range": f"bytes={held}-", "If-Range": version} if held else {}
    try:
        with requests.get(address, headers=wanted, stream=True, timeout=30) as answer:
            if answer.status_code == 416 and held:
                if answer.headers.get("Content-Range", "").endswith(f"/{held}"):
                    return
                part.unlink()
                raise EngineError("is another file by now", place=plain(address), remedy="run the same command again")
            answer.raise_for_status()
            if answer.status_code != 206:
                held = 0
            seen.write_text(_version(answer.headers))
            total = held + int(answer.headers.get("Content-Length", 0))
            _refuse_without_room(total - held, plain(address))
            bar = ui.Progress(f"downloading {name_of(address)}", total=total or None, unit="B")
            with bar as progress, part.open("r+b" if held else "wb") as file:
                file.seek(held)
                for chunk in answer.iter_content(CHUNK):
                    held += file.write(chunk)
                    progress.update(completed=held)
                    if time.monotonic() > deadline:
                        remedy = f"{AGAIN}; or raise download[].timeout"
                        raise EngineError("no end within its timeout", place=plain(address), remedy=remedy)
            if total and held < total:
                raise EngineError(f"broke off after {held:,} of {total:,} bytes", place=plain(address), remedy=AGAIN)
    except (requests.RequestException, ValueError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        remedy = _remedy(error, login)
        raise EngineError(f"cannot be downloaded: {plain(why)}", place=plain(address), remedy=remedy) from None


AGAIN = "run the same command again: it goes on where it stopped"


def _remedy(error: Exception, login: str) -> str:
    """What to do next: only what broke on the way is worth another try."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        code = error.response.status_code
        if code in (401, 403):
            return login
        return "its server is at fault or busy: try again later" if code >= 500 or code == 429 else "check the address"
    if isinstance(error, requests.exceptions.ChunkedEncodingError | requests.Timeout):
        return AGAIN
    if isinstance(error, requests.ConnectionError):
        return f"check the address and the network, then {AGAIN}"
    return "check the address"


def _version(headers: Mapping[str, str]) -> str:
    """What a server says a file's version is, if it can be relied on to the byte."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


SECRET = re.compile(
    r"""(//)[^/@\s]*(?=@)|((?:Bearer|Basic|Authorization:\s*\w+)\s+)[^\s'"]+|"""
    r"""((?:token|key|secret|password)["']?\s?[=:]\s?["']?)[^\s'"]+|(\s(?:-u|--user|--token|--password)[\s=]["']?)[^\s'"]+""",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """Without what may be secret in it: a user's password, a key behind a question mark, a token in a header."""
    text = re.sub(r"""\?[^\s)'"]+""", "?...", text)
    return SECRET.sub(lambda found: f"{found[found.lastindex or 0]}***", text)


def _refuse_without_room(missing: int, name: str) -> None:
    free = shutil.disk_usage(paths.cache()).free
    if missing > free:
        needs = f"needs {missing / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise HardwareError(needs, place=name, remedy="free space, or set TRAINBOX_CACHE=")


def _by_http(wanted: Download, engine: Any, tag: str) -> tuple[Path, str]:
    return http(wanted.source, wanted.sha256, wanted.timeout)


def _from_civitai(wanted: Download, engine: Any, tag: str) -> tuple[Path, str]:
    """A model version by its number or address; CIVITAI_TOKEN opens what needs an account."""
    address = wanted.source
    if address.isdigit():
        address = f"https://civitai.com/api/download/models/{address}"
    token = secret("CIVITAI_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    login = "CIVITAI_TOKEN is not accepted for it" if token else "it wants an account: set CIVITAI_TOKEN"
    return http(address, wanted.sha256, wanted.timeout, headers, login)


# hf, script

AUTHORITIES = "/run/authorities.pem"
CA_NAMES = (*image.CA_VARIABLES, "CURL_CA_BUNDLE", "GIT_SSL_CAINFO")


def _from_hub(wanted: Download, engine: Any, tag: str) -> tuple[Path, str]:
    return download.snapshot(wanted.source, wanted.revision, wanted.allow, wanted.timeout)


def _by_script(wanted: Download, engine: Docker | Local, tag: str) -> tuple[Path, str]:
    """What a shell command leaves in its folder; it runs in the box, with the network and nothing else."""
    folder = paths.cache() / "scripts" / hash_json(wanted.source)[:24]
    if not (folder / download.FACTS).exists():
        staged = download.staged(folder)
        try:
            authorities = image.ca_bundle()
            box = Box(
                image=tag,
                command=("script", wanted.source, "--timeout", str(wanted.timeout)),
                mounts=(
                    Mount(staged, BOX_OUTPUT, read_only=False),
                    *([Mount(authorities, AUTHORITIES)] if authorities else []),
                ),
                env={**Watcher.env, **(dict.fromkeys(CA_NAMES, AUTHORITIES) if authorities else {})},
                secrets=image.net_settings(),
                network=True,
            )
            with ui.Progress(f"downloading by {told(wanted)}"), Watcher() as watcher:
                finished = engine.run(box, watcher.on_line)
            try:
                watcher.raise_for(finished)
            except TrainboxError as error:  # the shell repeats each command that it runs
                error.remedy = plain(error.remedy)
                raise
            download.publish(staged, folder, {"name": told(wanted)})
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return folder, hash_json(hashes.hash_folder(folder))


Strategy = Callable[[Download, Any, str], tuple[Path, str]]
STRATEGIES: dict[str, Strategy] = {
    "hf": _from_hub,
    "git": _by_git,
    "git-lfs": _by_git,
    "http": _by_http,
    "civitai": _from_civitai,
    "script": _by_script,
}
"""Each gives the path on this machine and what pins it."""
