"""The section ``events``: names, URLs, patterns and bounds of targets."""

from __future__ import annotations

from typing import Any

import pytest

from mirror.config.settings import EventTarget, InvalidSetting, build

TARGET = {"name": "audit", "url": "https://audit.example/x?key=1", "secret_file": "/s"}


def read(*targets: dict[str, Any]) -> tuple[EventTarget, ...]:
    upstreams = {"docker.io": {"endpoints": ["https://one.example"]}}
    return build({"upstreams": upstreams, "events": [{**TARGET, **one} for one in targets]}).events


def test_defaults() -> None:
    (target,) = read({})
    assert target.url == TARGET["url"]
    assert (target.events, target.repositories) == (("push", "delete", "pull"), ("**",))
    assert (target.timeout, target.max_queued, target.max_queued_size) == (15.0, 10_000, 16 << 20)


@pytest.mark.parametrize(
    "pattern", ["**", "docker.io/library/*", "*/app", "localhost/a", "reg.example:5000/**"]
)
def test_pattern_of_whole_names_is_accepted(pattern: str) -> None:
    assert read({"repositories": [pattern]})[0].repositories == (pattern,)


@pytest.mark.parametrize(
    ("keys", "path", "reason"),
    [
        ({"name": "Audit"}, "name", "lower case"),
        ({"name": "a" * 64}, "name", "at most 63"),
        ({"url": "audit.example"}, "url", "absolute URL"),
        ({"url": "http://audit.example"}, "url", "allow_plain_http"),
        ({"url": "http://10.0.0.1:80/x"}, "url", "allow_plain_http"),
        ({"url": "ftp://audit.example"}, "url", "https://"),
        ({"url": "https://u:p@audit.example"}, "url", "user or password"),
        ({"url": "https://audit.example/#x"}, "url", "fragment"),
        ({"events": ["mount"]}, "events", "push"),
        ({"events": []}, "events", "at least 1"),
        ({"repositories": []}, "repositories", "at least 1"),
        ({"repositories": ["team/*"]}, "repositories", "begin with a registry"),
        ({"repositories": ["docker.io"]}, "repositories", "begin with a registry"),
        ({"repositories": ["docker.io/Team/*"]}, "repositories", "lower case"),
        ({"repositories": [" "]}, "repositories", "begin with a registry"),
        ({"timeout": "0"}, "timeout", "more than 0"),
        ({"max_queued": 0}, "max_queued", "1"),
        ({"client_key": "/k"}, "client_key", "needs client_certificate"),
    ],
)
def test_unusable_target_is_refused(keys: dict[str, Any], path: str, reason: str) -> None:
    with pytest.raises(InvalidSetting, match=reason) as caught:
        read(keys)
    assert caught.value.path[:3] == ("events", 0, path)


@pytest.mark.parametrize(
    "keys",
    [
        {"url": "http://127.0.0.1:9/x"},
        {"url": "http://[::1]:9"},
        {"url": "http://localhost"},
        {"url": "http://audit.example", "allow_plain_http": "true"},
    ],
)
def test_plain_http_is_for_this_machine_unless_it_is_allowed(keys: dict[str, Any]) -> None:
    assert read(keys)[0].url == keys["url"]


def test_two_targets_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidSetting, match="two targets have the name audit"):
        read({}, {})
