"""Build an upstream with images and our server in front of it, for the tests of clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from tests.real import images
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror
from tests.real.tokens import TokenServer

Access = Literal["open", "basic", "tokens", "anonymous tokens"]
ACCESSES: tuple[Access, ...] = ("open", "basic", "tokens", "anonymous tokens")
USER, PASSWORD = "joe", "correct-horse"


@dataclass(slots=True)
class Deployment:
    """Two upstreams and a mirror. ``upstream`` is docker.io, ``other`` is ``two.example``.

    ``other`` is open. Both have ``library/app:1``, with different content.
    """

    upstream: DockerRegistry
    other: DockerRegistry
    tokens: TokenServer | None
    mirror: Mirror
    pushed: Mapping[str, images.Content]
    """``repository:tag`` to its content at the upstream."""
    elsewhere: images.Image
    """The image ``two.example/library/app:1``."""

    def stop_upstreams(self) -> None:
        """Stop the registries and the token service, and restart the mirror."""
        self.mirror.stop()
        self.upstream.stop()
        self.other.stop()
        if self.tokens is not None:
            self.tokens.stop()
        self.mirror.start()

    def sent(self) -> dict[str, int]:
        """Return how often the upstream sent each content, by digest."""
        return dict(Counter(asked for asked in self.upstream.gets() if asked.startswith("sha256:")))


def content() -> dict[str, images.Content]:
    """Return content of each kind by ``repository:tag``: image, index, artifact, OCI and Docker."""
    single = images.image(11, layers=(600_000, 20_000, 1))
    sbom = images.artifact(15, subject=single)
    listed = images.Blob(
        "application/vnd.oci.image.index.v1+json",
        images.json_bytes(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.index.v1+json",
                "manifests": [
                    sbom.manifest.descriptor(artifactType="application/vnd.example.sbom.v1+json")
                ],
            }
        ),
    )
    return {
        "library/app:1": single,
        "library/app:multi": images.index(12),
        "library/app:docker": images.image(13, flavour="docker"),
        "org/team/app:list": images.index(14, flavour="docker"),
        # The referrers tag schema, for an upstream without the referrers API.
        f"library/app:{single.digest.replace(':', '-')}": images.Index(listed, (sbom,)),
        "library/app:sbom": sbom,
    }


@contextmanager
def deploy(access: Access, **settings: Any) -> Iterator[Deployment]:
    """Start an upstream with this access, another one, and a mirror with these ``settings``."""
    pushed = content()
    elsewhere = images.image(21)
    with ExitStack() as stack:
        tokens: TokenServer | None = None
        upstream: dict[str, Any] = {}
        if "tokens" in access:
            tokens = stack.enter_context(
                TokenServer({USER: PASSWORD}, anonymous=access == "anonymous tokens")
            )
            upstream["token_hosts"] = [f"127.0.0.1:{tokens.port}"]
        if access in ("basic", "tokens"):
            upstream["credentials"] = {"username": USER, "password": PASSWORD}
            # Half of the deployments check a tag at each use, and serve it stale without an
            # upstream. The others serve it as fresh.
            upstream["tag_ttl"] = 0
        basic = (USER, PASSWORD) if access == "basic" else None
        registry = stack.enter_context(DockerRegistry(basic=basic, tokens=tokens))
        other = stack.enter_context(DockerRegistry())
        for name, held in pushed.items():
            repository, _, tag = name.rpartition(":")
            registry.push(repository, held, tag)
        other.push("library/app", elsewhere, "1")
        mirror = stack.enter_context(
            Mirror(
                {
                    "docker.io": {"endpoints": [registry.url], **upstream},
                    "two.example": other.url,
                },
                **settings,
            )
        )
        yield Deployment(registry, other, tokens, mirror, pushed, elsewhere)
