"""Backup and restore: what comes back, beside pushes, from damaged and foreign backups."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mirror.hosted.collection import collect
from mirror.hosted.snapshot import drop_stale_snapshot, opened_snapshot
from mirror.observability.hosted_events import Actor
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.errors import BlobUnknown, QuotaExceeded, StorageUnavailable
from mirror.oci.reference import Digest, Tag
from mirror.operations.restore import RestoreReport, restore_backup
from mirror.operations.restored_content import RestoredContent
from mirror.operations.write_backup import BackupReport, write_backup
from mirror.store import disk
from mirror.threads import run_in_thread
from tests.robustness.kit import every_file_hashes_to_its_name
from tests.unit.hosted.kit import (
    ANYBODY,
    CONFIG,
    NOW,
    HostedKit,
    deletion_of,
    descriptor,
    hosted_kit,
    index_of,
    manifest_of,
)
from tests.unit.store.kit import random_bytes

NAME = "registry.example"
LAYER = random_bytes(3_000_000, 1)
TARGETS = ["backup", "backup.tar"]


async def push_all(kit: HostedKit) -> None:
    """Push images of every form: by tag and digest, an index, a signature, sha512."""
    await kit.push_image(LAYER, repository="team/app", tag="v1")
    await kit.push_image(b"two", repository="team/app", tag="v2")
    await kit.push_image(b"by digest", repository="team/app", tag=None)
    await kit.push_image(b"two", repository="other", tag="v2")
    await kit.push_image(b"child", repository="team/app", tag=None)
    index = index_of(manifest_of(b"child"))
    await kit.service.manifests.put("team/app", Tag("index"), (), index, OCI_INDEX, actor=ANYBODY)
    await kit.push_image(
        b"signature",
        repository="team/app",
        tag=None,
        subject=descriptor(manifest_of(LAYER), OCI_MANIFEST),
    )
    wide = manifest_of(LAYER)
    await kit.service.manifests.put(
        "team/app", Digest.of(wide, "sha512"), (), wide, OCI_MANIFEST, actor=ANYBODY
    )


async def state_of(kit: HostedKit) -> dict[str, Any]:
    """Return all rows that a backup has to bring back."""

    def read(connection: Any) -> dict[str, Any]:
        return {
            table: connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2").fetchall()
            for table, columns in (
                ("tags", "repository, tag, digest, pushed_at, pushed_by"),
                ("manifests", "*"),
                ("parts", "repository, manifest, digest"),
                ("blobs", "repository, digest, size"),
                ("contents", "*"),
                ("repositories", "*"),
                ("totals", "*"),
            )
        }

    return await kit.database.read(read)


def backup(kit: HostedKit, target: Path) -> BackupReport:
    return write_backup(kit.store.layout, NAME, target)


async def restore(kit: HostedKit, source: Path, *, may_replace: bool = False) -> RestoreReport:
    return await restore_backup(
        kit.store,
        kit.service.settings,
        source,
        may_replace=may_replace,
        actor=Actor("local:root"),
    )


@asynccontextmanager
async def pushed(root: Path) -> AsyncIterator[HostedKit]:
    async with hosted_kit(root / "data") as kit:
        await push_all(kit)
        yield kit


def damage(path: Path) -> None:
    """Change a byte of a file in place, so that a stat does not tell."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.unlink()  # A backup on the same file system may be a hard link.
    path.write_bytes(data)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", TARGETS)
async def test_everything_comes_back_on_an_empty_data_directory(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    async with pushed(tmp_path) as kit:
        kit.clock[0] = NOW + 5000
        kit.service.manifests.mark_pulled(
            "other", await kit.service.manifests.find("other", Tag("v2"))
        )
        await kit.push_blob(b"named by no manifest")
        before = await state_of(kit)
        report = backup(kit, target)
        assert report.missing == []
    async with hosted_kit(tmp_path / "new") as kit:
        restored = await restore(kit, target)
        assert restored.problems == []
        assert restored.images == report.images == 7
        assert restored.contents == report.contents
        assert await state_of(kit) == before
        assert await kit.read_blob(Digest.of(LAYER), "team/app") == LAYER
        changes = await kit.emitted_changes()
        assert {(one.action, one.user) for one in changes} == {("push", "local:root")}
        again = await restore(kit, target)
        assert (again.contents, again.problems) == (0, [])
        assert await state_of(kit) == before
    every_file_hashes_to_its_name(tmp_path / "new")


async def test_second_backup_adds_what_is_new_and_removes_what_is_gone(tmp_path: Path) -> None:
    target = tmp_path / "backup"
    async with pushed(tmp_path) as kit:
        backup(kit, target)
        assert backup(kit, target).added == 0
        await kit.service.manifests.delete(
            "team/app", Digest.of(manifest_of(b"by digest")), actor=ANYBODY
        )
        await collect(
            kit.database, kit.store.layout, NOW + 10**6, 0.0, deletion_of, kit.is_protected
        )
        await kit.push_image(b"three", repository="team/app", tag="v2")
        report = backup(kit, target)
        assert report.added == 2
        files = {path.name for path in (target / "blobs" / "sha256").iterdir()}
        assert Digest.of(b"three").hex in files
        assert Digest.of(b"by digest").hex not in files
        before = await state_of(kit)
    async with hosted_kit(tmp_path / "new") as kit:
        await restore(kit, target)
        assert (await state_of(kit))["tags"] == before["tags"]


async def test_content_that_is_deleted_while_a_backup_reads_stays_until_its_end(
    tmp_path: Path,
) -> None:
    async with pushed(tmp_path) as kit:
        digest = Digest.of(LAYER)
        blob = next(blob for blob in kit.store.catalog.blobs(NOW) if blob.digest == digest)
        with opened_snapshot(kit.store.layout) as snapshot:
            for repository in list(snapshot.repositories()):
                for row in list(snapshot.manifests(repository)):
                    await kit.service.manifests.delete(repository, row.digest, actor=ANYBODY)
            await collect(
                kit.database, kit.store.layout, NOW + 10**6, 0.0, deletion_of, kit.is_protected
            )
            assert (await kit.usage()).contents == 0
            await kit.store.evictor.remove([blob])
            assert kit.store.catalog.has_blob(digest)
            assert digest in dict(snapshot.contents())
        await kit.store.evictor.remove([blob])
        assert not kit.store.catalog.has_blob(digest)


async def test_content_that_a_removal_looks_at_meanwhile_is_not_called_lost(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path / "data") as kit:
        await kit.push_image(b"layer", tag="v1")
        file = kit.store.layout.blob(Digest.of(b"layer")).open("rb")
        fcntl.flock(file, fcntl.LOCK_EX)
        # As a removal does, which leaves content that the backup names.
        asyncio.get_running_loop().call_later(0.2, file.close)
        report = await run_in_thread(write_backup, kit.store.layout, NAME, tmp_path / "backup")
        assert file.closed
        assert report.missing == []


async def test_copy_of_a_killed_backup_keeps_nothing_and_is_removed(tmp_path: Path) -> None:
    async with pushed(tmp_path) as kit:
        layout = kit.store.layout
        with opened_snapshot(layout):
            stale = layout.snapshot.read_bytes()
        layout.snapshot.write_bytes(stale)
        await kit.service.blobs.delete("team/app", Digest.of(LAYER), actor=ANYBODY)
        blob = next(one for one in kit.store.catalog.blobs(NOW) if one.digest == Digest.of(LAYER))
        assert (await kit.store.evictor.remove([blob])).sizes
        drop_stale_snapshot(layout)
        assert not layout.snapshot.exists()


async def test_two_backups_at_once_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.hosted.snapshot._SNAPSHOT_TIMEOUT_S", 0.0)
    async with pushed(tmp_path) as kit:
        with (
            opened_snapshot(kit.store.layout),
            pytest.raises(StorageUnavailable, match="another backup"),
        ):
            backup(kit, tmp_path / "backup")
        target = tmp_path / "other"
        backup(kit, target)
        fd = os.open(target, os.O_RDONLY)
        assert disk.try_lock(fd)
        with pytest.raises(StorageUnavailable, match="another process writes this backup"):
            backup(kit, target)
        os.close(fd)


async def test_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    async with pushed(tmp_path) as kit:
        for target in (tmp_path, kit.store.layout.root):
            with pytest.raises(StorageUnavailable, match="has other files than a backup"):
                backup(kit, target)


async def test_lost_content_is_named_and_stays_in_an_earlier_backup(tmp_path: Path) -> None:
    async with pushed(tmp_path) as kit:
        backup(kit, tmp_path / "earlier")
        kit.store.layout.blob(Digest.of(LAYER)).unlink()
        assert backup(kit, tmp_path / "earlier").missing == []
        assert backup(kit, tmp_path / "new").missing == [Digest.of(LAYER)]
        before = await state_of(kit)
    async with hosted_kit(tmp_path / "one") as kit:
        assert (await restore(kit, tmp_path / "earlier")).problems == []
    async with hosted_kit(tmp_path / "two") as kit:
        report = await restore(kit, tmp_path / "new")
        assert report.problems == [f"team/app: the backup does not have {Digest.of(LAYER)}"]
        assert report.images == 7
        assert await state_of(kit) == before
        with pytest.raises(BlobUnknown):
            await kit.service.blobs.size("team/app", Digest.of(LAYER))


@pytest.mark.parametrize("how", ["flipped", "short", "long", "link"])
async def test_damaged_content_of_a_backup_is_not_restored(tmp_path: Path, how: str) -> None:
    target = tmp_path / "backup"
    async with pushed(tmp_path) as kit:
        backup(kit, target)
    path = target / "blobs" / "sha256" / Digest.of(LAYER).hex
    data = path.read_bytes()
    path.unlink()
    if how == "link":
        path.symlink_to("/dev/zero")
    else:
        damaged = {"flipped": data[:-1] + b"x", "short": data[:-1], "long": data + b"x"}[how]
        path.write_bytes(damaged)
    async with hosted_kit(tmp_path / "new") as kit:
        report = await restore(kit, target)
        (problem,) = report.problems
        assert str(Digest.of(LAYER)) in problem
        assert not kit.store.catalog.has_blob(Digest.of(LAYER))
        assert (await kit.service.lists.tags("team/app", None, None))[0] == ["index", "v1", "v2"]
    assert list((tmp_path / "new" / "uploads").iterdir()) == []


@pytest.mark.parametrize("name", TARGETS)
async def test_content_that_is_damaged_here_is_replaced_by_a_restore(
    tmp_path: Path, name: str
) -> None:
    target = tmp_path / name
    async with pushed(tmp_path) as kit:
        backup(kit, target)
        for data in (LAYER, manifest_of(LAYER)):
            damage(kit.store.layout.blob(Digest.of(data)))
        report = await restore(kit, target)
        assert (report.contents, report.problems) == (2, [])
        usage = await kit.usage()
        assert usage.bytes == backup(kit, tmp_path / "again").bytes
    every_file_hashes_to_its_name(tmp_path / "data")


@pytest.mark.parametrize("name", TARGETS)
async def test_content_that_is_damaged_here_is_in_no_backup(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    async with pushed(tmp_path) as kit:
        damage(kit.store.layout.blob(Digest.of(LAYER)))
        report = backup(kit, target)
        assert report.missing == [Digest.of(LAYER)]
        before = await state_of(kit)
    async with hosted_kit(tmp_path / "new") as kit:
        (problem,) = (await restore(kit, target)).problems
        assert str(Digest.of(LAYER)) in problem
        assert await state_of(kit) == before
    every_file_hashes_to_its_name(tmp_path / "new")


async def test_content_that_is_damaged_in_an_earlier_backup_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "backup"
    path = target / "blobs" / "sha256" / Digest.of(LAYER).hex
    async with pushed(tmp_path) as kit:
        backup(kit, target)
        damage(path)
        report = backup(kit, target)
        assert (report.added, report.missing) == (1, [])
        assert path.read_bytes() == LAYER
        damage(path)
        damage(kit.store.layout.blob(Digest.of(LAYER)))
        assert backup(kit, target).missing == [Digest.of(LAYER)]
        assert not path.exists()


async def test_lost_manifest_takes_its_own_tags_only(tmp_path: Path) -> None:
    target = tmp_path / "backup"
    async with pushed(tmp_path) as kit:
        lost = Digest.of(manifest_of(LAYER))
        kit.store.layout.blob(lost).unlink()
        assert backup(kit, target).missing == [lost]
    async with hosted_kit(tmp_path / "new") as kit:
        report = await restore(kit, target)
        assert report.problems == [
            f"team/app: the backup does not have {lost}",
            f"team/app:v1 is not restored: its manifest {lost} is lost",
        ]
        assert (await kit.service.lists.tags("team/app", None, None))[0] == ["index", "v2"]
        assert await kit.read_blob(Digest.of(LAYER), "team/app") == LAYER


async def test_restore_revives_what_is_an_orphan_only_here(tmp_path: Path) -> None:
    target = tmp_path / "backup"
    async with pushed(tmp_path) as kit:
        before = await state_of(kit)
        backup(kit, target)
        await kit.service.manifests.delete("team/app", Digest.of(manifest_of(LAYER)), actor=ANYBODY)
        await kit.service.manifests.delete(
            "team/app", Digest.of(index_of(manifest_of(b"child"))), actor=ANYBODY
        )
        assert {row[-1] for row in (await state_of(kit))["manifests"]} == {0, NOW}
        await restore(kit, target)
        assert await state_of(kit) == before


async def test_tag_of_another_manifest_is_replaced_by_force_only(tmp_path: Path) -> None:
    target = tmp_path / "backup"
    async with pushed(tmp_path) as kit:
        backup(kit, target)
        first = await kit.service.manifests.find("team/app", Tag("v2"))
        await kit.push_image(b"three", repository="team/app", tag="v2")
        await kit.service.manifests.delete("team/app", Tag("v1"), actor=ANYBODY)
        with pytest.raises(StorageUnavailable, match=r"1 tags .*team/app:v2.* --force replaces"):
            await restore(kit, target)
        assert (await kit.service.lists.tags("team/app", None, None))[0] == ["index", "v2"]
        await restore(kit, target, may_replace=True)
        assert (await kit.service.manifests.find("team/app", Tag("v2"))).digest == first.digest
        assert (await kit.service.lists.tags("team/app", None, None))[0] == ["index", "v1", "v2"]


async def test_quota_ends_a_restore_with_words(tmp_path: Path) -> None:
    async with pushed(tmp_path) as kit:
        backup(kit, tmp_path / "backup")
    async with hosted_kit(tmp_path / "new", max_size="1MiB") as kit:
        with pytest.raises(QuotaExceeded, match=r"more than hosted.max_size .1MiB. are needed"):
            await restore(kit, tmp_path / "backup")


def index_with(name: str, body: bytes = b"", media_type: str = OCI_MANIFEST) -> dict[str, Any]:
    body = body or manifest_of()
    annotations = {"org.opencontainers.image.ref.name": name}
    entry = descriptor(body, media_type, annotations=annotations)
    return {"schemaVersion": 2, "manifests": [entry]}


def write_layout(root: Path, index: Any, *contents: bytes) -> Path:
    (root / "blobs" / "sha256").mkdir(parents=True)
    for data in contents:
        (root / "blobs" / "sha256" / Digest.of(data).hex).write_bytes(data)
    (root / "index.json").write_text(json.dumps(index))
    return root


async def test_layout_of_another_program_is_restored_by_its_full_names(tmp_path: Path) -> None:
    layout = write_layout(
        tmp_path / "layout", index_with("ghcr.io/org/app:1"), manifest_of(), CONFIG
    )
    async with hosted_kit(tmp_path / "data") as kit:
        report = await restore(kit, layout)
        assert (report.images, report.problems) == (1, [])
        row = await kit.service.manifests.find("org/app", Tag("1"))
        assert row.digest == Digest.of(manifest_of())


async def test_manifest_that_a_layout_lists_many_times_is_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_manifest, reads = RestoredContent.read_manifest, Counter[Digest]()

    def note(self: RestoredContent, digest: Digest) -> bytes:
        reads[digest] += 1
        return read_manifest(self, digest)

    monkeypatch.setattr(RestoredContent, "read_manifest", note)
    bodies = [manifest_of(), index_of(manifest_of())]
    for _ in range(4):
        bodies.append(index_of(manifests=[descriptor(bodies[-1], OCI_INDEX)] * 3))
    top = index_with("ghcr.io/org/app:1", bodies[-1], OCI_INDEX)
    layout = write_layout(tmp_path / "layout", top, *bodies, CONFIG)
    async with hosted_kit(tmp_path / "data") as kit:
        report = await restore(kit, layout)
        assert (report.images, report.problems) == (1, [])
    assert reads == dict.fromkeys(map(Digest.of, bodies), 2)


@pytest.mark.parametrize("copy", [None, b"", b"other bytes under its digest"])
@pytest.mark.parametrize("pushed", ["secret/app", "org/app"])
async def test_layout_gives_a_repository_no_content_that_only_others_have(
    tmp_path: Path, pushed: str, copy: bytes | None
) -> None:
    layer = b"a private layer, of which others know the digest"
    image = manifest_of(layer)
    layout = write_layout(
        tmp_path / "layout", index_with("ghcr.io/org/app:1", image), image, CONFIG
    )
    if copy is not None:
        (layout / "blobs" / "sha256" / Digest.of(layer).hex).write_bytes(copy)
    async with hosted_kit(tmp_path / "data") as kit:
        await kit.push_blob(layer, pushed)
        report = await restore(kit, layout)
        if pushed == "org/app":
            assert (report.images, report.problems) == (1, [])
            return
        assert report.images == 0
        assert str(Digest.of(layer)) in report.problems[0]
        with pytest.raises(BlobUnknown):
            await kit.service.blobs.size("org/app", Digest.of(layer))


@pytest.mark.parametrize(
    "index",
    [
        index_with("latest"),
        index_with("registry.example/../../etc:1"),
        {"manifests": [{}, 3, {"annotations": 1}]},
    ],
)
async def test_entry_without_a_full_name_is_a_problem(tmp_path: Path, index: Any) -> None:
    layout = write_layout(tmp_path / "layout", index, manifest_of(), CONFIG)
    async with hosted_kit(tmp_path / "data") as kit:
        report = await restore(kit, layout)
        assert report.images == 0
        assert "has no full name" in report.problems[0]


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"manifests": 3}', "[" * 100_000])
async def test_damaged_index_is_an_error(tmp_path: Path, text: str) -> None:
    layout = write_layout(tmp_path / "layout", {})
    (layout / "index.json").write_text(text)
    async with hosted_kit(tmp_path / "data") as kit:
        with pytest.raises(StorageUnavailable, match=r"index\.json"):
            await restore(kit, layout)


async def test_backup_of_a_later_version_is_refused(tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "layout", index_with("a.example/b:1"))
    (layout / "oci-mirror.json").write_text('{"version": 3, "name": "a", "rows": [')
    async with hosted_kit(tmp_path / "data") as kit:
        with pytest.raises(StorageUnavailable, match=r"has version 3.*: use a later one"):
            await restore(kit, layout)


def tag_row(pushed_at: object, pushed_by: str) -> str:
    row = f'["tag", "a", "v1", "{Digest.of(CONFIG)}", {pushed_at}, {pushed_by}]'
    return f'{{"version": 2, "name": "a", "rows": [\n{row}\n]}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not finished"),
        ("{}", "not finished"),
        ('{"version": 1, "name": "a",\n"manifests": []}', "version 1.*: write the backup again"),
        ('{"version": 2, "name": "a", "rows": [\n["blob", "a", "sha256:0", 1]\n]}', "line 2 "),
        ('{"version": 2, "name": "a", "rows": [\n["tag", "../a"]\n]}', "line 2 .* is damaged"),
        ('{"version": 2, "name": "a", "rows": [\n["other", "a"]\n]}', "line 2 .* is damaged"),
        ('{"version": 2, "name": "a", "rows": [\n' + "[" * 70_000 + "\n]}", "line 2 "),
        ('{"version": 2, "name": "a", "rows": [\n', "is cut"),
        (tag_row(1, r'"\ud800"'), "line 2 .* is damaged"),
        (tag_row("1" + "0" * 400, '"ci"'), "line 2 .* is damaged"),
        (tag_row("1e999", '"ci"'), "line 2 .* is damaged"),
    ],
)
async def test_backup_with_damaged_or_old_rows_restores_nothing(
    tmp_path: Path, text: str, message: str
) -> None:
    layout = write_layout(tmp_path / "layout", index_with("a.example/b:1"), manifest_of(), CONFIG)
    (layout / "oci-mirror.json").write_text(text)
    async with hosted_kit(tmp_path / "data") as kit:
        with pytest.raises(StorageUnavailable, match=message):
            await restore(kit, layout)
        assert (await kit.usage()).contents == 0


async def test_tar_file_with_links_and_one_that_is_none_restore_nothing(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    body = json.dumps(index_with("a.example/b:1")).encode()
    with tarfile.open(path, "w") as tar:
        entry = tarfile.TarInfo("index.json")
        entry.size = len(body)
        tar.addfile(entry, io.BytesIO(body))
        link = tarfile.TarInfo(f"blobs/sha256/{Digest.of(manifest_of()).hex}")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    async with hosted_kit(tmp_path / "data") as kit:
        report = await restore(kit, path)
        assert "the backup does not have sha256:" in report.problems[0]
        path.write_bytes(b"x" * 5000)
        with pytest.raises(StorageUnavailable, match="neither a directory nor a plain tar file"):
            await restore(kit, path)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (tarfile.XHDTYPE, 2 * 1024 * 1024),
        (tarfile.XGLTYPE, 1 << 40),
        (tarfile.GNUTYPE_LONGNAME, 1 << 40),
        (tarfile.REGTYPE, -512),
        (tarfile.REGTYPE, 1 << 80),
    ],
)
async def test_tar_file_with_a_header_of_impossible_size_is_an_error_of_one_line(
    tmp_path: Path, kind: bytes, size: int
) -> None:
    path, entry = tmp_path / "odd.tar", tarfile.TarInfo("odd")
    entry.type, entry.size = kind, size
    with path.open("wb") as file:
        file.write(tarfile.TarInfo("oci-layout").tobuf())
        file.write(entry.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1024 + 4 * 1024 * 1024)
    async with hosted_kit(tmp_path / "data") as kit:
        with pytest.raises(StorageUnavailable, match="neither a directory nor a plain tar file"):
            await restore(kit, path)


async def test_backup_joins_no_paths_for_each_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joins = 0
    join = Path.__truediv__

    def count(path: Path, name: str) -> Path:
        nonlocal joins
        joins += 1
        return join(path, name)

    async with hosted_kit(tmp_path / "data") as kit:
        counts = []
        for contents in (1, 20):
            for number in range(contents):
                await kit.push_blob(b"%d" % number)
            monkeypatch.setattr(Path, "__truediv__", count)
            joins = 0
            backup(kit, tmp_path / f"backup-{contents}")
            backup(kit, tmp_path / f"backup-{contents}")
            counts.append(joins)
            monkeypatch.undo()
    assert counts[0] == counts[1]
