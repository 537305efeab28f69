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
from collections.abc import Callable, Mapping
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Any, Final, TextIO, TypeAlias

from mirror.config.settings import Log
from mirror.observability import events
from mirror.observability.events import Event, Kind, Pull
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
_NUMBERS: Final = "id=%s bytes=%d seconds=%.6f first_byte=%.6f"
_JSON_NUMBERS: Final = '"id":"%s","bytes":%d,"seconds":%.6f,"first_byte":%.6f'
_TOKEN: Final = re.compile(r"[^A-Za-z0-9!#$%&'*+.^_`|~-]")
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_NAMES: Final = {level: name for name, level in _LEVELS.items()}


Later: TypeAlias = Callable[[Callable[[], None]], object]
Steady: TypeAlias = tuple[tuple[str, str | int], ...]


class Lines:
    """Writes lines to a stream; one that is closed or full loses them.

    ``logging`` is for what libraries have to say: its records cost more than an answer does.
    """

    def __init__(self, settings: Log, stream: TextIO, later: Later | None = None) -> None:
        self._stream = stream
        self._later = later
        self._held: list[str] = []
        self._level = _LEVELS[settings.level]
        self._as_json = settings.format == "json" or (
            settings.format == "auto" and not stream.isatty()
        )
        self._second = (0, "")

    def enabled(self, level: int) -> bool:
        """Whether lines of this level are written."""
        return level >= self._level

    def write(self, level: int, message: str, fields: Mapping[str, object]) -> None:
        """Write one line, whatever is in its fields."""
        self._write(level, message, [_pair(*field, self._as_json) for field in fields.items()])

    def write_pull(self, level: int, pull: Pull) -> None:
        """Write the line of a pull."""
        self._write(level, "pull", pull_pairs(pull, self._as_json))

    def _write(self, level: int, message: str, pairs: list[str]) -> None:
        """Hold a line; ``later`` brings those of one moment out together."""
        self._held.append(self._line(time.time(), level, message, pairs))
        if self._later is None:
            self.flush()
        elif len(self._held) == 1:
            self._later(self.flush)

    def flush(self) -> None:
        """Bring out what is held back."""
        lines, self._held = self._held, []
        try:
            self._stream.write("".join(lines))
            self._stream.flush()
        except (OSError, ValueError):
            return

    def _line(self, at: float, level: int, message: str, pairs: list[str]) -> str:
        """Human-readable, or JSON; always exactly one line."""
        second = int(at)
        if second != self._second[0]:
            self._second = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        stamp = f"{self._second[1]}.{int((at - second) * 1000):03d}Z"
        name = _NAMES.get(level, "info")
        if self._as_json:
            head = f'{{"time":"{stamp}","level":"{name}","message":{_encoded(message)}'
            return ",".join((head, *pairs)) + "}\n"
        return " ".join((f"{stamp} {name:7} {_clean(message)}", *pairs)).rstrip() + "\n"


def _pair(key: str, value: object, as_json: bool) -> str:
    return f'"{key}":{_encoded(value)}' if as_json else f"{key}={_quoted(_clean(value))}"


@lru_cache(4096)
def _remembered(steady: Steady, as_json: bool) -> str:
    pairs = (_pair(key, value, as_json) for key, value in steady)
    return ("," if as_json else " ").join(pairs)


def _encoded(value: object) -> str:
    """JSON (RFC 8259); the standard encoder takes longer than the answer that the line is about."""
    match value:
        case float():
            return f"{value:.6f}"
        case bool() | None:
            return _ENCODE(value)
        case int():
            return repr(value)
        case dict():
            pairs = [f'"{key}":{_encoded(part)}' for key, part in value.items()]
            return "{" + ",".join(pairs) + "}"
    return encode_basestring_ascii(str(_clean(value)))


def _clean(value: object) -> object:
    """No control characters, no secrets, no novels."""
    if isinstance(value, str):
        plain = len(value) <= _FIELD_LIMIT and value.isascii() and value.isalnum()
        return value if plain else _mask_secrets(value)
    return round(value, 6) if isinstance(value, float) else value


def _mask_secrets(text: str) -> str:
    return _SECRETS.sub(_mask, printable(text, _FIELD_LIMIT))


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


def configure_logging(
    settings: Log, stream: TextIO | None = None, later: Later | None = None
) -> Lines:
    """Set up logging of this process, and return where lines go.

    ``later``: an event loop's ``call_soon``; without it each line is written at once.
    """
    lines = Lines(settings, stream or sys.stdout, later)
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
            case events.PullStarted() | events.BytesSent():
                pass
            case events.PullEnded(pull):
                quiet = pull.kind is Kind.PING and not pull.error
                level = logging.DEBUG if quiet else logging.INFO
                if self._lines.enabled(level):
                    self._lines.write_pull(level, pull)
            case events.LogMessage(level, message, fields):
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


def pull_pairs(pull: Pull, as_json: bool) -> list[str]:
    """A pull's story, encoded: what it has in common with others first, then what is its own."""
    # A request id is letters and digits by its pattern: nothing in it has to be escaped.
    numbers = _JSON_NUMBERS if as_json else _NUMBERS
    first = pull.first_byte or 0.0
    pairs = [
        _remembered(pull_names(pull), as_json),
        numbers % (pull.request_id, pull.bytes_sent, pull.duration, first),
    ]
    if pull.joined_at is not None:
        pairs.append(_pair("joined_at", pull.joined_at, as_json))
    if pull.stages:
        pairs.append(_pair("stages", _totals(pull), as_json))
    if not pull.repository:
        pairs.append(_pair("path", pull.path.partition("?")[0], as_json))
    if pull.warning:
        pairs.append(_pair("warning", pull.warning, as_json))
    if pull.error:
        pairs.append(_pair("error", pull.error, as_json))
    return pairs


def pull_names(pull: Pull) -> Steady:
    """What it has in common with others: who asked for what, and how that ended."""
    named: Steady = (
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
        named = tuple(pair for pair in named if pair[1] != "")
    agent = pull.user_agent[: _FIELD_LIMIT + 1]
    return (*named, ("user_agent", agent)) if agent else named


def server_timing(pull: Pull) -> str:
    """``Server-Timing`` (W3C): the stages so far, in milliseconds."""
    totals = {**_totals(pull), "total": time.monotonic() - pull.started}
    return ", ".join(f"{_token(name)};dur={seconds * 1000:.2f}" for name, seconds in totals.items())


@lru_cache(64)
def _token(name: str) -> str:
    return _TOKEN.sub("-", name)


def _totals(pull: Pull) -> dict[str, float]:
    totals: dict[str, float] = {}
    for name, seconds in pull.stages:
        totals[name] = totals.get(name, 0.0) + seconds
    return totals
