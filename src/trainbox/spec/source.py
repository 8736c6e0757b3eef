"""What something is fetched from: hub names, addresses, git repositories. Each is checked when it is read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/\w[\w.-]*)?")
GIT_SCHEMES = ("https", "http", "ssh", "git", "file")


def name_of(source: str) -> str:
    """A source's last name."""
    path = urlsplit(source).path if "://" in source else source
    return re.split("[/:]", path.rstrip("/"))[-1].removesuffix(".git") or "download"


def _word(value: str) -> str:
    """What no command takes for nothing, or for one of its options."""
    if not value.strip():
        raise ValueError("is empty")
    if value.startswith("-"):
        raise ValueError(f"begins with -, as an option does: {value!r}")
    return value


def _named(value: str) -> str:
    """What a file or folder can be called after."""
    if (name := name_of(value)) in (".", ".."):
        raise ValueError(f"ends in {name}, after which nothing can be called")
    return value


def _script(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a zero byte")
    return _word(value)


def _hub_name(value: str) -> str:
    if not HUB_NAME.fullmatch(_word(value)):
        raise ValueError(f"must be a hub name, as org/name, not {value!r}")
    return value


def _address(value: str, schemes: tuple[str, ...] = ("https", "http")) -> str:
    try:
        parts = urlsplit(_word(value))
        whole = bool(parts.hostname or parts.scheme == "file") and (parts.port is None or parts.port > 0)
    except ValueError as error:
        raise ValueError(f"is no address: {error}") from None
    if parts.scheme not in schemes or not whole or not value.isprintable() or " " in value:
        raise ValueError(f"must be an address that begins with {'://, '.join(schemes)}://")
    return _named(value)


def _civitai(value: str) -> str:
    return value if value.isascii() and value.isdigit() else _address(value)


def _git(value: str) -> str:
    if "://" in value:
        return _address(value, GIT_SCHEMES)
    if re.match(r"\w+::", value) or not value.isprintable():  # git would run a program of that name
        raise ValueError(f"must be an address, user@host:path or a folder, not {value!r}")
    return _named(_word(value))


def expanded(source: str) -> str:
    """With the home folder in the place of ~; unlike Path.expanduser, no error for a user who is not there."""
    return os.path.expanduser(source)  # noqa: PTH111


def is_folder(source: str) -> bool:
    """Whether git takes a source for a path: neither an address nor `user@host:path`."""
    return ":" not in source.partition("/")[0]


GitSource = Annotated[str, AfterValidator(_git)]
"""An address, `user@host:path` or a folder."""
CHECKS: dict[str, Callable[[str], str]] = {
    "hf": _hub_name, "http": _address, "git": _git, "git-lfs": _git, "civitai": _civitai, "script": _script,
}  # fmt: skip
"""By a download's strategy; each gives the source back, or raises ValueError."""
