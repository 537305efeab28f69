"""Row L10: real clients are killed in mid-pull and started again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from tests.real import images
from tests.real.clients import Containerd, Podman, Skopeo
from tests.real.process import wait_until
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import Mirror
from tests.robustness.kit import open_sockets

LARGE = 4_500_000
NAME = "docker.io/library/app:1"


@dataclass(slots=True)
class SlowDeployment:
    """A slow upstream with one image, and the mirror in front of it."""

    front: NginxFront
    mirror: Mirror
    image: images.Image

    def in_mid_pull(self) -> bool:
        """True if the mirror has a part of the large layer, and not all of it."""
        ingest = self.mirror.data_dir / "ingest" / "sha256"
        layer = ingest / self.image.layers[0].digest.partition(":")[2]
        return layer.exists() and 1_000_000 < layer.stat().st_size < LARGE

    def kill_and_pull_again(self, pull: Callable[..., Any]) -> None:
        """Kill a pull in the middle, and make the same pull again at once."""
        pull(kill_when=self.in_mid_pull)
        pull()

    def assert_one_fetch_and_nothing_left(self) -> None:
        """Assert one upstream request for each content, no ingest and no open connection."""
        for blob in self.image.blobs:
            (fetched,) = self.front.blob_gets(blob.digest)
            assert (fetched.status, fetched.sent) == (200, blob.size)
        ingest = self.mirror.data_dir / "ingest" / "sha256"
        wait_until(lambda: not list(ingest.iterdir()), "nothing is growing", 20)
        self.front.stop()
        wait_until(lambda: open_sockets(self.mirror.pid) == 3, "no connection is open", 20)


@pytest.fixture
def deployment() -> Iterator[SlowDeployment]:
    """Build a deployment in which the large layer of an image takes more than a second."""
    image = images.image(91, layers=(LARGE, 20_000))
    with ExitStack() as stack:
        registry = stack.enter_context(DockerRegistry())
        registry.push("library/app", image, "1")
        front = stack.enter_context(NginxFront(registry.url, limit_rate=2_000_000))
        yield SlowDeployment(front, stack.enter_context(Mirror({"docker.io": front.url})), image)


@pytest.mark.row("L10-killed-clients")
@pytest.mark.parametrize("daemon", [False, True], ids=["ctr", "containerd"])
def test_containerd_killed_in_mid_pull_pulls_again_without_a_second_fetch(
    deployment: SlowDeployment, daemon: bool
) -> None:
    """``ctr`` is killed, alone or together with its daemon."""
    with Containerd() as containerd:
        containerd.use("docker.io", deployment.mirror.url)
        containerd.pull(NAME, kill_when=deployment.in_mid_pull)
        if daemon:
            containerd.kill()
            containerd.start()
        containerd.pull(NAME)
        assert containerd.held() == deployment.image.contents()
    deployment.assert_one_fetch_and_nothing_left()


@pytest.mark.row("L10-killed-clients")
def test_podman_killed_in_mid_pull_pulls_again_without_a_second_fetch(
    deployment: SlowDeployment,
) -> None:
    with Podman({"docker.io": f"{deployment.mirror.host}/docker.io"}) as podman:
        deployment.kill_and_pull_again(lambda **how: podman.pull(NAME, **how))
        assert podman.layers(NAME) == list(deployment.image.diff_ids)
    deployment.assert_one_fetch_and_nothing_left()


@pytest.mark.row("L10-killed-clients")
def test_skopeo_killed_in_mid_pull_pulls_again_without_a_second_fetch(
    deployment: SlowDeployment,
) -> None:
    held: list[dict[str, bytes]] = []

    def copy(**how: Any) -> None:
        # a killed copy leaves no directory to compare
        held.append(skopeo.copy(NAME, **how))

    with Skopeo({"docker.io": f"{deployment.mirror.host}/docker.io"}) as skopeo:
        deployment.kill_and_pull_again(copy)
        assert held[-1] == deployment.image.contents()
    deployment.assert_one_fetch_and_nothing_left()
