"""JWTs: which are valid, and whom they name."""

from __future__ import annotations

import base64
import hmac
import json
from math import inf, nan
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization

from mirror.access.identity import Identity
from mirror.access.issuers import (
    LEEWAY_S,
    KeyUnknown,
    TokenRefused,
    ValidToken,
    check_token,
    is_jwt,
    issuer_of,
)
from mirror.access.key_sets import parse_key_set
from mirror.config.access import Issuer
from tests.unit.access.kit import AUDIENCE, ISSUER, NOW, Signer, key_set

RSA_KEY = Signer("rsa")
EC_KEY = Signer("ec", kind="EC")
KEYS = parse_key_set(key_set(RSA_KEY, EC_KEY)).content


def settings(**keys: Any) -> Issuer:
    fields = {"issuer": ISSUER, "jwks": "keys.json", "audience": AUDIENCE, **keys}
    return Issuer.model_validate(fields)


def check(token: str, now: float = NOW, **keys: Any) -> ValidToken:
    return check_token(token, settings(**keys), KEYS, lambda: now)


@pytest.mark.parametrize("signer", [RSA_KEY, EC_KEY])
def test_token_of_a_known_key_is_valid(signer: Signer) -> None:
    token = signer.sign()
    assert is_jwt(token)
    assert issuer_of(token) == ISSUER
    valid = check(token)
    assert valid == ValidToken(Identity("job"), NOW + 600 + LEEWAY_S)


def test_token_without_a_key_id_is_tried_with_the_keys_that_fit() -> None:
    signer = Signer(None)
    signer.key = RSA_KEY.key
    assert check(signer.sign()).identity.user == "job"


@pytest.mark.parametrize(
    ("claims", "now"),
    [
        ({"exp": None}, NOW),
        ({"exp": NOW - LEEWAY_S}, NOW),
        ({"exp": "soon"}, NOW),
        ({"exp": True}, NOW),
        *(
            ({name: value}, NOW)
            for name in ("exp", "nbf", "iat")
            for value in (nan, inf, -inf, -1, 10**400, 1e300, "1", False, [1], {"a": 1})
        ),
        ({"nbf": NOW + LEEWAY_S + 1}, NOW),
        ({"iat": NOW + LEEWAY_S + 1}, NOW),
        ({}, NOW + 600 + LEEWAY_S),
        ({"aud": None}, NOW),
        ({"aud": "another"}, NOW),
        ({"aud": ["another", "third"]}, NOW),
        ({"iss": "https://other.example"}, NOW),
        ({"sub": None}, NOW),
        ({"sub": 7}, NOW),
        ({"sub": ""}, NOW),
        ({"sub": "anonymous"}, NOW),
        ({"sub": "authenticated"}, NOW),
        ({"sub": "group:dev"}, NOW),
        ({"sub": "local:root"}, NOW),
        ({"sub": "collection"}, NOW),
        ({"sub": "a\nb"}, NOW),
    ],
)
def test_token_with_a_wrong_claim_is_refused(claims: dict[str, Any], now: float) -> None:
    with pytest.raises(TokenRefused):
        check(RSA_KEY.sign(**claims), now)


def test_clock_may_differ_by_the_leeway() -> None:
    assert check(RSA_KEY.sign(exp=NOW - LEEWAY_S + 1)).identity.user == "job"
    assert check(RSA_KEY.sign(nbf=NOW + LEEWAY_S)).identity.user == "job"
    assert check(RSA_KEY.sign(aud=["other", AUDIENCE])).identity.user == "job"


def test_token_of_an_unknown_key_may_be_of_a_newer_set() -> None:
    with pytest.raises(KeyUnknown):
        check(Signer("new").sign())


def forged(header: dict[str, Any], payload: dict[str, Any], signature: bytes = b"x") -> str:
    """Return a token with any header."""
    parts = [json.dumps(header).encode(), json.dumps(payload).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def signed_with_public_key(payload: dict[str, Any]) -> str:
    """Return a token whose secret for HMAC is the public key, which everybody has."""
    pem = RSA_KEY.key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    signed = forged({"alg": "HS256", "kid": "rsa"}, payload, b"").rstrip(".")
    signature = hmac.digest(pem, signed.encode(), "sha256")
    return forged({"alg": "HS256", "kid": "rsa"}, payload, signature)


def test_forged_token_is_refused() -> None:
    payload = {"iss": ISSUER, "aud": AUDIENCE, "sub": "root", "exp": NOW + 600}
    other = Signer("rsa")
    head, _, rest = RSA_KEY.sign().partition(".")
    body, _, signature = rest.partition(".")
    changed = base64.urlsafe_b64encode(json.dumps(payload).encode()).rstrip(b"=").decode()
    for token in (
        other.sign(),
        f"{head}.{changed}.{signature}",
        f"{head}.{body}.{signature[:-8]}AAAAAAAA",
        forged({"alg": "none"}, payload, b""),
        forged({"alg": "none", "kid": "rsa"}, payload),
        forged({"alg": "HS256", "kid": "rsa"}, payload),
        signed_with_public_key(payload),
        forged({"alg": "ES256", "kid": "rsa"}, payload),
        forged({"alg": "RS256", "kid": "ec"}, payload),
        forged({"alg": ["RS256"], "kid": "rsa"}, payload),
        forged({"alg": "RS256", "kid": 7}, payload),
        forged({"kid": "rsa"}, payload),
        forged({"alg": "RS256", "kid": "rsa", "crit": ["x"], "x": 1}, payload),
    ):
        with pytest.raises(TokenRefused):
            check(token)


@pytest.mark.parametrize("text", ["", "a.b.c", "eyJ.x", "eyJhbGciOiJub25lIn0.e30.", "x" * 40, "ey"])
def test_other_secrets_are_no_jwt(text: str) -> None:
    assert not is_jwt(text)


def test_malformed_token_is_refused() -> None:
    for token in ("eyJhbGci.eyJ.x", "eyJhbGciOiJSUzI1NiJ9.W10.x"):
        with pytest.raises(TokenRefused):
            issuer_of(token)


def test_claims_give_the_user_and_the_groups() -> None:
    token = RSA_KEY.sign(repository="acme/app", roles=["dev", "ops"], team="a")
    valid = check(
        token,
        user_claim="repository",
        user_prefix="ci:",
        groups_claim="roles",
        groups_prefix="ci-",
    )
    assert valid.identity == Identity("ci:acme/app", frozenset({"ci-dev", "ci-ops"}))
    assert check(token, groups_claim="team").identity.groups == {"a"}
    assert check(token, groups_claim="missing").identity.groups == frozenset()
    with pytest.raises(TokenRefused):
        check(RSA_KEY.sign(roles={"a": 1}), groups_claim="roles")


@pytest.mark.parametrize("groups", [["a"] * 257, ["a", 7], ["a", None]])
def test_token_whose_groups_cannot_all_count_is_refused(groups: list[object]) -> None:
    with pytest.raises(TokenRefused, match="its claim roles"):
        check(RSA_KEY.sign(roles=groups), groups_claim="roles")


def test_token_must_have_the_required_claims() -> None:
    token = RSA_KEY.sign(owner="acme", protected=True, number=7)
    required = {"owner": "acme", "protected": "true", "number": "7"}
    assert check(token, claims=required).identity.user == "job"
    for claims in ({"owner": "other"}, {"missing": "x"}, {"aud": AUDIENCE, "list": "x"}):
        with pytest.raises(TokenRefused):
            check(token, claims=claims)


@pytest.mark.parametrize("prefix", ["", "k8s:"])
def test_token_without_a_user_is_refused(prefix: str) -> None:
    signer = Signer()
    issuer = Issuer(issuer=ISSUER, jwks="k", audience=AUDIENCE, user_prefix=prefix)
    keys = parse_key_set(key_set(signer)).content
    with pytest.raises(TokenRefused, match="claim sub"):
        check_token(signer.sign(sub=""), issuer, keys, lambda: NOW)


@pytest.mark.parametrize(
    ("header", "is_valid"),
    [
        ({}, True),
        ({"typ": "at+jwt"}, True),
        ({"typ": "application/at+JWT"}, True),
        ({"typ": "logout+jwt"}, False),
        ({"typ": "application/secevent+jwt"}, False),
        ({"crit": ["x"], "x": 1}, False),
    ],
)
def test_token_for_another_purpose_is_refused(header: dict[str, Any], is_valid: bool) -> None:
    signer = Signer()
    issuer = Issuer(issuer=ISSUER, jwks="k", audience=AUDIENCE)
    keys = parse_key_set(key_set(signer)).content
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "job", "exp": NOW + 600}
    token = jwt.encode(claims, signer.key, "RS256", {"kid": signer.kid, **header})
    if is_valid:
        assert check_token(token, issuer, keys, lambda: NOW).identity.user == "job"
    else:
        with pytest.raises(TokenRefused):
            check_token(token, issuer, keys, lambda: NOW)
