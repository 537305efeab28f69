"""Events of a whole server with two worker processes, and what SIGHUP changes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import yaml

from tests.real import images
from tests.real.process import free_port, wait_until
from tests.real.server import Mirror
from tests.real.webhooks import WebhookReceiver
from tests.real.wire import ask

NAME = "registry.example"
pytestmark = pytest.mark.timeout(120)


def test_push_pull_and_delete_are_told_once_by_two_workers(tmp_path: Path) -> None:
    push_host = f"127.0.0.1:{free_port()}"
    image = images.image(1)
    with (
        WebhookReceiver(tmp_path) as receiver,
        Mirror(
            {"docker.io": "http://127.0.0.1:9"},
            hosted={"name": NAME, "listen": push_host},
            events=[receiver.target()],
            workers=2,
        ) as mirror,
    ):
        images.push(f"http://{push_host}", "team/app", image, "v1", "v2")
        assert mirror.ask(f"/v2/{NAME}/team/app/manifests/v1").status == 200
        assert mirror.ask(f"/v2/{NAME}/team/app/manifests/v1", "HEAD").status == 200
        assert ask(f"http://{push_host}/v2/team/app/manifests/v2").status == 200
        assert ask(f"http://{push_host}/v2/team/app/manifests/v1", "DELETE").status == 202
        expected = {
            *("oci-mirror.push team/app:v1", "oci-mirror.push team/app:v2"),
            *("oci-mirror.pull team/app:v1", "oci-mirror.pull team/app:v2"),
            "oci-mirror.delete team/app:v1",
        }
        wait_until(lambda: set(receiver.accepted_subjects()) >= expected, "all events have come")
        assert sorted(receiver.accepted_subjects()) == sorted(expected)
        labels = {"target": "audit", "result": "delivered"}
        assert mirror.metric_reaches(5, "oci_mirror_notifications_sent_total", **labels)
        queued = "oci_mirror_notifications_queued"
        wait_until(lambda: mirror.metric(queued, target="audit") == 0, "the queue is empty")

        mirror.settings["events"] = [receiver.target("second", events=["push"])]
        mirror.config_file.write_text(yaml.safe_dump(mirror.settings))
        os.kill(mirror.pid, signal.SIGHUP)
        read = "the configuration was read again"
        wait_until(lambda: [line["message"] for line in mirror.log()].count(read) == 2, read)
        images.push(f"http://{push_host}", "team/app", image, "v3")
        wait_until(lambda: len(receiver.accepted) == 6, "the new target has the event")
        assert receiver.accepted_subjects()[5] == "oci-mirror.push team/app:v3"
