"""Secrets come from the environment or one private file, and go only to the step that asks for them by name."""

from __future__ import annotations

import os
from pathlib import Path

from trainbox.errors import ConfigError
from trainbox.host.box import SECRETS


def secrets_file() -> Path:
    """TRAINBOX_SECRETS, or ~/.config/trainbox/secrets.env: lines of NAME=value."""
    return Path(os.environ.get("TRAINBOX_SECRETS") or "~/.config/trainbox/secrets.env").expanduser()


def secret(name: str) -> str | None:
    """The value of one of the known secrets, or None where it is not set."""
    assert name in SECRETS  # noqa: S101
    return os.environ.get(name) or _from_file(secrets_file()).get(name)


def _from_file(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    if path.stat().st_mode & 0o077:
        raise ConfigError("may be read by others", place=str(path), remedy=f"chmod 600 {path}")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.removeprefix("export ").strip(): value.strip().strip("'\"") for name, _, value in pairs}
