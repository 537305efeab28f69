"""The receiver in docs/hosting.md verifies what the mirror sends, and refuses what it did not."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mirror.notifications.cloud_event import CloudEvent
from tests.real.process import free_port, wait_until
from tests.unit.notifications.kit import NAME, SECRETS, a_change, notification_kit

DOCUMENT = (Path(__file__).parents[3] / "docs/hosting.md").read_text(encoding="utf-8")


@contextmanager
def documented_receiver(directory: Path, port: int) -> Iterator[Path]:
    """Run the program of the document. Yields the file of its output."""
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    (directory / "receiver.py").write_text(program)
    (directory / "secret").write_text(f"whsec_{SECRETS[0]}\n")
    output = directory / "output"
    command = [sys.executable, "receiver.py", "secret", str(port)]
    with output.open("wb") as out, subprocess.Popen(command, cwd=directory, stdout=out) as process:

        def is_listening() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_until(is_listening, "the receiver listens")
            yield output
        finally:
            process.kill()


async def test_documented_receiver_accepts_signed_events_and_no_others(tmp_path: Path) -> None:
    port = free_port()
    target = {"url": f"http://127.0.0.1:{port}/"}
    with documented_receiver(tmp_path, port) as output:
        async with notification_kit(tmp_path, target, clock=[time.time()]) as kit:
            kit.push("v1")
            kit.push("v2", action="delete")
            await kit.settle()
            (tmp_path / "secret").write_text(f"whsec_{SECRETS[1]}\n")
            kit.push("v3")
            await kit.settle()
            assert kit.results == ["delivered", "delivered", "failed"]
    assert output.read_text().splitlines() == [
        f"oci-mirror.push {NAME} team/app:v1",
        f"oci-mirror.delete {NAME} team/app:v2",
    ]


def test_documented_event_has_the_fields_of_a_push() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)
    documented = json.loads(text)
    sent = json.loads(CloudEvent.of_change(a_change()).to_json("mirror-1"))
    assert list(documented) == list(sent)
    assert list(documented["data"]) == list(sent["data"])
    assert documented["type"] == sent["type"]
