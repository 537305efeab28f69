"""Log lines: one for each pull, one for each thing an operator wants to know, and none too many.

Lives here: the formats, what is escaped, what is held back. Must not know: how events come about.
Lines are written without waiting: a pipe that is full or closed loses lines, never a pull.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, Final, TextIO

from mirror import events
from mirror.config import Log
from mirror.events import Event, Kind, Pull
from mirror.oci.text import printable

_ENCODE: Final = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_FIELD_LIMIT: Final = 512
_BURST: Final = 5
"""Lines of one kind that are written in a period; the others are counted."""
_PERIOD: Final = 10.0
_SECRETS: Final = re.compile(
    r"(?P<keep>://)[^\s/@]+(?=@)|(?P<name>authorization\s*[:=]\s*(?:(?:bearer|basic)\s+)?)\S+"
    r"|(?P<query>https?://[^\s?]+)\?\S+",
    re.IGNORECASE,
)
_TOKEN: Final = re.compile(r"[^A-Za-z0-9!#$%&'*+.^_`|~-]")
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class Lines:
    """Writes lines to a stream; one that is closed or full loses them.

    ``logging`` is for what libraries have to say: its records cost more than an answer does.
    """

    def __init__(self, settings: Log, stream: TextIO) -> None:
        self._stream = stream
        self._level = _LEVELS[settings.level]
        self._as_json = settings.format == "json" or (
            settings.format == "auto" and not stream.isatty()
        )
        self._second = (0, "")

    def enabled(self, level: int) -> bool:
        """Whether lines of this level are written."""
        return level >= self._level

    def write(self, level: int, message: str, fields: Mapping[str, object]) -> None:
        """Write one line, whatever is in it."""
        line = self.format(time.time(), level, message, fields)
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            return

    def format(self, at: float, level: int, message: str, fields: Mapping[str, object]) -> str:
        """Human-readable, or JSON; never more than one line."""
        second = int(at)
        if second != self._second[0]:
            self._second = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        stamp = f"{self._second[1]}.{int((at - second) * 1000):03d}Z"
        name = logging.getLevelName(level).lower()
        clean = {key: _clean(value) for key, value in fields.items()}
        if self._as_json:
            return _ENCODE({"time": stamp, "level": name, "message": _clean(message), **clean})
        rest = " ".join(f"{key}={_quoted(value)}" for key, value in clean.items())
        return f"{stamp} {name:7} {_clean(message)} {rest}".rstrip()


def _clean(value: object) -> object:
    """No control characters, no secrets, no novels."""
    if isinstance(value, str):
        if len(value) <= _FIELD_LIMIT and value.isascii() and value.isprintable():
            plain = "://" not in value and "uthorization" not in value.lower()
            return value if plain else _SECRETS.sub(_mask, value)
        return _SECRETS.sub(_mask, printable(value, _FIELD_LIMIT))
    return round(value, 6) if isinstance(value, float) else value


def _mask(match: re.Match[str]) -> str:
    return (match["keep"] or match["name"] or match["query"] or "") + "***"


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(char in text for char in ' ="') else text


class _Forward(logging.Handler):
    """What libraries log, as lines of ours; a traceback becomes its last line."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        fields: dict[str, object] = {"logger": record.name, **getattr(record, "fields", {})}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            fields["error"] = f"{type(error).__name__}: {error}"
        self._lines.write(record.levelno, record.getMessage(), fields)


class _OneLine(logging.Filter):
    """aiohttp's server logs a dozen lines for a malformed request: one, and not each time."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = RateLimit()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        suppressed = self._limit.allow(record.msg if isinstance(record.msg, str) else "")
        if suppressed is None:
            return False
        record.fields = {"suppressed": suppressed} if suppressed else {}
        return True


class RateLimit:
    """Lets a burst through in each period, for each key, and counts the rest."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, int]] = {}

    def allow(self, key: str) -> int | None:
        """None: hold it back. Else how many were held back before it."""
        now = time.monotonic()
        begun, count = self._seen.get(key, (now, 0))
        if now - begun > _PERIOD:
            self._seen[key] = (now, 1)
            return max(0, count - _BURST)
        if len(self._seen) > 1000:
            self._seen.clear()
        self._seen[key] = (begun, count + 1)
        return 0 if count < _BURST else None


def configure_logging(settings: Log, stream: TextIO | None = None) -> Lines:
    """Set up logging of this process, and return where lines go."""
    lines = Lines(settings, stream or sys.stdout)
    root = logging.getLogger()
    root.handlers = [_Forward(lines)]
    root.setLevel(logging.WARNING)
    logging.raiseExceptions = False
    logging.getLogger("aiohttp.server").filters = [_OneLine()]
    return lines


class LogObserver:
    """The observer that writes."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._limit = RateLimit()

    def observe(self, event: Event) -> None:
        """Write what is worth a line."""
        match event:
            case events.PullEnded(pull):
                quiet = pull.kind is Kind.PING and not pull.error
                level = logging.DEBUG if quiet else logging.INFO
                if self._lines.enabled(level):
                    self._lines.write(level, "pull", pull_fields(pull))
            case events.Noted(level, message, fields):
                self._note(_LEVELS.get(level, logging.INFO), message, dict(fields))
            case events.DigestMismatched(upstream, digest, where):
                fields_ = {"upstream": upstream, "digest": digest, "where": where}
                self._note(logging.ERROR, "digest mismatch", fields_)
            case events.Uncached(digest, reason):
                self._note(logging.WARNING, "served uncached", {"digest": digest, "reason": reason})
            case events.Evicted(count, size, reason):
                self._note(
                    logging.INFO, "evicted", {"count": count, "bytes": size, "reason": reason}
                )
            case events.CircuitChanged(upstream, endpoint, is_open):
                state = "open" if is_open else "closed"
                self._note(
                    logging.WARNING,
                    f"circuit {state}",
                    {"upstream": upstream, "endpoint": endpoint},
                )
            case events.Resumed(upstream, offset, _, reason):
                self._note(
                    logging.INFO,
                    "transfer resumed",
                    {"upstream": upstream, "offset": offset, "reason": reason},
                )
            case _:
                pass

    def _note(self, level: int, message: str, fields: dict[str, Any]) -> None:
        suppressed = self._limit.allow(message) if self._lines.enabled(level) else None
        if suppressed is not None:
            more = {"suppressed": suppressed} if suppressed else {}
            self._lines.write(level, message, {**fields, **more})


def pull_fields(pull: Pull) -> dict[str, Any]:
    """A pull's story."""
    fields: dict[str, Any] = {
        "id": pull.request_id,
        "method": pull.method,
        "kind": pull.kind.value,
        "outcome": pull.outcome.value,
        "status": pull.status,
        "upstream": pull.upstream,
        "repository": pull.repository,
        "reference": pull.reference,
        "digest": pull.digest,
        "bytes": pull.bytes_sent,
        "seconds": pull.duration,
        "first_byte": pull.first_byte or 0.0,
        "joined_at": pull.joined_at,
        "stages": {name: round(seconds, 6) for name, seconds in _totals(pull).items()},
        "client": pull.client,
        "user_agent": pull.user_agent,
        "warning": pull.warning,
        "error": pull.error,
    }
    if not pull.repository:
        fields["path"] = pull.path.partition("?")[0]
    return {key: value for key, value in fields.items() if value not in ("", None, {})}


def server_timing(pull: Pull) -> str:
    """``Server-Timing`` (W3C): the stages so far, in milliseconds."""
    totals = {**_totals(pull), "total": time.monotonic() - pull.started}
    return ", ".join(
        f"{_TOKEN.sub('-', name)};dur={seconds * 1000:.2f}" for name, seconds in totals.items()
    )


def _totals(pull: Pull) -> dict[str, float]:
    totals: dict[str, float] = {}
    for name, seconds in pull.stages:
        totals[name] = totals.get(name, 0.0) + seconds
    return totals
