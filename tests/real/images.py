"""Images and artifacts of random bytes, built without a network.

Lives here: building contents (OCI, Docker schema 2, multi-platform indexes, artifacts with a
subject), writing them as an OCI layout, pushing them to a registry. Sizes are bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.real.wire import ask

Flavour = Literal["oci", "docker"]

_TYPES: Mapping[Flavour, Mapping[str, str]] = {
    "oci": {
        "manifest": "application/vnd.oci.image.manifest.v1+json",
        "index": "application/vnd.oci.image.index.v1+json",
        "config": "application/vnd.oci.image.config.v1+json",
        "layer": "application/vnd.oci.image.layer.v1.tar+gzip",
    },
    "docker": {
        "manifest": "application/vnd.docker.distribution.manifest.v2+json",
        "index": "application/vnd.docker.distribution.manifest.list.v2+json",
        "config": "application/vnd.docker.container.image.v1+json",
        "layer": "application/vnd.docker.image.rootfs.diff.tar.gzip",
    },
}

ACCEPT = {
    "Accept": ", ".join(types[kind] for types in _TYPES.values() for kind in ("manifest", "index"))
}
"""Headers of a raw request for a manifest. A registry hides types that are not accepted."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes, and the media type a descriptor gives them."""

    media_type: str
    data: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        """``sha256:<hex>``."""
        return "sha256:" + hashlib.sha256(self.data).hexdigest()

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    def descriptor(self, **more: Any) -> dict[str, Any]:
        """Its OCI descriptor."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size, **more}


@dataclass(frozen=True, slots=True)
class Image:
    """One manifest with its config and layers; an artifact is one too."""

    manifest: Blob
    config: Blob
    layers: tuple[Blob, ...]
    diff_ids: tuple[str, ...] = ()
    """Digests of the uncompressed layers, as a client reports them after unpacking."""
    platform: str = "linux/amd64"

    @property
    def digest(self) -> str:
        """The manifest's digest."""
        return self.manifest.digest

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """Config and layers: what is pushed as blobs."""
        return (self.config, *self.layers)

    @property
    def manifests(self) -> tuple[Blob, ...]:
        """The manifests to push, children first."""
        return (self.manifest,)

    def contents(self) -> dict[str, bytes]:
        """Everything, by digest."""
        return {item.digest: item.data for item in (*self.manifests, *self.blobs)}


@dataclass(frozen=True, slots=True)
class Index:
    """A multi-platform image."""

    manifest: Blob
    images: tuple[Image, ...]

    @property
    def digest(self) -> str:
        """The index's digest."""
        return self.manifest.digest

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """Configs and layers of every platform."""
        return tuple(blob for image in self.images for blob in image.blobs)

    @property
    def manifests(self) -> tuple[Blob, ...]:
        """The children, then the index."""
        return (*(image.manifest for image in self.images), self.manifest)

    def contents(self) -> dict[str, bytes]:
        """Everything, by digest."""
        return {item.digest: item.data for item in (*self.manifests, *self.blobs)}

    def for_platform(self, platform: str) -> Image:
        """The child for ``os/architecture``."""
        return next(image for image in self.images if image.platform == platform)


Content = Image | Index


def random_bytes(size: int, seed: int) -> bytes:
    """Incompressible bytes that a seed reproduces."""
    return random.Random(seed).randbytes(size)


def stream(size: int, seed: int, chunk: int = 1 << 20) -> Iterator[bytes]:
    """Incompressible bytes in pieces, for contents too large to hold."""
    source = random.Random(seed)
    for start in range(0, size, chunk):
        yield source.randbytes(min(chunk, size - start))


def json_bytes(value: Any) -> bytes:
    """Compact JSON, as manifests are written here."""
    return json.dumps(value, separators=(",", ":")).encode()


def _layer(size: int, seed: int, media_type: str) -> tuple[Blob, str]:
    """A layer with one file of random bytes, and its diff id."""
    body = random_bytes(size, seed)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        entry = tarfile.TarInfo(f"data-{seed}.bin")
        entry.size = len(body)
        archive.addfile(entry, io.BytesIO(body))
    diff_id = "sha256:" + hashlib.sha256(plain.getvalue()).hexdigest()
    return Blob(media_type, gzip.compress(plain.getvalue(), 1, mtime=0)), diff_id


def image(
    seed: int = 1,
    *,
    layers: tuple[int, ...] = (200_000, 50_000),
    flavour: Flavour = "oci",
    platform: str = "linux/amd64",
) -> Image:
    """An image whose layers hold files of the given sizes."""
    types = _TYPES[flavour]
    system, architecture = platform.split("/")
    made = [_layer(size, seed * 1000 + n, types["layer"]) for n, size in enumerate(layers)]
    config = Blob(
        types["config"],
        json_bytes(
            {
                "architecture": architecture,
                "os": system,
                "config": {"Cmd": ["/none"], "Labels": {"seed": str(seed)}},
                "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in made]},
            }
        ),
    )
    manifest = Blob(
        types["manifest"],
        json_bytes(
            {
                "schemaVersion": 2,
                "mediaType": types["manifest"],
                "config": config.descriptor(),
                "layers": [blob.descriptor() for blob, _ in made],
            }
        ),
    )
    return Image(
        manifest,
        config,
        tuple(blob for blob, _ in made),
        tuple(diff_id for _, diff_id in made),
        platform,
    )


def index(
    seed: int = 1,
    *,
    platforms: tuple[str, ...] = ("linux/amd64", "linux/arm64"),
    layers: tuple[int, ...] = (100_000,),
    flavour: Flavour = "oci",
) -> Index:
    """A multi-platform image; every platform has layers of its own."""
    types = _TYPES[flavour]
    images = tuple(
        image(seed * 100 + n, layers=layers, flavour=flavour, platform=platform)
        for n, platform in enumerate(platforms)
    )
    children = [
        made.manifest.descriptor(
            platform=dict(zip(("os", "architecture"), made.platform.split("/"), strict=True))
        )
        for made in images
    ]
    body = json_bytes({"schemaVersion": 2, "mediaType": types["index"], "manifests": children})
    return Index(Blob(types["index"], body), images)


def artifact(
    seed: int = 1,
    *,
    size: int = 5_000,
    artifact_type: str = "application/vnd.example.sbom.v1+json",
    subject: Content | None = None,
) -> Image:
    """An OCI 1.1 artifact: ``artifactType``, the empty config, and a ``subject`` if given."""
    config = Blob("application/vnd.oci.empty.v1+json", b"{}")
    layer = Blob("application/vnd.example.data", random_bytes(size, seed))
    body: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": _TYPES["oci"]["manifest"],
        "artifactType": artifact_type,
        "config": config.descriptor(),
        "layers": [layer.descriptor()],
        "annotations": {"org.opencontainers.image.created": "2026-01-01T00:00:00Z"},
    }
    if subject is not None:
        body["subject"] = subject.manifest.descriptor()
    return Image(Blob(_TYPES["oci"]["manifest"], json_bytes(body)), config, (layer,))


def write_layout(directory: Path, content: Content, tag: str = "latest") -> Path:
    """Write an OCI image layout with one tag; returns the directory."""
    for digest, data in content.contents().items():
        algorithm, encoded = digest.split(":")
        path = directory / "blobs" / algorithm / encoded
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (directory / "oci-layout").write_bytes(json_bytes({"imageLayoutVersion": "1.0.0"}))
    entry = content.manifest.descriptor(annotations={"org.opencontainers.image.ref.name": tag})
    (directory / "index.json").write_bytes(json_bytes({"schemaVersion": 2, "manifests": [entry]}))
    return directory


def push(
    url: str,
    repository: str,
    content: Content,
    *tags: str,
    headers: Mapping[str, str] | None = None,
    ca: str | None = None,
) -> None:
    """Push to a registry. Without a tag the manifest goes by its digest alone."""
    for blob in {blob.digest: blob for blob in content.blobs}.values():
        push_blob(url, repository, blob.digest, blob.size, iter((blob.data,)), headers, ca)
    for manifest in content.manifests:
        top = manifest is content.manifest
        for reference in tags if top and tags else (manifest.digest,):
            response = ask(
                f"{url}/v2/{repository}/manifests/{reference}",
                "PUT",
                {**(headers or {}), "Content-Type": manifest.media_type},
                manifest.data,
                ca=ca,
            )
            assert response.status == 201, response


def push_blob(
    url: str,
    repository: str,
    digest: str,
    size: int,
    data: Iterator[bytes],
    headers: Mapping[str, str] | None = None,
    ca: str | None = None,
) -> None:
    """Push one blob in one piece."""
    sent = dict(headers or {})
    begun = ask(f"{url}/v2/{repository}/blobs/uploads/", "POST", sent, b"", ca=ca)
    assert begun.status == 202, begun
    location = begun.headers["Location"]
    target = location if location.startswith("http") else url + location
    sent |= {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
    joint = "&" if "?" in target else "?"
    done = ask(f"{target}{joint}digest={digest}", "PUT", sent, data, timeout=300, ca=ca)
    assert done.status == 201, done


def push_large(
    url: str,
    repository: str,
    size: int,
    seed: int = 7,
    headers: Mapping[str, str] | None = None,
) -> str:
    """Push a blob of ``size`` random bytes without holding it; returns its digest."""
    digest = hashlib.sha256()
    for piece in stream(size, seed):
        digest.update(piece)
    name = "sha256:" + digest.hexdigest()
    push_blob(url, repository, name, size, stream(size, seed), headers)
    return name
