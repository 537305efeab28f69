"""What an event stream sends, and how many there may be."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

from mirror.admin import event_stream as module
from mirror.admin.event_stream import EventStreams
from mirror.admin.jobs import Jobs
from mirror.admin.problems import ApiProblem
from mirror.observability.events import Kind, RequestRecord, RequestStarted
from mirror.single_flight import SingleFlight
from tests.unit.admin.kit import running_admin


async def turn(seconds: float) -> None:
    """Sleep for no time: the streams of these tests do not wait."""
    await asyncio.sleep(0)


def parse(part: bytes) -> list[tuple[str, Any]]:
    found = []
    for block in part.decode().strip().split("\n\n"):
        lines = dict(line.partition(": ")[::2] for line in block.splitlines())
        if "event" in lines:
            found.append((lines["event"], json.loads(lines["data"])))
        elif "" in lines:
            found.append(("comment", lines[""]))
    return found


async def test_stream_sends_what_has_changed_and_a_heartbeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "UPDATE_INTERVAL_S", 0.0)
    monkeypatch.setattr(module, "STREAM_HEARTBEAT_S", 0.0)
    live = {"fetches": 1}
    async with SingleFlight() as single_flight:
        jobs = Jobs(single_flight, lambda event: None, lambda: 0.0)
        streams = EventStreams(lambda: live, jobs, turn)
        async with aclosing(streams.open()) as stream:
            assert (await anext(stream)).startswith(b": oci-mirror")
            first = parse(await anext(stream))
            assert [name for name, _ in first][:2] == ["live", "jobs"]
            assert parse(await anext(stream)) == [("comment", "still here")]
            live = {"fetches": 2}
            assert ("live", live) in parse(await anext(stream))
            streams.mark_changed()
            assert ("changed", {}) in parse(await anext(stream))


async def test_number_of_streams_is_bounded_and_a_closed_one_makes_room() -> None:
    async with SingleFlight() as single_flight, AsyncExitStack() as stack:
        jobs = Jobs(single_flight, lambda event: None, lambda: 0.0)
        streams = EventStreams(dict, jobs, turn)
        opened = []
        for _ in range(module.MAX_STREAMS):
            opened.append(await stack.enter_async_context(aclosing(streams.open())))
            await anext(opened[-1])
        with pytest.raises(ApiProblem, match="open already") as raised:
            streams.open()
        assert raised.value.status == 429
        await opened[0].aclose()
        await anext(await stack.enter_async_context(aclosing(streams.open())))


async def test_stream_is_opened_with_a_ticket_once(tmp_path: Path) -> None:
    async with running_admin(tmp_path) as kit:
        kit.live.observe(RequestStarted(RequestRecord("one", "GET", "/", kind=Kind.BLOB)))
        _, answer = await kit.post("/admin/v1/events/ticket")
        url = f"{kit.url}/admin/v1/events?ticket={answer['ticket']}"
        async with kit.session.get(url) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            text = b""
            while b"event: live" not in text:
                text += await response.content.readany()
            await response.content.readany()
        async with kit.session.get(url) as response:
            assert response.status == 401
        async with kit.session.get(f"{kit.url}/admin/v1/events") as response:
            assert response.status == 401


async def test_ticket_permits_nothing_but_the_stream(tmp_path: Path) -> None:
    async with running_admin(tmp_path) as kit:
        _, answer = await kit.post("/admin/v1/events/ticket")
        kit.token = None
        status, _ = await kit.get(f"/admin/v1/images?ticket={answer['ticket']}")
        assert status == 401
        kit.token = answer["ticket"]
        assert (await kit.get("/admin/v1/images"))[0] == 401
