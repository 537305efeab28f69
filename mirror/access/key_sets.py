"""The public keys of issuers (JSON Web Key Set, RFC 7517).

Lives here: which keys of a set are used, and when a set of a URL is fetched. Must not know: how it
is fetched, tokens.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import jwt

from mirror.access.watched_file import ParsedFile
from mirror.oci.errors import MirrorError

KEY_ALGORITHMS: Final = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "EC": ("ES256", "ES384", "ES512"),
    "OKP": ("EdDSA",),
}
"""Type of a key -> algorithms (RFC 7518) that it may have signed with. No symmetric one: everybody
who could check a token could forge it."""
KEYS_REFRESH_S: Final = 600.0
"""Seconds between two fetches of a set. Issuers publish a new key some time before they use it."""
KEYS_RETRY_S: Final = 10.0
"""Seconds between two fetches for tokens with unknown keys, or after a failure. Anybody can send
such a token."""
_KEYS_TTL_S: Final = 86_400.0
"""Seconds for which keys are used that cannot be fetched again."""
_MAX_KEYS: Final = 100
"""Keys of a set that count: issuers have a few."""
KEYS_REMEDY: Final = (
    "save what the jwks_uri of the issuer's /.well-known/openid-configuration returns"
)
"""How to make a file of keys."""
_MIN_RSA_BITS: Final = 2048
"""RFC 7518, section 3.3."""

FetchKeys: TypeAlias = Callable[[str, str | None], Awaitable[bytes]]
"""Returns the body of a URL. The second argument is a PEM file of authorities, or None. Raises
``MirrorError`` or ``OSError``."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that may have signed a token."""

    key_id: str | None
    algorithms: tuple[str, ...]
    key: Any
    """The key, for PyJWT."""


Keys: TypeAlias = Sequence[PublicKey]


def parse_key_set(raw: bytes) -> ParsedFile[Keys]:
    """Parse a key set. Keys for other purposes than signatures are passed over."""
    try:
        document = json.loads(raw) if raw else {"keys": []}
        listed = document["keys"]
        entries = [entry for entry in listed if isinstance(entry, dict)][:_MAX_KEYS]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ParsedFile((), ("not a JSON Web Key Set",))
    keys = [key for entry in entries if (key := _read_key(entry)) is not None]
    problems = () if keys or not raw else ("no key for signatures (RSA of 2048 bits, EC, EdDSA)",)
    return ParsedFile(tuple(keys), problems)


def _read_key(entry: dict[str, Any]) -> PublicKey | None:
    """Return a key of a set. None: it is not for the signatures of tokens."""
    algorithms = KEY_ALGORITHMS.get(str(entry.get("kty")), ())
    stated = entry.get("alg")
    if stated is not None:
        algorithms = tuple(one for one in algorithms if one == stated)
    if not algorithms or entry.get("use", "sig") != "sig":
        return None
    public = {name: part for name, part in entry.items() if name not in _PRIVATE}
    try:
        key = jwt.PyJWK(public, algorithms[0]).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    if getattr(key, "key_size", _MIN_RSA_BITS) < _MIN_RSA_BITS and entry["kty"] == "RSA":
        return None
    if entry["kty"] == "EC":
        curve = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
        algorithms = tuple(one for one in algorithms if one == curve.get(key.curve.name))
    key_id = entry.get("kid")
    return PublicKey(key_id if isinstance(key_id, str) else None, algorithms, key)


_PRIVATE: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth"})
"""Members of a private key (RFC 7518, section 6). Only its public part is used."""


class FetchedKeySet:
    """A key set that is fetched from a URL."""

    def __init__(self, url: str, ca: str | None, fetch: FetchKeys) -> None:
        """Start without keys. See :data:`FetchKeys` for ``ca`` and ``fetch``."""
        self.url = url
        self._ca = ca
        self._fetch = fetch
        self._keys: Keys = ()
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self.is_fetching = False

    def keys(self, now: float) -> Keys:
        """Return the keys. None of them if they could not be fetched for a day."""
        if self._fetched_at is None or now - self._fetched_at > _KEYS_TTL_S:
            return ()
        return self._keys

    def is_due(self, now: float, *, is_key_unknown: bool = False) -> bool:
        """Return whether the set is to be fetched at ``now``, in seconds, or is being fetched."""
        if self.is_fetching:
            return True
        # A time in the future: the clock was set back.
        if self._tried_at is not None and 0 <= now - self._tried_at < KEYS_RETRY_S:
            return False
        is_new = self._fetched_at is not None and 0 <= now - self._fetched_at < KEYS_REFRESH_S
        return is_key_unknown or not is_new

    @property
    def is_current(self) -> bool:
        """Whether the last fetch has ended and succeeded."""
        return self._fetched_at is not None and self._fetched_at == self._tried_at

    async def refresh(self, now: float) -> str:
        """Fetch the set. Returns why that failed; the keys stay then. Empty: it did not."""
        self._tried_at, self.is_fetching = now, True
        try:
            parsed = parse_key_set(await self._fetch(self.url, self._ca))
        except (MirrorError, OSError) as error:
            return f"{self.url}: {error}"
        except Exception:
            return f"{self.url}: its response cannot be used"
        finally:
            self.is_fetching = False
        if parsed.problems:
            return f"{self.url}: {parsed.problems[0]}"
        self._keys, self._fetched_at = parsed.content, now
        return ""
