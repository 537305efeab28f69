"""The bearer tokens of the admin listener, and the tickets of its event streams.

Lives here: which role a token has, in constant time, and tickets that are valid once. Must not
know: requests, what a role may do.

A browser's ``EventSource`` sends no ``Authorization``. So a page gets a ticket with its token, and
puts the ticket into the address of the stream. It is valid once, for a short time, and for nothing
else. An address may be logged by a proxy; the ticket in it is worth nothing by then. A cookie would
be sent to every port of the host.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from mirror.access.access_tokens import NEW_TOKENS_REMEDY, bearer_token, check_new_token, hash_token
from mirror.access.watched_file import ParsedFile, WatchedFile
from mirror.config.settings import Admin
from mirror.oci.errors import ConfigError

_MAX_TOKEN_FILE_BYTES: Final = 64 * 1024
"""Bytes of a file of tokens. A token is a line of at most some hundred characters."""
TICKET_TTL_S: Final = 30.0
"""Seconds in which a page opens the stream for which it has got a ticket."""
_MAX_TICKETS: Final = 256
"""Tickets that are valid at the same time. The oldest ones end first."""


class CallerRole(StrEnum):
    """The requests that a caller may send."""

    FULL = "full"
    READ_ONLY = "read-only"


class Tokens:
    """The tokens in the files of the configuration, as digests."""

    def __init__(self, admin: Admin) -> None:
        """Read the files. Raises ``ConfigError`` if one has no token, or a malformed line."""
        self._admin = admin
        files = (
            ("token_file", admin.token_file, CallerRole.FULL),
            ("read_only_token_file", admin.read_only_token_file, CallerRole.READ_ONLY),
        )
        self._files = [
            (WatchedFile(("admin", key), path, _parse_tokens, NEW_TOKENS_REMEDY), role)
            for key, path, role in files
            if path is not None
        ]
        problems = [problem for file, _ in self._files for problem in file.read()]
        if problems:
            raise ConfigError(problems[0], problems[1:])

    def refresh(self) -> None:
        """Read the files that have changed, and are not being written. Called once a second.

        Only the tokens that a file has now are valid. A malformed line is none, and all others
        count; a file that cannot be read has none.

        Raises ``ConfigError`` once for what is wrong.
        """
        problems: list[str] = []
        for file, _ in self._files:
            if file.has_changed():
                found = file.read()
                revoked = "" if file.content else ": all tokens of this file are revoked"
                problems += [f"{problem}{revoked}" for problem in found]
        if problems:
            raise ConfigError(problems[0], problems[1:])

    def role_of(self, authorization: str | None) -> CallerRole | None:
        """Return the role of an ``Authorization`` header field. None: it permits nothing."""
        if self._admin.is_open:
            return CallerRole.FULL
        given = hash_token(bearer_token(authorization or "") or "")
        role = None
        # No early end: the time must not depend on which token is nearly right.
        for file, its_role in self._files:
            for digest in file.content:
                if hmac.compare_digest(digest, given) and role is not CallerRole.FULL:
                    role = its_role
        return role


def _parse_tokens(raw: bytes) -> ParsedFile[tuple[bytes, ...]]:
    """Return the digests of the tokens of a file, and what is wrong, without a part of a token."""
    if len(raw) > _MAX_TOKEN_FILE_BYTES:
        return ParsedFile((), (f"larger than {_MAX_TOKEN_FILE_BYTES} bytes",))
    digests: list[bytes] = []
    problems: list[str] = []
    for number, line in enumerate(raw.decode("utf-8-sig", errors="replace").splitlines(), 1):
        token = line.strip()
        if not token or token[0] == "#":
            continue
        try:
            check_new_token(token)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
        else:
            digests.append(hash_token(token))
    if not digests and not problems:
        problems.append(f"no token: {NEW_TOKENS_REMEDY}")
    return ParsedFile(tuple(digests), tuple(problems))


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
