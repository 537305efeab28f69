"""Log lines: format, escapes, masked secrets, limits."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest

from mirror.config.settings import Log
from mirror.observability import events
from mirror.observability.events import Kind, Outcome, RequestRecord
from mirror.observability.library_logs import configure_logging
from mirror.observability.logs import LogObserver, encode_request, server_timing
from mirror.oci.reference import Digest, Repository


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


@pytest.mark.parametrize(
    ("method", "message"),
    [("PUT", "push"), ("POST", "push"), ("PATCH", "push"), ("DELETE", "delete"), ("HEAD", "pull")],
)
def test_line_of_a_request_says_push_or_delete_and_the_bytes_received(
    method: str, message: str
) -> None:
    (line,) = written(events.RequestEnded(a_pull(method=method, bytes_received=7)))
    fields = json.loads(line)
    assert (fields["message"], fields["received"], fields["bytes"]) == (message, 7, 0)


def test_request_with_bytes_of_aside_requests_says_how_many() -> None:
    pull = a_pull(kind=Kind.BLOB, outcome=Outcome.ASIDE, aside_bytes=51, bytes_sent=51)
    (line,) = written(events.RequestEnded(pull))
    fields = json.loads(line)
    assert (fields["outcome"], fields["aside"]) == ("aside", 51)


def test_request_that_several_connections_fetched_says_how_many_and_what_came_late() -> None:
    pull = a_pull(kind=Kind.BLOB, outcome=Outcome.MISS, connections=4, late_parts=2)
    fields = json.loads(written(events.RequestEnded(pull))[0])
    assert (fields["connections"], fields["late_parts"]) == (4, 2)
    assert "connections" not in json.loads(written(events.RequestEnded(a_pull()))[0])


def test_fetch_that_goes_on_with_fewer_connections_says_why() -> None:
    (line,) = written(events.BackedOff("docker.io", "https://x", "rate_limited", 2))
    fields = json.loads(line)
    assert (fields["upstream"], fields["count"]) == ("docker.io", 2)
    assert fields["reason"] == "rate_limited"


def test_only_a_failed_aside_request_has_a_line() -> None:
    ended: list[tuple[events.AsideResult, str]] = [
        ("ok", ""),
        ("dropped", ""),
        ("no_range", "the upstream ignores Range"),
    ]
    (line,) = written(*(events.AsideEnded("docker.io", result, 0, why) for result, why in ended))
    fields = json.loads(line)
    assert fields["message"].startswith("request for a range failed")
    assert (fields["result"], fields["reason"]) == ("no_range", "the upstream ignores Range")


HUMAN = Log(format="human")


@pytest.mark.row("FE6-one-line-per-request")
def test_human_line_of_a_blob_fits_120_columns_and_has_its_digest_once() -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    pull = a_pull(
        kind=Kind.BLOB,
        repository="library/alpine",
        reference=digest,
        digest=digest,
        bytes_sent=3_565_158,
        duration=0.0123,
        client="10.244.13.7",
        user_agent="containerd/v2.1.4",
        stages=[("index", 0.0004), ("send", 0.005), ("send", 0.004)],
    )
    (line,) = written(events.RequestEnded(pull), log=HUMAN)
    stamp, _, rest = line.partition(" ")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}Z", stamp)
    assert rest == (
        "info    hit 200 GET blob docker.io/library/alpine@0123456789ab 3.4MiB 12ms (send 9ms)"
        " 10.244.13.7"
    )
    assert len(line) <= 120, line


@pytest.mark.row("FE6-one-line-per-request")
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"digest": "sha256:" + "ab" * 32}, "manifest docker.io/library/app:1.0@abababababab <1ms"),
        ({"kind": Kind.TAGS, "reference": ""}, "tags docker.io/library/app <1ms"),
        ({"duration": 12.34}, "manifest docker.io/library/app:1.0 12.3s"),
        (
            {"duration": 0.9, "stages": [("index", 0.1), ("resolve", 0.2), ("fetch", 0.5)]},
            "manifest docker.io/library/app:1.0 900ms (fetch 500ms, resolve 200ms)",
        ),
        ({"repository": "", "kind": Kind.INVALID}, "invalid /v2/library/app/manifests/1.0 <1ms"),
        ({"path": "/x y", "repository": "", "kind": Kind.INVALID}, "invalid /x y <1ms"),
    ],
)
def test_human_line_names_kind_target_time_and_long_stages(
    fields: dict[str, object], expected: str
) -> None:
    (line,) = written(events.RequestEnded(a_pull(**fields)), log=HUMAN)
    assert line.endswith(f"hit 200 GET {expected}")


@pytest.mark.row("FE6-one-line-per-request")
def test_human_line_of_a_failure_ends_with_the_error_and_the_id() -> None:
    failed = a_pull(outcome=Outcome.ERROR, status=502, error="UNAVAILABLE: no answer")
    (line,) = written(events.RequestEnded(failed), log=HUMAN)
    assert line.endswith(' error="UNAVAILABLE: no answer" id=0123456789abcdef')
    stale = a_pull(outcome=Outcome.STALE, warning="no answer")
    (line,) = written(events.RequestEnded(stale), log=HUMAN)
    assert line.endswith(' warning="no answer" id=0123456789abcdef')


@pytest.mark.row("FE4-severity-of-failures")
@pytest.mark.parametrize(
    ("outcome", "status", "error", "level"),
    [
        # The upstream's or our own fault.
        (Outcome.ERROR, 502, "UNAVAILABLE: no answer", "warning"),
        (Outcome.ERROR, 504, "UNAVAILABLE: too slow", "warning"),
        (Outcome.ERROR, 429, "TOOMANYREQUESTS: pause", "warning"),
        (Outcome.ERROR, 503, "UNAVAILABLE: no descriptor", "warning"),
        (Outcome.ERROR, 500, "UNKNOWN: internal error", "warning"),
        # Cut after the header was sent.
        (Outcome.ERROR, 200, "UNAVAILABLE: the upstream broke off", "warning"),
        (Outcome.ERROR, 0, "cut off at the end of drain_timeout", "warning"),
        # The client's own fault, or a decision.
        (Outcome.REJECTED, 400, "NAME_INVALID: malformed", "info"),
        (Outcome.REJECTED, 405, "UNSUPPORTED: read-only", "info"),
        (Outcome.REJECTED, 416, "SIZE_INVALID: range", "info"),
        (Outcome.NEGATIVE, 404, "MANIFEST_UNKNOWN: no such tag", "info"),
        (Outcome.DENIED, 403, "DENIED: deny-list", "info"),
        (Outcome.HIT, 200, "client left", "info"),
        (Outcome.HIT, 200, "", "info"),
        (Outcome.STALE, 200, "", "info"),
    ],
)
def test_level_of_a_request_says_whose_fault_a_failure_is(
    outcome: Outcome, status: int, error: str, level: str
) -> None:
    pull = a_pull(outcome=outcome, status=status, error=error)
    (line,) = written(events.RequestEnded(pull))
    assert json.loads(line)["level"] == level


@pytest.mark.row("FE4-severity-of-failures")
def test_level_warning_shows_failed_pulls_and_nothing_else() -> None:
    log = Log(format="json", level="warning")
    failed = a_pull(outcome=Outcome.ERROR, status=502, error="UNAVAILABLE: no answer")
    lines = written(events.RequestEnded(a_pull()), events.RequestEnded(failed), log=log)
    assert [json.loads(line)["status"] for line in lines] == [502]


@pytest.mark.row("FE7-commands-and-start-line")
def test_first_measurement_of_the_storage_is_logged_with_use_and_quota() -> None:
    measured = events.StorageMeasured(7, 3_435_973_837, 50 * 10**9, True)
    (line,) = written(measured, measured)
    fields = json.loads(line)
    assert fields["message"] == "storage"
    assert (fields["contents"], fields["used"], fields["quota"]) == (7, "3.2GiB", "50GB")


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


def a_change(number: int = 0, **fields: Any) -> events.HostedChange:
    change = events.HostedChange(
        action="push",
        repository=Repository("registry.example", "team/app"),
        digest=Digest.of(b""),
        tag=f"v{number}",
        media_type="application/json",
        size=7,
        user="ci",
        client="192.0.2.1",
        at=1.0,
    )
    return replace(change, **fields)


def test_each_change_of_a_hosted_repository_is_one_line_however_many_there_are() -> None:
    lines = written(*map(a_change, range(100)))
    assert len(lines) == 100
    fields = json.loads(lines[7])
    assert fields["message"] == "pushed"
    assert (fields["user"], fields["client"]) == ("ci", "192.0.2.1")
    assert (fields["repository"], fields["tag"]) == ("registry.example/team/app", "v7")
    assert (fields["digest"], fields["manifest_bytes"]) == (str(Digest.of(b"")), 7)
    assert fields.keys().isdisjoint({"bytes", "blob_bytes", "image_bytes"})
    assert fields["at"] == "1970-01-01T00:00:01Z", "also if a server tells of it later"
    assert written(a_change(), log=Log(format="json", level="warning")) == []


def test_line_of_a_change_says_what_its_bytes_are() -> None:
    (line,) = written(a_change(image_size=5_000_000_000))
    fields = json.loads(line)
    assert (fields["manifest_bytes"], fields["image_bytes"]) == (7, 5_000_000_000)
    (line,) = written(a_change(action="mount", tag="", media_type="application/octet-stream"))
    fields = json.loads(line)
    assert (fields["message"], fields["blob_bytes"]) == ("mounted", 7)
    assert "manifest_bytes" not in fields


def test_change_without_a_user_or_a_client_says_so() -> None:
    (line,) = written(a_change(user="", client="", tag="", action="delete"))
    fields = json.loads(line)
    assert (fields["message"], fields["user"], fields["client"]) == (
        *("deleted", "anonymous", "server"),
    )
    assert "tag" not in fields


def test_long_field_is_cut() -> None:
    (line,) = written(events.RequestEnded(a_pull(user_agent="x" * 100_000)))
    assert len(line) < 2000


@pytest.mark.parametrize("style", ["json", "human"])
def test_lines_of_one_turn_are_written_together_in_their_order(
    style: Literal["json", "human"],
) -> None:
    reported = [
        events.RequestEnded(a_pull(request_id="first", error="x")),
        events.LogMessage("info", "between", (("a", 1),)),
        events.RequestEnded(a_pull(request_id="last", error="x")),
    ]
    turn: list[Callable[[], None]] = []
    stream = Stream()
    lines = configure_logging(Log(format=style), stream, turn.append)
    observer = LogObserver(lines)
    for event in reported:
        observer.observe(event)
    (flush,) = turn
    assert stream.writes == []
    flush()
    (text,) = stream.writes
    order = [text.index(mark) for mark in ("first", "between", "last")]
    assert order == sorted(order)
    assert without_times(text.splitlines()) == without_times(
        written(*reported, log=Log(format=style))
    )


def test_line_that_waits_for_the_end_of_its_turn_has_the_format_of_its_time() -> None:
    turn: list[Callable[[], None]] = []
    stream = Stream()
    lines = configure_logging(Log(format="json"), stream, turn.append)
    LogObserver(lines).observe(events.LogMessage("info", "read again", (("a", 1),)))
    lines.configure(Log(format="human"))
    (text,) = stream.writes
    assert json.loads(text)["a"] == 1


def test_line_that_another_thread_adds_in_between_does_not_keep_both_back_for_ever() -> None:
    turn: list[Callable[[], None]] = []
    stream = Stream()
    lines = configure_logging(Log(format="json"), stream, turn.append)

    class Interrupted(deque[Any]):
        """As if another thread added a line right after each first line was added."""

        def append(self, line: Any, /) -> None:
            super().append(line)
            if len(self) == 1:
                lines.write(logging.INFO, "other", {})

    lines._pending = Interrupted()
    lines.write(logging.INFO, "one", {})
    for flush in turn:
        flush()
    assert [json.loads(line)["message"] for line in "".join(stream.writes).splitlines()] == [
        "one",
        "other",
    ]


def test_lines_that_several_threads_write_are_all_written_once() -> None:
    stream = Stream()
    lines = configure_logging(Log(format="json"), stream)

    def work(number: int) -> None:
        for line in range(200):
            lines.write(logging.INFO, f"{number}-{line}", {})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    messages = [json.loads(line)["message"] for line in "".join(stream.writes).splitlines()]
    assert sorted(messages) == sorted(f"{n}-{line}" for n in range(4) for line in range(200))


class Stream(io.StringIO):
    """A stream that keeps its writes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        if text:
            self.writes.append(text)
        return len(text)


def without_times(lines: list[str]) -> list[str]:
    return [re.sub(r"\d\d:\d\d:\d\d\.\d{3}Z", "", line) for line in lines]


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
    assert '"stages":{' in encode_request(pull)
