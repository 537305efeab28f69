"""Log lines: one each, clean, bounded."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest

from mirror.config.settings import Log
from mirror.observability import events
from mirror.observability.events import Kind, Outcome, Pull
from mirror.observability.logs import LogObserver, configure_logging, pull_pairs, server_timing


def written(*happened: events.Event, log: Log | None = None) -> list[str]:
    stream = io.StringIO()
    observer = LogObserver(configure_logging(log or Log(format="json"), stream))
    for event in happened:
        observer.observe(event)
    return stream.getvalue().splitlines()


def a_pull(**fields: object) -> Pull:
    pull = Pull("0123456789abcdef", "GET", "/v2/library/app/manifests/1.0")
    pull.kind, pull.outcome, pull.status = Kind.MANIFEST, Outcome.HIT, 200
    pull.upstream, pull.repository, pull.reference = "docker.io", "library/app", "1.0"
    for name, field in fields.items():
        setattr(pull, name, field)
    return pull


def test_a_pull_is_one_line_with_its_story() -> None:
    pull = a_pull(bytes_sent=418, duration=0.25)
    with pull.stage("resolve"):
        pass
    (line,) = written(events.PullEnded(pull))
    fields = json.loads(line)
    assert fields["message"] == "pull"
    assert fields["id"] == "0123456789abcdef"
    assert (fields["outcome"], fields["bytes"], fields["seconds"]) == ("hit", 418, 0.25)
    assert "resolve" in fields["stages"]


def test_people_get_another_format() -> None:
    (line,) = written(events.PullEnded(a_pull(user_agent="a b")), log=Log(format="human"))
    assert re.match(
        r"\d{4}-\d\d-\d\dT[\d:.]+Z info    pull outcome=hit status=200 method=GET", line
    )
    assert 'user_agent="a b"' in line


def test_probes_are_quiet() -> None:
    assert not written(events.PullEnded(a_pull(kind=Kind.PING)))
    assert written(events.PullEnded(a_pull(kind=Kind.PING)), log=Log(level="debug"))


@pytest.mark.row("HU15-hostile-error-bodies")
@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nlevel=error", "\x1b[31mred", "a\x00b", "a\u2028b", "\udcff"]
)
@pytest.mark.parametrize("style", ["json", "human"])
def test_control_characters_stay_in_their_line(text: str, style: str) -> None:
    log = Log.model_validate({"format": style})
    lines = written(events.PullEnded(a_pull(user_agent=text, error=text)), log=log)
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
def test_secrets_are_masked(text: str) -> None:
    for line in written(
        events.PullEnded(a_pull(error=text)), events.LogMessage("error", text, (("why", text),))
    ):
        assert "canary" not in line


def test_repeated_lines_are_held_back_and_counted() -> None:
    lines = written(*(events.Uncached("sha256:x", "full") for _ in range(1000)))
    assert len(lines) == 5


def test_long_fields_are_cut() -> None:
    (line,) = written(events.PullEnded(a_pull(user_agent="x" * 100_000)))
    assert len(line) < 2000


@pytest.mark.row("HC2-malformed-requests")
def test_a_traceback_becomes_a_line() -> None:
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
def test_a_stream_that_is_gone_loses_lines_and_nothing_else() -> None:
    stream = io.StringIO()
    observer = LogObserver(configure_logging(Log(format="json"), stream))
    stream.close()
    observer.observe(events.PullEnded(a_pull()))
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - closing it fails as well
    observer = LogObserver(configure_logging(Log(format="json"), full))
    observer.observe(events.PullEnded(a_pull()))
    with pytest.raises(OSError, match="No space"):
        full.close()


def test_server_timing_is_a_header() -> None:
    pull = a_pull()
    with pull.stage("wait for it"), pull.stage("index"):
        pass
    assert re.fullmatch(r"(?:[\w-]+;dur=\d+\.\d\d(?:, )?)+", server_timing(pull))
    assert any("stages" in pair for pair in pull_pairs(pull, as_json=True))
