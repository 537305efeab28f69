"""Which events become notifications, their form, and the bounds of what waits."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from mirror.observability.events import Kind, OwnRequestEnded, RequestEnded
from mirror.oci.reference import Digest, Repository
from mirror.store import batch_writer, shared_database
from tests.fakes.registry import FakeRegistry
from tests.server_kit import running
from tests.unit.notifications.kit import (
    DIGEST,
    NAME,
    NOW,
    SECRETS,
    NotificationKit,
    Receiver,
    a_pull,
    is_signed_by,
    notification_kit,
)

UNREACHABLE = {"url": "http://127.0.0.1:9/events"}


def queued(kit: NotificationKit, columns: str = "count(*)") -> list[tuple[Any, ...]]:
    """Return the rows of the queue."""
    connection = sqlite3.connect(kit.root / "data/notifications/queue.1.db")
    try:
        return connection.execute(f"SELECT {columns} FROM notifications ORDER BY number").fetchall()
    finally:
        connection.close()


async def test_push_is_a_signed_cloud_event(tmp_path: Path) -> None:
    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        kit.push()
        await kit.settle()
        (request,) = receiver.requests
        (event,) = receiver.bodies()
    assert (request.method, request.path) == ("POST", "/events")
    assert request.headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    assert request.headers["webhook-id"] == event["id"]
    assert request.headers["webhook-timestamp"] == str(int(NOW))
    assert is_signed_by(request, SECRETS[0])
    assert not is_signed_by(request, SECRETS[1])
    assert re.fullmatch(r"//[^/]+/registry\.example", event.pop("source"))
    assert re.fullmatch("[0-9a-f]{32}", event.pop("id"))
    assert event == {
        "specversion": "1.0",
        "type": "oci-mirror.push",
        "subject": "team/app:v1",
        "time": "2030-03-17T17:46:40.000Z",
        "datacontenttype": "application/json",
        "data": {
            "registry": NAME,
            "repository": "team/app",
            "tag": "v1",
            "digest": str(DIGEST),
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "size": 8,
            "user": "ci",
            "client": "10.0.0.7",
        },
    }


async def test_pull_by_digest_has_no_tag_and_waits_for_its_batch(tmp_path: Path) -> None:
    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        kit.pull(str(DIGEST), user="ann")
        await kit.settle()
        assert receiver.requests == []
        kit.run_timers()
        await kit.settle()
        (event,) = receiver.bodies()
    assert event["type"] == "oci-mirror.pull"
    assert event["data"].pop("user") == "ann"
    assert event["subject"] == f"library/app@{DIGEST}"
    assert event["data"] == {
        "registry": "docker.io",
        "repository": "library/app",
        "digest": str(DIGEST),
        "size": 8,
        "client": "10.0.0.7",
        "userAgent": "containerd/2.0",
    }


async def test_pull_of_a_mirrored_image_is_told_for_a_miss_and_a_hit(tmp_path: Path) -> None:
    async with FakeRegistry() as upstream, running(tmp_path / "mirror", upstream.url) as server:
        digest = upstream.add_image(b"layer", tag="v1")
        for _ in range(3):
            await server.get(server.manifest("v1"))
        await server.ask("HEAD", server.manifest("v1"))
        await server.get(server.blob(Digest.of(b"layer")))
        pulls = await server.records()
    async with notification_kit(tmp_path, UNREACHABLE) as kit:
        for pull in pulls:
            kit.service.observe(RequestEnded(pull))
        kit.run_timers()
        await kit.settle()
        events = [json.loads(body) for (body,) in queued(kit, "body")]
    assert [event["subject"] for event in events] == ["library/app:v1"] * 3
    assert {event["data"]["digest"] for event in events} == {str(digest)}
    assert all(event["data"]["client"] == "127.0.0.1" for event in events)


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "HEAD"},
        {"kind": Kind.BLOB},
        {"status": 404},
        {"status": 304},
        {"is_complete": False},
    ],
)
async def test_other_requests_are_no_pull(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with notification_kit(tmp_path, UNREACHABLE) as kit:
        kit.pull(**fields)
        assert kit.timers == []


async def test_requests_of_the_mirror_itself_and_mounts_are_not_told(tmp_path: Path) -> None:
    async with notification_kit(tmp_path, UNREACHABLE) as kit:
        kit.service.observe(OwnRequestEnded(a_pull(command="warm")))
        kit.push(action="mount")
        assert kit.timers == []
        assert kit.service._recorder._writer is None


async def test_without_targets_nothing_is_queued(tmp_path: Path) -> None:
    async with notification_kit(tmp_path) as kit:
        kit.push()
        await kit.settle()
    assert not (tmp_path / "data").exists()


async def test_target_gets_only_its_kinds_of_events_and_its_repositories(tmp_path: Path) -> None:
    async with Receiver() as receiver:
        targets = (
            {"name": "ours", "url": f"{receiver.target}/ours", "repositories": [f"{NAME}/team/*"]},
            {"name": "pulls", "url": f"{receiver.target}/pulls", "events": ["pull"]},
        )
        async with notification_kit(tmp_path, *targets) as kit:
            kit.push("v1")
            kit.push("v2", repository=Repository(NAME, "other/app"))
            kit.push("v3", action="delete")
            kit.pull("v4")
            kit.run_timers()
            await kit.settle()
        got = sorted(
            (request.path, body["subject"])
            for request, body in zip(receiver.requests, receiver.bodies(), strict=True)
        )
    assert got == [
        ("/events/ours", "team/app:v1"),
        ("/events/ours", "team/app:v3"),
        ("/events/pulls", "library/app:v4"),
    ]


async def test_full_queue_drops_the_oldest_pulls_first_then_the_oldest_others(
    tmp_path: Path,
) -> None:
    async with notification_kit(tmp_path, {**UNREACHABLE, "max_queued": 3}) as kit:
        for tag in ("p1", "p2", "p3", "p4"):
            kit.pull(tag)
        kit.run_timers()
        for tag in ("v1", "v2"):
            kit.push(tag)
        await kit.written()
        tags = [re.findall(rb'"tag":"(\w+)"', body)[0] for (body,) in queued(kit, "body")]
        assert tags == [b"p4", b"v1", b"v2"]
        for tag in ("v3", "v4"):
            kit.push(tag)
        await kit.settle()
        tags = [re.findall(rb'"tag":"(\w+)"', body)[0] for (body,) in queued(kit, "body")]
        assert tags == [b"v2", b"v3", b"v4"]
        assert kit.dropped == {("audit", "full"): 5}


async def test_queue_is_bounded_by_its_bytes(tmp_path: Path) -> None:
    async with notification_kit(tmp_path, {**UNREACHABLE, "max_queued_size": "2KiB"}) as kit:
        for number in range(20):
            kit.push(f"v{number}")
        await kit.settle()
        sizes = [size for (size,) in queued(kit, "length(body)")]
        assert 1024 < sum(sizes) <= 2048
        assert kit.dropped == {("audit", "full"): 20 - len(sizes)}


async def test_pulls_are_bounded_by_their_rate_and_pushes_are_not(tmp_path: Path) -> None:
    async with notification_kit(tmp_path, UNREACHABLE) as kit:
        for _ in range(700):
            kit.pull()
        kit.push()
        kit.run_timers()
        await kit.settle()
        assert queued(kit) == [(501,)]
        assert kit.dropped == {("audit", "rate"): 200}


async def test_disk_that_refuses_drops_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object) -> sqlite3.Connection:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(shared_database.SharedDatabase, "_open", refuse)
    async with notification_kit(tmp_path, UNREACHABLE) as kit:
        for tag in ("v1", "v2"):
            kit.push(tag)
            await kit.settle()
        assert kit.dropped == {("audit", "disk"): 2}
        assert kit.messages.count("notifications are not sent: their queue cannot be used") == 1
        refused = "the queue of notifications is not recorded: its file cannot be written"
        assert kit.messages.count(refused) == 1


async def test_damaged_queue_is_moved_aside_and_a_new_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_writer, "_RETRY_S", 0.0)
    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        kit.push("v1")
        await kit.settle()
        for path in (tmp_path / "data/notifications").glob("queue.1.db*"):
            path.write_bytes(b"no database" * 1000)
        for tag in ("v2", "v3", "v4"):
            kit.push(tag)
            await kit.settle()
        assert receiver.subjects()[-1] == "team/app:v4"
    names = sorted(path.name for path in (tmp_path / "data/notifications").iterdir())
    assert names == ["deliver.lock", "lock", "queue.1.damaged", "queue.2.db"]
