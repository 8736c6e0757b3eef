"""Which gpu.jsonc counts, what becomes of it in an image, and the one that is written for GPU CLI."""

import json

import pytest

from trainbox.errors import ConfigError, EngineError, HardwareError
from trainbox.host import doctoring, gpu_config, hardware, image, locks, paths, planning
from trainbox.host.environment import Environment
from trainbox.spec.gpu_config import GpuConfig, Step, read_gpu_config
from trainbox.spec.load import Choices, load_recipe
from trainbox.spec.recipe.llm import SftRecipe
from trainbox.spec.recipe.sections import Model


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "project").mkdir()
    (tmp_path / "project/recipe.yaml").write_text("recipe: llm-lora\n")

    def write(**fields):
        (tmp_path / "project/gpu.jsonc").write_text(json.dumps(fields))
        return Choices("llm-lora", config=str(tmp_path / "project/recipe.yaml"))

    return write


def test_the_file_beside_config_is_laid_over_the_project_s_own(project):
    own = gpu_config.for_run(Choices("llm-lora"))
    laid = gpu_config.for_run(project(gpu_type="H100", outputs=["checkpoints/", "output/", "/workspace/results/"]))
    assert [gpu.type for gpu in laid.wanted] == ["H100"]
    assert laid.idle_minutes == own.idle_minutes
    assert gpu_config.outputs(laid) == ["checkpoints", "results"]


def test_output_folders_have_one_name_each_and_none_is_inside_another(project):
    given = ["./results/", "results", "/workspace/results/a", "output/samples", "final", "logs"]
    assert gpu_config.outputs(gpu_config.for_run(project(outputs=given))) == ["results", "final", "logs"]


def test_every_gpu_jsonc_of_this_project_loads():
    files = [paths.REPO / "gpu.jsonc", *paths.REPO.glob("recipes/*/gpu.jsonc")]
    assert all(read_gpu_config(file).wanted for file in files)


def test_a_requirements_file_is_found_beside_its_gpu_jsonc_or_told(project, tmp_path):
    choices = project(environment={"python": {"requirements": "requirements.txt"}})
    with pytest.raises(ConfigError, match=r"there is no .*requirements\.txt") as caught:
        gpu_config.for_run(choices)
    assert caught.value.place.endswith("gpu.jsonc: environment.python.requirements")
    (tmp_path / "project/requirements.txt").write_text("six==1.16.0 --hash=sha256:" + "0" * 64)
    found = gpu_config.environment(gpu_config.for_run(choices), SftRecipe())
    assert found.lock == tmp_path / "project/requirements.txt"


def test_steps_are_layers_or_commands_of_each_start(project):
    steps = [{"run": "a", "only_once": True, "timeout_sec": 5}, {"run": "b"}]
    found = gpu_config.environment(gpu_config.for_run(project(environment={"shell": {"steps": steps}})), SftRecipe())
    assert ([step.run for step in found.steps], [step.run for step in found.start]) == (["a"], ["b"])
    builds = image.plan("llm-lora", "root", found)
    assert [build.name for build in builds] == ["base", "llm-lora-deps", "llm-lora-env", "llm-lora"]
    assert builds[3].args["BASE"] == builds[2].tag
    assert json.loads(builds[3].files["recipe/setup.json"])[0]["run"] == "b"


def test_a_recipe_without_any_has_the_image_it_had():
    own = Environment()
    assert own.files == {}
    assert [build.name for build in image.plan("llm-lora", "root", own)] == ["base", "llm-lora-deps", "llm-lora"]


def test_the_whole_dockerfile_of_an_environment(tmp_path):
    (tmp_path / "tree/lib").mkdir(parents=True)
    (tmp_path / "tree/lib/a.py").write_text("")
    (tmp_path / "tree/.trainbox.json").write_text("{}")
    (tmp_path / "r.lock").write_text("")
    steps = (Step(run="git clone x\npip install -r x/requirements.txt", only_once=True, timeout_sec=60),)
    own = Environment(apt=("jq",), lock=tmp_path / "r.lock", steps=steps, trainer=("sd", tmp_path / "tree"))
    mounts = (
        "--mount=type=tmpfs,target=/run --mount=type=tmpfs,target=/tmp --mount=type=secret,id=ca "
        "--mount=type=secret,id=net --mount=type=cache,id=trainbox,target=/run/cache"
    )
    apt = "apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends jq git"
    clean = "find /var/lib/apt/lists /var/cache/apt /var/log -type f -delete"
    copy = "mkdir -p /workspace && cp -r --no-preserve=all /run/trainer /workspace/sd"
    lock, tree, step = (
        f"RUN {mounts} --mount=type=bind,source={name},target=/run/{name}" for name in ("job.lock", "trainer", "step-0")
    )
    assert own.files["Dockerfile"].decode().splitlines() == [
        "ARG BASE",
        "FROM ${BASE}",
        f"RUN {mounts} trainbox-install --run '{apt} && {clean}'",
        f"{lock} trainbox-install --job /run/job.lock",
        f"{tree} trainbox-install --run '{copy}'",
        f"{step} trainbox-install --step 60 /run/step-0  # environment.shell.steps[0]",
    ]
    assert list(own.files) == ["Dockerfile", "job.lock", "trainer/lib/a.py", "step-0"]
    assert own.files["step-0"] == steps[0].run.encode()


class Engine:
    """Stands in for an engine that has the image `mine`, and a registry that has `theirs`."""

    def inspect(self, name):
        return {"RepoDigests": ["mine@sha256:1"]} if name == "mine" else None

    def registry_digest(self, name):
        return "sha256:2" if name == "theirs" else None


def test_a_base_image_is_pinned_by_its_digest_or_told():
    assert [image._pinned(name, Engine()) for name in ("mine", "theirs", "x@sha256:3")] == [
        "mine@sha256:1", "theirs@sha256:2", "x@sha256:3",
    ]  # fmt: skip
    with pytest.raises(EngineError, match="neither here nor in a registry"):
        image._pinned("none", Engine())


def test_the_model_of_the_recipe_is_not_fetched_twice_and_has_its_timeout(project):
    recipe = SftRecipe()
    model = {"strategy": "hf", "source": recipe.model.name, "timeout": 7}
    config = gpu_config.for_run(project(download=[model, {"strategy": "http", "source": "http://x/y"}]))
    assert gpu_config.model_timeout(config, recipe) == 7
    assert [each.source for each in gpu_config.downloads(config, recipe)] == ["http://x/y"]


def test_the_model_is_taken_at_the_revision_that_gpu_jsonc_pins(project):
    name = load_recipe(paths.REPO / "recipes/llm-lora", Choices("llm-lora")).model.name
    choices = project(download=[{"strategy": "hf", "source": name, "revision": "v1", "allow": "*.safetensors"}])
    assert planning.budgeted(load_recipe(paths.REPO / "recipes/llm-lora", choices), choices).model.revision == "v1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"revision": "v2"}, r"download\[0\].revision: is v2, but model.revision is v1"),
        ({"allow": ["*.bin"]}, r"download\[0\].allow: \*.bin: of the recipe's own model all weights are loaded"),
    ],
)
def test_a_download_of_the_model_that_cannot_be_the_one_that_is_trained_is_refused(project, fields, message):
    recipe = SftRecipe(model=Model(name="a/b", revision="v1"))
    config = gpu_config.for_run(project(download=[{"strategy": "hf", "source": "a/b", **fields}]))
    with pytest.raises(ConfigError, match=message):
        gpu_config.pinned(config, recipe)
    elsewhere = gpu_config.for_run(project(download=[{"strategy": "hf", "source": "a/b", "target": "c", **fields}]))
    assert gpu_config.pinned(elsewhere, recipe) == recipe


def test_a_clone_that_is_not_there_is_told_before_anything_is_built(project, tmp_path):
    with pytest.raises(ConfigError, match=r"gpu\.jsonc: download\[0\]\.source: there is no .*/none"):
        gpu_config.for_run(project(download=[{"strategy": "git", "source": str(tmp_path / "none")}]))
    for source in (str(tmp_path), "https://example.org/a.git", "git@example.org:a.git"):
        assert gpu_config.for_run(project(download=[{"strategy": "git", "source": source}])).download


def test_a_recipe_s_own_download_of_its_model_is_not_wanted_for_another_model():
    for name in ("sdxl-lora-kohya", "flux-lora-ai-toolkit"):
        config = gpu_config.for_run(Choices(name))
        recipe = load_recipe(paths.REPO / "recipes" / name, Choices(name))
        assert [each.source for each in config.download] == [recipe.model.name]
        assert gpu_config.downloads(config, recipe) == []
        assert gpu_config.model_timeout(config, recipe) in (3600, 7200)
        assert gpu_config.for_run(Choices(name, "tiny")).download == []


def test_a_gpu_with_less_memory_than_min_vram_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(hardware, "gpus", lambda: [hardware.Gpu("RTX 4090", 23.99, "999", "8.9")])
    assert hardware.check("auto", {}, 24)
    with pytest.raises(HardwareError, match=r"it has 23\.99 GB, gpu\.jsonc's min_vram is 48"):
        hardware.check("auto", {}, 48)


def test_what_is_written_for_gpu_cli_can_be_read_and_names_the_whole_command(tmp_path, capsys):
    target, choices = tmp_path / "gpu.jsonc", Choices("llm-qlora", model="Qwen/Qwen3-4B")
    gpu_config.write(choices, target, overwrite=False)
    config = read_gpu_config(target)
    assert config.wanted[0].type == "RTX 4090"
    assert "gpu run make train RECIPE=llm-qlora MODEL=Qwen/Qwen3-4B" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is there already"):
        gpu_config.write(choices, target, overwrite=False)


@pytest.mark.parametrize(("recipe", "least"), [("llm-qlora", None), ("flux-lora-ai-toolkit", 48)])
def test_the_memory_that_a_gpu_must_have_is_written_only_where_it_was_asked_for(tmp_path, recipe, least):
    gpu_config.write(Choices(recipe), tmp_path / "gpu.jsonc", overwrite=False)
    assert read_gpu_config(tmp_path / "gpu.jsonc").min_vram == least


@pytest.mark.parametrize(("name", "message"), [("none/gpu.jsonc", "there is no folder .*/none"), ("", "is a folder")])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_that_can_never_be_is_refused_by_the_variable_that_names_it(tmp_path, name, message, overwrite):
    with pytest.raises(ConfigError, match=message) as caught:
        gpu_config.write(Choices("llm-qlora"), tmp_path / name, overwrite=overwrite)
    assert caught.value.place.startswith("OUTPUT=")


def test_doctor_lists_what_is_left_to_gpu_cli_and_no_secret(project, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "sentinel")
    doctoring.doctor(project(gpu_type="H100", ports=[8080], serverless={}))
    said = capsys.readouterr().out
    assert "left to GPU CLI: ports, serverless" in said
    assert "HF_TOKEN is set" in said
    assert "sentinel" not in said


def test_a_lock_over_the_base_leaves_out_what_the_base_has_and_is_kept(tmp_path, monkeypatch):
    base = locks.base_versions()
    compiled = f"""numpy=={base["numpy"]} \\
    --hash=sha256:1
    # via mine
mine==2.0 \\
    --hash=sha256:2
torch=={base["torch"]} ; sys_platform == 'linux' \\
    --hash=sha256:3
"""
    seen = []

    def run(argv, cwd):
        seen.append(argv)
        staged = argv[argv.index("--output-file") + 1]
        preferred = open(staged).read().splitlines()  # noqa: PTH123, SIM115
        assert f"torch=={base['torch']}" in preferred
        open(staged, "w").write(compiled)  # noqa: PTH123, SIM115

    monkeypatch.setattr(locks.shell, "run", run)
    source = tmp_path / "requirements.txt"
    source.write_text("mine\n")
    lock = locks.lock_job(source)
    assert lock.read_text().splitlines()[1:] == ["mine==2.0 \\", "    --hash=sha256:2"]
    assert locks.lock_job(source) == lock
    assert len(seen) == 1
    source.write_text("mine==2\n")
    locks.lock_job(source)
    assert len(seen) == 2


def test_overrides_beside_a_file_beat_what_its_packages_and_the_base_ask_for(tmp_path, monkeypatch):
    seen = {}

    def run(argv, cwd):
        constraints = argv[argv.index("--constraint") + 1]
        seen["argv"], seen["kept"] = argv, (cwd / constraints).read_text()
        staged = argv[argv.index("--output-file") + 1]
        text = f"setuptools==69.5.1 \\\n    --hash=sha256:1\n    # via -c {constraints}\n"
        open(staged, "w").write(text)  # noqa: PTH123, SIM115

    monkeypatch.setattr(locks.shell, "run", run)
    source = tmp_path / "requirements.txt"
    source.write_text("mine\n")
    (tmp_path / "requirements.overrides").write_text("# why\nsetuptools==69.5.1\n")
    lock = locks.lock_job(source)
    assert seen["argv"][seen["argv"].index("--override") + 1] == "requirements.overrides"
    assert "\ntorch==" in seen["kept"]
    assert "\nsetuptools==" not in seen["kept"]
    assert "setuptools==69.5.1" in lock.read_text()
    assert lock.read_text().rstrip().endswith("docker/base/requirements-torch.lock")


def test_both_ways_to_name_packages_make_one_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path))
    seen = []
    monkeypatch.setattr(locks, "_compile_over_base", lambda *sources: seen.append([s.read_text() for s in sources]))
    (tmp_path / "r.txt").write_text("a\n")
    config = GpuConfig.model_validate({"environment": {"python": {
        "requirements": str(tmp_path / "r.txt"), "pip_global": [{"name": "b", "version": "1.2"}, {"name": "c"}],
    }}})  # fmt: skip
    assert gpu_config.environment(config, SftRecipe()).lock == tmp_path / "r.lock"
    assert seen == [["a\n", "b==1.2\nc\n"]]


def test_a_lock_of_another_tool_is_never_overwritten(tmp_path):
    (tmp_path / "requirements.txt").write_text("six\n")
    lock = tmp_path / "requirements.lock"
    lock.write_text("six==1.16.0\n")
    for source in (tmp_path / "requirements.txt", lock):
        with pytest.raises(ConfigError, match="is another tool's lock"):
            locks.lock_job(source)
    assert lock.read_text() == "six==1.16.0\n"


def test_a_lock_is_made_anew_when_a_file_that_it_includes_changes(tmp_path):
    (tmp_path / "more.txt").write_text("a\n")
    source = tmp_path / "requirements.txt"
    source.write_text("-r more.txt\nsix\n")
    before = locks._mark(source)
    (tmp_path / "more.txt").write_text("b\n")
    assert locks._mark(source) != before


def test_the_fingerprint_of_an_environment_follows_its_files(project, tmp_path):
    (tmp_path / "project/requirements.txt").write_text("six\n")
    choices = project(environment={"python": {"requirements": "requirements.txt"}})
    before = gpu_config.fingerprint(gpu_config.for_run(choices), SftRecipe())
    (tmp_path / "project/requirements.txt").write_text("six==1.16.0\n")
    assert gpu_config.fingerprint(gpu_config.for_run(choices), SftRecipe()) != before
    assert gpu_config.fingerprint(GpuConfig(), SftRecipe()) == ""


def test_doctor_refuses_a_recipe_and_a_config_that_are_not_there(tmp_path):
    for choices in (Choices("nope"), Choices("llm-lora", config=str(tmp_path / "none.yaml"))):
        with pytest.raises(ConfigError, match="there is no"):
            doctoring.doctor(choices)
