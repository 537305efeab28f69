"""A restore is whole or not at all: beside pushes, evictions, on a full disk, after a kill."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mirror.access.known_names import KnownNames, add_known_names, read_known_names
from mirror.config.settings import Hosted
from mirror.hosted.staged_names import StagedNames
from mirror.hosted.upload_files import publish_upload
from mirror.oci.errors import MirrorError, QuotaExceeded, StorageUnavailable
from mirror.oci.reference import Digest, Tag
from mirror.operations import restore_plan
from mirror.operations.restore import BackupRestore, restore_backup
from mirror.operations.write_backup import write_backup
from mirror.store.eviction import StoredBlob
from mirror.store.hosted_contents import HostedContents
from mirror.store.removal import KeptBecause
from tests.unit.hosted.kit import ANYBODY, NOW, HostedKit, hosted_kit, manifest_of
from tests.unit.hosted.test_quota import as_version_1
from tests.unit.operations.test_backup import backup, index_with, restore, state_of, write_layout

LAYERS = [b"one" * 1000, b"two" * 1000, b"three" * 1000]
CONTENTS = 7
"""Contents of the backup: three layers, three manifests, one config."""


@pytest.fixture
async def source(tmp_path: Path) -> Path:
    """Return a backup of three images in two repositories."""
    async with hosted_kit(tmp_path / "from") as kit:
        for number, layer in enumerate(LAYERS):
            repository = ("team/app", "other")[number % 2]
            await kit.push_image(layer, repository=repository, tag=f"v{number}")
        report = backup(kit, tmp_path / "backup")
        assert report.contents == CONTENTS
    return tmp_path / "backup"


class FullDisk:
    """Publishes some contents, and has no space for the next one."""

    def __init__(self, room: int) -> None:
        self.room = room

    def publish(self, *arguments: Any) -> bool:
        """See :func:`mirror.hosted.upload_files.publish_upload`."""
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= 1
        return publish_upload(*arguments)


@pytest.mark.parametrize("has_names", [False, True], ids=["empty", "with-names"])
async def test_disk_that_is_full_at_any_content_leaves_the_names_as_they_were(
    tmp_path: Path, source: Path, has_names: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path / "new") as kit:
        if has_names:
            await kit.push_image(b"older", repository="team/app", tag="v9")
        before = await state_of(kit)
        copied = 0
        for room in range(0, CONTENTS, 2):
            disk = FullDisk(room - copied if room > copied else 1)
            monkeypatch.setattr("mirror.hosted.upload_files.publish_upload", disk.publish)
            with pytest.raises(
                StorageUnavailable, match=r"No space left .*then run the command again .no name was"
            ):
                await restore(kit, source)
            copied = sum(
                kit.store.catalog.has_blob(Digest(path.parent.name, path.name))
                for path in (source / "blobs").glob("*/*")
            )
            assert await state_of(kit) == before
        monkeypatch.undo()
        report = await restore(kit, source)
        assert (report.images, report.problems) == (3, [])
        assert report.contents < CONTENTS, "what was copied before is not copied again"
        assert list((tmp_path / "new" / "hosted").glob("restore.db*")) == []


async def test_no_name_is_seen_before_all_are(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    stage = BackupRestore.stage
    async with hosted_kit(tmp_path / "new") as kit:
        before = await state_of(kit)

        async def stage_and_look(restoring: BackupRestore) -> Any:
            report = await stage(restoring)
            seen.append(await state_of(kit))
            return report

        monkeypatch.setattr(BackupRestore, "stage", stage_and_look)
        await restore(kit, source)
        assert seen == [before]
        assert len((await state_of(kit))["tags"]) == 3


async def test_content_of_a_running_restore_is_hosted_and_is_not_removed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[Any] = []
    stage = BackupRestore.stage
    async with hosted_kit(tmp_path / "new") as kit:
        await kit.push_blob(LAYERS[0])
        layout = kit.store.layout

        async def stage_and_evict(restoring: BackupRestore) -> Any:
            report = await stage(restoring)
            results.append(HostedContents(layout).usage()[0])
            for layer in LAYERS:
                blob = StoredBlob(Digest.of(layer), len(layer), NOW + 1)
                results.append((await kit.store.evictor.remove([blob])).kept[blob.digest])
            return report

        monkeypatch.setattr(BackupRestore, "stage", stage_and_evict)
        await restore(kit, source)
        assert results == [CONTENTS, *[KeptBecause.HOSTED] * 3]
        assert HostedContents(layout).usage()[0] == CONTENTS


async def test_rows_of_a_restore_that_was_killed_count_for_nothing(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path / "new") as kit:
        layout = kit.store.layout
        digest = await kit.push_blob(b"x")
        layout.staged_names.write_bytes(layout.hosted_names.read_bytes())
        await kit.service.blobs.delete("app", digest, actor=ANYBODY)
        assert HostedContents(layout).find([digest]) == set()
        assert HostedContents(layout).usage() == (0, 0)


async def test_tag_that_is_pushed_during_a_restore_keeps_its_manifest(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = StagedNames.merge
    async with hosted_kit(tmp_path / "new") as kit:

        async def push_and_merge(staged: StagedNames, hosted: Hosted, **more: Any) -> list[str]:
            await kit.push_image(b"pushed", repository="team/app", tag="v0")
            return await merge(staged, hosted, **more)

        monkeypatch.setattr(StagedNames, "merge", push_and_merge)
        report = await restore(kit, source)
        assert report.problems == ["team/app:v0 was pushed with another manifest meanwhile"]
        assert report.images == 2
        row = await kit.service.manifests.find("team/app", Tag("v0"))
        assert row.digest == Digest.of(manifest_of(b"pushed"))
        told = [one.tag for one in await kit.emitted_changes() if one.user == "local:root"]
        assert sorted(told) == ["v1", "v2"]


async def test_two_restores_at_once_are_refused(tmp_path: Path, source: Path) -> None:
    async with hosted_kit(tmp_path / "new") as kit:
        staged = await StagedNames.open(kit.store.layout)
        with pytest.raises(StorageUnavailable, match=r"another restore .* runs: wait for its end"):
            await restore(kit, source)
        await staged.close()
        await restore(kit, source)


async def test_backup_beside_a_restore_has_what_clients_see(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []
    stage = BackupRestore.stage
    async with hosted_kit(tmp_path / "new") as kit:

        async def stage_and_back_up(restoring: BackupRestore) -> Any:
            report = await stage(restoring)
            reports.append(write_backup(kit.store.layout, "r", tmp_path / "second").contents)
            return report

        monkeypatch.setattr(BackupRestore, "stage", stage_and_back_up)
        await restore(kit, source)
        assert reports == [0]


# --- what is needed -------------------------------------------------------------------------------


def copied(kit: HostedKit) -> list[str]:
    """Return the names of the contents in the data directory."""
    return [path.name for path in (kit.store.layout.root / "blobs").glob("*/*")]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_size": "1KiB"}, r"more than hosted\.max_size \(1KiB\) are needed: "),
        (
            {"max_repository_size": "1KiB"},
            r"more than hosted\.max_repository_size \(1KiB\) are needed for (other|team/app): ",
        ),
    ],
    ids=["all", "repository"],
)
async def test_quota_is_checked_before_anything_is_copied(
    tmp_path: Path, source: Path, keys: dict[str, Any], message: str
) -> None:
    async with hosted_kit(tmp_path / "new", **keys) as kit:
        with pytest.raises(QuotaExceeded, match=f"{message}.*Nothing was restored: raise hosted"):
            await restore(kit, source)
        assert copied(kit) == []


@pytest.mark.parametrize("key", ["max_size", "max_repository_size"])
@pytest.mark.parametrize("is_layout", [False, True])
async def test_quota_of_a_restore_is_what_a_push_needs(
    tmp_path: Path, key: str, is_layout: bool
) -> None:
    body = manifest_of(LAYERS[0])
    async with hosted_kit(tmp_path / "from") as kit:
        for tag in ("v1", "v2", "v3"):
            await kit.push_image(LAYERS[0], repository="org/app", tag=tag)
        usage = await kit.usage()
        backup(kit, tmp_path / "backup")
    path = tmp_path / "backup"
    if is_layout:
        index = index_with("ghcr.io/org/app:v1", body)
        index["manifests"] += [
            index_with(f"ghcr.io/org/app:{tag}", body)["manifests"][0] for tag in ("v2", "v3")
        ]
        path = write_layout(tmp_path / "layout", index, body, b"{}", LAYERS[0])
    needed = usage.bytes + usage.metadata
    async with hosted_kit(tmp_path / "new", **{key: str(needed - 1)}) as kit:
        with pytest.raises(QuotaExceeded, match="are needed"):
            await restore(kit, path)
        assert copied(kit) == []
    async with hosted_kit(tmp_path / "new", **{key: str(needed)}) as kit:
        assert (await restore(kit, path)).problems == []
        found = await kit.usage()
        assert (found.bytes, found.metadata) == (usage.bytes, usage.metadata)
    async with hosted_kit(tmp_path / "new", **{key: "1KiB"}) as kit:
        assert (await restore(kit, path)).problems == [], "all of it is here"


async def test_restore_upgrades_the_names_of_version_1(tmp_path: Path, source: Path) -> None:
    async with hosted_kit(tmp_path / "new") as kit:
        await kit.push_image(LAYERS[0], repository="team/app", tag="v0")
        as_version_1(kit.store.layout.hosted_names)
        await restore(kit, source)
        found = await kit.usage()
    async with hosted_kit(tmp_path / "other") as kit:
        await restore(kit, source)
        assert await kit.usage() == found


async def test_content_that_is_here_needs_no_quota_again(tmp_path: Path, source: Path) -> None:
    async with hosted_kit(tmp_path / "new", max_size="64KiB") as kit:
        await restore(kit, source)
        usage = await kit.usage()
        used = usage.bytes + usage.metadata
        with pytest.raises(QuotaExceeded):
            await kit.push_blob(b"x" * 30_000)
    async with hosted_kit(tmp_path / "new", max_size=str(used)) as kit:
        assert (await restore(kit, source)).problems == []


async def test_disk_space_is_checked_before_anything_is_copied(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosted_kit(tmp_path / "new") as kit:
        monkeypatch.setattr(restore_plan, "free_bytes", lambda path: 2000)
        with pytest.raises(StorageUnavailable, match=r"are needed on the disk .* 2\.0KiB are free"):
            await restore(kit, source)
        assert copied(kit) == []
        monkeypatch.undo()
        await restore(kit, source)
        # Only rows are needed now.
        monkeypatch.setattr(restore_plan, "free_bytes", lambda path: 20_000)
        await restore(kit, source)


@pytest.mark.parametrize("what", ["quota", "disk"])
async def test_layout_of_another_program_is_checked_before_it_is_copied(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = manifest_of(LAYERS[0])
    layout = write_layout(
        tmp_path / "layout", index_with("ghcr.io/org/app:1", body), body, b"{}", LAYERS[0]
    )
    if what == "disk":
        monkeypatch.setattr(restore_plan, "free_bytes", lambda path: 2000)
    async with hosted_kit(tmp_path / "new", max_size="1KiB") as kit:
        hosted = kit.service.settings
        if what == "disk":
            hosted = hosted.model_copy(update={"max_size": 1 << 30})
        with pytest.raises(MirrorError, match="are needed"):
            await restore_backup(kit.store, hosted, layout, may_replace=False, actor=ANYBODY)
        assert copied(kit) == []


async def test_tag_that_an_index_has_twice_is_a_problem(tmp_path: Path) -> None:
    bodies = manifest_of(), manifest_of(b"x")
    documents = [index_with("ghcr.io/a:1", bodies[0]), index_with("quay.io/a:1", bodies[1])]
    index = {"manifests": [document["manifests"][0] for document in documents]}
    layout = write_layout(tmp_path / "layout", index, *bodies, b"{}", b"x")
    async with hosted_kit(tmp_path / "new") as kit:
        report = await restore(kit, layout)
        assert report.images == 1
        assert report.problems == ["a:1 is twice in index.json: the first one is restored"]


# --- names of users -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["backup", "backup.tar"])
async def test_names_of_removed_users_come_back_beside_those_that_are_known(
    tmp_path: Path, name: str
) -> None:
    async with hosted_kit(tmp_path / "data") as kit:
        await kit.push_image(b"x")
        add_known_names(kit.store.layout.user_names, {"ann", "bob"})
        backup(kit, tmp_path / name)
    async with hosted_kit(tmp_path / "new") as kit:
        add_known_names(kit.store.layout.user_names, {"carl"})
        await restore(kit, tmp_path / name)
        assert read_known_names(kit.store.layout.user_names) == {"ann", "bob", "carl"}
        known = KnownNames(kit.store.layout.user_names)
        known.refresh(set())
        assert "who is or was in access.users" in known.reason_to_refuse("ann")


async def test_backup_without_names_of_users_makes_no_file(tmp_path: Path, source: Path) -> None:
    (source / "oci-mirror.users").unlink()  # As an earlier version writes it.
    async with hosted_kit(tmp_path / "new") as kit:
        assert (await restore(kit, source)).problems == []
        assert not kit.store.layout.user_names.exists()


@pytest.mark.parametrize("text", ["two words\n", "x" * (2 << 20)], ids=["odd", "large"])
async def test_damaged_names_of_users_restore_nothing(
    tmp_path: Path, source: Path, text: str
) -> None:
    (source / "oci-mirror.users").write_text(text)
    async with hosted_kit(tmp_path / "new") as kit:
        with pytest.raises(StorageUnavailable, match=r"oci-mirror\.users of the backup cannot be"):
            await restore(kit, source)
        assert (await state_of(kit))["tags"] == []


async def test_damaged_names_of_users_are_not_backed_up(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path / "data") as kit:
        path = kit.store.layout.user_names
        add_known_names(path, {"ann"})
        path.write_text("two words\n")
        with pytest.raises(StorageUnavailable, match=r"access/names: .*: repair it, or delete it"):
            backup(kit, tmp_path / "backup")
