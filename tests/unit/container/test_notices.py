"""Notices of the clouds: their services as small servers of the same routes; what is sent is a real SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from trainbox.container import interrupt, notices
from trainbox.host import paths

SCRIPT = """
import signal, sys, time
from trainbox.container import notices
from trainbox.errors import ConfigError
notices.EVERY = 0.05
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
try:
    notices.watch()
except ConfigError as error:
    sys.exit(str(error))
print("training", flush=True)
for _ in range(600):  # not one sleep: a signal just before it would wait for its end
    time.sleep(0.1)
"""
QUIET, NOTICE = (
    {"aws": [None], "gcp": ["FALSE"], "azure": [{"Events": [{"EventType": "Freeze"}]}, ["of another shape"]]},
    {
        "aws": {"action": "terminate", "time": "2026-11-25T17:00:00Z"},
        "gcp": "TRUE",
        "azure": {"DocumentIncarnation": 2, "Events": [{"EventType": "Preempt", "EventStatus": "Scheduled"}]},
    },
)


class Service(BaseHTTPRequestHandler):
    """The three clouds' routes; each wants its own header, and answers `server.answer`."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        fine = self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._send(200 if fine else 400, "token")

    def do_GET(self) -> None:
        wanted = {
            "/latest/meta-data/spot/instance-action": ("X-aws-ec2-metadata-token", "token"),
            "/computeMetadata/v1/instance/preempted": ("Metadata-Flavor", "Google"),
            "/metadata/scheduledevents?api-version=2020-07-01": ("Metadata", "true"),
        }
        name, value = wanted[self.path]
        if self.headers.get(name) != value:
            return self._send(401, "")
        answer = self.server.answer  # type: ignore[attr-defined]
        self.server.asked.set()  # type: ignore[attr-defined]
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return self._send(404 if answer is None else 200, text)

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def service() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.asked = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def start(notice: str, address: str = "") -> subprocess.Popen[str]:
    env = {"PYTHONPATH": str(paths.SOURCE), "PATH": os.environ["PATH"], "TRAINBOX_NOTICE": notice}
    env |= {"TRAINBOX_NOTICE_ADDRESS": address} if address else {}
    argv = [sys.executable, "-c", SCRIPT]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


@pytest.mark.parametrize("cloud", ["aws", "azure", "gcp"])
def test_a_cloud_s_notice_is_a_sigterm_and_its_silence_is_none(cloud: str, service: Any) -> None:
    service.answer = QUIET[cloud][0]
    process = start(cloud, f"http://127.0.0.1:{service.server_port}")
    for answer in (*QUIET[cloud], None):
        assert service.asked.wait(30)
        service.answer = answer
        service.asked.clear()
    assert process.poll() is None
    service.answer = NOTICE[cloud]
    text, _ = process.communicate(timeout=30)
    assert (process.returncode, f"notice by {cloud}" in text, "Traceback" in text) == (75, True, False), text


def test_a_service_that_is_not_there_yet_is_asked_again(service: Any) -> None:
    address = f"http://127.0.0.1:{service.server_port}"
    service.server_close()
    process = start("gcp", address)
    assert process.stdout
    assert [process.stdout.readline() for _ in range(2)][-1].strip() != ""
    late: Any = ThreadingHTTPServer(("127.0.0.1", service.server_port), Service)
    late.answer, late.asked = "TRUE", threading.Event()
    threading.Thread(target=late.serve_forever, daemon=True).start()
    try:
        text, _ = process.communicate(timeout=30)
    finally:
        late.shutdown()
    assert (process.returncode, "notice by gcp" in text) == (75, True), text


def test_a_file_is_a_notice_once_it_is_there(tmp_path: Path) -> None:
    process = start(f"file:{tmp_path}/notice")
    assert process.stdout
    assert process.stdout.readline() == "training\n"
    (tmp_path / "notice").touch()
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_an_unknown_notice_is_refused() -> None:
    text, _ = start("moon").communicate(timeout=30)
    assert "TRAINBOX_NOTICE: 'moon' is none of aws, azure, gcp, file:/path" in text


def test_the_machine_s_own_sigterm_after_a_notice_is_no_wish_to_stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(notices, "ECHO", 0)
    monkeypatch.setattr(interrupt.os, "_exit", sys.exit)
    asked = interrupt.Interrupt()
    asked.training = True
    notices._echoes.append(signal.SIGTERM)
    for _ in range(2):
        asked._handle(signal.SIGTERM, None)
    assert asked.asked
    with pytest.raises(SystemExit):
        asked._handle(signal.SIGTERM, None)
