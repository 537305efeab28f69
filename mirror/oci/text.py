"""Text of strangers, made safe to show.

Lives here: the one escape for what an upstream or a client wrote before it goes into a header, an
error body or a log line, and the pattern that the grammars of headers share. Must not know: where
it is shown.
"""

from __future__ import annotations

import re
from typing import Final

# RFC 9110, section 5.6.2: token = 1*tchar
TCHARS: Final = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"

_UNSAFE: Final = re.compile(r"[^ -~]")


def printable(text: str, limit: int = 512) -> str:
    """``text`` in printable ASCII, at most ``limit`` characters; the rest as ``\\xNN`` escapes.

    Escapes terminal sequences, line breaks, bidirectional marks and lone surrogates alike.
    """
    escaped = _UNSAFE.sub(_escape, text[: limit + 1])
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character < "\x80":  # the codec below leaves control characters as they are
        return f"\\x{ord(character):02x}"
    return character.encode("ascii", "backslashreplace").decode()
