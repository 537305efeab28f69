"""A file of credentials, which is read again when it changes.

Lives here: when a file is read, and what counts if it cannot be. Must not know: what is in it.

The file says at any time all who may log in. So what cannot be read in it does not count: a line
that is broken, and everything if the file is gone. Otherwise somebody whose line was removed could
go on, because another line is broken.

``cp`` and some editors write a file in place. So a change counts once two looks have found the same
file: what was valid before stays so meanwhile, and a user who was removed for 2 s at most (3 s if
the file changes all the time).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeAlias, TypeVar

from mirror.config.section import KeyPath
from mirror.oci.errors import ConfigError
from mirror.store.file_stamp import file_stamp

T = TypeVar("T")
MessagePrefix: TypeAlias = Callable[[KeyPath], str]
"""Begins a message about a key: returns ``mirror.yaml:12: access.users: ``."""

_MAX_CREDENTIALS_BYTES: Final = 4 * 1024 * 1024
"""Bytes of a file: 40,000 users."""
_MAX_UNSETTLED_LOOKS: Final = 3
"""A change counts at this look at the latest, also if the file changes at each look."""


def dotted_prefix(key: KeyPath) -> str:
    """Begin a message where the origin of a value is not known: ``access.users: ``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return f"{''.join(parts).removeprefix('.')}: "


@dataclass(frozen=True, slots=True)
class ParsedFile(Generic[T]):
    """The content of a file, as far as it can be used."""

    content: T
    problems: tuple[str, ...] = ()
    """Why the rest cannot. No text of the file: it may be a secret."""


class ChangeWatch:
    """Tells when a file has changed, and is not being written."""

    def __init__(self, path: str) -> None:
        """Look at nothing yet. ``path``: the file, which need not exist."""
        self._path = path
        self._read_stamp: tuple[int, ...] | None = None
        self._last_stamp: tuple[int, ...] | None = None
        self._looks = 0
        self._has_failed = False

    def has_changed(self) -> bool:
        """Look at the file. Returns whether it is to be read. Called once a second.

        One that could not be read is to be read once it can be: the machine may have had no free
        descriptor for a moment.
        """
        stamp = file_stamp(self._path)
        if stamp == self._read_stamp:
            self._looks = 0
            if self._has_failed:
                with suppress(OSError):
                    self.read()
                    return True
            return False
        self._looks += 1
        is_first = self._read_stamp is None
        is_settled = stamp == self._last_stamp or self._looks >= _MAX_UNSETTLED_LOOKS
        self._last_stamp = stamp
        return is_first or is_settled

    def read(self) -> bytes:
        """Return the bytes of the file, as many as a file of credentials may have, and one more.

        What changes later is a change. Raises ``OSError``.
        """
        self._read_stamp, self._looks, self._has_failed = file_stamp(self._path), 0, True
        with Path(self._path).open("rb") as file:
            raw = file.read(_MAX_CREDENTIALS_BYTES + 1)
        self._has_failed = False
        return raw


class WatchedFile(Generic[T]):
    """A file whose content is parsed again after each change."""

    def __init__(
        self, key: KeyPath, path: str, parse: Callable[[bytes], ParsedFile[T]], remedy: str
    ) -> None:
        """Create it. Call :meth:`read` before :attr:`content` is used.

        Args:
            key: The key of the configuration that names the file, for messages.
            path: The file. A relative path is relative to the working directory.
            parse: Parses its bytes. Must accept ``b""``: the content if there is no file.
            remedy: How to make such a file.
        """
        self._key = key
        self.path = os.path.abspath(path)
        self._parse = parse
        self._remedy = remedy
        self._changes = ChangeWatch(self.path)
        self._empty: T = parse(b"").content
        self.content = self._empty

    def has_changed(self) -> bool:
        """Return whether the file is to be read: see :class:`ChangeWatch`."""
        return self._changes.has_changed()

    def read(self, prefix: MessagePrefix = dotted_prefix) -> tuple[str, ...]:
        """Read the file. Blocks. Returns what is wrong with it, one line for each problem.

        ``prefix``: begins each line; it is called with the key of the configuration.
        """
        parsed = self._read()
        self.content = parsed.content
        begin = prefix(self._key)
        return tuple(f"{begin}{self.path}: {problem}" for problem in parsed.problems)

    def _read(self) -> ParsedFile[T]:
        """Read the file. Raises nothing: otherwise the content of before would stay in use."""
        try:
            raw = self._changes.read()
            if len(raw) <= _MAX_CREDENTIALS_BYTES:
                return self._parse(raw)
            reason = f"larger than {_MAX_CREDENTIALS_BYTES} bytes"
        except OSError as error:
            remedy = f": {self._remedy}" if isinstance(error, FileNotFoundError) else ""
            reason = f"{error.strerror or error}{remedy}"
        except Exception:  # Its text may have a part of the file.
            reason = f"its content cannot be used: {self._remedy}"
        return ParsedFile(self._empty, (reason,))

    def read_strictly(self, prefix: MessagePrefix = dotted_prefix) -> None:
        """Read the file. Raises ``ConfigError`` for all that is wrong with it.

        ``prefix``: see :meth:`read`.
        """
        problems = self.read(prefix)
        if problems:
            raise ConfigError(problems[0], problems[1:])
