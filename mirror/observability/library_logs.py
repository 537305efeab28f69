"""Writes what libraries log, by ``logging``, as our lines.

Lives here: the set-up of ``logging``. Must not know: the format of a line.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from typing import Final

from mirror.config.settings import Log
from mirror.observability.logs import BurstLimit, LineStream, LogWriter
from mirror.oci.errors import error_text
from mirror.threads import Schedule

_MALFORMED_HTTP: Final = "aiohttp.http_exceptions"
"""Module of the exceptions that aiohttp's parser raises for bytes that are no HTTP request."""


def configure_logging(
    settings: Log,
    stream: LineStream | None = None,
    schedule: Schedule | None = None,
    on_dropped: Callable[[int], None] | None = None,
) -> LogWriter:
    """Set up logging of this process as ``settings`` says, and return the writer of its lines.

    ``stream``: None is standard output. The others are those of :class:`LogWriter`.
    """
    writer = LogWriter(settings, stream or sys.stdout, schedule, on_dropped)
    root = logging.getLogger()
    root.handlers = [_LibraryLogHandler(writer)]
    root.setLevel(logging.WARNING)
    logging.raiseExceptions = False
    for name in ("aiohttp.server", "asyncio"):
        logging.getLogger(name).filters = [_RepeatFilter()]
    return writer


class _LibraryLogHandler(logging.Handler):
    """Writes the records of libraries as our lines. A traceback becomes its last line."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if not self._writer.is_enabled(record.levelno):
            return
        fields: dict[str, object] = {"logger": record.name, **getattr(record, "fields", {})}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            fields["error"] = _parser_reason(error) or error_text(error)
        self._writer.write(record.levelno, record.getMessage(), fields)


def _parser_reason(error: BaseException) -> str:
    """Return the reason of aiohttp's parser. Empty: another error.

    The rest of its text has bytes of the request, which may be a part of a password.
    """
    if type(error).__module__ != _MALFORMED_HTTP:
        return ""
    match = re.match(r"[A-Za-z0-9 ]+", str(getattr(error, "message", "")))
    return match[0].strip() if match else "malformed"


class _RepeatFilter(logging.Filter):
    """Limits repeated records: aiohttp's server logs several for each malformed request.

    asyncio logs each error of a background task, and each write after a client has left.
    """

    def __init__(self) -> None:
        super().__init__()
        self._limit = BurstLimit()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written."""
        kind = record.exc_info[0] if record.exc_info else None
        if kind is not None and kind.__module__ == _MALFORMED_HTTP:
            record.levelno = logging.INFO  # The client's fault, and its response is a 400.
        suppressed = self._limit.admit(record.msg if isinstance(record.msg, str) else "")
        if suppressed is None:
            return False
        record.fields = {"suppressed": suppressed} if suppressed else {}
        return True
