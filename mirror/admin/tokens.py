"""The bearer tokens of the admin listener, and the tickets of its event streams.

Lives here: which role a token has, in constant time, and tickets that are valid once. Must not
know: requests, what a role may do.

A browser's ``EventSource`` sends no ``Authorization``. So a page gets a ticket with its token, and
puts the ticket into the address of the stream. It is valid once, for a short time, and for nothing
else. An address may be logged by a proxy; the ticket in it is worth nothing by then. A cookie would
be sent to every port of the host.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Final

from mirror.config.settings import Admin
from mirror.oci.errors import ConfigError
from mirror.store.file_stamp import file_stamp

MIN_TOKEN_CHARS: Final = 16
"""Characters of a token at least: one that is shorter can be guessed."""
_MAX_TOKEN_FILE_BYTES: Final = 64 * 1024
"""Bytes of a file of tokens. A token is a line of at most some hundred characters."""
TICKET_TTL_S: Final = 30.0
"""Seconds in which a page opens the stream for which it has got a ticket."""
_MAX_TICKETS: Final = 256
"""Tickets that are valid at the same time. The oldest ones end first."""
# RFC 6750, section 2.1: credentials = "Bearer" 1*SP b64token. Schemes are compared without case.
_BEARER: Final = re.compile(r"bearer +([A-Za-z0-9._~+/=-]+) *", re.IGNORECASE | re.ASCII)
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=-]+", re.ASCII)


class CallerRole(StrEnum):
    """The requests that a caller may send."""

    FULL = "full"
    READ_ONLY = "read-only"


class Tokens:
    """The tokens in the files of the configuration, as digests."""

    def __init__(self, admin: Admin) -> None:
        """Read the files. Raises ``ConfigError`` if one has no token, or cannot be used."""
        self._admin = admin
        self._stamp = self._find_stamps()
        self._roles, without = self._read()
        self._failure = ""
        if without:
            raise ConfigError(without[0])

    def refresh(self) -> None:
        """Read the files again if they have changed.

        A file that is missing, or has no token any more, revokes all of its tokens. If one cannot
        be used (it cannot be read, or has a malformed line), all tokens in use stay, and the next
        call tries again.

        Raises ``ConfigError`` in both cases, once for the same reason.
        """
        stamp = self._find_stamps()
        if stamp == self._stamp:
            return
        try:
            self._roles, without = self._read()
        except ConfigError as error:
            if str(error) != self._failure:
                self._failure = str(error)
                raise
            return
        self._stamp, self._failure = stamp, ""
        if without:
            raise ConfigError(f"{without[0]}: all tokens of this file are revoked")

    def role_of(self, authorization: str | None) -> CallerRole | None:
        """Return the role of an ``Authorization`` header field. None: it permits nothing."""
        if self._admin.is_open:
            return CallerRole.FULL
        match = _BEARER.fullmatch(authorization or "")
        given = _digest(match[1] if match else "")
        role = None
        # No early end: the time must not depend on which token is nearly right.
        for digest, its_role in self._roles:
            if hmac.compare_digest(digest, given):
                role = its_role
        return role

    def _files(self) -> list[tuple[str, str, CallerRole]]:
        """Return (key, path, role) of each file."""
        files = (
            ("admin.token_file", self._admin.token_file, CallerRole.FULL),
            ("admin.read_only_token_file", self._admin.read_only_token_file, CallerRole.READ_ONLY),
        )
        return [(key, path, role) for key, path, role in files if path is not None]

    def _find_stamps(self) -> list[tuple[int, ...]]:
        return [file_stamp(path) for _, path, _ in self._files()]

    def _read(self) -> tuple[list[tuple[bytes, CallerRole]], list[str]]:
        """Return the digests of all tokens, and why files have none.

        The read-only ones come first: a full one wins.
        """
        roles: list[tuple[bytes, CallerRole]] = []
        without: list[str] = []
        for key, path, role in self._files():
            tokens = _read_tokens(key, path)
            roles = [(_digest(token), role) for token in tokens] + roles
            if not tokens:
                without.append(f"{key}: {path}: no token: make one with `openssl rand -hex 32`")
        return roles, without


def _read_tokens(key: str, path: str) -> list[str]:
    """Return the tokens of a file. There are none if it is missing.

    Raises ``ConfigError``; its message has no part of a token.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MAX_TOKEN_FILE_BYTES + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}") from None
    if len(raw) > _MAX_TOKEN_FILE_BYTES:
        raise ConfigError(f"{key}: {path}: larger than {_MAX_TOKEN_FILE_BYTES} bytes")
    lines = [line.strip() for line in raw.decode("utf-8-sig", errors="replace").splitlines()]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line and line[0] != "#"]
    for number, line in numbered:
        if len(line) < MIN_TOKEN_CHARS:
            raise ConfigError(
                f"{key}: {path}:{number}: shorter than {MIN_TOKEN_CHARS} characters: make one with"
                " `openssl rand -hex 32`"
            )
        if not _TOKEN.fullmatch(line):
            raise ConfigError(f"{key}: {path}:{number}: only letters, digits and . _ ~ + / = -")
    return [line for _, line in numbered]


def _digest(token: str) -> bytes:
    """Return the hash of a token: all have the same length, and none is kept in memory."""
    return hashlib.sha256(token.encode()).digest()


class Tickets:
    """Tickets for event streams. Each is valid once, and for :data:`TICKET_TTL_S`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Start without tickets. ``clock`` returns seconds."""
        self._clock = clock
        self._valid: dict[str, tuple[float, CallerRole]] = {}
        """Ticket -> (time at which it ends, role of its caller). The oldest one first."""

    def issue(self, role: CallerRole) -> str:
        """Return a new ticket for a caller that has ``role``."""
        now = self._clock()
        for ticket, (until, _) in list(self._valid.items()):
            if until > now and len(self._valid) < _MAX_TICKETS:
                break
            del self._valid[ticket]
        ticket = secrets.token_urlsafe(24)
        self._valid[ticket] = now + TICKET_TTL_S, role
        return ticket

    def redeem(self, ticket: str) -> CallerRole | None:
        """Return the role of a ticket, and end the ticket. None: it is not valid."""
        until, role = self._valid.pop(ticket, (0.0, None))
        return role if until > self._clock() else None
