"""What may be fetched from: only what no command takes for an option of its own, and only what its strategy fetches."""

import pytest

from trainbox.spec.source import CHECKS, name_of


@pytest.mark.parametrize(
    ("strategy", "source"),
    [
        ("hf", "org/name-1.0"), ("hf", "gpt2"),
        ("http", "https://example.org/a.bin?key=1"), ("http", "http://user:word@localhost:8080/a"),
        ("civitai", "128713"), ("civitai", "https://civitai.com/api/download/models/128713"),
        ("git", "https://example.org/a/b.git"), ("git", "git@example.org:a/b.git"), ("git", "ssh://git@h/a"),
        ("git", "/src/my tool"), ("git-lfs", "~/tool"), ("git", "file:///src/tool"),
        ("script", "curl -LO x\ntar xf x"),
    ],
)  # fmt: skip
def test_what_a_strategy_fetches_is_taken_as_it_is(strategy, source):
    assert CHECKS[strategy](source) == source


@pytest.mark.parametrize("strategy", CHECKS)
@pytest.mark.parametrize("source", ["", " ", "-x", "--upload-pack=touch /tmp/x", "a\0b"])
def test_nothing_an_option_and_a_zero_byte_are_no_source_of_any_kind(strategy, source):
    with pytest.raises(ValueError, match=r"."):
        CHECKS[strategy](source)


@pytest.mark.parametrize(
    ("strategy", "source", "message"),
    [
        ("hf", "https://huggingface.co/a/b", "must be a hub name, as org/name"), ("hf", "a/b/c", "must be a hub name"),
        ("hf", "a/..", "must be a hub name"),
        ("http", "example.org/a", "must be an address"), ("http", "ftp://example.org/a", "https://, http://"),
        ("http", "https://", "must be an address"), ("http", "http://a:b/", "is no address: Port could not be cast"),
        ("http", "http://a/b c", "must be an address"), ("http", "http://[/a", "is no address"),
        ("civitai", "some model", "must be an address"), ("civitai", "１２", "must be an address"),
        ("git", "ext::sh -c touch% x", "must be an address, user@host:path or a folder"),
        ("git", "ftp://example.org/a", "must be an address that begins with"), ("git", "https:///a", "must be an"),
        ("git", "..", "ends in .., after"), ("http", "https://h/a/..", "ends in .., after"),
        ("git", "-x", "begins with -, as an option does"), ("script", "\n", "is empty"),
    ],
)  # fmt: skip
def test_what_a_strategy_cannot_fetch_is_refused_with_what_it_takes(strategy, source, message):
    with pytest.raises(ValueError, match=message):
        CHECKS[strategy](source)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("https://h/a/b.git?x=/y", "b"), ("git@h:b.git", "b"), ("git@h:a/b", "b"), ("org/name", "name"),
        ("/src/tool/", "tool"), ("https://h/", "download"), ("5", "5"),
    ],
)  # fmt: skip
def test_the_last_name_of_a_source(source, name):
    assert name_of(source) == name
