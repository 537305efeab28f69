"""The users of an htpasswd file, and their passwords.

Lives here: the file (``name:hash``, as ``htpasswd -B`` writes it), and the comparison of a password
with a bcrypt hash. Must not know: requests, threads.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Set
from typing import Final, TypeAlias

import bcrypt

from mirror.access.watched_file import ParsedFile
from mirror.config.access import check_name

# $2y$ is what htpasswd writes; $2a$ and $2b$ are other names of the same hash.
# The last character of the salt has two bits, so bcrypt refuses all but four of them.
_HASH: Final = re.compile(r"\$2[aby]\$(?P<cost>[0-9]{2})\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
_MIN_COST: Final = 4
"""Cost of a hash at least: bcrypt knows no other."""
_MAX_COST: Final = 14
"""Cost of a hash at most. Its check takes about a second; each further one doubles that."""
_MAX_PASSWORD_BYTES: Final = 72
"""Bytes of a password that bcrypt takes into account. ``htpasswd`` ignores the others, too."""
USERS_REMEDY: Final = "make it with htpasswd -cB FILE USER"
"""How to make a file of users."""
_HTPASSWD_REMEDY: Final = "make it with htpasswd -B"

Users: TypeAlias = Mapping[str, bytes]
"""Name -> bcrypt hash."""


def parse_users(raw: bytes, reserved: tuple[str, ...] = ()) -> ParsedFile[PasswordCheck]:
    """Parse an htpasswd file. Lines that cannot be used are problems, and all others count.

    ``reserved``: what begins the names of users of issuers, and of none here.
    """
    users: dict[str, bytes] = {}
    problems: list[str] = []
    for number, line in enumerate(raw.decode("utf-8-sig", errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, hashed = line.rstrip().partition(":")
        try:
            check_name(name)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if name.startswith(reserved):
            problems.append(f"line {number}: the name begins with the user_prefix of an issuer")
            continue
        match = _HASH.fullmatch(hashed)
        if not colon:
            problems.append(f"line {number}: needs NAME:HASH: {_HTPASSWD_REMEDY}")
        elif match is None:
            problems.append(f"line {number}: the hash is not bcrypt: {_HTPASSWD_REMEDY}")
        elif not _MIN_COST <= int(match["cost"]) <= _MAX_COST:
            problems.append(
                f"line {number}: the cost of the hash is not {_MIN_COST} to {_MAX_COST}:"
                f" {_HTPASSWD_REMEDY}"
            )
        elif name in users:
            problems.append(f"line {number}: the user has a line already")
        else:
            users[name] = hashed.encode()
    return ParsedFile(PasswordCheck(users), tuple(problems))


class PasswordCheck:
    """Compares passwords with the hashes of a file.

    Each unknown name takes as long as that of a user: it has a cost of its own, always the same,
    and as many of them have each cost as users have. Otherwise the time of a rare cost would say
    that there is such a user.
    """

    def __init__(self, users: Users) -> None:
        """Prepare for ``users``."""
        self._users = users
        self._costs = sorted(int(hashed[4:6]) for hashed in users.values()) or [_MIN_COST]
        # A secret that all processes have, and that seldom changes with the file.
        self._key = hashlib.sha256(min(users.values(), default=b"")).digest()

    @property
    def names(self) -> Set[str]:
        """The names of all users."""
        return self._users.keys()

    def _hash_of_unknown(self, user: str) -> bytes:
        """Return a hash with the cost of an unknown name. Nobody has its password."""
        digest = hmac.digest(self._key, user.encode(errors="replace"), "sha256")
        index = int.from_bytes(digest[:8]) * len(self._costs) >> 64
        return b"$2b$%02d$%s" % (self._costs[index], b"." * 53)

    def is_right(self, user: str, password: str) -> bool:
        """Return whether this is the password of a user. Blocks for the time of the hash.

        An empty one is of nobody: a script has hashed a variable that was not set.
        """
        hashed = self._users.get(user)
        given = password.encode(errors="replace")[:_MAX_PASSWORD_BYTES]
        try:
            is_same = bcrypt.checkpw(given, hashed or self._hash_of_unknown(user))
        except ValueError:
            return False
        is_empty = not password.strip("\0")  # For bcrypt, these are the same.
        return is_same and hashed is not None and not is_empty
