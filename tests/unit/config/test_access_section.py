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
        ({"who": ["*"]}, "write anonymous for everybody"),
        ({"who": ["group:ci-*"]}, "has no wildcards"),
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
    assert len(read({"rules": [RULE, all_]}).rules) == 2


@pytest.mark.parametrize(
    ("first", "then", "is_dead"),
    [
        (("r.io/**", "anonymous"), ("r.io/team/**", "ci"), True),
        (("r.io/**", "authenticated"), ("r.io/team/*", "group:dev"), True),
        (("r.io/**", "authenticated"), ("r.io/team/*", "anonymous"), False),
        (("r.io/**", "group:dev"), ("r.io/team/app", "ann"), True),
        (("r.io/**", "group:dev"), ("r.io/team/app", "bob"), False),
        (("r.io/**", "dev"), ("r.io/team/app", "ann"), False),
        (("r.io/team/*", "ci"), ("r.io/team/**", "ci"), False),
        (("r.io/*/app", "ci"), ("r.io/team/app", "ci"), True),
        (("r.io/**/app", "ci"), ("r.io/a/b/app", "ci"), True),
        (("r.io/**/app", "ci"), ("r.io/a/**/app", "ci"), True),
        (("r.io/t*/**", "ci"), ("r.io/team*/a", "ci"), True),
        (("r.io/te*m/**", "ci"), ("r.io/t*m/a", "ci"), False),
        (("*/team/**", "ci"), ("r.io/team/**", "ci"), True),
        (("**", "ci"), ("r.io/team/**", "ci"), True),
        (("r.io/**", "ci"), ("**", "ci"), False),
        (("r.io/team/**", "ci"), ("r.io/team", "ci"), False),
    ],
)
def test_rule_that_earlier_ones_cover_is_refused_as_one_that_never_decides(
    first: tuple[str, str], then: tuple[str, str], *, is_dead: bool
) -> None:
    rules = [{"repositories": [one], "who": [who], "may": []} for one, who in (first, then)]
    access = {"rules": rules, "groups": {"dev": ["ann"]}}
    if not is_dead:
        assert len(read(access).rules) == 2
        return
    with pytest.raises(InvalidSetting, match=r"is never used: rules\[0\]") as caught:
        read(access)
    assert caught.value.path == ("access", "rules", 1)


def test_rule_that_several_earlier_ones_cover_together_is_refused() -> None:
    first = {"repositories": ["r.io/a/**"], "who": ["anonymous"], "may": []}
    second = {"repositories": ["r.io/b/**"], "who": ["authenticated"], "may": []}
    both = {"repositories": ["r.io/a/x", "r.io/b/x"], "who": ["ci"], "may": ["pull"]}
    with pytest.raises(InvalidSetting, match=r"is never used: rules\[1\]"):
        read({"rules": [first, second, both]})
    assert read({"rules": [first, {**both, "who": ["ci"]}, second]})


@pytest.mark.parametrize(
    "issuer",
    [
        "https://token.actions.githubusercontent.com",
        "https://gitlab.com",
        "https://GitLab.com/",
        "https://accounts.google.com",
        "https://agent.buildkite.com",
    ],
)
def test_public_issuer_needs_claims_because_everybody_gets_its_tokens(issuer: str) -> None:
    with pytest.raises(InvalidSetting, match="everybody can get a token") as caught:
        read({"issuers": [{**ISSUER, "issuer": issuer}]})
    assert caught.value.path == ("access", "issuers", 0, "claims")
    assert read({"issuers": [{**ISSUER, "issuer": issuer, "claims": {"a": "b"}}]})
    own = "https://oidc.circleci.com/org/6d1c3a60-0000-4000-8000-000000000000"
    assert read({"issuers": [{**ISSUER, "issuer": own}]})


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


def test_push_listener_beyond_loopback_needs_access_and_tls() -> None:
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
