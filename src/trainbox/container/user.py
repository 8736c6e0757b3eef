"""Whom the image runs as. A cloud starts it as root and sets it up by a shell; training has no use for root."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from trainbox.spec.run import BOX_OUTPUT


def hand_over(arguments: Sequence[str], commands: Collection[str]) -> None:
    """Become the program that `docker run IMAGE PROGRAM ...` names, unless it is one of the image's own commands.

    Some clouds can only append to an image's entrypoint.
    """
    if arguments and arguments[0] not in commands and shutil.which(arguments[0]):
        os.execvp(arguments[0], list(arguments))  # noqa: S606


def step_down() -> None:
    """As root in a container, become the owner of /output for good; have a home that can be written.

    The image's own /output, and a new volume in its place, is 1000's. Where root itself owns it, root stays: on a
    rented machine of which nobody else makes use, and under a rootless engine, whose root is the caller.
    """
    if os.getuid() == 0 and "TRAINBOX_ROOT" not in os.environ:
        owner = Path(BOX_OUTPUT).stat()
        with contextlib.suppress(PermissionError):  # without the capability to do so
            os.setgroups([])
            os.setgid(owner.st_gid)
            os.setuid(owner.st_uid)
    if not os.access(os.path.expanduser("~"), os.W_OK):  # noqa: PTH111  # Path.home() wants a passwd entry
        os.environ["HOME"] = "/tmp"  # noqa: S108
