from __future__ import annotations

import pytest

from trainbox.errors import ConfigError, EngineError
from trainbox.host import kept, registry, ui


@pytest.mark.parametrize(
    "name", ["registry.example/me", "localhost/a", "localhost:5000", "10.0.0.7:5443/a/b-c.d", "images.example/me/"]
)
def test_a_registry_is_a_host_and_a_prefix(name: str) -> None:
    assert registry.checked(name) == name.rstrip("/")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "me",
        "me/images",
        "https://registry.example/me",
        "registry.example/Me",
        "registry.example/me:tag",
        "registry.example//a",
    ],
)
def test_what_is_none_is_refused_with_an_example(name: str) -> None:
    with pytest.raises(ConfigError, match="REGISTRY") as caught:
        registry.checked(name)
    assert "registry.example/me" in caught.value.remedy


def far(current: int, total: int, layer: str) -> dict[str, object]:
    return {"status": "Pushing", "progressDetail": {"current": current, "total": total}, "id": layer}


def test_what_goes_over_the_line_is_counted_and_what_is_tried_again_once() -> None:
    """Events as Docker 20.10 gives them; its counts include the archive's own bytes."""
    moved = registry.Moved(ui.Progress("push", unit="B"))
    events = [
        {"status": "The push refers to repository [r/a]"},
        {"status": "Preparing", "progressDetail": {}, "id": "one"},
        {"status": "Preparing", "progressDetail": {}, "id": "two"},
        {"status": "Preparing", "progressDetail": {}, "id": "three"},
        far(512, 3, "one"),
        far(2425344, 3000000, "two"),
        {"status": "Mounted from a/b", "progressDetail": {}, "id": "three"},
        {"status": "Retrying in 5 seconds", "progressDetail": {}, "id": "two"},
        far(33280, 3000000, "two"),
        {"status": "Pushed", "progressDetail": {}, "id": "one"},
    ]
    for event in events:
        moved.take(event)
    assert moved.bytes == 3 + 33280
    moved.take({"status": "Pushed", "progressDetail": {}, "id": "two"})
    moved.take({"progressDetail": {}, "aux": {"Tag": "x", "Digest": "sha256:71", "Size": 942}})
    assert (moved.bytes, moved.digest) == (3000003, "sha256:71")
    with pytest.raises(EngineError, match="no basic auth"):
        moved.take({"errorDetail": {"message": "no basic auth credentials"}, "error": "no basic auth credentials"})


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ('Get "https://h/v2/": dial tcp 10.0.0.7:443: i/o timeout', "does not answer"),
        ('Get "https://h/v2/": dial tcp: lookup h: no such host', "does not answer"),
        ('Get "https://h/v2/": http: server gave HTTP response to HTTPS client', "speaks plain HTTP"),
        ("denied: requested access to the resource is denied", "this login may not do that there"),
        ("name unknown: The repository with name 'a' does not exist in the registry with id '1'", registry.ABSENT),
        ("failed to register layer: write /x: no space left on device", "the disk is full"),
        ("something new", "the engine could not do it"),
    ],
)
def test_the_engine_s_words_become_a_fault_with_the_words_kept(words: str, fault: str) -> None:
    with pytest.raises(EngineError) as caught, registry._told("h:5000/a/b", {"username": "me"}):
        raise EngineError(words)
    assert (caught.value.place, caught.value.fault) == ("h:5000", fault)
    assert caught.value.remedy.endswith(words)


def test_what_was_pushed_is_remembered_by_content_tag(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path))
    assert registry.pushed("trainbox/a:1") is None
    kept.add(registry.STORE, {"trainbox/a:1": "h/a@sha256:1"})
    kept.add(registry.STORE, {"trainbox/b:1": "h/b@sha256:2"})
    assert registry.pushed("trainbox/a:1") == "h/a@sha256:1"
    (tmp_path / registry.STORE).write_text("{")
    assert registry.pushed("trainbox/a:1") is None
