from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
import stat
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainbox.errors import ConfigError, EngineError
from trainbox.host import image, locks, paths, shell, ui

REPO = Path(__file__).parents[3]
RECIPES = sorted(path.parent.name for path in REPO.glob("recipes/*/Dockerfile"))


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout of one recipe."""
    files = {
        "docker/pins.json": json.dumps(
            {
                "root": {"image": "debian:trixie-slim", "digest": ""},
                "cuda": {"version": "13.0", "min_driver": "580", "compute_capabilities": "8.0 9.0"},
            }
        ),
        "docker/base/Dockerfile": "FROM x",
        "docker/base/packages.txt": "gcc",
        "docker/base/requirements.lock": "torch==1",
        "docker/rootfs/build": "#!/bin/sh",
        "docker/source/Dockerfile": "FROM y",
        "recipes/r/Dockerfile": "FROM z",
        "recipes/r/requirements.lock": "gguf==1",
        "recipes/r/recipe.yaml": "task: sft",
        "recipes/r/README.md": "r",
        "recipes/r/sample/rows.jsonl": "{}",
        "src/trainbox/errors.py": "",
        "src/trainbox/host/ui.py": "",
        "src/trainbox/__pycache__/errors.pyc": "",
    }
    for name, text in files.items():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_text(text)
    monkeypatch.setattr(paths, "REPO", tmp_path / "repo")
    monkeypatch.setattr(paths, "SOURCE", tmp_path / "repo/src")
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path / "cache"))
    for name in (*image.NET_VARIABLES, *image.CA_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(image, "CA_FILES", ())
    return tmp_path / "repo"


class Engine:
    """Stands in for the engine: images by tag, and a registry that has `digest` or is out of reach."""

    def __init__(self, digest: str | None = None) -> None:
        self.images: dict[str, dict[str, Any]] = {}
        self.digest, self.builder, self.calls = digest, ["docker"], 0

    def inspect(self, tag: str) -> dict[str, Any] | None:
        self.calls += 1
        return self.images.get(tag)

    def registry_digest(self, name: str) -> str | None:
        return self.digest

    def stream(self, argv: list[str], on_line: Any, env: Any = None, stdin: bytes = b"") -> int:
        """What the clients would do: build, import, bootstrap."""
        if argv[1] == "build":
            labels = [part for flag, part in itertools.pairwise(argv) if flag in ("--label", "--build-arg")]
            self.images[argv[argv.index("--tag") + 1]] = built(dict(label.split("=", 1) for label in labels))
        elif argv[1] == "import":
            self.images[argv[3]] = built({})
        else:
            Path(argv[1]).write_text("tar")
        return 0


def built(labels: dict[str, str]) -> dict[str, Any]:
    return {"Id": "sha256:1", "RootFS": {"Layers": ["sha256:root"]}, "Config": {"Labels": labels}}


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = Engine()
    monkeypatch.setattr(shell, "stream", found.stream)
    return found


def test_contexts_hold_what_each_image_needs(repo: Path) -> None:
    base, packages, source = image.plan("r", "root")
    assert sorted(base.files) == ["Dockerfile", "packages.txt", "requirements.lock"]
    assert sorted(packages.files) == ["Dockerfile", "requirements.lock"]
    assert sorted(source.files) == [
        "Dockerfile",
        "recipe/recipe.yaml",
        "recipe/sample/rows.jsonl",
        "trainbox/errors.py",
    ]
    assert packages.args == {"BASE": base.tag}
    assert source.args == {"BASE": packages.tag, "RECIPE": "r"}
    assert base.args == {
        "ROOT": "root", "CUDA_VERSION": "13.0", "MIN_DRIVER": "580", "COMPUTE_CAPABILITIES": "8.0 9.0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("docker/base/requirements.lock", [True, True, True]),
        ("recipes/r/requirements.lock", [False, True, True]),
        ("recipes/r/sample/rows.jsonl", [False, False, True]),
        ("src/trainbox/errors.py", [False, False, True]),
        ("src/trainbox/host/ui.py", [False, False, False]),
        ("recipes/r/README.md", [False, False, False]),
    ],
)
def test_an_edit_changes_the_tags_it_should(repo: Path, file: str, changed: list[bool]) -> None:
    before = [build.tag for build in image.plan("r", "root")]
    (repo / file).write_text("edited")
    after = [build.tag for build in image.plan("r", "root")]
    assert [old != new for old, new in zip(before, after, strict=True)] == changed


def test_tags_and_contexts_are_the_same_in_every_clone(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = image.plan("r", "root")
    tars = [image.context(build.files) for build in first]
    clone = tmp_path / "clone"
    shutil.copytree(repo, clone, copy_function=shutil.copyfile)
    (clone / "recipes/r/Dockerfile").chmod(0o600)
    monkeypatch.setattr(paths, "REPO", clone)
    monkeypatch.setattr(paths, "SOURCE", clone / "src")
    second = image.plan("r", "root")
    assert [build.tag for build in second] == [build.tag for build in first]
    assert [image.context(build.files) for build in second] == tars


def test_a_mode_that_git_keeps_counts(repo: Path) -> None:
    before = image.plan("r", "root")[0].tag
    (repo / "docker/base/Dockerfile").chmod(0o755)
    assert image.plan("r", "root")[0].tag != before


def test_a_context_carries_no_owner_and_no_time(repo: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(image.context(image.plan("r", "root")[2].files))) as tar:
        entries = tar.getmembers()
    names = [entry.name for entry in entries]
    assert names == sorted(names)
    assert {"recipe", "recipe/sample", "trainbox"} <= set(names)
    assert {(entry.uid, entry.gid, entry.mtime) for entry in entries} == {(0, 0, image.EPOCH)}


def test_the_whole_build_line(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = image.Build("r", {}, {"BASE": "b", "RECIPE": "r"})
    secrets = {"net": Path("/s/net"), "ca": Path("/etc/ca.pem")}
    line = image.build_argv(build, ["/bin/docker"], secrets, {"REVISION": "abc"})
    assert line == [
        "/bin/docker", "build", "--progress=plain", "--tag", build.tag,
        "--build-arg", "BASE=b", "--build-arg", "RECIPE=r", "--build-arg", "REVISION=abc",
        "--secret", "id=ca,src=/etc/ca.pem", "--secret", "id=net,src=/s/net", "-",
    ]  # fmt: skip
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:3128")
    assert image.build_argv(build, ["docker"], {}, {})[-3:] == ["--network", "host", "-"]


def test_an_image_on_the_official_root_says_so(repo: Path) -> None:
    build = image.Build("base", {}, {"ROOT": "debian@sha256:1"})
    line = image.build_argv(build, ["docker"], {}, {})
    assert line[line.index("--label") + 1] == "org.trainbox.root=debian@sha256:1"


def test_network_settings_reach_a_build_as_secrets(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with image._build_secrets() as secrets:
        assert secrets == {}
    (tmp_path / "ca.pem").write_text("PEM")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("https_proxy", "http://u:it's@proxy:1")
    with image._build_secrets() as secrets:
        assert secrets["ca"] == tmp_path / "ca.pem"
        assert stat.S_IMODE(secrets["net"].stat().st_mode) == 0o600
        told = shell.run(["sh", "-c", f'. {secrets["net"]}; echo "$https_proxy"'], env={"https_proxy": ""})
        assert told.stdout == "http://u:it's@proxy:1\n"
    assert not secrets["net"].exists()


def test_the_bundle_of_authorities_is_found_wherever_the_host_keeps_it(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, named = tmp_path / "system.crt", tmp_path / "named.crt"
    system.write_text("PEM")
    named.write_text("PEM")
    monkeypatch.setattr(image, "CA_FILES", (str(tmp_path / "none.crt"), str(system)))
    for variable, found in (("", system), ("PIP_CERT", named), ("REQUESTS_CA_BUNDLE", named)):
        if variable:
            monkeypatch.setenv(variable, str(named))
        with image._build_secrets() as secrets:
            assert secrets["ca"] == found
        if variable:
            monkeypatch.delenv(variable)


def test_a_second_ensure_is_one_look_up(repo: Path, docker: Engine) -> None:
    first = image.ensure("r", docker)  # type: ignore[arg-type]
    docker.calls = 0
    assert image.ensure("r", docker) == first  # type: ignore[arg-type]
    assert docker.calls == 1


def test_without_a_registry_the_root_is_bootstrapped_and_the_record_says_so(repo: Path, docker: Engine) -> None:
    facts = image.ensure("r", docker)  # type: ignore[arg-type]
    assert facts.root == "rootfs:sha256:root"
    assert facts.locks == {
        "docker/base/requirements.lock": hashlib.sha256(b"torch==1").hexdigest(),
        "recipes/r/requirements.lock": hashlib.sha256(b"gguf==1").hexdigest(),
    }
    assert [tag.partition(":")[0] for tag in docker.images] == [
        "trainbox/root", "trainbox/base", "trainbox/r-deps", "trainbox/r",
    ]  # fmt: skip
    assert image.read_pins()["root"]["digest"] == ""


def test_a_registry_s_digest_is_pinned_at_the_first_build_that_reaches_one(repo: Path, docker: Engine) -> None:
    docker.digest = "sha256:abc"
    image.ensure("r", docker)  # type: ignore[arg-type]
    assert image.read_pins()["root"]["digest"] == "sha256:abc"
    base = next(found for tag, found in docker.images.items() if tag.startswith("trainbox/base"))
    assert base["Config"]["Labels"]["org.trainbox.root"] == "debian:trixie-slim@sha256:abc"
    docker.digest = None
    docker.calls = 0
    image.ensure("r", docker)  # type: ignore[arg-type]
    assert docker.calls == 1


def test_a_pinned_root_out_of_reach_falls_back(repo: Path, docker: Engine) -> None:
    pins = image.read_pins()
    pins["root"]["digest"] = "sha256:abc"
    (repo / "docker/pins.json").write_text(json.dumps(pins))
    assert image.ensure("r", docker).root == "rootfs:sha256:root"  # type: ignore[arg-type]


def test_a_recipe_without_a_dockerfile_is_a_config_error(repo: Path) -> None:
    with pytest.raises(ConfigError, match="no Dockerfile"):
        image.plan("none", "root")


LOG = """#1 [internal] load build definition from Dockerfile
#1 DONE 0.0s
#4 [1/3] FROM docker.io/trainbox/base
#4 CACHED
#5 [stage-0 2/3] RUN --mount=type=tmpfs,target=/run pip install x
#5 sha256:74df5fb033b291d734e969544675d3583eab8306b82021ae877d4de61ff8ec9d
#5 0.300 Collecting x
#5 1.2 ERROR: No matching distribution
#5 ERROR: executor failed running [/bin/sh -c pip install x]: exit code: 1
------
 > [2/3] RUN pip install x:
------
executor failed"""


def test_a_failed_build_tells_what_its_step_said(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    progress = SimpleNamespace(update=lambda **given: seen.append(given))
    log = image.BuildLog(progress)  # type: ignore[arg-type]
    for line in LOG.splitlines():
        log.take(line)
    assert log.last_lines() == ["RUN pip install x", "Collecting x", "ERROR: No matching distribution"]
    assert {"completed": 1, "total": 3, "note": "RUN pip install x"} in seen
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy:1")
    assert log.last_lines()[-1] == "the build used the proxy http://***@proxy:1: is it right?"


def test_a_build_that_fails_is_an_engine_error(repo: Path, docker: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(argv: list[str], on_line: Any, **_: Any) -> int:
        if argv[1] != "build":
            return docker.stream(argv, on_line)
        on_line("dockerfile parse error line 3")
        return 1

    monkeypatch.setattr(shell, "stream", stream)
    with pytest.raises(EngineError) as caught:
        image.ensure("r", docker)  # type: ignore[arg-type]
    assert str(caught.value).startswith("trainbox/base:")
    assert caught.value.remedy == "dockerfile parse error line 3"


def test_every_recipe_can_be_planned() -> None:
    assert RECIPES
    for recipe in RECIPES:
        assert all(build.tag for build in image.plan(recipe, "root"))


def test_locks_are_refreshed_in_order_and_the_changes_told(
    repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "requirements",
        "requirements-cloud",
        "docker/base/installer",
        "docker/base/requirements-torch",
        "recipes/r/requirements",
    ):
        (repo / f"{name}.in").write_text("x")
    (repo / "docker/base/requirements.in").write_text("torch")
    seen: list[list[str]] = []

    def run(argv: list[str], cwd: Path) -> None:
        seen.append(argv[1:])
        if cwd == repo / "recipes/r":
            (cwd / argv[-1]).write_text("gguf==2 \\\n    --hash=sha256:1\nnew-one==1 ; sys_platform == 'x' \\\n")

    monkeypatch.setattr(locks.shell, "run", run)
    assert locks.lock() == [
        "recipes/r/requirements.lock: gguf 1 -> 2",
        "recipes/r/requirements.lock: new-one (new) -> 1",
    ]
    common = [
        "pip", "compile", "--quiet", "--upgrade", "--universal", "--python-version", "3.11", "--generate-hashes",
        "--no-emit-index-url", "--no-header",
    ]  # fmt: skip
    assert seen == [
        [*common, "requirements.in", "--output-file", "requirements.lock"],
        [*common, "requirements-cloud.in", "--output-file", "requirements-cloud.lock"],
        [*common, "installer.in", "--output-file", "installer.lock"],
        [*common, "requirements-torch.in", "--output-file", "requirements-torch.lock"],
        [*common, "--constraint", "requirements-torch.lock", "requirements.in", "--output-file",
         "requirements.lock"],
        [*common, "--constraint", "../../docker/base/requirements.lock", "requirements.in", "--output-file",
         "requirements.lock"],
    ]  # fmt: skip
    assert "gguf 1 -> 2" in capsys.readouterr().out


def test_say_is_used_for_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ui.Progress("image x"):
        pass
    assert capsys.readouterr().out.startswith("image x ...\n")
