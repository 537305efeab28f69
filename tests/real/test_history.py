"""A running server with two workers records its history, and the commands read it beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.real.process import wait_until
from tests.real.registry import DockerRegistry
from tests.real.server import ROOT, Mirror


def run(mirror: Mirror, command: str, *arguments: str) -> list[dict[str, Any]]:
    line = [sys.executable, "-m", "mirror", command, "--config", str(mirror.config_file), "--json"]
    done = subprocess.run([*line, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(text) for text in done.stdout.splitlines()]


def test_commands_tell_of_pulls_of_all_workers_while_they_run_and_after_a_stop() -> None:
    with DockerRegistry() as registry:
        digest = registry.push_large("org/big", 3 << 20)
        with Mirror({"docker.io": registry.url}, workers=2) as mirror:
            path = f"/v2/org/big/blobs/{digest}?ns=docker.io"
            for _ in range(4):
                assert mirror.download(path).size == 3 << 20
            assert mirror.ask("/v2/org/big/manifests/nope?ns=docker.io").status == 404
            name = "docker.io/org/big"
            wait_until(lambda: len(run(mirror, "explain", name)) == 5, "all requests are written")
            pulls = run(mirror, "explain", name)
            # The content is published a moment after it is complete. Until then, a request joins
            # its fetch, or follows it from the other worker.
            fetched = [
                pull for pull in pulls if pull["outcome"] == "miss" and pull["fetched_bytes"]
            ]
            (miss,) = fetched
            assert [pull["outcome"] for pull in pulls].count("negative") == 1
            assert miss["sentences"][0].startswith("Miss: ")
            assert miss["fetched_bytes"] == 3 << 20
            mirror.stop()
            (total,) = (row for row in run(mirror, "savings") if row["kind"] == "total")
            assert total["bytes_sent"] == 4 * (3 << 20)
            assert total["bytes_fetched"] == 3 << 20
            assert total["hit_ratio"] == 0.75
