"""Log lines: one for each request, and one for each event that an operator should know of.

Lives here: the two formats, the escapes, the masking of secrets, and the limit on repeated lines.
Must not know: how an event comes about, how lines reach the descriptor (``log_stream.py``), what
libraries log (``library_logs.py``).
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from json.encoder import encode_basestring_ascii
from typing import Any, Final, Protocol, TypeAlias

from mirror.config.settings import Log
from mirror.config.values import format_size
from mirror.observability import events
from mirror.observability.events import Event, Kind, Outcome, RequestRecord
from mirror.oci.text import printable, size_text
from mirror.threads import Schedule

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
_SHARED: Final = (
    *("outcome", "status", "method", "kind", "upstream"),
    *("repository", "reference", "digest", "client", "user_agent"),
)
"""Fields of a request's line that are the same for many requests, in their order."""
_LINES_AT_ONCE: Final = 100
"""Lines that are written together: 40 KB. The stream drops them together if it has no room."""
_SHOWN_STAGE_S: Final = 0.001
"""Seconds. On a terminal, a shorter stage is left out: it is not why a request took long."""
_SHOWN_STAGES: Final = 2
"""Stages on a terminal. Nearly always, one of them explains why a request took long."""
_SHOWN_IN_MS_S: Final = 10.0
"""Seconds from which a duration is shown in seconds on a terminal."""
_SHORT_DIGEST_CHARS: Final = 12
"""Hex digits of a digest on a terminal, as in the output of ``docker images``."""
_NOT_TOKEN: Final = re.compile(r"[^A-Za-z0-9!#$%&'*+.^_`|~-]")
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_LEVEL_NAMES: Final = {level: name for name, level in _LEVELS.items()}


_Line: TypeAlias = tuple[float, int, str | RequestRecord, list[str]]
"""Time, level, message, and encoded fields. Or a request in place of the message: it has fields of
its own."""
_MESSAGE_OF_METHOD: Final = {**dict.fromkeys(("POST", "PATCH", "PUT"), "push"), "DELETE": "delete"}


class LineStream(Protocol):
    """A text stream, such as ``sys.stdout`` or a ``LogStream``."""

    def write(self, text: str, /) -> int:
        """Write text. Returns 0 if it was dropped."""

    def flush(self) -> None:
        """Pass on what was written."""

    def isatty(self) -> bool:
        """Return whether a person reads it on a terminal."""


class LogWriter:
    """Writes log lines to a stream. Lines are lost if it is closed or full.

    Only libraries use ``logging``: a record of it takes longer than a response from the cache. They
    may do so in any thread.
    """

    def __init__(
        self,
        settings: Log,
        stream: LineStream,
        schedule: Schedule | None = None,
        on_dropped: Callable[[int], None] | None = None,
    ) -> None:
        """Create a writer without lines.

        Args:
            settings: Level and format.
            stream: Gets the lines.
            schedule: The lines of one turn of the event loop are written together. None: each line
                is written at once.
            on_dropped: Receives the number of lines that ``stream`` has dropped.
        """
        self._stream = stream
        self._schedule = schedule
        self._on_dropped = on_dropped or (lambda count: None)
        self._pending: deque[_Line] = deque()
        """The lines that are not formatted yet."""
        self._is_scheduled = False
        """Whether a call of :meth:`flush` is to come that will see a line which is added now."""
        self._dropped = 0
        """Lines that the stream has dropped since it last accepted one."""
        self._second = (0, "")
        """A second since the epoch, and its text: most lines are of the same second."""
        self.configure(settings)

    def configure(self, settings: Log) -> None:
        """Use this level and this format from now on."""
        if self._pending:
            self.flush()
        self._level = _LEVELS[settings.level]
        self._as_json = settings.format == "json" or (
            settings.format == "auto" and not self._stream.isatty()
        )

    def is_enabled(self, level: int) -> bool:
        """Return whether lines of this level are written."""
        return level >= self._level

    def write(self, level: int, message: str, fields: Mapping[str, object]) -> None:
        """Write one line of ``level`` with ``message``. ``fields`` may hold any values."""
        encoded = [_encode_field(*field, self._as_json) for field in fields.items()]
        self._add(level, message, encoded)

    def write_request(self, level: int, pull: RequestRecord) -> None:
        """Write the line of a request that has ended."""
        self._add(level, pull, [])

    def _add(self, level: int, subject: str | RequestRecord, fields: list[str]) -> None:
        # Append first: a flush in another thread may run between two of these steps. In another
        # order, a line could stay without a scheduled flush.
        self._pending.append((time.time(), level, subject, fields))
        if self._schedule is None:
            self.flush()
        elif not self._is_scheduled:
            self._is_scheduled = True
            self._schedule(self.flush)

    def flush(self) -> None:
        """Write the pending lines. After a loss of lines, say how many were lost."""
        self._is_scheduled = False
        pending = self._take_pending()
        while lines := [self._format_line(*line) for line in islice(pending, _LINES_AT_ONCE)]:
            self._write_lines(lines)

    def _write_lines(self, lines: list[str]) -> None:
        text = "".join(lines)
        if self._dropped:
            lost = [_encode_field("count", self._dropped, self._as_json)]
            line = self._format_line(time.time(), logging.WARNING, "log lines were dropped", lost)
            text = line + text
        try:
            was_accepted = self._stream.write(text) > 0
            self._stream.flush()
        except (OSError, ValueError):
            return
        if was_accepted:
            self._dropped = 0
        else:
            self._dropped += len(lines)
            self._on_dropped(len(lines))

    def _take_pending(self) -> Iterator[_Line]:
        # Another thread may take a line between a look at the length and this step.
        with suppress(IndexError):
            while True:
                yield self._pending.popleft()

    def _format_line(
        self, at: float, level: int, subject: str | RequestRecord, fields: list[str]
    ) -> str:
        """Return exactly one line, for humans or as JSON. ``at``: seconds since the epoch."""
        second = int(at)
        if second != self._second[0]:
            self._second = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        stamp = f"{self._second[1]}.{int((at - second) * 1000):03d}Z"
        name = _LEVEL_NAMES.get(level, "info")
        if isinstance(subject, str):
            message = subject
        elif self._as_json:
            message = _MESSAGE_OF_METHOD.get(subject.method, "pull")
            fields = [encode_request(subject)]
        else:
            message, fields = format_request(subject)
        if self._as_json:
            rest = ",".join((_to_json(message), *fields))
            return f'{{"time":"{stamp}","level":"{name}","message":{rest}}}\n'
        # On a terminal, the date would be a tenth of the line.
        time_of_day = stamp.partition("T")[2]
        return " ".join((f"{time_of_day} {name:7} {_sanitize(message)}", *fields)).rstrip() + "\n"


# --- encoding -------------------------------------------------------------------------------------


def _encode_field(key: str, value: object, is_json: bool) -> str:
    return f'"{key}":{_to_json(value)}' if is_json else f"{key}={_quote(_sanitize(value))}"


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


# --- repeated lines -------------------------------------------------------------------------------


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


# --- events ---------------------------------------------------------------------------------------


class LogObserver:
    """The observer that writes log lines."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer
        self._limit = BurstLimit()
        self._has_measured = False

    def observe(self, event: Event) -> None:
        """Write the line of an event, if it has one."""
        match event:
            case events.RequestEnded(pull):  # First: it is the most frequent one.
                level = request_level(pull)
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
            case events.HostedChange() if self._writer.is_enabled(logging.INFO):
                # Never suppressed: it is the record of who has changed what.
                self._writer.write(logging.INFO, event.log_message, event.log_fields())
            case events.Resumed(upstream, offset, _, reason):
                resumed = {"upstream": upstream, "offset": offset, "reason": reason}
                self._write_limited(logging.INFO, "transfer resumed", resumed)
            case events.AsideEnded(upstream, result, _, reason) if reason:
                message = "request for a range failed: its client waits for the fetch of the blob"
                failed = {"upstream": upstream, "result": result, "reason": reason}
                self._write_limited(logging.INFO, message, failed)
            case events.PieceCut(upstream, endpoint, offset):
                message = "part of a blob was cut: it arrived far slower than others"
                late = {"upstream": upstream, "endpoint": endpoint, "offset": offset}
                self._write_limited(logging.INFO, message, late)
            case events.BackedOff(upstream, endpoint, reason, count) if reason != "no_gain":
                message = "blob is fetched by fewer connections"
                fewer = {"upstream": upstream, "endpoint": endpoint, "reason": reason}
                self._write_limited(logging.INFO, message, {**fewer, "count": count})
            case events.ConnectionRefused(client):
                message = "connection refused: the client has max_client_connections"
                self._write_limited(logging.WARNING, message, {"client": client})
            case events.StorageMeasured(count, size, quota) if not self._has_measured:
                self._has_measured = True
                used = {"contents": count, "used": size_text(size)}
                self._write_limited(logging.INFO, "storage", {**used, "quota": format_size(quota)})

    def _write_limited(self, level: int, message: str, fields: dict[str, Any]) -> None:
        suppressed = self._limit.admit(message) if self._writer.is_enabled(level) else None
        if suppressed is not None:
            more = {"suppressed": suppressed} if suppressed else {}
            self._writer.write(level, message, {**fields, **more})


# --- the line of a request ------------------------------------------------------------------------


# Looking up a member of an enum is a call: it takes a quarter of the time of `request_level`.
_ERROR: Final = Outcome.ERROR
_PING: Final = Kind.PING


def request_level(pull: RequestRecord) -> int:
    """Return the level of a request's line.

    A warning: the upstream's or our own fault, before or after the header was sent. Debug: a probe
    (``/healthz``, ``/metrics``). All else is info: also a 404, and a client's own fault.
    """
    if pull.outcome is _ERROR and (pull.status == 429 or not 400 <= pull.status < 500):
        return logging.WARNING
    is_probe = pull.kind is _PING and not pull.error
    return logging.DEBUG if is_probe else logging.INFO


def encode_request(pull: RequestRecord) -> str:
    """Encode the fields as JSON: those that many requests share first, then the request's own."""
    shared = _encode_shared(
        pull.outcome,
        pull.status,
        pull.method,
        pull.kind,
        pull.upstream,
        pull.repository,
        pull.reference,
        pull.digest,
        pull.client,
        pull.user_agent[: _MAX_FIELD_CHARS + 1],
    )
    # A request id has only letters, digits and ``._-``, so it needs no escape.
    line = (
        f'{shared},"id":"{pull.request_id}","bytes":{pull.bytes_sent},'
        f'"seconds":{pull.duration:.6f},"first_byte":{pull.first_byte or 0.0:.6f}'
    )
    more = [_encode_field("user", pull.user, is_json=True)] if pull.user else []
    if pull.bytes_received:
        more.append(_encode_field("received", pull.bytes_received, is_json=True))
    if pull.joined_at_byte is not None:
        more.append(_encode_field("joined_at", pull.joined_at_byte, is_json=True))
    if pull.aside_bytes:
        more.append(_encode_field("aside", pull.aside_bytes, is_json=True))
    if pull.connections:
        more.append(_encode_field("connections", pull.connections, is_json=True))
    if pull.late_parts:
        more.append(_encode_field("late_parts", pull.late_parts, is_json=True))
    if pull.stages:
        stages = [f'"{name}":{seconds:.6f}' for name, seconds in _stage_totals(pull).items()]
        more.append(f'"stages":{{{",".join(stages)}}}')
    if not pull.repository:
        more.append(_encode_field("path", pull.path.partition("?")[0], is_json=True))
    if pull.warning or pull.error:
        more += _encode_reasons(pull, is_json=True)
    return ",".join((line, *more)) if more else line


def format_request(pull: RequestRecord) -> tuple[str, list[str]]:
    """Return the text of a request's line for people, and its further fields.

    ``hit 200 GET blob docker.io/library/alpine@0123456789ab 3.4MiB 12ms (send 8ms) 10.0.0.1``: it
    fits a terminal of 120 columns. A digest is cut to 12 digits. Of the stages, the two longest
    are shown.
    """
    target = pull.path.partition("?")[0]
    if pull.repository:
        tag = f":{pull.reference}" if pull.reference and ":" not in pull.reference else ""
        digest = pull.digest or (pull.reference if ":" in pull.reference else "")
        short = f"@{digest.partition(':')[2][:_SHORT_DIGEST_CHARS]}" if digest else ""
        target = f"{pull.upstream}/{pull.repository}{tag}{short}"
    stages = _stage_totals(pull).items()
    longest = sorted(stages, key=lambda stage: stage[1], reverse=True)[:_SHOWN_STAGES]
    long = [f"{name} {_milliseconds(time)}" for name, time in longest if time >= _SHOWN_STAGE_S]
    words = (
        pull.outcome.value,
        str(pull.status or "-"),
        pull.method,
        pull.kind.value,
        target,
        size_text(size) if (size := pull.bytes_received or pull.bytes_sent) else "",
        _milliseconds(pull.duration),
        f"({', '.join(long)})" if long else "",
        pull.client,
    )
    text = " ".join(word for word in words if word)
    fields = _encode_reasons(pull, is_json=False)
    # Only a line that somebody will look into needs the id.
    return text, [*fields, f"id={pull.request_id}"] if fields else []


def _encode_reasons(pull: RequestRecord, *, is_json: bool) -> list[str]:
    reasons = (("warning", pull.warning), ("error", pull.error))
    return [_encode_field(key, reason, is_json) for key, reason in reasons if reason]


def _milliseconds(seconds: float) -> str:
    """Return a duration for people: ``<1ms``, ``12ms``, ``12.3s`` from 10 s on."""
    if seconds < _SHOWN_STAGE_S:
        return "<1ms"
    return f"{seconds * 1000:.0f}ms" if seconds < _SHOWN_IN_MS_S else f"{seconds:.1f}s"


@lru_cache(4096)
def _encode_shared(*values: str | int) -> str:
    """Encode, as JSON, the fields that are the same for many requests.

    ``values``: those of ``_SHARED``, in this order. Empty ones are left out. But a request that
    names content has all of them except for the user agent.
    """
    fields = dict(zip(_SHARED, values, strict=True))
    optional = _SHARED if fields["digest"] == "" else ("user_agent",)
    shown = [(key, value) for key, value in fields.items() if value != "" or key not in optional]
    return ",".join(_encode_field(key, value, is_json=True) for key, value in shown)


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
