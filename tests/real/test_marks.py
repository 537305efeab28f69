"""Commands that mark images, beside a server with two workers that skopeo has filled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.real import images
from tests.real.clients import Skopeo
from tests.real.process import wait_until
from tests.real.registry import DockerRegistry
from tests.real.server import ROOT, Mirror

FOLLOWED_S = 10.0
"""Seconds in which all workers have followed a command, on a busy machine."""


def run(mirror: Mirror, *argv: str) -> list[dict[str, Any]]:
    """Run a command with the configuration of the server. Returns the rows of its JSON."""
    command = [sys.executable, "-m", "mirror", *argv, "--json", "--config", str(mirror.config_file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def manifests(mirror: Mirror, reference: str, times: int = 16) -> set[tuple[int, str]]:
    """Return (status, digest or error code) of several requests, on a connection each.

    The kernel spreads them over the workers.
    """
    found = set()
    for _ in range(times):
        got = mirror.ask(f"/v2/library/app/manifests/{reference}", headers=images.ACCEPT)
        named = got.headers.get("docker-content-digest", "")
        found.add((got.status, named or json.loads(got.body)["errors"][0]["code"]))
    return found


def follows(mirror: Mirror, reference: str, expected: tuple[int, str]) -> bool:
    """Return whether all workers soon respond like this. Alone, they do within a second."""
    wait_until(lambda: manifests(mirror, reference) == {expected}, f"{expected}", FOLLOWED_S)
    return True


def test_all_workers_follow_the_marks_of_a_filled_cache(tmp_path: Path) -> None:
    old, new = images.image(1), images.image(2)
    with (
        DockerRegistry() as registry,
        Mirror(
            {"docker.io": {"endpoints": [registry.url], "pull_policy": "Always"}}, workers=2
        ) as mirror,
    ):
        skopeo = Skopeo({"docker.io": f"{mirror.host}"})
        for image in (old, new):
            registry.push("library/app", image, "latest")
            assert image.digest in skopeo.copy("docker.io/library/app:latest")
        assert follows(mirror, "latest", (200, new.digest))

        [pinned] = run(mirror, "pin", "app")
        assert pinned["digest"] == new.digest

        # The policy is Always, but the upstream is not asked for the tag any more.
        [frozen] = run(mirror, "rollback", "app", "--to", old.digest[7:19])
        assert (frozen["digest"], frozen["missing"]) == (old.digest, 0)
        assert follows(mirror, "latest", (200, old.digest))
        assert old.digest in skopeo.copy("docker.io/library/app:latest")
        run(mirror, "unfreeze", "app")
        assert follows(mirror, "latest", (200, new.digest))

        [blocked] = run(mirror, "block", "app:latest", "--reason", "CVE-2026-1")
        assert blocked["digests"] == [new.digest]
        assert follows(mirror, "latest", (403, "DENIED"))
        assert manifests(mirror, new.digest, times=2) == {(403, "DENIED")}
        assert manifests(mirror, old.digest, times=2) == {(200, old.digest)}
        run(mirror, "unblock", "app:latest")
        assert follows(mirror, "latest", (200, new.digest))

        names = tmp_path / "used"
        names.write_text(f"docker.io/library/app@{old.digest}\n")
        [leased] = run(mirror, "in-use", "--file", str(names))
        assert (leased["digests"], leased["cached"]) == (1, 1)
        skopeo.close()
