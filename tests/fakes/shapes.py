"""Odd images as registries really serve them.

Tests compare a direct pull of each with a pull through the mirror. ``shapes.json`` has those that
users have reported, byte for byte. The others are built here: at least three more for each row of
the robustness table.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirror.oci.descriptor import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    MANIFEST_TYPES,
    OCI_INDEX,
    OCI_MANIFEST,
)
from mirror.oci.reference import Digest
from tests.fakes.registry import FakeRegistry

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar.gzip"
FOREIGN_TYPE = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
CACHE_CONFIG_TYPE = "application/vnd.buildkit.cacheconfig.v0"

CONFIG = b'{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}'
LAYER = b"a layer " * 500
NOWHERE = b"no registry has this"


@dataclass(frozen=True)
class ShapedManifest:
    """One manifest of a shape."""

    body: bytes
    content_type: str | None
    tag: str | None = "v1"
    digest: Digest | None = None
    """The digest that its registry names. None: that of ``body``."""

    @property
    def name(self) -> Digest:
        """The digest under which its registry has it."""
        return self.digest or Digest.of(self.body)


@dataclass(frozen=True)
class Shape:
    """One image. ``row``: the row of the robustness table that it belongs to."""

    name: str
    row: str
    manifests: tuple[ShapedManifest, ...]
    blobs: tuple[bytes, ...] = (CONFIG, LAYER)

    @property
    def repository(self) -> str:
        return f"wild/{self.name}"

    def add_to(self, fake: FakeRegistry) -> None:
        """Let a registry serve it."""
        for blob in self.blobs:
            fake.add_blob(blob, self.repository)
        for manifest in self.manifests:
            stored = manifest.body, manifest.content_type or ""
            fake.manifests[self.repository, str(manifest.name)] = stored
            if manifest.tag is not None:
                fake.tags[self.repository, manifest.tag] = str(manifest.name)

    def parts(self) -> list[tuple[str, str]]:
        """Return (``blobs`` or ``manifests``, digest) of each part, as clients request it."""
        return [part for manifest in self.manifests for part in _parts_of(manifest.body)]


def _parts_of(body: bytes) -> Iterator[tuple[str, str]]:
    try:
        document = json.loads(body.decode("latin-1").removeprefix("\xef\xbb\xbf"))
    except ValueError:
        return
    if not isinstance(document, dict):
        return
    for field in ("config", "layers", "manifests", "fsLayers"):
        entries = document.get(field)
        for found in entries if isinstance(entries, list) else [entries]:
            if isinstance(found, dict) and ("digest" in found or "blobSum" in found):
                is_manifest = field == "manifests" and found["mediaType"] in MANIFEST_TYPES
                digest = found.get("digest") or found["blobSum"]
                yield ("manifests" if is_manifest else "blobs"), digest


# --- building -------------------------------------------------------------------------------------


def entry(data: bytes, media_type: str | None, **more: object) -> dict[str, Any]:
    """Make a descriptor. A field that is None is left out."""
    fields = {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data), **more}
    return {name: value for name, value in fields.items() if value is not None}


def image(**more: object) -> dict[str, Any]:
    """Make an image without a ``mediaType``."""
    return {
        "schemaVersion": 2,
        "config": entry(CONFIG, CONFIG_TYPE),
        "layers": [entry(LAYER, LAYER_TYPE)],
        **more,
    }


def text(document: object) -> bytes:
    return json.dumps(document, indent=3).encode()


def one(name: str, row: str, body: bytes, content_type: str | None, *blobs: bytes) -> Shape:
    """Make a shape with one manifest."""
    return Shape(name, row, (ShapedManifest(body, content_type),), blobs or (CONFIG, LAYER))


def raw_image(end: bytes) -> bytes:
    """Make an image whose JSON object ends with ``end``."""
    return text(image(mediaType=OCI_MANIFEST))[:-2] + b"," + end + b"}"


def encoded(data: bytes) -> str:
    """Encode as base64url without padding (RFC 7515)."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def signed(payload: bytes, **protected: object) -> bytes:
    """Add a signature to a manifest of schema 1, as libtrust does. The signature itself is fake."""
    length = payload.rindex(b"\n")
    fields = {"formatLength": length, "formatTail": encoded(payload[length:]), **protected}
    signature = {
        "header": {"alg": "ES256"},
        "signature": "AAAA",
        "protected": encoded(json.dumps(fields).encode()),
    }
    return payload[:length] + b',\n   "signatures": [' + json.dumps(signature).encode() + b"]\n}"


SCHEMA1 = text(
    {
        "schemaVersion": 1,
        "name": "wild/schema1",
        "tag": "v1",
        "architecture": "amd64",
        "fsLayers": [{"blobSum": str(Digest.of(LAYER))}],
        "history": [{"v1Compatibility": "{}"}],
    }
)

# --- the shapes -----------------------------------------------------------------------------------


def _reported() -> Iterator[Shape]:
    for raw in json.loads((Path(__file__).parent / "shapes.json").read_text()):
        manifests = tuple(
            ShapedManifest(m["body"].encode(), m["content_type"], m["tag"])
            for m in raw["manifests"]
        )
        blobs = tuple(base64.b64decode(blob) for blob in raw["blobs_base64"])
        yield Shape(raw["name"], raw["row"], manifests, blobs)


def _indexes_of_blobs() -> Iterator[Shape]:
    cache = [entry(LAYER, DOCKER_LAYER_TYPE), entry(CONFIG, CACHE_CONFIG_TYPE)]
    document = {"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": cache}
    yield one("buildkit-cache-docker", "FB3", text(document), DOCKER_LIST)
    octets = [entry(LAYER, "application/octet-stream"), entry(CONFIG, "text/spdx")]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": octets}
    yield one("index-of-octet-streams", "FB3", text(document), OCI_INDEX)
    child = text(image(mediaType=OCI_MANIFEST))
    mixed = [entry(child, OCI_MANIFEST), entry(LAYER, LAYER_TYPE), entry(CONFIG, "text/plain")]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": mixed}
    index = ShapedManifest(text(document), OCI_INDEX)
    yield Shape("index-of-both", "FB3", (ShapedManifest(child, OCI_MANIFEST, None), index))


def _generic_types() -> Iterator[Shape]:
    body = text(image(mediaType=DOCKER_MANIFEST))
    for number, generic in enumerate(
        ("text/html; charset=utf-8", "application/json", "binary/octet-stream", "not a type")
    ):
        yield one(f"ctype-generic-{number}", "FB4", body, generic)
    yield one("ctype-unnamed", "FB4", text(image()), "text/plain")
    yield one("ctype-page-inside", "FB4", text(image(mediaType="text/html")), "text/html")
    child = ShapedManifest(text(image()), "text/plain", None)
    entries = [entry(child.body, OCI_MANIFEST)]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    index = ShapedManifest(text(document), "text/plain")
    yield Shape("ctype-of-an-index", "FB4", (child, index))


def _odd_manifests() -> Iterator[Shape]:
    odd = {
        "layers-twice": raw_image(b'"layers": []'),
        "not-a-number": raw_image(b'"x": NaN'),
        "long-number": raw_image(b'"x": ' + b"9" * 5000),
        "lone-surrogate": raw_image(b'"x": "\\ud800"'),
        "latin-1": raw_image(b'"x": "\xe9"'),
        "byte-order-mark": b"\xef\xbb\xbf" + text(image()),
        "wrong-case": raw_image(b'"Layers": []'),
        "both-kinds": text(image(manifests=[entry(LAYER, LAYER_TYPE)])),
        "negative-size": text(image(layers=[entry(LAYER, LAYER_TYPE, size=-1)])),
        "size-as-text": text(image(layers=[entry(LAYER, LAYER_TYPE, size="4000")])),
        "wrong-size": text(image(layers=[entry(LAYER, LAYER_TYPE, size=7)])),
        "type-as-number": text(image(layers=[entry(LAYER, None, mediaType=5)])),
        "config-as-list": text(image(config=[entry(CONFIG, CONFIG_TYPE)])),
        "layers-as-text": text(image(layers="none")),
        "subject-as-text": text(image(subject="none")),
        "another-type-inside": text(image(mediaType=OCI_INDEX)),
        "nothing-known": b'{"hello": "world"}',
        "spaces-around": b"\n\n  " + text(image()) + b"\n \n",
    }
    for name, body in odd.items():
        yield one(name, "FB5", body, OCI_MANIFEST)
    for algorithm, digits in (("md5", 32), ("sha384", 96), ("sha512+b64u", 20)):
        unknown = {"mediaType": LAYER_TYPE, "digest": f"{algorithm}:{'a' * digits}", "size": 5}
        document = image(layers=[entry(LAYER, LAYER_TYPE), unknown])
        yield one(f"digest-of-{algorithm[:6]}", "FB5", text(document), OCI_MANIFEST)
    yield one("binary-artifact", "FB5", b"\x7fELF\x00", "application/vnd.acme.elf")
    yield one("list-artifact", "FB5", b"[1, 2]", "application/vnd.acme.list+json")


def _schema1() -> Iterator[Shape]:
    digest = Digest.of(SCHEMA1)
    body = signed(SCHEMA1)
    for name, content_type in (
        ("signed", DOCKER_SCHEMA1_SIGNED),
        ("plain-type", DOCKER_SCHEMA1),
        ("json-type", "application/json; charset=utf-8"),
        ("no-type", None),
    ):
        manifest = ShapedManifest(body, content_type, digest=digest)
        yield Shape(f"schema1-{name}", "FB8", (manifest,))
    yield one("schema1-unsigned", "FB8", SCHEMA1, DOCKER_SCHEMA1)
    long = ShapedManifest(body, DOCKER_SCHEMA1_SIGNED, digest=Digest.of(SCHEMA1, "sha512"))
    yield Shape("schema1-sha512", "FB8", (long,))


def _missing_parts() -> Iterator[Shape]:
    urls = ["https://example.com/layer"]
    foreign = entry(NOWHERE, FOREIGN_TYPE, urls=urls)
    body = text(image(mediaType=DOCKER_MANIFEST, layers=[foreign, entry(LAYER, DOCKER_LAYER_TYPE)]))
    yield one("foreign-first", "FB12", body, DOCKER_MANIFEST)
    kept_back = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
    body = text(image(layers=[entry(NOWHERE, kept_back, urls=urls)]))
    yield one("nondistributable", "FB12", body, OCI_MANIFEST)
    yield one("no-config", "FB12", text(image(config=entry(NOWHERE, CONFIG_TYPE))), OCI_MANIFEST)
    absent = text(image(annotations={"which": "absent"}))
    child = text(image(mediaType=OCI_MANIFEST))
    entries = [entry(child, OCI_MANIFEST), entry(absent, OCI_MANIFEST)]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    index = ShapedManifest(text(document), OCI_INDEX)
    yield Shape("sparse-index", "FB12", (ShapedManifest(child, OCI_MANIFEST, None), index))


SHAPES = (
    *_reported(),
    *_indexes_of_blobs(),
    *_generic_types(),
    *_odd_manifests(),
    *_schema1(),
    *_missing_parts(),
)
