"""Helpers of the tests of access: users, tokens and issuers without a server."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

import bcrypt
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from mirror.config.access import AccessSection

NOW = 1_900_000_000.0
ISSUER = "https://issuer.example"
AUDIENCE = "oci-mirror"
DOCUMENTED = """
hosted:
  listen: 127.0.0.1:5101            # or hosts: [registry.example.internal], on its listener
  name: registry.example.internal   # as in image references
  max_size: 100GiB
access:
  users: ./htpasswd                 # bcrypt
  tokens: ./tokens.yaml
  issuers: [{issuer: https://…, jwks: ./jwks.json, audience: oci-mirror}]
  rules:                            # the first that fits; none fits: no
    - {repositories: ["registry.example.internal/team/**"], who: [ci], may: [pull, push, delete]}
    - {repositories: ["**"], who: [anonymous], may: [pull]}
"""
"""The example that hosting was designed with, as it was written: one issuer beside the files."""


@cache
def hash_of(password: str) -> str:
    """Return a bcrypt hash with the lowest cost."""
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()


def htpasswd(**users: str) -> str:
    """Return an htpasswd file. ``users``: name -> password."""
    return "".join(f"{name}:{hash_of(password)}\n" for name, password in users.items())


def basic(user: str, password: str) -> str:
    """Return an ``Authorization`` field."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def rule(repositories: Any, who: Any, *may: str) -> dict[str, Any]:
    """Return a rule, as in the configuration."""
    return {
        "repositories": [repositories] if isinstance(repositories, str) else repositories,
        "who": [who] if isinstance(who, str) else who,
        "may": list(may),
    }


def access_section(*rules: Mapping[str, Any], **keys: Any) -> AccessSection:
    """Return the section ``access``."""
    return AccessSection.model_validate({"rules": list(rules), **keys})


# --- issuers --------------------------------------------------------------------------------------


class Signer:
    """A key of an issuer."""

    def __init__(self, kid: str | None = "one", kind: str = "RSA") -> None:
        self.kid = kid
        self.kind = kind

    @cached_property
    def key(self) -> Any:
        """The private key. Made at its first use: each worker of pytest imports all tests."""
        if self.kind == "RSA":
            return rsa.generate_private_key(65537, 2048)
        return ec.generate_private_key(ec.SECP256R1())

    @property
    def jwk(self) -> dict[str, Any]:
        """The public key, for a key set."""
        encode = RSAAlgorithm.to_jwk if self.kind == "RSA" else ECAlgorithm.to_jwk
        entry: dict[str, Any] = json.loads(encode(self.key.public_key()))
        return entry if self.kid is None else {**entry, "kid": self.kid}

    def sign(self, algorithm: str = "", now: float = NOW, **claims: Any) -> str:
        """Return a token. ``claims``: they replace the usual ones; None leaves one out."""
        usual = {"iss": ISSUER, "aud": AUDIENCE, "sub": "job", "exp": now + 600, "iat": now}
        payload = {name: value for name, value in {**usual, **claims}.items() if value is not None}
        header = {} if self.kid is None else {"kid": self.kid}
        algorithm = algorithm or ("RS256" if self.kind == "RSA" else "ES256")
        return jwt.encode(payload, self.key, algorithm, header)


def key_set(*signers: Signer) -> bytes:
    """Return a JSON Web Key Set."""
    return json.dumps({"keys": [signer.jwk for signer in signers]}).encode()
