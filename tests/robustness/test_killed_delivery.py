"""Row C16: servers that are killed while they queue and send notifications."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.extent import Extent
from tests.real import images
from tests.real.process import free_port, wait_until
from tests.real.server import Mirror
from tests.real.webhooks import WebhookReceiver

NAME = "registry.example"


def queued_subjects(data: Path) -> set[str]:
    """Return the subjects of the notifications that wait. The server may run."""
    found: set[str] = set()
    for path in (data / "notifications").glob("queue.*.db"):
        connection = sqlite3.connect(path, timeout=10)
        try:
            rows = connection.execute("SELECT json_extract(body, '$.subject') FROM notifications")
            found |= {row[0] for row in rows}
        finally:
            connection.close()
    return found


def kill_among_deliveries(tmp_path: Path, kills: int, seed: int) -> None:
    """Push, kill and start a server again and again. Each queued push reaches the receiver."""
    choose = random.Random(seed)
    push_host = f"127.0.0.1:{free_port()}"
    image = images.image(1)

    def may_fail(event: dict[str, Any]) -> int:
        return choose.choice([204, 204, 503])

    with (
        WebhookReceiver(tmp_path) as receiver,
        Mirror(
            {"docker.io": "http://127.0.0.1:9"},
            hosted={"name": NAME, "listen": push_host},
            events=[receiver.target()],
            workers=2,
        ) as mirror,
    ):

        def has_event(subject: str) -> bool:
            return any(event["subject"] == subject for event in list(receiver.accepted))

        receiver.status_of = may_fail
        tags: list[str] = []
        for number in range(kills):
            new = [f"t{number}.{n}" for n in range(choose.randint(1, 8))]
            tags += new
            images.push(f"http://{push_host}", "team/app", image, *new)
            last = f"team/app:{new[-1]}"
            wait_until(
                lambda last=last: last in queued_subjects(mirror.data_dir) or has_event(last),  # type: ignore[misc] # mypy cannot infer it
                "the push is queued",
            )
            mirror.kill()
            mirror.start()
        receiver.status_of = lambda event: 204
        wait_until(lambda: all(has_event(f"team/app:{tag}") for tag in tags), "all came", 60)
        ids = {}
        for event in receiver.accepted:
            assert ids.setdefault(event["subject"], event["id"]) == event["id"]
        # One event may be sent twice for each kill.
        assert len(receiver.accepted) <= len(tags) + kills
        wait_until(lambda: not queued_subjects(mirror.data_dir), "the queue is empty")


@pytest.mark.row("C16-sigkill-of-a-delivery")
@pytest.mark.timeout(120)
def test_sigkill_among_deliveries_loses_no_queued_push(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    kill_among_deliveries(tmp_path, 1, 1)
    tried(1)


@pytest.mark.row("C16-sigkill-of-a-delivery")
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
def test_many_sigkills_among_deliveries_lose_no_queued_push(
    tmp_path: Path, seed: int, extent: Extent
) -> None:
    kills = extent.of(12)
    kill_among_deliveries(tmp_path, kills, seed)
    extent.tried(kills)
