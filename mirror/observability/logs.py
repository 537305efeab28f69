"""Log lines: one for each request, and one for each event that an operator should know of.

Lives here: the two formats, the escapes, the masking of secrets, and the limit on repeated lines.
Must not know: how an event comes about. A write never blocks: a pipe that is full or closed loses
lines, and delays no request.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Any, Final, TextIO, TypeAlias

from mirror.config.settings import Log
from mirror.observability import events
from mirror.observability.events import Event, Kind, RequestRecord
from mirror.oci.text import printable

_ENCODE: Final = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_MAX_FIELD_CHARS: Final = 512
"""Characters of one field; enough for a digest and a long URL."""
_BURST_LINES: Final = 5
"""Lines with the same message that are written in a period. Further ones are only counted."""
_BURST_PERIOD_S: Final = 10.0
"""Seconds; a repeated message stays visible, and cannot fill the disk."""
_MAX_BURST_KEYS: Final = 1000
"""Messages that are counted at a time; bounds the memory if messages differ."""
# A password in a URL, the value of an Authorization header, the query of a signed URL.
_SECRETS: Final = re.compile(
    r"(?P<keep>://)[^\s/@]+(?=@)|(?P<name>authorization\s*[:=]\s*(?:(?:bearer|basic)\s+)?)\S+"
    r"|(?P<query>https?://[^\s?]+)\?\S+",
    re.IGNORECASE,
)
_NUMBERS: Final = "id=%s bytes=%d seconds=%.6f first_byte=%.6f"
_JSON_NUMBERS: Final = '"id":"%s","bytes":%d,"seconds":%.6f,"first_byte":%.6f'
_NOT_TOKEN: Final = re.compile(r"[^A-Za-z0-9!#$%&'*+.^_`|~-]")
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_LEVEL_NAMES: Final = {level: name for name, level in _LEVELS.items()}


Schedule: TypeAlias = Callable[[Callable[[], None]], object]
"""Calls a function soon, such as an event loop's ``call_soon``."""
Fields: TypeAlias = tuple[tuple[str, str | int], ...]
"""(key, value) of each field, in the order of the line."""


class LogWriter:
    """Writes log lines to a stream. Lines are lost if it is closed or full.

    ``settings`` chooses level and format. ``schedule``: the lines of one turn of the event loop are
    written together; None writes each line at once. Only libraries use ``logging``: a record of it
    takes longer than a response from the cache.
    """

    def __init__(self, settings: Log, stream: TextIO, schedule: Schedule | None = None) -> None:
        self._stream = stream
        self._schedule = schedule
        self._pending: list[str] = []
        self._level = _LEVELS[settings.level]
        self._as_json = settings.format == "json" or (
            settings.format == "auto" and not stream.isatty()
        )
        self._second = (0, "")
        """A second since the epoch, and its text: most lines are of the same second."""

    def is_enabled(self, level: int) -> bool:
        """Return whether lines of this level are written."""
        return level >= self._level

    def write(self, level: int, message: str, fields: Mapping[str, object]) -> None:
        """Write one line of ``level`` with ``message``. ``fields`` may hold any values."""
        self._add(
            level, message, [_encode_field(*field, self._as_json) for field in fields.items()]
        )

    def write_request(self, level: int, pull: RequestRecord) -> None:
        """Write the line of a request."""
        self._add(level, "pull", encode_request(pull, self._as_json))

    def _add(self, level: int, message: str, fields: list[str]) -> None:
        self._pending.append(self._format_line(time.time(), level, message, fields))
        if self._schedule is None:
            self.flush()
        elif len(self._pending) == 1:
            self._schedule(self.flush)

    def flush(self) -> None:
        """Write the pending lines."""
        lines, self._pending = self._pending, []
        try:
            self._stream.write("".join(lines))
            self._stream.flush()
        except (OSError, ValueError):
            return

    def _format_line(self, at: float, level: int, message: str, fields: list[str]) -> str:
        """Return exactly one line, for humans or as JSON. ``at``: seconds since the epoch."""
        second = int(at)
        if second != self._second[0]:
            self._second = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        stamp = f"{self._second[1]}.{int((at - second) * 1000):03d}Z"
        name = _LEVEL_NAMES.get(level, "info")
        if self._as_json:
            head = f'{{"time":"{stamp}","level":"{name}","message":{_to_json(message)}'
            return ",".join((head, *fields)) + "}\n"
        return " ".join((f"{stamp} {name:7} {_sanitize(message)}", *fields)).rstrip() + "\n"


# --- encoding -------------------------------------------------------------------------------------


def _encode_field(key: str, value: object, as_json: bool) -> str:
    return f'"{key}":{_to_json(value)}' if as_json else f"{key}={_quote(_sanitize(value))}"


@lru_cache(4096)
def _encode_fields(fields: Fields, as_json: bool) -> str:
    """Encode fields that are the same for many requests."""
    encoded = (_encode_field(key, value, as_json) for key, value in fields)
    return ("," if as_json else " ").join(encoded)


def _to_json(value: object) -> str:
    """Encode as JSON (RFC 8259). The standard encoder takes longer than a cached response."""
    match value:
        case float():
            return f"{value:.6f}"
        case bool() | None:
            return _ENCODE(value)
        case int():
            return repr(value)
        case dict():
            fields = [f'"{key}":{_to_json(item)}' for key, item in value.items()]
            return "{" + ",".join(fields) + "}"
    return encode_basestring_ascii(str(_sanitize(value)))


def _sanitize(value: object) -> object:
    """Escape control characters, mask secrets, and cut long text. Round a float to microseconds."""
    if isinstance(value, str):
        plain = len(value) <= _MAX_FIELD_CHARS and value.isascii() and value.isalnum()
        return value if plain else _SECRETS.sub(_mask, printable(value, _MAX_FIELD_CHARS))
    return round(value, 6) if isinstance(value, float) else value


def _mask(match: re.Match[str]) -> str:
    return (match["keep"] or match["name"] or match["query"] or "") + "***"


def _quote(value: object) -> str:
    """Quote text that would not be one word of a line for humans."""
    text = str(value)
    return json.dumps(text) if not text or any(char in text for char in ' ="') else text


# --- the log of libraries -------------------------------------------------------------------------


class _LibraryLogHandler(logging.Handler):
    """Writes the records of libraries as our lines. A traceback becomes its last line."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        fields: dict[str, object] = {"logger": record.name, **getattr(record, "fields", {})}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            fields["error"] = f"{type(error).__name__}: {error}"
        self._writer.write(record.levelno, record.getMessage(), fields)


class _RepeatFilter(logging.Filter):
    """Limits repeated records: aiohttp's server logs several for each malformed request."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = BurstLimit()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written."""
        suppressed = self._limit.admit(record.msg if isinstance(record.msg, str) else "")
        if suppressed is None:
            return False
        record.fields = {"suppressed": suppressed} if suppressed else {}
        return True


class BurstLimit:
    """Admits a few lines for each key in a period, and counts the others."""

    def __init__(self) -> None:
        self._bursts: dict[str, tuple[float, int]] = {}
        """Key to the start of its period (monotonic, in seconds) and its lines since then."""

    def admit(self, key: str) -> int | None:
        """Count a line. Returns None to suppress it, else the number suppressed before it."""
        now = time.monotonic()
        started, count = self._bursts.get(key, (now, 0))
        if now - started > _BURST_PERIOD_S:
            self._bursts[key] = (now, 1)
            return max(0, count - _BURST_LINES)
        if len(self._bursts) > _MAX_BURST_KEYS:
            self._bursts.clear()
        self._bursts[key] = (started, count + 1)
        return 0 if count < _BURST_LINES else None


def configure_logging(
    settings: Log, stream: TextIO | None = None, schedule: Schedule | None = None
) -> LogWriter:
    """Set up logging of this process as ``settings`` says, and return the writer of its lines.

    ``stream``: None is standard output. ``schedule``: see :class:`LogWriter`.
    """
    writer = LogWriter(settings, stream or sys.stdout, schedule)
    root = logging.getLogger()
    root.handlers = [_LibraryLogHandler(writer)]
    root.setLevel(logging.WARNING)
    logging.raiseExceptions = False
    logging.getLogger("aiohttp.server").filters = [_RepeatFilter()]
    return writer


# --- events ---------------------------------------------------------------------------------------


class LogObserver:
    """The observer that writes log lines."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer
        self._limit = BurstLimit()

    def observe(self, event: Event) -> None:
        """Write the line of an event, if it has one."""
        match event:
            case events.RequestStarted() | events.BytesSent():
                pass
            case events.RequestEnded(pull):
                is_quiet = pull.kind is Kind.PING and not pull.error
                level = logging.DEBUG if is_quiet else logging.INFO
                if self._writer.is_enabled(level):
                    self._writer.write_request(level, pull)
            case events.LogMessage(level, message, fields):
                self._write_limited(_LEVELS.get(level, logging.INFO), message, dict(fields))
            case events.DigestMismatched(upstream, digest, where):
                fields_ = {"upstream": upstream, "digest": digest, "where": where}
                self._write_limited(logging.ERROR, "digest mismatch", fields_)
            case events.IndexDamaged(why):
                message = "the index is damaged: it was renamed to index.damaged"
                self._write_limited(logging.ERROR, message, {"why": why})
            case events.IndexRestored(names):
                message = "the index was restored from index.json"
                self._write_limited(logging.WARNING, message, {"names": names})
            case events.Uncached(digest, reason):
                fields_ = {"digest": digest, "reason": reason}
                self._write_limited(logging.WARNING, "served uncached", fields_)
            case events.Evicted(count, size, reason):
                counts = {"count": count, "bytes": size, "reason": reason}
                self._write_limited(logging.INFO, "evicted", counts)
            case events.CircuitChanged(upstream, endpoint, is_open):
                message = "circuit open" if is_open else "circuit closed"
                fields_ = {"upstream": upstream, "endpoint": endpoint}
                self._write_limited(logging.WARNING, message, fields_)
            case events.Resumed(upstream, offset, _, reason):
                resumed = {"upstream": upstream, "offset": offset, "reason": reason}
                self._write_limited(logging.INFO, "transfer resumed", resumed)

    def _write_limited(self, level: int, message: str, fields: dict[str, Any]) -> None:
        suppressed = self._limit.admit(message) if self._writer.is_enabled(level) else None
        if suppressed is not None:
            more = {"suppressed": suppressed} if suppressed else {}
            self._writer.write(level, message, {**fields, **more})


def encode_request(pull: RequestRecord, as_json: bool) -> list[str]:
    """Encode the fields of a request: those that many requests share first, then its own."""
    # A request id has only letters, digits and ``._-``, so it needs no escape.
    numbers = _JSON_NUMBERS if as_json else _NUMBERS
    first = pull.first_byte or 0.0
    fields = [
        _encode_fields(_shared_fields(pull), as_json),
        numbers % (pull.request_id, pull.bytes_sent, pull.duration, first),
    ]
    if pull.joined_at_byte is not None:
        fields.append(_encode_field("joined_at", pull.joined_at_byte, as_json))
    if pull.stages:
        fields.append(_encode_field("stages", _stage_totals(pull), as_json))
    if not pull.repository:
        fields.append(_encode_field("path", pull.path.partition("?")[0], as_json))
    if pull.warning:
        fields.append(_encode_field("warning", pull.warning, as_json))
    if pull.error:
        fields.append(_encode_field("error", pull.error, as_json))
    return fields


def _shared_fields(pull: RequestRecord) -> Fields:
    """Return the fields that are the same for many requests, so that their encoding is cached."""
    fields: Fields = (
        ("outcome", pull.outcome.value),
        ("status", pull.status),
        ("method", pull.method),
        ("kind", pull.kind.value),
        ("upstream", pull.upstream),
        ("repository", pull.repository),
        ("reference", pull.reference),
        ("digest", pull.digest),
        ("client", pull.client),
    )
    if not pull.digest:
        fields = tuple(field for field in fields if field[1] != "")
    agent = pull.user_agent[: _MAX_FIELD_CHARS + 1]
    return (*fields, ("user_agent", agent)) if agent else fields


# --- Server-Timing --------------------------------------------------------------------------------


def server_timing(pull: RequestRecord) -> str:
    """Return ``Server-Timing`` (W3C Server Timing): the stages so far, in milliseconds."""
    totals = {**_stage_totals(pull), "total": time.monotonic() - pull.started}
    return ", ".join(f"{_token(name)};dur={seconds * 1000:.2f}" for name, seconds in totals.items())


@lru_cache(64)
def _token(name: str) -> str:
    """Return ``name`` as a ``token`` (RFC 9110, section 5.6.2). Other characters become ``-``."""
    return _NOT_TOKEN.sub("-", name)


def _stage_totals(pull: RequestRecord) -> dict[str, float]:
    """Return the seconds of each stage. Stages of the same name are added up."""
    totals: dict[str, float] = {}
    for name, seconds in pull.stages:
        totals[name] = totals.get(name, 0.0) + seconds
    return totals
