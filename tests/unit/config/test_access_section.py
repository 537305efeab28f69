"""The section ``access``: patterns, names, issuers, and listeners that must not be open."""

from __future__ import annotations

from typing import Any

import pytest

from mirror.config.settings import InvalidSetting, build

UPSTREAMS = {"docker.io": {"endpoints": ["https://one.example"]}}
RULE = {"repositories": ["**"], "who": ["ci"], "may": ["pull"]}
ISSUER = {"issuer": "https://a.example", "jwks": "keys.json", "audience": "oci-mirror"}
HOSTED = {"name": "registry.example", "listen": "0.0.0.0:5101"}
TLS = {"certificate": "c", "key": "k"}


def read(access: dict[str, Any], **more: Any) -> Any:
    return build({"upstreams": UPSTREAMS, "access": access, **more}).access


def test_defaults() -> None:
    access = read({})
    assert (access.users, access.tokens, access.issuers, access.rules) == (None, None, (), ())
    assert (access.anonymous_pull, access.allow_plain_http, access.has_login) == (
        True,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"repositories": []}, "at least 1"),
        ({"repositories": ["team/**"]}, "begin with a registry"),
        ({"repositories": ["registry.example"]}, "begin with a registry"),
        ({"repositories": ["registry.example/"]}, "begin with a registry"),
        ({"repositories": ["registry.example/A"]}, "lower case"),
        ({"repositories": ["registry.example/a:1"]}, "without a tag"),
        ({"repositories": ["registry.example/a@sha256"]}, "without a tag"),
        ({"repositories": ["registry.example/a?"]}, "the wildcards"),
        ({"repositories": ["registry.example/a//b"]}, "the wildcards"),
        ({"repositories": ["registry.example/[ab]"]}, "the wildcards"),
        ({"repositories": ["registry.example/a**"]}, "whole components"),
        ({"who": []}, "at least 1"),
        ({"who": ["a b"]}, "no space"),
        ({"who": ["group:"]}, "1 to 256"),
        ({"who": ["group:anonymous"]}, "a meaning of its own"),
        ({"may": ["read"]}, "must be"),
        ({"can": []}, "unknown key"),
    ],
)
def test_rule_that_cannot_be_meant_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidSetting, match=reason):
        read({"rules": [{**RULE, **changed}]})


def test_rule_after_one_that_fits_everything_is_refused() -> None:
    all_ = {**RULE, "who": ["anonymous"]}
    with pytest.raises(InvalidSetting, match="is never used") as caught:
        read({"rules": [RULE, all_, RULE]})
    assert caught.value.path == ("access", "rules", 2)
    assert len(read({"rules": [RULE, RULE, all_]}).rules) == 3


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"jwks": "http://a.example/keys"}, "https://"),
        ({"jwks": "https://a.example/keys?x"}, "query"),
        ({"jwks": "~/keys"}, "not expanded"),
        ({"audience": ""}, "must not be empty"),
    ],
)
def test_issuer_that_cannot_be_trusted_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidSetting, match=reason):
        read({"issuers": [{**ISSUER, **changed}]})


@pytest.mark.parametrize("prefixes", [("", ""), ("a:", ""), ("a:", "a:"), ("a", "ab")])
def test_issuers_cannot_name_the_users_of_each_other(prefixes: tuple[str, str]) -> None:
    issuers = [
        {**ISSUER, "issuer": f"https://{index}.example", "user_prefix": prefix}
        for index, prefix in enumerate(prefixes)
    ]
    with pytest.raises(InvalidSetting, match="must differ"):
        read({"issuers": issuers})


@pytest.mark.parametrize(
    "more", [{"users": "/file"}, {"tokens": "/file"}, {"groups": {"dev": ["ann"]}}]
)
def test_one_issuer_needs_no_prefix_beside_other_sources_of_names(more: dict[str, Any]) -> None:
    access = read({**more, "issuers": [{**ISSUER, "groups_claim": "groups"}]})
    assert (access.user_prefixes, access.group_prefixes) == ((), ())


def test_group_with_the_prefix_of_an_issuer_is_refused() -> None:
    issuer = {**ISSUER, "groups_claim": "groups", "groups_prefix": "ci:"}
    with pytest.raises(InvalidSetting, match="begins with the groups_prefix") as caught:
        read({"groups": {"ci:dev": ["ann"]}, "issuers": [issuer]})
    assert caught.value.path == ("access", "groups", "ci:dev")


def test_issuer_is_listed_once() -> None:
    with pytest.raises(InvalidSetting, match="listed twice"):
        read({"issuers": [{**ISSUER, "user_prefix": prefix} for prefix in ("a:", "b:")]})


# --- reach ----------------------------------------------------------------------------------------


def test_door_beyond_loopback_needs_access_and_tls() -> None:
    with pytest.raises(InvalidSetting, match="add the section access, or use a loopback address"):
        build({"upstreams": UPSTREAMS, "hosted": HOSTED})
    with pytest.raises(
        InvalidSetting, match=r"passwords cross the network to 0\.0\.0\.0:5101"
    ) as caught:
        read({"users": "u"}, hosted=HOSTED)
    assert caught.value.path == ("access", "allow_plain_http")
    for access, more in (
        ({"users": "u"}, {"tls": TLS}),
        ({"users": "u", "allow_plain_http": True}, {}),
        ({"rules": [{**RULE, "who": ["anonymous"]}]}, {}),
    ):
        assert read(access, hosted=HOSTED, **more) is not None


def test_mirrors_listener_beyond_loopback_needs_tls_for_passwords() -> None:
    with pytest.raises(InvalidSetting, match=r"to 0\.0\.0\.0:5100 \(listen\) unencr"):
        read({"tokens": "t"}, listen="0.0.0.0:5100")
    assert read({"tokens": "t"}, listen="0.0.0.0:5100", tls=TLS) is not None
    assert read({}, listen="0.0.0.0:5100") is not None
