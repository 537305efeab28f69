"""Projected tokens of Kubernetes service accounts, as the API server issues them."""

from __future__ import annotations

from typing import Any

import pytest

from mirror.access.issuers import TokenRefused, ValidToken, check_token, is_jwt
from mirror.access.key_sets import parse_key_set
from mirror.access.rules import Rules
from mirror.config.access import AccessAction, Issuer
from mirror.oci.reference import Repository
from tests.unit.access.kit import AUDIENCE, NOW, Signer, access_section, key_set, rule

CLUSTER = "https://kubernetes.default.svc.cluster.local"
ACCOUNT = "system:serviceaccount:ci:builder"
KEY = Signer("Yx2o4aRtTf0Y6sQ1zCnVd0p9pSxRzq7Xqf3mJ5m0o5c")
KEYS = parse_key_set(key_set(KEY)).content


def projected_token(namespace: str = "ci", account: str = "builder", **claims: Any) -> str:
    """Return a token of ``serviceAccountToken`` with an audience, in a pod."""
    uid = "8d2b1c9e-4a5f-4b0f-9c1e-0f7f1f3a2b11"
    bound = {
        "namespace": namespace,
        "node": {"name": "node-1", "uid": uid},
        "pod": {"name": "build-7c9d", "uid": uid},
        "serviceaccount": {"name": account, "uid": uid},
        "warnafter": int(NOW) + 3607,
    }
    return KEY.sign(
        **{
            "iss": CLUSTER,
            "aud": [AUDIENCE],
            "exp": int(NOW) + 3600,
            "iat": int(NOW),
            "nbf": int(NOW),
            "jti": "5f1d7a52-57a9-4d5c-8b6c-4d4f6f3f2a10",
            "sub": f"system:serviceaccount:{namespace}:{account}",
            "kubernetes.io": bound,
            **claims,
        }
    )


def check(token: str) -> ValidToken:
    settings = {"issuer": CLUSTER, "jwks": "jwks.json", "audience": AUDIENCE, "user_prefix": "k8s:"}
    return check_token(token, Issuer.model_validate(settings), KEYS, lambda: NOW)


def test_service_account_may_do_what_its_rule_says() -> None:
    token = projected_token()
    assert is_jwt(token)
    identity = check(token).identity
    assert (identity.user, identity.groups) == (f"k8s:{ACCOUNT}", frozenset())
    rules = Rules(
        access_section(rule("registry.example/team/**", f"k8s:{ACCOUNT}", "pull", "push")),
        "registry.example",
    )
    team, other = (Repository("registry.example", path) for path in ("team/app", "other/app"))
    assert rules.is_allowed(identity, team, AccessAction.PUSH)
    assert not rules.is_allowed(identity, team, AccessAction.DELETE)
    assert not rules.is_allowed(identity, other, AccessAction.PUSH)
    for stranger in (projected_token("default"), projected_token("ci", "builder2")):
        assert not rules.is_allowed(check(stranger).identity, team, AccessAction.PUSH)


def test_several_audiences_are_allowed_and_the_default_one_is_refused() -> None:
    assert check(projected_token(aud=[CLUSTER, AUDIENCE])).identity.user == f"k8s:{ACCOUNT}"
    for audiences in ([CLUSTER], [], ["oci-mirror.evil"]):
        with pytest.raises(TokenRefused):
            check(projected_token(aud=audiences))
