"""The names of users that the files of credentials have, or once had.

Lives here: the file that remembers them, and what is refused because of it. Must not know: files of
credentials, tokens.

Rules name users. So the token of an issuer without a prefix must not have the name of a user who
was removed from the files, for whom rules may be left. The names are one file for all processes of
a data directory, one name a line. Each process adds what it reads in its files. An operator may
delete a line: then the issuer may give that name, unless a file has it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Final

from mirror.access.watched_file import ChangeWatch
from mirror.config.access import check_name
from mirror.store.private_directory import make_private_directory
from mirror.store.spare_file import replace_durably
from mirror.threads import HangingCalls

_MAX_NAMES_BYTES: Final = 1024 * 1024
"""Bytes of the file: 60,000 names of 16 characters. It is parsed on the event loop in 30 ms."""
_CALLS: Final = HangingCalls("names", limit=4)
"""Writes of the file, one for each data directory."""


class KnownNames:
    """The names of users in the files of credentials, and those that were in them."""

    def __init__(self, path: Path) -> None:
        """Read nothing yet. ``path``: the file, which need not exist."""
        self._path = path
        self._changes = ChangeWatch(str(path))
        self._saved: frozenset[str] = frozenset()
        self._unsaved: frozenset[str] = frozenset()
        """Names of the files of credentials that the file does not have yet."""
        self._failure = ""
        """Why the file cannot say which names there were. Empty: it does."""
        self._is_full = False
        """Whether not all names fit into the file."""

    @property
    def has_unsaved(self) -> bool:
        """Whether :meth:`save` has something to do."""
        return bool(self._unsaved)

    def refresh(self, current: Set[str]) -> bool:
        """Read the file if it has changed, and add the names that there are now.

        Blocks for the file, which is small. Returns whether it has changed.
        """
        has_changed = self._changes.has_changed()
        if has_changed:
            try:
                self._saved = _read(self._changes.read)
                self._failure = ""
            except (OSError, ValueError) as error:
                self._failure = f"{self._path}: {_reason(error)}: repair it, or delete it"
        unsaved = (self._unsaved | current) - self._saved
        if has_changed or unsaved != self._unsaved:
            self._unsaved = unsaved
            self._is_full = _size(self._saved | unsaved) > _MAX_NAMES_BYTES
        return has_changed

    def reason_to_refuse(self, user: str) -> str:
        """Return why an issuer without a prefix may not give a name. Empty: it may."""
        if self._failure:
            return f"the names of earlier users are not known: {self._failure}"
        if user in self._saved or user in self._unsaved:
            return (
                "its user has the name of one who is or was in access.users or access.tokens: set"
                f" user_prefix, or delete that line of {self._path} if nobody has the name any more"
            )
        if self._is_full:
            return (
                f"{self._path} has no room for the names of all users (at most"
                f" {_MAX_NAMES_BYTES} bytes): set user_prefix, or delete lines of it"
            )
        return ""

    async def save(self) -> str:
        """Add the names to the file, durably. Returns why that is not possible, or ``""``."""
        names, path = self._unsaved, self._path
        try:
            await _CALLS.run(path, lambda: add_known_names(path, names))
        except (OSError, ValueError) as error:
            return f"{path}: {_reason(error)}: after a restart, removed users are not remembered"
        self._saved |= names
        self._unsaved -= names
        return ""


def add_known_names(path: Path, names: Set[str]) -> None:
    """Add names to the file, durably. Blocks.

    Raises ``OSError``, and ``ValueError`` if the file cannot be used.
    """
    make_private_directory(path.parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(path.with_suffix(".lock"), flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        saved = read_known_names(path)
        merged = saved | names
        if _size(merged) > _MAX_NAMES_BYTES:
            raise ValueError(f"larger than {_MAX_NAMES_BYTES} bytes with all names")
        if merged != saved:
            replace_durably(path, known_names_text(merged).encode())
    finally:
        os.close(lock)


def read_known_names(path: Path) -> frozenset[str]:
    """Return the names of the file, none without it. Blocks. Raises ``OSError``, ``ValueError``."""
    return _read(ChangeWatch(str(path)).read)


def _read(read: Callable[[], bytes]) -> frozenset[str]:
    try:
        return parse_known_names(read())
    except FileNotFoundError:
        return frozenset()


def parse_known_names(raw: bytes) -> frozenset[str]:
    """Return the names of a file with these bytes. Raises ``ValueError``."""
    if len(raw) > _MAX_NAMES_BYTES:
        raise ValueError(f"larger than {_MAX_NAMES_BYTES} bytes")
    names = [line.strip() for line in raw.decode(errors="replace").splitlines()]
    return frozenset(check_name(name) for name in names if name)


def known_names_text(names: Iterable[str]) -> str:
    """Return the text of a file with these names, one a line."""
    return "".join(f"{name}\n" for name in sorted(names))


def _size(names: Iterable[str]) -> int:
    """Return the bytes of a file with these names, which are ASCII."""
    return sum(len(name) + 1 for name in names)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
