"""A configuration that was read again: what is applied, and what needs a restart (row FE2)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mirror.config.reload import _NEEDS_RESTART, merge_settings
from mirror.config.settings import Settings
from mirror.oci.errors import ConfigError

BASE: dict[str, Any] = {"upstreams": {"docker.io": {"endpoints": ["https://one.example"]}}}


def settings(**more: Any) -> Settings:
    return Settings.model_validate({**BASE, **more})


APPLIED = {
    "events",
    *("drain_timeout", "trusted_proxies", "catalog", "log", "default_upstream", "upstreams"),
    "prefetch",
    "retention",
    "retention_interval",
    "access",
}
KEPT = {
    *(
        "listen",
        "admin",
        "hosted",
        "tls",
        "data_dir",
        "workers",
        "abandoned",
        "storage",
        "max_client_connections",
    ),
}


def test_every_key_is_applied_or_needs_a_restart() -> None:
    """A new key belongs to one of the two, and into docs/configuration.md, "Signals"."""
    assert set(Settings.model_fields) == APPLIED | KEPT
    assert set(_NEEDS_RESTART) == KEPT
    text = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text(encoding="utf-8")
    signals = text.partition("\n## Signals\n")[2]
    for keys, begin, end in ((APPLIED, "SIGHUP reads", "All other"), (KEPT, "All other", ") need")):
        part = signals.partition(begin)[2].partition(end)[0]
        assert keys <= set(re.findall(r"`(\w+)`", part))


HOSTED = {"name": "registry.example", "listen": "0.0.0.0:5101"}
CLOSED = {"rules": [{"repositories": ["**"], "who": ["ci"], "may": ["pull"]}]}
PLAIN = {"users": "htpasswd", "allow_plain_http": True}


@pytest.mark.parametrize(
    ("current", "new"),
    [
        (
            {"hosted": HOSTED, "access": CLOSED},
            {"hosted": {**HOSTED, "listen": "127.0.0.1:5101"}},
        ),
        ({"hosted": HOSTED, "access": CLOSED}, {}),
        (
            {"hosted": HOSTED, "access": PLAIN},
            {"hosted": HOSTED, "access": {"users": "u"}, "tls": {"certificate": "c", "key": "k"}},
        ),
        ({"listen": "0.0.0.0:5100", "access": PLAIN}, {"access": {"users": "u"}}),
    ],
)
def test_listeners_in_use_are_not_combined_with_access_that_would_open_them(
    current: dict[str, Any], new: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="a restart is needed: "):
        merge_settings(settings(**current), settings(**new))


def test_rules_are_applied_without_a_restart() -> None:
    merged = merge_settings(
        settings(hosted=HOSTED, access=CLOSED), settings(hosted=HOSTED, access={"rules": []})
    )
    assert (merged.applied, merged.kept) == (("access.rules",), ())


def test_equal_settings_change_nothing() -> None:
    merged = merge_settings(settings(), settings())
    assert (merged.applied, merged.kept) == ((), ())
    assert merged.settings == settings()


@pytest.mark.row("FE2-signals-and-orphans")
@pytest.mark.parametrize(
    ("more", "applied"),
    [
        ({"log": {"level": "debug"}}, "log.level"),
        ({"drain_timeout": "5s"}, "drain_timeout"),
        ({"trusted_proxies": ["10.0.0.0/8"]}, "trusted_proxies"),
        ({"catalog": True}, "catalog"),
        (
            {"upstreams": {"docker.io": {"endpoints": ["https://two.example"]}}},
            "upstreams.docker.io",
        ),
        (
            {"upstreams": {**BASE["upstreams"], "ghcr.io": {"endpoints": ["https://ghcr.io"]}}},
            "upstreams.ghcr.io",
        ),
        (
            {"upstreams": {"ghcr.io": {"endpoints": ["https://ghcr.io"]}}},
            "upstreams.docker.io,upstreams.ghcr.io",
        ),
    ],
)
def test_changed_key_is_applied_and_named(more: dict[str, Any], applied: str) -> None:
    new = settings(**more)
    merged = merge_settings(settings(), new)
    assert (",".join(merged.applied), merged.kept) == (applied, ())
    assert merged.settings == new


@pytest.mark.row("FE2-signals-and-orphans")
@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ({"listen": "127.0.0.1:1"}, "listen"),
        ({"data_dir": "/elsewhere"}, "data_dir"),
        ({"workers": 3}, "workers"),
        ({"tls": {"certificate": "a", "key": "b"}}, "tls"),
        ({"storage": {"max_size": "1GiB", "reverify": "0"}}, "storage.max_size,storage.reverify"),
        ({"abandoned": "cancel"}, "abandoned"),
        ({"max_client_connections": 5}, "max_client_connections"),
    ],
)
def test_key_that_needs_a_restart_keeps_its_value_and_is_named(
    more: dict[str, Any], kept: str
) -> None:
    merged = merge_settings(settings(), settings(**more, log={"level": "error"}))
    assert (merged.applied, ",".join(merged.kept)) == (("log.level",), kept)
    assert merged.settings == settings(log={"level": "error"})
