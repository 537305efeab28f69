"""Row C2: SIGKILL of the server while a job of the admin API runs. The job is started again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml

from tests.real import images
from tests.real.process import free_port, wait_until
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror
from tests.robustness.kit import every_file_hashes_to_its_name
from tests.robustness.test_killed_cleaning import (
    Filled,
    check_done,
    check_nothing_lost,
    copy,
    filled,
)

__all__ = ["filled"]  # A fixture.

NAME = "docker.io/library/app"
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "rm": ("remove", {"images": [f"{NAME}:1.0.0"]}),
    "prune": ("prune", {"older_than": 0, "keep_last": 1}),
    "gc": ("gc", {}),
    "verify": ("verify", {"repair": True}),
}
DELAYS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)
"""Seconds from the start of a job to the kill. Its process needs about 0.5 s."""
WARM_RATE = 256 * 1024
"""Bytes per second of the upstream, so that a warm job takes some seconds."""


def ask(port: int, path: str, body: Any = None) -> Any:
    """Send a request to the admin listener, and return the JSON of its response."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(f"http://127.0.0.1:{port}/admin/v1{path}", data, headers)) as response:
        return json.load(response)


def start_job(port: int, kind: str, arguments: dict[str, Any]) -> str:
    """Start a job. Returns its id."""
    return str(ask(port, f"/jobs/{kind}", arguments)["id"])


def wait_for_end(port: int, job: str) -> dict[str, Any]:
    """Wait until a job has ended, and return it."""
    found: dict[str, Any] = {}

    def has_ended() -> bool:
        found.update(ask(port, f"/jobs/{job}"))
        return found["state"] not in ("waiting", "running")

    wait_until(has_ended, "the job ends", 60)
    return found


def kill_and_repeat(filled: Filled, root: Path, command: str, delay: float) -> None:
    """Kill the server in the middle of a job, start both again, and check the result."""
    data, config = copy(filled, root / f"{command}-{delay}", command)
    kind, arguments = JOBS[command]
    port = free_port()
    upstreams = yaml.safe_load(config.read_text())["upstreams"]
    with Mirror(
        upstreams, data_dir=data, admin={"listen": f"127.0.0.1:{port}"}, workers=1
    ) as mirror:
        start_job(port, kind, arguments)
        time.sleep(delay)
        mirror.kill()
        check_nothing_lost(filled, data, command)
        mirror.start()
        done = wait_for_end(port, start_job(port, kind, arguments))
        is_gone = command == "rm" and "is not in the cache" in str(done["error"])
        assert done["state"] == "done" or is_gone, done
        check_nothing_lost(filled, data, command)
        check_done(filled, data, command)


@pytest.mark.row("C2-sigkill-of-a-command")
@pytest.mark.timeout(120)
def test_warm_job_of_a_killed_server_is_completed_by_the_next(
    tmp_path: Path, tried: Callable[[int], None]
) -> None:
    image = images.image(91, layers=(900_000, 20_000))
    port = free_port()
    with DockerRegistry() as registry, NginxFront(registry.url, limit_rate=WARM_RATE) as front:
        registry.push("library/app", image, "v1")
        admin = {"listen": f"127.0.0.1:{port}"}
        with Mirror({"docker.io": front.url}, data_dir=tmp_path, admin=admin) as mirror:
            arguments = {"images": [f"{NAME}:v1"]}
            job = start_job(port, "warm", arguments)
            size = len(image.layers[0].data)

            def is_in_the_middle() -> bool:
                return 300_000 < int(ask(port, f"/jobs/{job}")["progress"]["done"]) < size

            wait_until(is_in_the_middle, "bytes arrive", 30)
            mirror.kill()
            every_file_hashes_to_its_name(tmp_path)
            mirror.start()
            done = wait_for_end(port, start_job(port, "warm", arguments))
    assert (done["state"], done["result"]["failed_images"]) == ("done", 0), done
    every_file_hashes_to_its_name(tmp_path)
    for content in (image.manifest, *image.blobs):
        assert mirror.content(content.digest).exists()
    tried(1)


@pytest.mark.row("C2-sigkill-of-a-command")
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", JOBS)
def test_job_of_a_killed_server_loses_nothing_and_is_completed_by_the_next(
    filled: Filled, tmp_path: Path, command: str, tried: Callable[[int], None]
) -> None:
    for delay in DELAYS:
        kill_and_repeat(filled, tmp_path, command, delay)
        tried(1)
