"""The tokens in a file, which clients send as a bearer token or as a password.

Lives here: the file, the form of a token, and the comparison by hash. Must not know: requests.

A token is looked up by its SHA-256. Its time may depend on the hash, which says nothing about the
token: it has at least 16 characters that nobody can guess.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, time
from typing import Annotated, Any, Final, TypeAlias

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from mirror.access.identity import Identity
from mirror.access.watched_file import ParsedFile
from mirror.config.access import check_name

_MIN_TOKEN_CHARS: Final = 16
"""Characters of a token at least: one that is shorter can be guessed."""
# RFC 6750, section 2.1: credentials = "Bearer" 1*SP b64token. Schemes are compared without case.
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=-]+", re.ASCII)
_BEARER: Final = re.compile(rf"bearer +({_TOKEN.pattern}) *", re.IGNORECASE | re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_SHA256_OF_NOTHING: Final = hashlib.sha256().hexdigest()
TOKENS_REMEDY: Final = "make it with a list of tokens: [{name: ci, token: ...}]"
"""How to make a file of tokens."""
NEW_TOKENS_REMEDY: Final = "make one with `openssl rand -hex 32`"
"""How to make a token."""


@dataclass(frozen=True, slots=True)
class AccessToken:
    """A token of a file."""

    identity: Identity
    expires_at: float | None
    """Seconds since the epoch. None: never."""


AccessTokens: TypeAlias = Mapping[bytes, AccessToken]
"""SHA-256 of a token -> what it stands for."""

_Name = Annotated[str, AfterValidator(check_name)]


class _TokenEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: _Name
    token: str | None = None
    sha256: str | None = None
    expires: str | None = None
    groups: tuple[_Name, ...] = ()

    @model_validator(mode="after")
    def _check_secret(self) -> _TokenEntry:
        if (self.token is None) == (self.sha256 is None):
            raise ValueError("needs token or sha256, and not both")
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ValueError("sha256 must have 64 lower-case hex digits")
        if self.sha256 == _SHA256_OF_NOTHING:
            raise ValueError(f"sha256 is that of an empty token: {NEW_TOKENS_REMEDY}")
        if self.token is not None:
            check_new_token(self.token)
        return self

    def digest(self) -> bytes:
        """Return the SHA-256 of the token."""
        if self.sha256 is not None:
            return bytes.fromhex(self.sha256)
        return hash_token(self.token or "")

    def expires_at(self) -> float | None:
        """Return the end of the token, in seconds since the epoch. A date ends at its midnight."""
        if self.expires is None:
            return None
        moment = datetime.fromisoformat(self.expires)
        if len(self.expires) == len("2030-01-31"):
            moment = datetime.combine(moment.date(), time.max)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def find_token(tokens: AccessTokens, secret: str) -> AccessToken | None:
    """Return the token that a client has sent, or None.

    One that is too short counts for none: its hash may be in the file, which does not tell.
    """
    return tokens.get(hash_token(secret)) if len(secret) >= _MIN_TOKEN_CHARS else None


def bearer_token(authorization: str) -> str | None:
    """Return the token of an ``Authorization`` header field. None: it has another form."""
    match = _BEARER.fullmatch(authorization)
    return match and match[1]


def check_new_token(token: str) -> None:
    """Raise ``ValueError`` if a file must not have this token. The message has no part of it."""
    if len(token) < _MIN_TOKEN_CHARS:
        raise ValueError(f"shorter than {_MIN_TOKEN_CHARS} characters: {NEW_TOKENS_REMEDY}")
    if not _TOKEN.fullmatch(token):
        raise ValueError("may have only letters, digits and . _ ~ + / = -")


def hash_token(token: str) -> bytes:
    """Return the SHA-256 of a token: all have the same length, and none is kept in memory."""
    return hashlib.sha256(token.encode(errors="replace")).digest()


def parse_tokens(
    raw: bytes, reserved: tuple[str, ...] = (), reserved_groups: tuple[str, ...] = ()
) -> ParsedFile[AccessTokens]:
    """Parse a file of tokens. Entries that cannot be used are problems, and all others count.

    Args:
        raw: The bytes of the file.
        reserved: What begins the names of users of issuers, and of none here.
        reserved_groups: What begins the names of groups of issuers, and of none here.
    """
    tokens: dict[bytes, AccessToken] = {}
    problems: list[str] = []
    try:
        # All scalars are text: nothing in the file is interpreted.
        entries = yaml.load(raw, Loader=yaml.BaseLoader)  # noqa: S506 - makes text, lists and dicts
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        # The last two are of an escape sequence for a character that there is not.
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        return ParsedFile({}, (f"{where}not YAML: {TOKENS_REMEDY}",))
    if entries in (None, ""):
        return ParsedFile({})
    if not isinstance(entries, list):
        return ParsedFile({}, ("must be a list of tokens, each with name, and token or sha256",))
    for number, entry in enumerate(entries, 1):
        try:
            digest, token = _read_entry(entry)
            _check_reserved(token.identity, reserved, reserved_groups)
        except ValueError as error:
            problems.append(f"token {number}: {error}")
            continue
        if digest in tokens:
            problems.append(f"token {number}: listed twice")
        tokens.setdefault(digest, token)
    return ParsedFile(tokens, tuple(problems))


def _check_reserved(identity: Identity, users: tuple[str, ...], groups: tuple[str, ...]) -> None:
    """Raise ``ValueError`` for a name that belongs to an issuer."""
    if identity.user.startswith(users):
        raise ValueError("name begins with the user_prefix of an issuer")
    if any(group.startswith(groups) for group in identity.groups):
        raise ValueError("groups: one begins with the groups_prefix of an issuer")


def _read_entry(entry: Any) -> tuple[bytes, AccessToken]:
    """Return the hash and the meaning of an entry. Raises ``ValueError``."""
    if not isinstance(entry, dict):
        raise ValueError("must be a mapping with name, and token or sha256")
    try:
        parsed = _TokenEntry.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {message}" if where else message) from None
    try:
        expires_at = parsed.expires_at()
    except ValueError:
        raise ValueError("expires must be a date, such as 2030-01-31") from None
    return parsed.digest(), AccessToken(
        Identity(user=parsed.name, groups=frozenset(parsed.groups)), expires_at
    )
