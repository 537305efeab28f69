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
class Stage:
    """A slow upstream with one image, and the mirror before it."""

    front: NginxFront
    mirror: Mirror
    image: images.Image

    def in_mid_pull(self) -> bool:
        """Whether some of the large layer has come, and not all of it."""
        ingest = self.mirror.data_dir / "ingest" / "sha256"
        layer = ingest / self.image.layers[0].digest.partition(":")[2]
        return layer.exists() and 1_000_000 < layer.stat().st_size < LARGE

    def killed(self, pull: Callable[..., Any]) -> None:
        """The same pull twice: the first one is killed, the second one goes on at once."""
        pull(kill_when=self.in_mid_pull)
        pull()

    def nothing_came_twice_and_nothing_is_left(self) -> None:
        """Every content was asked for once and sent once; nothing grows, no connection is open."""
        for blob in self.image.blobs:
            (fetched,) = self.front.blob_gets(blob.digest)
            assert (fetched.status, fetched.sent) == (200, blob.size)
        ingest = self.mirror.data_dir / "ingest" / "sha256"
        wait_until(lambda: not list(ingest.iterdir()), "nothing is growing", 20)
        self.front.stop()
        wait_until(lambda: open_sockets(self.mirror.pid) == 3, "no connection is open", 20)


@pytest.fixture
def stage() -> Iterator[Stage]:
    """An image whose large layer takes more than a second."""
    image = images.image(91, layers=(LARGE, 20_000))
    with ExitStack() as stack:
        registry = stack.enter_context(DockerRegistry())
        registry.push("library/app", image, "1")
        front = stack.enter_context(NginxFront(registry.url, limit_rate=2_000_000))
        yield Stage(front, stack.enter_context(Mirror({"docker.io": front.url})), image)


@pytest.mark.row("L10-killed-clients")
@pytest.mark.parametrize("daemon", [False, True], ids=["ctr", "containerd"])
def test_containerd(stage: Stage, daemon: bool) -> None:
    """``ctr`` is killed, alone or together with its daemon."""
    with Containerd() as containerd:
        containerd.use("docker.io", stage.mirror.url)
        containerd.pull(NAME, kill_when=stage.in_mid_pull)
        if daemon:
            containerd.kill()
            containerd.start()
        containerd.pull(NAME)
        assert containerd.held() == stage.image.contents()
    stage.nothing_came_twice_and_nothing_is_left()


@pytest.mark.row("L10-killed-clients")
def test_podman(stage: Stage) -> None:
    with Podman({"docker.io": f"{stage.mirror.host}/docker.io"}) as podman:
        stage.killed(lambda **how: podman.pull(NAME, **how))
        assert podman.layers(NAME) == list(stage.image.diff_ids)
    stage.nothing_came_twice_and_nothing_is_left()


@pytest.mark.row("L10-killed-clients")
def test_skopeo(stage: Stage) -> None:
    held: list[dict[str, bytes]] = []

    def copy(**how: Any) -> None:
        # a copy that is killed leaves no directory to look at
        held.append(skopeo.copy(NAME, **how))

    with Skopeo({"docker.io": f"{stage.mirror.host}/docker.io"}) as skopeo:
        stage.killed(copy)
        assert held[-1] == stage.image.contents()
    stage.nothing_came_twice_and_nothing_is_left()
