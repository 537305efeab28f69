"""A running server with two workers records its history, and the commands read it beside it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.real import images
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


def hit_ratios(
    registry: DockerRegistry,
    held: Sequence[images.Image],
    pulls: Sequence[int],
    max_size: int,
    pins: int,
) -> tuple[float, dict[str, float | None]]:
    """Pull in turn through a new mirror, while the first ``pins`` images are pinned.

    Returns the hit ratio, and those that are predicted for other sizes (None: not reliable).
    """
    settings = {"endpoints": [registry.url], "pull_policy": "IfNotPresent"}
    with Mirror({"docker.io": settings}, storage={"max_size": max_size}) as mirror:

        def pull(number: int) -> None:
            image = held[number]
            name = f"/v2/library/app/manifests/v{number}"
            assert mirror.ask(name, headers=images.ACCEPT).status == 200
            for blob in image.blobs:
                assert mirror.ask(f"/v2/library/app/blobs/{blob.digest}").status == 200

        for number in range(pins):
            pull(number)
            run(mirror, "pin", f"app:v{number}")
        for number in pulls:
            pull(number)
            time.sleep(0.35)
        time.sleep(2)  # The last requests are written.
        rows = run(mirror, "savings")
    (total,) = (row["hit_ratio"] for row in rows if row["kind"] == "total")
    disks = [row for row in rows if row["kind"] == "disk"]
    return total, {row["name"]: row["hit_ratio"] if row["is_reliable"] else None for row in disks}


@pytest.mark.long(100)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("pins", [0, 4])
def test_predicted_hit_ratios_are_those_of_servers_with_these_disks(pins: int) -> None:
    chance = random.Random(1)
    held = [
        images.image(n, layers=(chance.choice([40_000, 80_000, 150_000, 300_000]), 20_000))
        for n in range(40)
    ]
    size = sum(len(body) for image in held for body in image.contents().values())
    order = chance.sample(range(40), 40)
    pulls = [order[min(39, int(chance.paretovariate(0.7)) - 1)] for _ in range(200)]
    with DockerRegistry() as registry:
        for number, image in enumerate(held):
            registry.push("library/app", image, f"v{number}")
        factors = {"0.5x": 0.5, "1x": 1.0, "2x": 2.0}
        # Beside each other: they wait most of the time, since the prediction needs some.
        with ThreadPoolExecutor(len(factors)) as threads:
            servers = threads.map(
                lambda factor: hit_ratios(registry, held, pulls, int(size * 0.4 * factor), pins),
                factors.values(),
            )
            found = dict(zip(factors, servers, strict=True))
    predicted = found["1x"][1]
    actual = {name: ratio for name, (ratio, _) in found.items()}
    assert actual["2x"] - actual["0.5x"] > 0.1  # The disk matters in this trace.
    for name, ratio in actual.items():
        assert predicted[name] == pytest.approx(ratio, abs=0.03), (name, predicted, actual)
