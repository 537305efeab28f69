"""The one decision: patterns, who, the first rule that fits, the default."""

from __future__ import annotations

import pytest

from mirror.access.identity import ANONYMOUS, Identity
from mirror.access.rules import Rules
from mirror.config.access import AccessAction as Right
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
    assert [
        name for name in matching if not rules.is_allowed(CI, repository(name), Right.PUSH)
    ] == []
    assert [name for name in others if rules.is_allowed(CI, repository(name), Right.PUSH)] == []


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
        one
        for one in (ANONYMOUS, CI, DEV)
        if rules.is_allowed(one, repository("a.b/c"), Right.PUSH)
    ]
    assert found == identities


def test_group_of_the_configuration_has_its_members() -> None:
    access = access_section(rule("**", "group:ops", "push"), groups={"ops": ["ci"]})
    rules = Rules(access, HOST)
    assert rules.is_allowed(CI, repository("a.b/c"), Right.PUSH)
    assert not rules.is_allowed(DEV, repository("a.b/c"), Right.PUSH)


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
    assert rules.is_allowed(CI, secret, Right.PULL)
    assert not rules.is_allowed(CI, secret, Right.PUSH), "the first rule fits, and has no push"
    assert not rules.is_allowed(DEV, secret, Right.PULL)
    assert rules.is_allowed(DEV, other, Right.PUSH)
    assert not rules.is_allowed(DEV, other, Right.DELETE)


def test_only_names_of_docker_hub_have_a_short_form() -> None:
    rules = Rules(
        access_section(
            rule(f"{HOST}/docker.io/nginx", "ci", "push"), rule("docker.io/nginx", "ci", "pull")
        ),
        HOST,
    )
    assert rules.is_allowed(CI, repository("docker.io/library/nginx"), Right.PULL)
    assert rules.is_allowed(CI, repository(f"{HOST}/docker.io/nginx"), Right.PUSH)
    hidden = repository(f"{HOST}/docker.io/library/nginx")
    assert not rules.is_allowed(CI, hidden, Right.PUSH)


def test_admin_may_do_everything_and_others_are_no_admins() -> None:
    rules = Rules(
        access_section(
            rule(f"{HOST}/a", "ci", "admin"), rule(f"{HOST}/a", "ann", "pull", "push", "delete")
        ),
        HOST,
    )
    assert all(rules.is_allowed(CI, repository(f"{HOST}/a"), action) for action in Right)
    assert not rules.is_allowed(DEV, repository(f"{HOST}/a"), Right.ADMIN)


def test_without_a_rule_mirrored_repositories_can_be_pulled_and_hosted_ones_cannot() -> None:
    rules = Rules(access_section(), HOST)
    mirrored, hosted = repository("docker.io/a"), repository(f"{HOST}/a")
    for identity in (ANONYMOUS, CI):
        assert rules.is_allowed(identity, mirrored, Right.PULL)
        assert not rules.is_allowed(identity, mirrored, Right.PUSH)
        assert not any(rules.is_allowed(identity, hosted, action) for action in Right)
    closed = Rules(access_section(anonymous_pull=False), HOST)
    assert not closed.is_allowed(CI, mirrored, Right.PULL)


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
    assert Rules(access_section(*rules), HOST).is_login_needed() is expected


def test_path_that_begins_with_a_registry_needs_the_right_for_what_follows_too() -> None:
    access = access_section(
        rule("docker.io/secret", "ci", "pull"),
        rule("docker.io/secret", "anonymous"),
        rule(f"{HOST}/docker.io/**", "anonymous", "push"),
    )
    names = {"docker.io": "docker.io", "hub": "docker.io", "a.example": "a.example", HOST: HOST}
    rules = Rules(access, HOST, names)
    for name in (
        "docker.io/library/secret",
        "a.example/docker.io/secret",
        "a.example/hub/secret",
        "a.example/hub/library/secret",
        "docker.io/docker.io/library/secret",
        "a.example/a.example/docker.io/secret",
    ):
        assert not rules.is_allowed(ANONYMOUS, repository(name), Right.PULL), name
        assert rules.is_allowed(CI, repository(name), Right.PULL), name
    for name in ("a.example/docker.io/app", "a.example/x/docker.io/secret", "a.example/docker.io"):
        assert rules.is_allowed(ANONYMOUS, repository(name), Right.PULL), name
    # Nobody may pull from a hosted repository without a rule. It has no endpoints itself.
    assert not rules.is_allowed(ANONYMOUS, repository(f"a.example/{HOST}/app"), Right.PULL)
    assert rules.is_allowed(ANONYMOUS, repository(f"{HOST}/docker.io/secret"), Right.PUSH)
