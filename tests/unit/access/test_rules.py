"""The one decision: patterns, who, the first rule that fits, the default."""

from __future__ import annotations

import pytest

from mirror.access.identity import ANONYMOUS, Action, Identity
from mirror.access.rules import Rules
from mirror.oci.reference import Repository
from tests.unit.access.kit import access_section, rule

HOST = "registry.example"
CI = Identity("ci")
DEV = Identity("ann", frozenset({"dev"}))


def repository(name: str) -> Repository:
    return Repository(*name.split("/", 1))


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("**", ["docker.io/a", "host:5000/a/b"], []),
        (f"{HOST}/**", [f"{HOST}/a", f"{HOST}/a/b/c"], ["registry.example.org/a", "docker.io/a"]),
        (f"{HOST}/t/**", [f"{HOST}/t/a", f"{HOST}/t/a/b"], [f"{HOST}/t", f"{HOST}/x/t/a"]),
        (f"{HOST}/*", [f"{HOST}/a"], [f"{HOST}/a/b"]),
        (f"{HOST}/t-*/app", [f"{HOST}/t-a/app"], [f"{HOST}/t-a/b/app", f"{HOST}/t/app"]),
        (f"{HOST}/**/app", [f"{HOST}/app", f"{HOST}/a/b/app"], [f"{HOST}/a/app2", f"{HOST}/xapp"]),
        ("*.example/**", ["a.example/x", f"{HOST}/x"], ["a.example.org/x"]),
        ("*/app", ["docker.io/app", "docker.io/library/app"], ["quay.io/x/app"]),
        ("docker.io/app", ["docker.io/app", "docker.io/library/app"], ["docker.io/x/app"]),
        ("index.docker.io/app", ["docker.io/app"], []),
        ("host:5000/a.b", ["host:5000/a.b"], ["host:5000/axb", "host/a.b"]),
    ],
)  # fmt: skip
def test_pattern_matches_whole_names(pattern: str, matching: list[str], others: list[str]) -> None:
    rules = Rules(access_section(rule(pattern, "ci", "push")), HOST)
    assert [name for name in matching if not rules.may(CI, repository(name), Action.PUSH)] == []
    assert [name for name in others if rules.may(CI, repository(name), Action.PUSH)] == []


@pytest.mark.parametrize(
    ("who", "identities"),
    [
        ("anonymous", [ANONYMOUS, CI, DEV]),
        ("authenticated", [CI, DEV]),
        ("ci", [CI]),
        ("group:dev", [DEV]),
        (["ci", "group:dev"], [CI, DEV]),
        ("dev", []),
    ],
)
def test_who_names_users_groups_or_everybody(who: str, identities: list[Identity]) -> None:
    rules = Rules(access_section(rule("**", who, "push")), HOST)
    found = [
        one for one in (ANONYMOUS, CI, DEV) if rules.may(one, repository("a.b/c"), Action.PUSH)
    ]
    assert found == identities


def test_group_of_the_configuration_has_its_members() -> None:
    access = access_section(rule("**", "group:ops", "push"), groups={"ops": ["ci"]})
    rules = Rules(access, HOST)
    assert rules.may(CI, repository("a.b/c"), Action.PUSH)
    assert not rules.may(DEV, repository("a.b/c"), Action.PUSH)


def test_first_rule_that_fits_decides_also_with_a_no() -> None:
    rules = Rules(
        access_section(
            rule(f"{HOST}/a/secret", "ci", "pull"),
            rule(f"{HOST}/a/secret", "anonymous"),
            rule(f"{HOST}/a/**", "anonymous", "pull", "push"),
        ),
        HOST,
    )
    secret, other = repository(f"{HOST}/a/secret"), repository(f"{HOST}/a/other")
    assert rules.may(CI, secret, Action.PULL)
    assert not rules.may(CI, secret, Action.PUSH), "the first rule fits, and has no push"
    assert not rules.may(DEV, secret, Action.PULL)
    assert rules.may(DEV, other, Action.PUSH)
    assert not rules.may(DEV, other, Action.DELETE)


def test_admin_may_do_everything_and_others_are_no_admins() -> None:
    rules = Rules(
        access_section(
            rule(f"{HOST}/a", "ci", "admin"), rule(f"{HOST}/a", "ann", "pull", "push", "delete")
        ),
        HOST,
    )
    assert all(rules.may(CI, repository(f"{HOST}/a"), action) for action in Action)
    assert not rules.may(DEV, repository(f"{HOST}/a"), Action.ADMIN)


def test_without_a_rule_mirrored_repositories_can_be_pulled_and_hosted_ones_cannot() -> None:
    rules = Rules(access_section(), HOST)
    mirrored, hosted = repository("docker.io/a"), repository(f"{HOST}/a")
    for identity in (ANONYMOUS, CI):
        assert rules.may(identity, mirrored, Action.PULL)
        assert not rules.may(identity, mirrored, Action.PUSH)
        assert not any(rules.may(identity, hosted, action) for action in Action)
    closed = Rules(access_section(anonymous_pull=False), HOST)
    assert not closed.may(CI, mirrored, Action.PULL)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], True),
        ([rule("**", "anonymous", "pull")], True),
        ([rule("**", "anonymous", "pull", "push", "delete")], False),
        ([rule(f"{HOST}/**", "anonymous", "admin")], False),
        ([rule(f"{HOST}/a/**", "anonymous", "admin")], True),
        ([rule("**", "ci", "admin"), rule(f"{HOST}/**", "anonymous", "admin")], False),
        ([rule(f"{HOST}/a", "anonymous"), rule("**", "anonymous", "admin")], True),
    ],
)
def test_login_is_needed_unless_everybody_may_do_everything(
    rules: list[dict[str, object]], expected: bool
) -> None:
    assert Rules(access_section(*rules), HOST).needs_login() is expected
