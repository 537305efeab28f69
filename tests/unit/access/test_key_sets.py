"""Key sets: which keys count, and when a set is fetched."""

from __future__ import annotations

import json

import pytest

from mirror.access.key_sets import REFRESH_S, RETRY_S, FetchedKeySet, parse_key_set
from mirror.oci.errors import UpstreamUnavailable
from tests.unit.access.kit import NOW, Signer, key_set

KEY = Signer("one")
EC = Signer("two", kind="EC")


def test_keys_for_signatures_are_used_with_their_algorithms() -> None:
    rsa, ec = parse_key_set(key_set(KEY, EC)).content
    assert (rsa.key_id, set(rsa.algorithms)) == (
        "one",
        {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"},
    )
    assert (ec.key_id, ec.algorithms) == ("two", ("ES256",)), "the curve decides"


@pytest.mark.parametrize(
    "change",
    [
        {"kty": "oct", "k": "c2VjcmV0"},
        {"use": "enc"},
        {"alg": "HS256"},
        {"alg": "none"},
        {"n": "AQAB"},
        {"kty": "??"},
        {"n": 7},
    ],
)
def test_other_keys_are_passed_over(change: dict[str, object]) -> None:
    raw = json.dumps({"keys": [{**KEY.jwk, **change}, EC.jwk]}).encode()
    assert [key.key_id for key in parse_key_set(raw).content] == ["two"]


def test_key_with_an_algorithm_is_used_for_that_one_only() -> None:
    raw = json.dumps({"keys": [{**KEY.jwk, "alg": "PS256"}]}).encode()
    assert [key.algorithms for key in parse_key_set(raw).content] == [("PS256",)]


@pytest.mark.parametrize("raw", [b"{", b"[]", b"{}", b'{"keys": 7}', b"\xff", b'{"keys": [7]}'])
def test_what_is_no_key_set_has_no_keys(raw: bytes) -> None:
    parsed = parse_key_set(raw)
    assert len(parsed.content) == 0
    assert len(parsed.problems) == 1


async def test_set_of_a_url_is_fetched_again_and_kept_while_that_fails() -> None:
    bodies: list[bytes | Exception] = [
        key_set(KEY),
        UpstreamUnavailable("down"),
        b"a log-in page",
        key_set(EC),
    ]

    async def fetch(url: str, ca: str | None) -> bytes:
        assert (url, ca) == ("https://keys.example", "ca.pem")
        body = bodies.pop(0)
        if isinstance(body, Exception):
            raise body
        return body

    keys = FetchedKeySet("https://keys.example", "ca.pem", fetch)
    assert keys.is_due(NOW)
    assert await keys.refresh(NOW) == ""
    assert [key.key_id for key in keys.keys(NOW)] == ["one"]
    assert not keys.is_due(NOW + REFRESH_S - 1)
    assert not keys.is_due(NOW + RETRY_S - 1, is_key_unknown=True)
    assert keys.is_due(NOW + RETRY_S, is_key_unknown=True)
    later = NOW + REFRESH_S
    assert keys.is_due(later)
    assert await keys.refresh(later) == "https://keys.example: down"
    assert not keys.is_due(later + 1)
    assert await keys.refresh(later + RETRY_S) == "https://keys.example: not a JSON Web Key Set"
    assert [key.key_id for key in keys.keys(later)] == ["one"]
    assert await keys.refresh(later + 2 * RETRY_S) == ""
    assert [key.key_id for key in keys.keys(later)] == ["two"], "rotated"
    assert keys.keys(later + 100_000) == (), "a set that cannot be fetched for a day is not used"
