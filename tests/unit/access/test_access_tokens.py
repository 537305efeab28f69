"""Files of tokens."""

from __future__ import annotations

import hashlib

import pytest

from mirror.access.access_tokens import find_token, hash_token, parse_tokens

TOKEN = "0123456789abcdef"


def test_tokens_are_read_in_plain_and_as_hashes() -> None:
    hashed = hashlib.sha256(b"another-long-token").hexdigest()
    parsed = parse_tokens(
        f"""
        - {{name: ci, token: {TOKEN}, groups: [dev, ops]}}
        - {{name: robot, sha256: {hashed}, expires: 2030-01-31}}
        - {{name: ci, token: "12345678901234567890", expires: "2030-01-31T12:00:00+02:00"}}
        """.encode()
    )
    assert parsed.problems == ()
    ci, robot, other = (
        parsed.content[hash_token(token)]
        for token in (TOKEN, "another-long-token", "12345678901234567890")
    )
    assert (ci.identity.user, ci.identity.groups, ci.expires_at) == ("ci", {"dev", "ops"}, None)
    assert robot.identity.user == "robot"
    assert int(robot.expires_at or 0) == 1896134399, "the end of that day"
    assert other.expires_at == 1896084000


def test_short_token_is_none_although_the_file_has_its_hash() -> None:
    short, long = "x" * 15, "x" * 16
    hashes = [hashlib.sha256(token.encode()).hexdigest() for token in (short, long)]
    parsed = parse_tokens("".join(f"- {{name: a, sha256: {one}}}\n" for one in hashes).encode())
    assert find_token(parsed.content, short) is None
    assert find_token(parsed.content, long) is not None


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("{name: a}", "needs token or sha256, and not both"),
        (f"{{name: a, token: {TOKEN}, sha256: {'0' * 64}}}", "needs token or sha256"),
        ("{name: a, token: short}", "shorter than 16 characters: make one with"),
        ("{name: a, token: 'has a space in it'}", "may have only letters"),
        ("{name: a, sha256: ABC}", "64 lower-case hex digits"),
        (
            f"{{name: a, sha256: {hashlib.sha256().hexdigest()}}}",
            "sha256 is that of an empty token",
        ),
        (f"{{token: {TOKEN}}}", "name: "),
        (f"{{name: anonymous, token: {TOKEN}}}", "anonymous has a meaning of its own"),
        (f"{{name: retention, token: {TOKEN}}}", "retention has a meaning of its own"),
        (f"{{name: a, token: {TOKEN}, expires: soon}}", "expires must be a date"),
        (f"{{name: a, token: {TOKEN}, expire: 2030-01-01}}", "expire"),
        ("text", "must be a mapping"),
    ],
)
def test_entry_that_cannot_be_used_is_a_problem_and_all_others_count(
    entry: str, problem: str
) -> None:
    parsed = parse_tokens(f"- {entry}\n- {{name: good, token: good-{TOKEN}}}\n".encode())
    assert [token.identity.user for token in parsed.content.values()] == ["good"]
    (found,) = parsed.problems
    assert found.startswith("token 1: ")
    assert problem in found
    assert TOKEN not in found


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"a: [", "not YAML"),
        (b"a: b", "must be a list of tokens"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"- !!python/object:os.system {}", "token 1"),
    ],
)
def test_file_that_cannot_be_read_has_no_tokens(raw: bytes, problem: str) -> None:
    parsed = parse_tokens(raw)
    assert parsed.content == {}
    assert problem in parsed.problems[0]


def test_empty_file_has_no_tokens() -> None:
    for raw in (b"", b"# nothing\n", b"[]"):
        assert (parse_tokens(raw).content, parse_tokens(raw).problems) == ({}, ())


def test_token_that_is_listed_twice_is_a_problem() -> None:
    parsed = parse_tokens(f"- {{name: a, token: {TOKEN}}}\n- {{name: b, token: {TOKEN}}}".encode())
    assert parsed.problems == ("token 2: listed twice",)
    assert [token.identity.user for token in parsed.content.values()] == ["a"]


def test_names_that_an_issuer_may_give_are_refused() -> None:
    raw = f"- {{name: 'ci:a', token: {TOKEN}}}\n- {{name: b, token: x{TOKEN}, groups: ['ci-b']}}"
    parsed = parse_tokens(raw.encode(), reserved=("ci:",), reserved_groups=("ci-",))
    assert not parsed.content
    assert parsed.problems == (
        "token 1: name begins with the user_prefix of an issuer",
        "token 2: groups: one begins with the groups_prefix of an issuer",
    )
