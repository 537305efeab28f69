"""Text to print: untrusted text, made safe, sizes, times and ages.

Lives here: the escape of text from an upstream or a client, before it goes into a header, an error
body or a log line; sizes, times and ages; and the ``token`` pattern that the header grammars share.
Must not know: where the text is printed.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, overload

# RFC 9110, section 5.6.2: token = 1*tchar
TCHARS: Final = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"

_SIZE_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_AGE_UNITS: Final = ((86400, "d"), (3600, "h"), (60, "min"))
"""(seconds, unit) from the largest: an age is printed in the first one that it reaches twice."""
_UNSAFE: Final = re.compile(r"[^ -~]")


def printable(text: str, limit: int = 512) -> str:
    """Return ``text`` in printable ASCII, with all other characters as escapes such as ``\\x1b``.

    Terminal sequences, line breaks, bidirectional marks and lone surrogates are escaped alike. The
    result has at most ``limit`` characters: a longer one is cut, and ends with ``...``.
    """
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text  # The usual case, ten times as fast: a listing has 100,000 cells.
    escaped = _UNSAFE.sub(_escape, text[: limit + 1])
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character < "\x80":  # the codec below does not escape control characters
        return f"\\x{ord(character):02x}"
    return character.encode("ascii", "backslashreplace").decode()


def size_text(size: int) -> str:
    """Return a number of bytes for people, such as ``3.4MiB``."""
    exponent = min(max(size.bit_length() - 1, 0) // 10, len(_SIZE_UNITS) - 1)
    return f"{size / 1024**exponent:.{1 if exponent else 0}f}{_SIZE_UNITS[exponent]}"


def count_text(count: int, noun: str) -> str:
    """Return a number of things for people: ``1 image``, ``2 images``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


@overload
def time_text(seconds: float) -> str: ...
@overload
def time_text(seconds: float | None) -> str | None: ...
def time_text(seconds: float | None) -> str | None:
    """Return a Unix time in seconds as RFC 3339 text in UTC. None for None: not known."""
    return None if seconds is None else _whole_time_text(int(seconds))


@lru_cache(10_000)  # The images of a pull were used in the same second, and a listing has 100,000.
def _whole_time_text(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC).isoformat()[:19]}Z"


def age_text(seconds: float) -> str:
    """Return a duration of ``seconds`` for a person, such as ``3 d``."""
    for length, unit in _AGE_UNITS:
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(int(seconds), 0)} s"
