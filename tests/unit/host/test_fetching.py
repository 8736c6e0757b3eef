"""Downloads that gpu.jsonc names: whole or not at all, pinned, shared; one that fails or differs leaves nothing."""

import hashlib
import json
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trainbox.errors import ConfigError, EngineError, TrainboxError
from trainbox.host import download, fetching, paths
from trainbox.spec.gpu_config import Download
from trainbox.spec.run import hash_json

DATA = bytes(range(256)) * 20_000
SUM = hashlib.sha256(DATA).hexdigest()


class Files(BaseHTTPRequestHandler):
    """Serves one file; breaks off after `stop` bytes of it, waits `pause` seconds after each piece."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append({name: self.headers[name] for name in ("Range", "Authorization") if self.headers[name]})
        if self.path != "/weights.bin":
            self.send_error(int(self.path[1:4]) if self.path[1:4].isdigit() else 404)
            return
        start = int(self.headers["Range"][6:-1]) if self.headers["Range"] and server.ranges else 0
        body = DATA[start:]
        if self.headers["If-Range"] not in (None, server.version):
            start, body = 0, DATA
        self.send_response(206 if start else 200)
        self.send_header("ETag", server.version)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for at in range(0, len(body), fetching.CHUNK):
            if server.stop is not None and start + at >= server.stop:
                return
            self.wfile.write(body[at : at + fetching.CHUNK])
            time.sleep(server.pause)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path / "cache"))
    found = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    found.asked, found.stop, found.pause, found.ranges, found.version = [], None, 0, True, '"1"'
    found.address = f"http://127.0.0.1:{found.server_port}/weights.bin"
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()


def kept() -> list[str]:
    return [path.name for path in (paths.cache() / "files").rglob("*") if path.is_file() and path.name[0] != "."]


def test_a_file_is_downloaded_once_and_its_sum_is_known(server):
    for _ in range(2):
        path, found = fetching.http(server.address, SUM, 60)
        assert (path.read_bytes(), path.name, found) == (DATA, "weights.bin", SUM)
    assert len(server.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(server, ranges):
    server.stop, server.ranges = 2 * fetching.CHUNK, ranges
    with pytest.raises(EngineError, match=r"goes on where it stopped") as caught:
        fetching.http(server.address, SUM, 60)
    assert server.address in str(caught.value)
    server.stop = None
    assert fetching.http(server.address, SUM, 60)[0].read_bytes() == DATA
    assert "Range" in server.asked[-1]


def test_a_file_that_has_changed_meanwhile_begins_anew(server):
    server.stop = 2 * fetching.CHUNK
    with pytest.raises(EngineError):
        fetching.http(server.address, None, 60)
    server.stop, server.version = None, '"2"'
    path, found = fetching.http(server.address, None, 60)
    assert (path.read_bytes() == DATA, found) == (True, SUM)


def test_a_wrong_sum_leaves_nothing(server):
    with pytest.raises(EngineError, match=f"has the sha256 {SUM}, not 0000"):
        fetching.http(server.address, "0" * 64, 60)
    assert kept() == []
    assert not list((paths.cache() / "files").glob(".*.part"))


def test_a_slow_download_ends_at_its_timeout(server):
    server.pause = 0.2
    with pytest.raises(EngineError, match="no end within its timeout"):
        fetching.http(server.address, SUM, 0.3)
    assert kept() == []


def test_an_address_that_has_nothing_says_so_without_the_key_in_it(server):
    with pytest.raises(EngineError, match="404") as caught:
        fetching.http(server.address.replace("weights", "none") + "?token=sentinel", None, 60)
    assert "sentinel" not in str(caught.value)
    with pytest.raises(TrainboxError) as caught:
        fetching.fetch([Download(strategy="git", source="http://u:sentinel@127.0.0.1:9/x.git")], None, "")
    assert "sentinel" not in str(caught.value)


@pytest.mark.parametrize(
    ("strategy", "source"),
    [
        ("http", "http://127.0.0.1:9/x?token=sentinel"), ("http", "http://u:sentinel@127.0.0.1:9/x"),
        ("civitai", "http://127.0.0.1:9/x?token=sentinel"), ("git", "http://127.0.0.1:9/x?private_token=sentinel"),
    ],
)  # fmt: skip
def test_what_cannot_be_reached_is_told_without_the_key_in_its_address(server, strategy, source):
    with pytest.raises(EngineError) as caught:
        fetching.fetch([Download(strategy=strategy, source=source)], None, "")
    assert "sentinel" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


class Box:
    """Stands in for an engine."""

    def run(self, box, on_line):
        return 0


def fail(watcher, finished):
    raise ConfigError("failed", remedy=f"+ {SCRIPT}")


SCRIPT = "curl -H 'Authorization: Bearer sentinel' http://h/x?key=sentinel; API_TOKEN=sentinel ./x"


@pytest.mark.parametrize("fails", [True, False])
def test_a_script_s_keys_are_neither_told_nor_recorded(server, monkeypatch, capsys, fails):
    monkeypatch.setattr(fetching.image, "ca_bundle", lambda: None)
    monkeypatch.setattr(fetching.Watcher, "raise_for", fail if fails else lambda self, finished: None)
    wanted = [Download(strategy="script", source=SCRIPT, target="x")]
    if fails:
        with pytest.raises(ConfigError, match="curl") as caught:
            fetching.fetch(wanted, Box(), "")
        said = str(caught.value)
    else:
        said = json.dumps(fetching.fetch(wanted, Box(), "")[1])
    said += "".join(path.read_text() for path in paths.cache().rglob(download.FACTS)) + "".join(capsys.readouterr())
    assert f"script {hash_json(SCRIPT)[:16]}" in said
    assert "sentinel" not in said


@pytest.mark.parametrize(
    "shown",
    [
        'API_TOKEN="sentinel" ./get.sh', "curl -u me:sentinel x", "curl -H 'PRIVATE-TOKEN: sentinel' x",
        "X-Api-Key: sentinel", "Authorization: token sentinel", "get --token sentinel", "X_KEY='sentinel'",
        "http://me:sentinel@host/x", "url: /y?token=sentinel (Caused by)",
    ],
)  # fmt: skip
def test_a_key_in_what_a_program_says_is_not_told(shown):
    assert "sentinel" not in fetching.plain(shown)


@pytest.mark.parametrize(
    ("strategy", "path", "remedy"),
    [
        ("http", "401", "no login is sent but what the address itself holds"), ("http", "404", "check the address"),
        ("civitai", "403", "it wants an account: set CIVITAI_TOKEN"), ("http", "503", "try again later"),
    ],
)  # fmt: skip
def test_only_what_broke_on_the_way_is_to_be_tried_again_at_once(server, monkeypatch, strategy, path, remedy):
    monkeypatch.delenv("CIVITAI_TOKEN", raising=False)
    monkeypatch.setenv("TRAINBOX_SECRETS", "/none")
    source = server.address.replace("weights.bin", path)
    with pytest.raises(EngineError, match=f"{path} ") as caught:
        fetching.fetch([Download(strategy=strategy, source=source)], None, "")
    assert remedy in caught.value.remedy
    assert "goes on where it stopped" not in caught.value.remedy


def test_civitai_gets_its_token_in_a_header_alone(server, monkeypatch):
    monkeypatch.setenv("CIVITAI_TOKEN", "sentinel")
    wanted = Download(strategy="civitai", source=server.address)
    fetching.fetch([wanted], None, "")
    assert server.asked[0]["Authorization"] == "Bearer sentinel"


# git


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "trainer"
    (folder / "lib").mkdir(parents=True)
    (folder / "run.py").write_text("print(1)\n")
    (folder / "lib" / "a.py").write_text("")
    run(folder, "init", "-q", "-b", "main", ".")
    commit(folder)
    return folder


def run(folder, *arguments):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(git, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder):
    run(folder, "add", "-A")
    run(folder, "commit", "-qm", "x")
    return run(folder, "rev-parse", "HEAD")


def test_no_source_is_an_option_of_git(repository, tmp_path):
    with pytest.raises(EngineError, match="git cannot fetch it"):
        fetching.git(f"--upload-pack=touch {tmp_path}/ran; git-upload-pack", "main")
    assert not (tmp_path / "ran").exists()


def test_a_commit_s_files_come_without_the_history_and_once(repository):
    first = run(repository, "rev-parse", "HEAD")
    (repository / "run.py").write_text("print(2)\n")
    commit(repository)
    folder, found = fetching.git(str(repository), first)
    assert (found, (folder / "run.py").read_text()) == (first, "print(1)\n")
    assert not (folder / ".git").exists()
    (repository / ".git").rename(repository / "gone")
    assert fetching.git(str(repository), first)[0] == folder


def test_a_branch_and_a_tag_are_pinned_to_their_commit(repository):
    head = run(repository, "rev-parse", "HEAD")
    run(repository, "tag", "-a", "v1", "-m", "x")
    assert {fetching.git(str(repository), name)[1] for name in ("main", "v1", "HEAD")} == {head}


def test_a_branch_is_told_from_others_that_end_like_it_and_from_those_of_its_origin(repository, tmp_path):
    first = run(repository, "rev-parse", "HEAD")
    run(repository, "branch", "release/main")
    run(tmp_path, "clone", "-q", str(repository), "clone")
    clone = tmp_path / "clone"
    (clone / "run.py").write_text("print(2)\n")
    newest = commit(clone)
    assert [fetching.git(str(clone), name)[1] for name in ("HEAD", "main")] == [newest, newest]
    (repository / "run.py").write_text("print(3)\n")
    second = commit(repository)
    assert [fetching.git(str(repository), name)[1] for name in ("main", "release/main")] == [second, first]


@pytest.mark.parametrize(
    ("source", "revision", "error", "message"),
    [
        ("{repository}", "0" * 40, ConfigError, "has no commit 0000"),
        ("{repository}", "release", ConfigError, "has no branch or tag 'release'"),
        ("{repository}/none.git", "main", EngineError, "git cannot fetch it"),
        ("http://127.0.0.1:9/x.git", "0" * 40, EngineError, "git cannot fetch it"),
    ],
)
def test_a_source_that_cannot_be_had_is_told_and_leaves_nothing(repository, source, revision, error, message):
    with pytest.raises(error, match=message):
        fetching.git(source.format(repository=repository), revision)
    assert not [path for path in paths.cache().rglob("*") if path.is_file()]


def test_what_was_fetched_is_mounted_below_the_workspace_with_its_pin(repository):
    wanted = [
        Download(strategy="git", source=str(repository), revision="main"),
        Download(strategy="git", source=str(repository), revision="main", target="/workspace/tools/mine"),
    ]
    mounts, pins = fetching.fetch(wanted, None, "")
    assert [mount.target for mount in mounts] == ["/workspace/trainer", "/workspace/tools/mine"]
    assert {pin["pin"] for pin in pins} == {run(repository, "rev-parse", "HEAD")}
    assert all(mount.read_only for mount in mounts)


def test_the_download_that_failed_is_named(repository, tmp_path):
    wanted = Download(strategy="git", source=str(tmp_path / "none"))
    with pytest.raises(TrainboxError) as caught:
        fetching.fetch([wanted], None, "")
    assert caught.value.place == f"download[0] ({tmp_path / 'none'})"
    assert Path(paths.cache()).is_dir()
