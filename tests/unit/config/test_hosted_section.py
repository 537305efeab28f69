"""The section ``hosted``: its listener, its names, and who may reach it."""

from __future__ import annotations

from typing import Any

import pytest

from mirror.config.settings import InvalidSetting, build

UPSTREAMS = {
    "docker.io": {"endpoints": ["https://one.example"], "hosts": ["hub.example"]},
    "reg.example:5000": {"endpoints": ["https://two.example"]},
}


def read(hosted: dict[str, Any], **more: Any) -> Any:
    return build({"upstreams": UPSTREAMS, "hosted": hosted, **more}).hosted


def test_defaults_and_names() -> None:
    hosted = read({"name": "registry.example:443", "listen": "127.0.0.1:5101"})
    assert hosted.max_size == 100 * 2**30
    assert (hosted.max_repository_size, hosted.sparse_indexes) == (None, False)
    assert hosted.names() == dict.fromkeys(
        ("registry.example:443", "registry.example_443"), "registry.example:443"
    )


@pytest.mark.parametrize(
    ("hosted", "path", "reason"),
    [
        ({"listen": "127.0.0.1:1"}, "name", "is missing"),
        ({"name": "registry.example"}, "listen", "own port"),
        ({"name": "docker.io", "listen": "127.0.0.1:1"}, "name", "docker.io is an upstream"),
        ({"name": "index.docker.io", "listen": "[::1]:1"}, "name", "is an upstream"),
        ({"name": "reg.example:5000", "listen": "[::1]:1"}, "name", "is an upstream"),
        ({"name": "registry.example", "listen": "0.0.0.0:1"}, "listen", "everybody who can reach"),
        ({"name": "registry.example", "listen": "[::]:1"}, "listen", "everybody who can reach"),
        ({"name": "registry.example", "listen": "10.0.0.1:1"}, "listen", "use a loopback"),
        ({"name": "registry.example", "hosts": ["hub.example"]}, "hosts", "already a name"),
        ({"name": "registry", "listen": "127.0.0.1:1"}, "name", "has a dot"),
        (
            {
                "name": "r.example",
                "listen": "[::1]:1",
                "max_size": "1G",
                "max_repository_size": "2G",
            },
            "max_repository_size",
            "is more than max_size",
        ),
        ({"name": "r.example", "hosts": ["127.0.0.1"]}, "hosts", "the mirror's own requests"),
        ({"name": "r.example", "listen": "127.0.0.1:1", "max_size": "0"}, "max_size", "at least"),
    ],
)
def test_section_that_cannot_work_or_is_open_is_refused(
    hosted: dict[str, Any], path: str, reason: str
) -> None:
    with pytest.raises(InvalidSetting, match=reason) as caught:
        read(hosted)
    assert caught.value.path[:2] == ("hosted", path)


@pytest.mark.parametrize("rules", [{"retention": [{"older_than": "30"}]}, {"grace": "30"}])
def test_time_after_which_images_go_needs_a_unit(rules: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match="name a unit: 30s, 30m, 30h, 30d"):
        read({"name": "registry.example", "listen": "127.0.0.1:5101", **rules})
    if "retention" in rules:
        with pytest.raises(InvalidSetting, match="name a unit: 30s, 30m, 30h, 30d"):
            build({"upstreams": UPSTREAMS, **rules})


@pytest.mark.parametrize(
    ("listeners", "path"),
    [
        ({"listen": "127.0.0.1:5101"}, ("hosted", "listen")),
        ({"listen": "localhost:5101"}, ("hosted", "listen")),
        ({"listen": "0.0.0.0:5101"}, ("hosted", "listen")),
        ({"admin": {"listen": "127.0.0.1:5101"}}, ("hosted", "listen")),
        ({"listen": "[::1]:5102", "admin": {"listen": "[::1]:5102"}}, ("admin", "listen")),
    ],
)
def test_two_listeners_of_one_port_are_refused(
    listeners: dict[str, Any], path: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidSetting, match="is the port of") as caught:
        read({"name": "registry.example", "listen": "127.0.0.1:5101"}, **listeners)
    assert caught.value.path == path


@pytest.mark.parametrize("listen", ["[::1]:5101", "[::]:5101", "127.0.0.2:5101", "127.0.0.1:0"])
def test_listeners_that_can_be_beside_each_other_are_accepted(listen: str) -> None:
    assert read({"name": "registry.example", "listen": "127.0.0.1:5101"}, listen=listen)
    assert read({"name": "registry.example", "listen": "127.0.0.1:0"}, listen="127.0.0.1:0")


def test_host_names_need_a_mirror_that_listens_on_loopback() -> None:
    hosted = {"name": "registry.example", "hosts": ["push.example"]}
    assert read(hosted, listen="[::1]:5100").hosts == ("push.example",)
    with pytest.raises(InvalidSetting, match=r"0\.0\.0\.0:5100"):
        read(hosted, listen="0.0.0.0:5100")
