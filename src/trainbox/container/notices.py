"""The notice that a cloud gives before it takes a machine back: it leads to the same stop as SIGTERM.

TRAINBOX_NOTICE says where it comes from: `aws`, `azure` or `gcp`, whose machines are asked every few seconds, or
`file:/path`, a file that somebody makes. Without it nothing is asked.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from trainbox.container.report import emit
from trainbox.errors import ConfigError

EVERY = 2.0
"""Seconds between two looks. Of notice, AWS gives 120 seconds, Azure and Google at least 30."""
PATIENCE = 10.0
"""Seconds in which a machine's own service answers."""
HARMLESS = "Freeze"
"""The one of Azure's events that a process survives."""

_echoes: list[int] = []
_open = build_opener(ProxyHandler({})).open


def watch() -> None:
    """Begin to look for the notice that the environment asks for. Raises ConfigError where it asks for none that is."""
    wanted = os.environ.get("TRAINBOX_NOTICE", "")
    if not wanted:
        return
    kind, _, path = wanted.partition(":")
    if kind == "file" and path:
        look: Callable[[], bool] = Path(path).exists
    elif wanted in CLOUDS:
        look = CLOUDS[wanted]
    else:
        known = ", ".join(CLOUDS)
        raise ConfigError(f"{wanted!r} is none of {known}, file:/path", place="TRAINBOX_NOTICE")
    threading.Thread(target=_wait, args=(wanted, look), daemon=True).start()


def _wait(name: str, look: Callable[[], bool]) -> None:
    told, pause = False, threading.Event()
    while True:
        try:
            if look():
                break
        except Exception as error:  # a service that is late or busy may answer the next time, whatever it said now
            if not told:
                emit("warn", text=f"no word of whether {name} takes this machine back: {error}; asking again")
            told = True
        pause.wait(EVERY)
    emit("note", text=f"notice by {name}: this machine is being taken back")
    _echoes.append(signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


ECHO = 1.0
"""Seconds in which a second signal is the first one's echo: a killed harness with threads makes the kernel send two.

The engine's client hands on one after the other, and a busy engine takes a while for each.
"""


def is_echo(number: int, first: float) -> bool:
    """Whether a signal after the `first` one (monotonic seconds) is no wish to stop at once.

    It is the first one's echo, or what a notice told of, the machine's own SIGTERM.
    """
    if time.monotonic() - first < ECHO:
        return True
    if number in _echoes:
        _echoes.remove(number)
        return True
    return False


def _aws() -> bool:
    """Source: Amazon EC2's user guide, "Spot Instance interruption notices", with a token of IMDSv2."""
    token = _ask("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    return _ask("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}) != ""


def _azure() -> bool:
    """Source: Azure's "Scheduled Events for Linux VMs"."""
    events = json.loads(_ask("/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"}) or "{}")
    return any(event.get("EventType") != HARMLESS for event in events.get("Events", ()))


def _gcp() -> bool:
    """Source: Google Compute Engine's "Preemptible VM instances", detection through the metadata server."""
    return _ask("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}).strip() == "TRUE"


def _ask(path: str, headers: Mapping[str, str], method: str = "GET") -> str:
    """What the machine's metadata service says; empty for a thing that is not there."""
    address = os.environ.get("TRAINBOX_NOTICE_ADDRESS", "http://169.254.169.254")
    try:
        with _open(Request(address + path, headers=dict(headers), method=method), timeout=PATIENCE) as answer:  # noqa: S310
            return str(answer.read().decode())
    except HTTPError as error:
        if error.code == 404:
            return ""
        raise


CLOUDS: dict[str, Callable[[], bool]] = {"aws": _aws, "azure": _azure, "gcp": _gcp}
