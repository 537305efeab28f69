"""Tokens of OIDC issuers (JWT, RFC 7519): Kubernetes service accounts, CI jobs, people.

Lives here: which token is valid, and the identity that it stands for. Must not know: where keys
come from, requests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jwt

from mirror.access.identity import Identity
from mirror.access.key_sets import Keys, PublicKey
from mirror.config.access import Issuer, check_name

LEEWAY_S: Final = 30.0
"""Seconds by which the clock of an issuer may differ."""
_MAX_JWT_CHARS: Final = 16 * 1024
"""Characters of a token: those with many groups have a few thousand."""
_MAX_GROUPS: Final = 256
"""Groups of a token at most: each decision compares them with those of the rules."""
_MAX_TIME: Final = 253_402_300_799
"""Seconds since the epoch of the end of the year 9999, which is that of no clock."""
_JWT: Final = re.compile(r"eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
"""A JWT begins with a JSON object, ``{"``, in base64url."""


class TokenRefused(Exception):
    """A JWT is not valid. The text is for the log, and has no part of the token."""


class KeyUnknown(TokenRefused):
    """No key of the issuer has the id of the token's key. A newer set may have one."""


class KeysUnavailable(TokenRefused):
    """The issuer has no key that fits, and its keys are not known now. The token may be valid."""


@dataclass(frozen=True, slots=True)
class ValidToken:
    """A JWT that is valid."""

    identity: Identity
    expires_at: float
    """Seconds since the epoch."""


def is_jwt(text: str) -> bool:
    """Return whether a password or a bearer token has the form of a JWT."""
    return len(text) <= _MAX_JWT_CHARS and _JWT.fullmatch(text) is not None


def issuer_of(token: str) -> str:
    """Return the ``iss`` of a JWT, which is not verified. Raises ``TokenRefused``."""
    try:
        claims = jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise TokenRefused("malformed") from None
    issuer = claims.get("iss")
    if not isinstance(issuer, str):
        raise TokenRefused("it names no issuer")
    return issuer


def check_token(token: str, issuer: Issuer, keys: Keys, now: Callable[[], float]) -> ValidToken:
    """Check a JWT of an issuer.

    Args:
        token: The token.
        issuer: The issuer that it names.
        keys: Public keys of the issuer.
        now: Returns the seconds since the epoch.

    Raises:
        KeyUnknown: It is signed with a key that is not among ``keys``.
        TokenRefused: It is not valid, or is not for this server.
    """
    claims = _verify(token, issuer, _candidates(token, keys))
    # Checked here, and not by the library, which knows the time of the system only.
    expires_at, at = _time_claim(claims, "exp"), now()
    if expires_at is None or at >= expires_at + LEEWAY_S:
        raise TokenRefused("it has expired")
    for name in ("nbf", "iat"):
        begins_at = _time_claim(claims, name)
        if begins_at is not None and at < begins_at - LEEWAY_S:
            raise TokenRefused("it is not valid yet: compare the clocks")
    for name, value in issuer.claims.items():
        if _text_of(claims.get(name)) != value:
            raise TokenRefused(f"its claim {name} is not the one that the configuration requires")
    return ValidToken(_identity_of(claims, issuer), expires_at + LEEWAY_S)


def _candidates(token: str, keys: Keys) -> list[tuple[PublicKey, str]]:
    """Return (key, algorithm) of each key that may have signed a token."""
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise TokenRefused("malformed") from None
    if "crit" in header:  # RFC 7515, section 4.1.11.
        raise TokenRefused("it needs an extension, and none is supported")
    # RFC 8725, section 3.11. A JWT without a type of its own is told by its audience.
    kind = str(header.get("typ", "")).lower().removeprefix("application/")
    if kind.endswith("+jwt") and kind != "at+jwt":
        raise TokenRefused("its typ says that it is for another purpose")
    key_id, algorithm = header.get("kid"), header.get("alg")
    found = [
        (key, one)
        for key in keys
        for one in key.algorithms
        if one == algorithm and (key_id is None or key.key_id in (None, key_id))
    ]
    if not found:
        raise KeyUnknown("no key of the issuer fits it")
    return found


def _verify(
    token: str, issuer: Issuer, candidates: Sequence[tuple[PublicKey, str]]
) -> dict[str, Any]:
    for key, algorithm in candidates:
        try:
            return jwt.decode(
                token,
                key=key.key,
                algorithms=[algorithm],
                audience=issuer.audience,
                issuer=issuer.issuer,
                options={
                    "require": ["exp", "iss", "aud", issuer.user_claim],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except jwt.InvalidSignatureError:
            continue
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise TokenRefused(str(error)) from None
    raise TokenRefused("its signature is wrong")


def _time_claim(claims: dict[str, Any], name: str) -> float | None:
    """Return a NumericDate (RFC 7519, section 2). None without it. Raises ``TokenRefused``."""
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TokenRefused(f"its claim {name} is not a number")
    # JSON parsers of Python accept NaN, Infinity and 1e999, and compare them with any time.
    if not 0 <= value <= _MAX_TIME:
        raise TokenRefused(f"its claim {name} is not a time")
    return float(value)


def _identity_of(claims: dict[str, Any], issuer: Issuer) -> Identity:
    user = claims[issuer.user_claim]
    if not isinstance(user, str) or not user:  # An empty one would be the prefix alone.
        raise TokenRefused(f"its claim {issuer.user_claim} is not text, or empty")
    groups: list[str] = []
    if issuer.groups_claim is not None:
        listed = claims.get(issuer.groups_claim, [])
        listed = [listed] if isinstance(listed, str) else listed
        if not isinstance(listed, list):
            raise TokenRefused(f"its claim {issuer.groups_claim} is not a list")
        # All count, or the token does not: a rule may refuse something to the group left out.
        if len(listed) > _MAX_GROUPS:
            raise TokenRefused(
                f"its claim {issuer.groups_claim} has {len(listed)} groups, and at most"
                f" {_MAX_GROUPS} are allowed: let the issuer put fewer into it"
            )
        if not all(isinstance(name, str) for name in listed):
            raise TokenRefused(f"its claim {issuer.groups_claim} lists a group that is not text")
        groups = [issuer.groups_prefix + name for name in listed]
    try:
        return Identity(user=check_name(issuer.user_prefix + user), groups=frozenset(groups))
    except ValueError as error:
        raise TokenRefused(f"its user cannot be used: {error}") from None


def _text_of(value: Any) -> str | None:
    """Return a claim as it is written in the configuration."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int) else None
