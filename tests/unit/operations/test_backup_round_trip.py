"""After a backup and a restore, every answer of the hosted repositories is the same as before."""

from __future__ import annotations

import asyncio
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mirror.hosted.collection import collect
from mirror.hosted.name_rows import USE_STEP_S
from mirror.observability.hosted_events import Actor
from mirror.oci.descriptor import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from mirror.oci.errors import MirrorError
from mirror.oci.reference import Digest, Tag
from mirror.operations.restore import restore_backup
from mirror.operations.write_backup import write_backup
from tests.robustness.kit import every_file_hashes_to_its_name
from tests.unit.hosted.kit import (
    ANYBODY,
    CONFIG,
    EMPTY_TYPE,
    HostedKit,
    deletion_of,
    descriptor,
    hosted_kit,
    index_of,
    manifest_of,
)

REPOSITORIES = ["a", "team/app", "team/app/sub"]
BLOBS = [b"one", b"two", b"three"]
TAGS = ["latest", "v1", "v2"]

KINDS = ["image", "image", "untyped", "index", "index", "signature", "as-layer", "copy", "blob"]
KINDS += ["delete", "delete-tag", "delete-blob", "collect", "pull"]

small = st.integers(0, 7)
steps = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.sampled_from(REPOSITORIES),
        small,
        small,
        small,
    ),
    min_size=4,
    max_size=24,
)


class Pusher:
    """Makes random changes, as clients and the server do, and records all that was ever named."""

    def __init__(self, kit: HostedKit) -> None:
        self.kit = kit
        self.bodies: dict[bytes, str] = {manifest_of(b"never pushed"): OCI_MANIFEST}
        """Body of a manifest -> the type as which it is pushed."""

    async def run(self, kind: str, repository: str, one: int, two: int, three: int) -> None:
        """Make one change. It may be refused, as a client's is."""
        self.kit.clock[0] += 1000
        with suppress(MirrorError):
            await self._run(kind, repository, one, two, three)

    def _body(self, number: int) -> bytes:
        return list(self.bodies)[number % len(self.bodies)]

    async def _run(self, kind: str, repository: str, one: int, two: int, three: int) -> None:
        service = self.kit.service
        data, body = BLOBS[one % len(BLOBS)], self._body(two)
        more = {"annotations": {"n": f"é{two}"}} if two % 2 else {}
        if kind == "image":
            await self._push(repository, manifest_of(data, **more), OCI_MANIFEST, three, data)
        elif kind == "untyped":  # Its index may state another type.
            document = json.loads(manifest_of(data))
            del document["mediaType"]
            media_type = [OCI_MANIFEST, DOCKER_MANIFEST][two % 2]
            await self._push(repository, json.dumps(document).encode(), media_type, three, data)
        elif kind == "index":  # Also of indexes, of what is missing, and with a subject.
            entry = descriptor(body, [self.bodies[body], DOCKER_MANIFEST][one % 2])
            manifests = [entry, descriptor(self._body(one), self.bodies[self._body(one)])]
            index = index_of(manifests=manifests, **more)
            await self._push(repository, index, OCI_INDEX, three)
        elif kind == "signature":
            subject = descriptor(body, self.bodies[body])
            signature = manifest_of(data, subject=subject, artifactType=EMPTY_TYPE)
            await self._push(repository, signature, OCI_MANIFEST, three, data)
        elif kind == "as-layer":
            await self._push(repository, manifest_of(body), OCI_MANIFEST, three, body)
        elif kind == "copy":  # Shared with another repository.
            await self._push(repository, body, self.bodies[body], three)
        elif kind == "blob":
            await self.kit.push_blob(data, repository)
        elif kind == "delete":
            await service.manifests.delete(repository, Digest.of(body), actor=ANYBODY)
        elif kind == "delete-tag":
            await service.manifests.delete(repository, Tag(TAGS[one % len(TAGS)]), actor=ANYBODY)
        elif kind == "delete-blob":
            await service.blobs.delete(
                repository, Digest.of([*BLOBS, CONFIG, body][one % 5]), actor=ANYBODY
            )
        elif kind == "collect":
            grace = USE_STEP_S * one
            await collect(
                self.kit.database,
                self.kit.store.layout,
                self.kit.clock[0],
                grace,
                deletion_of,
                self.kit.is_protected,
            )
        elif kind == "pull":
            await service.manifests.mark_used(repository, Digest.of(body))

    async def _push(
        self, repository: str, body: bytes, media_type: str, number: int, *blobs: bytes
    ) -> None:
        self.bodies[body] = media_type
        for data in (CONFIG, *blobs) if blobs else ():
            await self.kit.push_blob(data, repository)
        algorithm = "sha512" if number == 7 else "sha256"
        tag = TAGS[number] if number < len(TAGS) else None
        reference = Digest.of(body, algorithm) if tag is None else Tag(tag)
        user = Actor(["", "ann"][number % 2])
        await self.kit.service.manifests.put(repository, reference, (), body, media_type, user)


async def answers_of(kit: HostedKit, bodies: list[bytes]) -> dict[Any, Any]:
    """Return every answer that clients can get, and all rows."""
    service = kit.service
    found: dict[Any, Any] = {"_catalog": await service.lists.repositories(None, "")}
    digests = [Digest.of(body, name) for body in bodies for name in ("sha256", "sha512")]
    blobs = [Digest.of(data) for data in (*BLOBS, CONFIG)]

    async def ask(key: Any, question: Any) -> None:
        try:
            found[key] = await question
        except MirrorError as error:
            found[key] = type(error), error.message

    for repository in REPOSITORIES:
        await ask(("tags", repository), service.lists.tags(repository, None, None))
        for reference in (*digests, *map(Tag, TAGS)):
            await ask(
                ("manifest", repository, reference), read_manifest(kit, repository, reference)
            )
        for digest in (*blobs, *digests):
            await ask(("blob", repository, digest), read_blob(kit, repository, digest))
        for digest in digests:
            await ask(
                ("referrers", repository, digest), service.lists.referrers(repository, digest, None)
            )
    found["usage"] = await kit.usage()

    def rows(connection: Any) -> dict[str, Any]:
        tables = ["tags", "manifests", "parts", "contents", "repositories", "totals"]
        columns = {**dict.fromkeys(tables, "*"), "blobs": "repository, digest, size"}
        return {
            table: connection.execute(f"SELECT {what} FROM {table} ORDER BY 1, 2").fetchall()
            for table, what in columns.items()
        }

    return {**found, **await kit.database.read(rows)}


async def read_manifest(kit: HostedKit, repository: str, reference: Any) -> Any:
    row = await kit.service.manifests.find(repository, reference)
    return row, await kit.service.manifests.read(row)


async def read_blob(kit: HostedKit, repository: str, digest: Digest) -> bytes:
    return await kit.read_blob(digest, repository)


async def round_trip(first: list[Any], second: list[Any], target: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        path = root / target
        async with hosted_kit(root / "data", sparse_indexes=True) as kit:
            pusher = Pusher(kit)
            for step in first:
                await pusher.run(*step)
            write_backup(kit.store.layout, "registry.example", path)
            for step in second:
                await pusher.run(*step)
            report = write_backup(kit.store.layout, "registry.example", path)
            assert report.missing == []
            bodies = list(pusher.bodies)
            before = await answers_of(kit, bodies)
        async with hosted_kit(root / "new", sparse_indexes=True) as kit:
            for _ in range(2):
                restored = await restore_backup(
                    kit.store, kit.service.settings, path, may_replace=False, actor=ANYBODY
                )
                assert restored.problems == []
                assert restored.images == report.images
                assert await answers_of(kit, bodies) == before
        if target == "backup":
            every_file_hashes_to_its_name(path)
            for entry in json.loads((path / "index.json").read_text())["manifests"]:
                digest = Digest.parse(entry["digest"])
                file = path / "blobs" / digest.algorithm / digest.hex
                assert file.stat().st_size == entry["size"]


def check(first: list[Any], second: list[Any], target: str) -> None:
    asyncio.run(round_trip(first, second, target))


NO_TAG = 4
LOST_LAYER = [("image", "a", 0, 0, NO_TAG), ("index", "a", 1, 1, 0), ("delete-blob", "a", 0, 0, 0)]
OTHER_TYPE = [("untyped", "a", 0, 0, NO_TAG), ("index", "a", 1, 1, 0)]
ALSO_A_LAYER = [("image", "a", 0, 0, NO_TAG), ("as-layer", "a", 0, 1, 0)]
DELETED_IN_ONE = [
    *[("image", "a", 0, 0, NO_TAG), ("image", "team/app", 0, 0, 0)],
    *[("index", "a", 1, 1, 0), ("delete", "a", 0, 1, 0)],
]
ORPHAN = [("image", "a", 0, 0, 0), ("signature", "a", 1, 1, NO_TAG), ("delete", "a", 0, 1, 0)]

given_steps = given(first=steps, second=steps, target=st.sampled_from(["backup", "backup.tar"]))
relaxed = [HealthCheck.too_slow, HealthCheck.data_too_large]


@given_steps
@example(LOST_LAYER, [], "backup")
@example(OTHER_TYPE, [], "backup.tar")
@example(ALSO_A_LAYER, [], "backup")
@example(DELETED_IN_ONE, [], "backup")
@example([], ORPHAN, "backup")
@settings(max_examples=2, deadline=None, suppress_health_check=relaxed)
def test_every_answer_is_the_same_after_backup_and_restore(
    first: list[Any], second: list[Any], target: str
) -> None:
    check(first, second, target)


@pytest.mark.long
@pytest.mark.timeout(1200)
@given_steps
@settings(max_examples=150, deadline=None, suppress_health_check=relaxed)
def test_every_answer_is_the_same_after_many_backups_and_restores(
    first: list[Any], second: list[Any], target: str
) -> None:
    check(first, second, target)
