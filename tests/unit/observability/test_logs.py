"""Log lines: format, escapes, masked secrets, limits."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest

from mirror.config.settings import Log
from mirror.observability import events
from mirror.observability.events import Kind, Outcome, RequestRecord
from mirror.observability.logs import LogObserver, configure_logging, encode_request, server_timing


def written(*reported: events.Event, log: Log | None = None) -> list[str]:
    stream = io.StringIO()
    observer = LogObserver(configure_logging(log or Log(format="json"), stream))
    for event in reported:
        observer.observe(event)
    return stream.getvalue().splitlines()


def a_pull(**fields: object) -> RequestRecord:
    pull = RequestRecord("0123456789abcdef", "GET", "/v2/library/app/manifests/1.0")
    pull.kind, pull.outcome, pull.status = Kind.MANIFEST, Outcome.HIT, 200
    pull.upstream, pull.repository, pull.reference = "docker.io", "library/app", "1.0"
    for name, field in fields.items():
        setattr(pull, name, field)
    return pull


def test_request_is_one_json_line_with_its_fields() -> None:
    pull = a_pull(bytes_sent=418, duration=0.25)
    with pull.stage("resolve"):
        pass
    (line,) = written(events.RequestEnded(pull))
    fields = json.loads(line)
    assert fields["message"] == "pull"
    assert fields["id"] == "0123456789abcdef"
    assert (fields["outcome"], fields["bytes"], fields["seconds"]) == ("hit", 418, 0.25)
    assert "resolve" in fields["stages"]


def test_human_format_has_key_value_pairs_and_quotes_spaces() -> None:
    (line,) = written(events.RequestEnded(a_pull(user_agent="a b")), log=Log(format="human"))
    assert re.match(
        r"\d{4}-\d\d-\d\dT[\d:.]+Z info    pull outcome=hit status=200 method=GET", line
    )
    assert 'user_agent="a b"' in line


def test_ping_is_logged_at_debug_level_only() -> None:
    assert not written(events.RequestEnded(a_pull(kind=Kind.PING)))
    assert written(events.RequestEnded(a_pull(kind=Kind.PING)), log=Log(level="debug"))


@pytest.mark.row("HU15-hostile-error-bodies")
@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nlevel=error", "\x1b[31mred", "a\x00b", "a\u2028b", "\udcff"]
)
@pytest.mark.parametrize("style", ["json", "human"])
def test_control_characters_are_escaped_within_one_line(text: str, style: str) -> None:
    log = Log.model_validate({"format": style})
    lines = written(events.RequestEnded(a_pull(user_agent=text, error=text)), log=log)
    assert len(lines) == 1
    assert all(char.isprintable() for char in lines[0])


@pytest.mark.row("HC14-secrets-in-output")
@pytest.mark.parametrize(
    "text",
    [
        "https://user:canary@registry.example/v2/",
        "Authorization: Bearer canary",
        "authorization=Basic canary",
        "https://cdn.example/blob?X-Amz-Signature=canary",
    ],
)
def test_secrets_in_urls_and_authorization_are_masked(text: str) -> None:
    for line in written(
        events.RequestEnded(a_pull(error=text)), events.LogMessage("error", text, (("why", text),))
    ):
        assert "canary" not in line


def test_message_repeated_1000_times_is_written_5_times() -> None:
    lines = written(*(events.Uncached("sha256:x", "full") for _ in range(1000)))
    assert len(lines) == 5


def test_long_field_is_cut() -> None:
    (line,) = written(events.RequestEnded(a_pull(user_agent="x" * 100_000)))
    assert len(line) < 2000


@pytest.mark.row("HC2-malformed-requests")
def test_traceback_of_a_library_becomes_one_line_and_is_limited() -> None:
    stream = io.StringIO()
    configure_logging(Log(format="json"), stream)
    try:
        raise ZeroDivisionError("oops")
    except ZeroDivisionError:
        for _ in range(100):
            logging.getLogger("aiohttp.server").exception("Error handling request")
    lines = stream.getvalue().splitlines()
    assert 1 <= len(lines) <= 5
    assert json.loads(lines[0])["error"] == "ZeroDivisionError: oops"


@pytest.mark.row("R9-blocked-stdout")
def test_closed_or_full_stream_loses_lines_without_an_exception() -> None:
    stream = io.StringIO()
    observer = LogObserver(configure_logging(Log(format="json"), stream))
    stream.close()
    observer.observe(events.RequestEnded(a_pull()))
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - closing it fails as well
    observer = LogObserver(configure_logging(Log(format="json"), full))
    observer.observe(events.RequestEnded(a_pull()))
    with pytest.raises(OSError, match="No space"):
        full.close()


def test_server_timing_is_a_valid_header_in_milliseconds() -> None:
    pull = a_pull()
    with pull.stage("wait for it"), pull.stage("index"):
        pass
    assert re.fullmatch(r"(?:[\w-]+;dur=\d+\.\d\d(?:, )?)+", server_timing(pull))
    assert any("stages" in field for field in encode_request(pull, as_json=True))
