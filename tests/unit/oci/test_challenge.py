"""``WWW-Authenticate``: several challenges, quoting, malformed headers (rows U10, HU10)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.challenge import (
    MAX_CHALLENGE_CHARS,
    MAX_CHALLENGES,
    Basic,
    Bearer,
    Challenge,
    Other,
    parse_challenges,
)

REALM = "https://auth.docker.io/token"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            f'Bearer realm="{REALM}",service="registry.docker.io",scope="repository:a/b:pull,push"',
            [Bearer(REALM, "registry.docker.io", "repository:a/b:pull,push")],
        ),
        (
            f'bearer  REALM = "{REALM}" , error="invalid_token"',
            [Bearer(REALM, error="invalid_token")],
        ),
        (f"Bearer realm={REALM},service=x", [Bearer(REALM, "x")]),
        ('Basic realm="Registry Realm"', [Basic("Registry Realm")]),
        ('Basic realm="a \\"quoted\\" \\\\ one"', [Basic('a "quoted" \\ one')]),
        ("Basic", [Basic()]),
        ("BASIC ", [Basic()]),
        ('Basic realm=""', [Basic("")]),
        ("Negotiate", [Other("negotiate")]),
        ("Negotiate dG9rZW4=", [Other("negotiate")]),
        ("Negotiate dG9rZW4==, Basic realm=x", [Other("negotiate"), Basic("x")]),
        ("Negotiate a.b~c+d/e, NTLM", [Other("negotiate"), Other("ntlm")]),
        ("Bearer", [Other("bearer")]),
        ('Bearer service="x"', [Other("bearer")]),
        ('Bearer realm=""', [Other("bearer")]),
        (
            f'Basic realm="x", Bearer realm="{REALM}", service="y", Digest nonce=z, qop="auth"',
            [Basic("x"), Bearer(REALM, "y"), Other("digest")],
        ),
        (f', ,Bearer realm="{REALM}",,service="y", ', [Bearer(REALM, "y")]),
        ('Newauth realm="apps", type=1, title="Login to \\"apps\\"", Basic realm="simple"',
         [Other("newauth"), Basic("simple")]),
    ],
)  # fmt: skip
def test_header_is_parsed_into_its_challenges(header: str, expected: list[Challenge]) -> None:
    assert parse_challenges(header) == tuple(expected)


def test_several_lines_are_read_as_one_list() -> None:
    lines = ["Negotiate", f'Bearer realm="{REALM}"', 'Basic realm="x"']
    assert parse_challenges(lines) == (Other("negotiate"), Bearer(REALM), Basic("x"))
    assert parse_challenges([]) == ()


@pytest.mark.parametrize(
    "header",
    [
        "",
        " , ,",
        "=",
        '"',
        'Bearer realm="unclosed',
        'Bearer realm="unclosed\\"',
        'Bearer realm="a" service="b"',
        'Bearer realm="a"b',
        'Bearer realm="a", realm="https://evil.example/"',
        'Bearer realm="a",REALM="b"',
        'Bearer realm="a\r\nb"',
        'Bearer realm="a\x00b"',
        'Bearer realm="a"\n',
        "Basic\n",
        "Bearer realm",
        "Bearer realm=",
        "Basic dXNlcg== realm=x",
        "Bearer {}",
        "Bearer realm=\u0660",
    ],
)
def test_malformed_header_gives_no_challenge(header: str) -> None:
    assert not any(isinstance(found, Bearer | Basic) for found in parse_challenges(header))


@pytest.mark.row("HU10-header-bombs")
def test_too_long_header_or_too_many_challenges_give_none() -> None:
    assert parse_challenges(f'Bearer realm="{"a" * MAX_CHALLENGE_CHARS}"') == ()
    assert parse_challenges(["Basic"] * (MAX_CHALLENGES + 1)) == ()
    assert len(parse_challenges(["Basic"] * MAX_CHALLENGES)) == MAX_CHALLENGES
    half = f'Basic realm="{"a" * (MAX_CHALLENGE_CHARS // 2)}"'
    assert parse_challenges([half, half]) == ()
    assert len(parse_challenges(half)) == 1


@given(st.text() | st.text(alphabet='Basic Bearer realm=",\\\t \x00é/:'))
def test_any_text_is_parsed_without_exception(header: str) -> None:
    for found in parse_challenges(header):
        if isinstance(found, Bearer):
            assert found.realm


VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)


@given(VALUES.filter(bool), VALUES, st.lists(st.sampled_from(["Basic", "Negotiate abc=="])))
def test_quoted_bearer_challenge_is_found_among_others(
    realm: str, service: str, others: list[str]
) -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    ours = f"Bearer realm={quoted(realm)},service={quoted(service)}"
    found = parse_challenges(", ".join([*others, ours, *others]))
    assert len(found) == (2 * len(others) + 1 if 2 * len(others) < MAX_CHALLENGES else 0)
    if found:
        assert found[len(others)] == Bearer(realm, service)
