"""The users of an htpasswd file, and their passwords.

Lives here: the file (``name:hash``, as ``htpasswd -B`` writes it), and the comparison of a password
with a bcrypt hash. Must not know: requests, threads.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Final, TypeAlias

import bcrypt

from mirror.access.watched_file import ParsedFile
from mirror.config.access import check_name

# $2y$ is what htpasswd writes; $2a$ and $2b$ are other names of the same hash.
_HASH: Final = re.compile(r"\$2[aby]\$(?P<cost>[0-9]{2})\$[./A-Za-z0-9]{53}")
_MAX_COST: Final = 14
"""Cost of a hash at most. Its check takes about a second; each further one doubles that."""
_MAX_PASSWORD_BYTES: Final = 72
"""Bytes of a password that bcrypt takes into account. ``htpasswd`` ignores the others, too."""
USERS_REMEDY: Final = "make it with htpasswd -cB FILE USER"
"""How to make a file of users."""
_HTPASSWD_REMEDY: Final = "make it with htpasswd -B"

Users: TypeAlias = Mapping[str, bytes]
"""Name -> bcrypt hash."""


def parse_users(raw: bytes, reserved: tuple[str, ...] = ()) -> ParsedFile[Users]:
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
        elif int(match["cost"]) > _MAX_COST:
            problems.append(f"line {number}: the cost of the hash is more than {_MAX_COST}")
        elif name in users:
            problems.append(f"line {number}: the user has a line already")
        else:
            users[name] = hashed.encode()
    return ParsedFile(users, tuple(problems))


class PasswordCheck:
    """Compares passwords with the hashes of a file. It takes as long for unknown users."""

    def __init__(self, users: Users) -> None:
        """Prepare for ``users``."""
        self._users = users
        costs = Counter(hashed[4:6] for hashed in users.values())
        cost = int(max(costs, key=lambda one: costs[one])) if costs else 4
        # Nobody has the password of this hash. It has the most frequent cost, so an unknown user
        # takes as long as a known one.
        self._other = bcrypt.gensalt(cost) + b"." * 31

    def is_right(self, user: str, password: str) -> bool:
        """Return whether this is the password of a user. Blocks for the time of the hash."""
        hashed = self._users.get(user)
        given = password.encode(errors="replace")[:_MAX_PASSWORD_BYTES]
        try:
            is_same = bcrypt.checkpw(given, hashed or self._other)
        except ValueError:
            return False
        return is_same and hashed is not None
