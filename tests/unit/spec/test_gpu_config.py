"""gpu.jsonc: every field of GPU CLI's loads, known projects mean the same, a fault is told by its line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbox.errors import ConfigError
from trainbox.spec.gpu_config import GpuConfig, acted_on, merged, read_gpu_config, strip_comments


def read(tmp_path: Path, text: str) -> GpuConfig:
    (tmp_path / "gpu.jsonc").write_text(text, encoding="utf-8")
    return read_gpu_config(tmp_path / "gpu.jsonc", "gpu.jsonc")


LLM = """// A QLoRA project.
{
  "$schema": "x", "project_id": "llm", "provider": "runpod",
  "gpu_type": "RTX 4090", /* one is enough */ "min_vram": 24,
  "outputs": ["output/", "logs/"], "cooldown_minutes": 15,
  "download": [{"strategy": "hf", "source": "meta-llama/Llama-3.1-8B-Instruct", "timeout": 7200}],
  "environment": {"python": {"requirements": "requirements.txt"}},
}"""
KOHYA = """{
  "gpu_type": "RTX 4090", "min_vram": 24, "outputs": ["output/"],
  "download": [{"strategy": "hf", "source": "stabilityai/stable-diffusion-xl-base-1.0",
                "allow": "*.safetensors", "timeout": 3600}],
  "environment": {"shell": {"steps": [
    {"run": "git clone https://example.org/sd-scripts /workspace/sd-scripts", "only_once": true},
    {"run": "cd /workspace/sd-scripts && pip install -r requirements.txt", "only_once": true},
  ]}},
}"""
FLUX = """{
  "gpu_type": "A100 PCIe 80GB", "min_vram": 48, "outputs": ["output/"],
  "download": [{"strategy": "hf", "source": "black-forest-labs/FLUX.1-dev", "allow": ["*.safetensors"],
                "timeout": 7200}],
  "environment": {"shell": {"steps": [
    {"run": "git clone https://example.org/ai-toolkit /workspace/ai-toolkit", "only_once": true}]}},
}"""
VIT = """{
  "gpu_type": "RTX 4090", "min_vram": 12, "outputs": ["checkpoints/", "results/"],
  "download": [{"strategy": "hf", "source": "google/vit-base-patch16-224"}],
}"""
SEVERAL = '{"gpu_type": "A100 SXM 80GB", "gpu_count": 2}'


@pytest.mark.parametrize(
    ("text", "gpu", "count", "min_vram", "source", "allow", "timeout"),
    [
        (LLM, "RTX 4090", 1, 24, "meta-llama/Llama-3.1-8B-Instruct", [], 7200),
        (KOHYA, "RTX 4090", 1, 24, "stabilityai/stable-diffusion-xl-base-1.0", ["*.safetensors"], 3600),
        (FLUX, "A100 PCIe 80GB", 1, 48, "black-forest-labs/FLUX.1-dev", ["*.safetensors"], 7200),
        (VIT, "RTX 4090", 1, 12, "google/vit-base-patch16-224", [], 3600),
        (SEVERAL, "A100 SXM 80GB", 2, None, None, None, None),
    ],
    ids=["LLM QLoRA", "SDXL with kohya", "FLUX with ai-toolkit", "ViT classifier", "several GPUs"],
)
def test_the_projects_that_people_have_load_unchanged(tmp_path, text, gpu, count, min_vram, source, allow, timeout):
    config = read(tmp_path, text)
    assert [(each.type, each.count) for each in config.wanted] == [(gpu, count)]
    assert config.min_vram == min_vram
    found = [(each.source, each.allow, each.timeout) for each in config.download]
    assert found == ([(source, allow, timeout)] if source else [])


def test_old_and_new_names_mean_the_same(tmp_path):
    assert read(tmp_path, LLM).idle_minutes == read(tmp_path, '{"keep_alive_minutes": 15}').idle_minutes == 15
    new = read(tmp_path, '{"gpu_types": [{"type": "RTX 4090"}, {"type": "H100", "count": 2}]}')
    assert [(each.type, each.count) for each in new.wanted] == [("RTX 4090", 1), ("H100", 2)]


FIELDS = [
    "profile", "cloud_type", "regions", "region", "encryption", "exclude_outputs", "outputs_enabled", "include",
    "storage_mode", "provider", "network_volume_id", "volume_mode", "dedicated_volume_id", "workspace_size_gb",
    "ports", "persistent_proxy", "resume_timeout_secs", "max_queued_requests", "health_check_paths", "hooks",
    "startup", "template", "inputs", "serverless", "extra_outputs", "project_id", "$schema",
]  # fmt: skip


def test_the_fields_left_to_gpu_cli_are_accepted_and_known_as_such(tmp_path):
    values = {name: {"any": ["thing"]} for name in FIELDS} | {"extra_outputs": [{"remote": "a", "local": "b"}]}
    values |= {"project_id": "mine", "$schema": "x"}
    assert acted_on(read(tmp_path, json.dumps(values))) == ([], sorted(FIELDS))


def test_a_field_left_to_gpu_cli_inside_a_section_is_told_by_its_dotted_name(tmp_path):
    python = {"package_manager": "uv", "allow_global_pip": True}
    names = [f"environment.python.{name}" for name in sorted(python)]
    config = {"$schema": "x", "gpu_type": "H100", "budget": {"max_usd": 3}, "environment": {"python": python}}
    assert acted_on(read(tmp_path, json.dumps(config))) == (["budget", "gpu_type"], ["$schema", *names])
    config["environment"]["system"] = {"apt": ["jq"]}
    assert acted_on(read(tmp_path, json.dumps(config)))[0] == ["budget", "environment", "gpu_type"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "gpu_type" "H100"\n}', "gpu.jsonc:2: is not JSON: expecting ':' delimiter (line 2, column 14)"),
        ("[]", "gpu.jsonc: holds no JSON object"),
        ('{\n"min_vram": 8,\n"min_vram": 9}', "gpu.jsonc:3: min_vram is given twice"),
        ('{"download": [{"strategy": "hf",\n"source": "a",\n"source": "b"}]}', ":3: download.0.source is given twice"),
        ('{\n\n  "gpu_typ": "H100"}', "gpu.jsonc:3: gpu_typ is not a field\n  did you mean gpu_type"),
        ('{"download": [{"strategy": "hf",\n"sauce": "x", "source": "y"}]}',
         "gpu.jsonc:2: download[0].sauce is not a field\n  did you mean source?"),
        ('{\n"environment": {"shell": {"steps": [{"run": "x"},\n{"run": "y", "only_one": true}]}}}',
         "gpu.jsonc:3: environment.shell.steps[1].only_one is not a field\n  did you mean only_once?"),
        ('{\n"gpu_type": "RTX 4080 Ti"}', "gpu.jsonc:2: there is no GPU 'RTX 4080 Ti'\n  did you mean RTX 4080"),
        ('{"gpu_types": [{"type": "H100",\n"count": 9}]}', "gpu.jsonc:2: gpu_types[0].count: input should be less"),
        ('{"gpu_type": "H100", "gpu_count": 9}', "gpu.jsonc:1: gpu_count: input should be less than or equal to 8"),
        ('{\n"gpu_count": 2}', "gpu.jsonc:2: gpu_count needs gpu_type"),
        ('{\n"gpu_type": ""}', "gpu.jsonc:2: there is no GPU ''"),
        ('{"gpu_types": [{"type": "H100"}],\n"gpu_type": ""}', "gpu.jsonc:1: gpu_types and gpu_type are two ways"),
        ('{"download": [{"strategy": "hf",\n"sorce": "x"}]}',
         "gpu.jsonc:2: download[0].sorce is not a field\n  did you mean source?"),
        ('{"gpu_types": [\n{"tpye": "H100"}]}', "gpu.jsonc:2: gpu_types[0].tpye is not a field\n  did you mean type?"),
        ('{"download": [{"strategy": "script", "source": "x",\n"taget": "y"}]}', "did you mean target?"),
        ('{"min_vram": 4096}', "gpu.jsonc:1: min_vram: no GPU has 4096 GB: the largest, B200, has 180 GB"),
        ('{"outputs": ["../up"]}', "outputs: ../up is not below /workspace"),
        ('{"download": [{"strategy": "hf", "source": "a", "target": "/etc"}]}', "is not below /workspace"),
        ('{"download": [{"strategy": "ftp", "source": "a"}]}', "download[0].strategy: input should be 'hf', 'http'"),
        ('{"environment": {"system": {"apt": ["vim; rm -rf /"]}}}', "environment.system.apt[0].name"),
        ('{"download": [{"strategy": "git", "source": "a/up"},\n{"strategy": "git", "source": "b/up.git"}]}',
         "gpu.jsonc:2: download[1] is to be at up, where up is: give it another target"),
        ('{"outputs": ["results"], "download": [{"strategy": "http", "source": "http://x/y", "target": "results/y"}]}',
         "download[0] is to be at results/y, where results is"),
        ('{"download": [{"strategy": "hf", "source": "a/output"}]}', "is to be at output, where output is"),
        ('{"cooldown_minutes": 1,\n"keep_alive_minutes": 2}',
         "gpu.jsonc:2: keep_alive_minutes and cooldown_minutes are the same: keep keep_alive_minutes"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_place_and_the_way_out(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "hf", "source": "a", "sha256": "0" * 64}, "sha256: is for http and civitai, not for hf"),
        ({"strategy": "git", "source": "a", "sha256": "0" * 64}, "sha256: is for http and civitai, not for git"),
        ({"strategy": "script", "source": "a", "target": "b", "sha256": "0" * 64}, "sha256: is for http and civitai"),
        ({"strategy": "git", "source": "a", "allow": ["*.py"]}, "allow: is for hf, not for git"),
        ({"strategy": "http", "source": "http://x/y", "revision": "main"}, "revision: is for hf and git and git-lfs"),
        ({"strategy": "git", "source": "--upload-pack=x"}, "source: begins with -, as an option does"),
        ({"strategy": "git", "source": ""}, "source: is empty"),
        ({"strategy": "http", "source": "example.org/a"}, "source: must be an address"),
        ({"strategy": "hf", "source": "https://example.org/a"}, "source: must be a hub name"),
        ({"strategy": "civitai", "source": "a model"}, "source: must be an address"),
        ({"strategy": "git", "source": "a/.."}, "source: ends in .."),
        ({"strategy": "script", "source": "curl x"}, "target: is needed: the folder below /workspace"),
    ],
)
def test_a_download_that_cannot_be_had_or_says_what_nobody_hears_is_refused(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=r"gpu\.jsonc:") as caught:
        read(tmp_path, json.dumps({"download": [fields]}))
    assert f"download[0].{message}" in str(caught.value)


def test_two_files_that_want_one_place_for_two_things_are_told(tmp_path):
    first = read(tmp_path, '{"outputs": ["results"]}')
    second = read(tmp_path, '{"download": [{"strategy": "hf", "source": "a/results"}]}')
    with pytest.raises(ConfigError, match=r"download\[0\] is to be at results, where results is"):
        merged([first, second])


def test_a_later_file_is_laid_over_an_earlier_one_and_two_names_of_a_thing_do_not_mix(tmp_path):
    first = read(tmp_path, '{"gpu_types": [{"type": "H100"}], "min_vram": 40, "cooldown_minutes": 5}')
    second = read(tmp_path, '{"gpu_type": "RTX 4090", "keep_alive_minutes": 9, "budget": {"max_usd": 3}}')
    both = merged([first, second])
    assert ([each.type for each in both.wanted], both.min_vram, both.idle_minutes) == (["RTX 4090"], 40, 9)
    assert both.budget.max_usd == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda below: st.lists(below) | st.dictionaries(st.text(), below),
)


@given(JSON)
def test_what_is_plain_json_is_not_changed_by_taking_comments_away(value):
    text = json.dumps(value, indent=1, ensure_ascii=False)
    assert strip_comments(text) == text


@given(JSON)
def test_comments_and_trailing_commas_do_not_count(value):
    text = json.dumps([value, value], indent=1)
    noisy = text[:-2] + ", // end\n/* of\n it */ ]"
    assert json.loads(strip_comments(noisy)) == [value, value]
    assert len(strip_comments(noisy)) == len(noisy)
