"""Text of strangers, made safe to show.

Lives here: the one escape for what an upstream or a client wrote before it goes into a header, an
error body or a log line. Must not know: where it is shown.
"""

from __future__ import annotations

import re
from typing import Final

_UNSAFE: Final = re.compile(r"[^ -~]")


def printable(text: str, limit: int = 512) -> str:
    """``text`` in printable ASCII, at most ``limit`` characters; the rest as ``\\xNN`` escapes.

    Escapes terminal sequences, line breaks, bidirectional marks and lone surrogates alike.
    """
    escaped = _UNSAFE.sub(_escape, text[: limit + 1])
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


def _escape(match: re.Match[str]) -> str:
    return (
        match[0].encode("ascii", "backslashreplace").decode()
        if match[0] > "\x7f"
        else (f"\\x{ord(match[0]):02x}")
    )
