"""Admission: allow- and deny-lists, the operator's blocks and freezes."""

from __future__ import annotations

import pytest

from mirror.config.settings import Upstream
from mirror.oci.reference import Digest, Repository, Tag
from mirror.pull.admission import (
    Allow,
    Deny,
    Restrictions,
    Undecided,
    admit,
    admit_digest,
    admit_with_nested,
)
from mirror.store.marks import Block, Freeze, Marks


@pytest.mark.parametrize(
    ("allow", "deny", "path", "served"),
    [
        ((), (), "library/nginx", True),
        (("library/*",), (), "library/nginx", True),
        (("library/*",), (), "evil/nginx", False),
        (("library/*",), ("library/nginx",), "library/nginx", False),
        ((), ("*/secret*",), "org/secret-app", False),
        ((), ("*/secret*",), "org/app", True),
        (("org/app",), (), "org/app/sub", False),
    ],
)
def test_allow_and_deny_lists_decide_by_repository_path_and_deny_wins(
    allow: tuple[str, ...], deny: tuple[str, ...], path: str, served: bool
) -> None:
    upstream = Upstream(endpoints=("http://x",), allow=allow, deny=deny)
    assert isinstance(admit(Repository("quay.io", path), upstream), Allow) is served


# --- blocks and freezes ---------------------------------------------------------------------------

REPO = Repository("docker.io", "library/app")
UPSTREAM = Upstream(endpoints=("http://x",))
DIGEST, CHILD = Digest.of(b"image"), Digest.of(b"child")


def restrictions(*targets: str, digests: frozenset[Digest] = frozenset()) -> Restrictions:
    blocks = {target: Block(target, f"by {target}", 0.0, digests) for target in targets}
    return Restrictions.of_marks(Marks(blocks=blocks))


@pytest.mark.parametrize(
    ("target", "refused"),
    [
        ("docker.io/library/app:v1", {"v1"}),
        ("docker.io/library/app", {"v1", "v2", "digest", "repository"}),
        ("docker.io/library/a*", {"v1", "v2", "digest", "repository"}),
        ("*/app", {"v1", "v2", "digest", "repository"}),
        ("docker.io/library/b*", set()),
        (str(DIGEST), {"digest"}),
        (f"ghcr.io/other@{DIGEST}", {"digest"}),
        ("not a target", set()),
    ],
)
def test_target_of_a_block_decides_which_requests_are_refused(
    target: str, refused: set[str]
) -> None:
    references = {"v1": Tag("v1"), "v2": Tag("v2"), "digest": DIGEST, "repository": None}
    found = {
        name
        for name, reference in references.items()
        if isinstance(admit(REPO, UPSTREAM, restrictions(target), reference), Deny)
    }
    assert found == refused


def test_nothing_is_admitted_while_the_marks_are_not_known() -> None:
    unknown = Restrictions(unknown_why="marks.json is damaged")
    assert admit(REPO, UPSTREAM, unknown, Tag("v1")) == Undecided("marks.json is damaged")
    assert admit_digest(DIGEST, unknown) == Undecided("marks.json is damaged")


def test_client_is_told_the_reason() -> None:
    denied = admit(REPO, UPSTREAM, restrictions("docker.io/library/app"))
    said = "this image is blocked by the operator of the mirror: by docker.io/library/app"
    assert denied == Deny(said)


def test_digests_of_a_blocked_image_are_refused_in_every_repository() -> None:
    blocked = restrictions("docker.io/library/app:v1", digests=frozenset({DIGEST, CHILD}))
    for digest in (DIGEST, CHILD):
        assert isinstance(admit_digest(digest, blocked), Deny)
        assert isinstance(admit(Repository("ghcr.io", "x"), UPSTREAM, blocked, digest), Deny)
    assert isinstance(admit_digest(Digest.of(b"other"), blocked), Allow)


def test_freezes_are_found_by_repository_and_tag() -> None:
    names = (f"{REPO}:v1", f"{REPO}@{DIGEST}", "malformed")
    marks = Marks(freezes={name: Freeze(name, DIGEST, 0.0) for name in names})
    assert Restrictions.of_marks(marks).frozen == {(REPO, Tag("v1")): (DIGEST,)}


# --- the endpoint may be a mirror itself ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tag", "is_served"),
    [
        ("one.example/two.example/public/app", "v1", True),
        ("one.example/two.example/private/app", "v1", False),  # allow
        ("one.example/two/private/app", "v1", False),
        ("one.example/one.example/two/private/app", "v1", False),
        ("two.example/one.example/secret/app", "v1", False),  # allow of the outer one
        ("one.example/one.example/secret/app", "v1", False),  # deny
        ("one.example/two.example/public/blocked", "v1", False),
        ("one.example/two.example/public/app", "bad", False),
        ("one.example/three.example/private/app", "v1", True),
        ("one.example/registry.example/team/app", "v1", True),
        ("one.example/registry.example/team/blocked", "v1", False),
        ("one.example/two.example", "v1", True),
    ],
)
def test_path_that_begins_with_a_registry_is_admitted_only_if_what_follows_is(
    name: str, tag: str, is_served: bool
) -> None:
    upstreams = {
        "one.example": Upstream(endpoints=("http://x",), deny=("secret/*",)),
        "two.example": Upstream(endpoints=("http://x",), allow=("public/*",)),
    }
    names = {one: one for one in (*upstreams, "registry.example")} | {"two": "two.example"}
    blocks = restrictions(
        "two.example/public/blocked",
        "two.example/public/app:bad",
        "registry.example/team/blocked",
    )
    repository = Repository(*name.split("/", 1))
    decision = admit_with_nested(repository, upstreams, names, blocks, Tag(tag))
    assert isinstance(decision, Allow) is is_served
