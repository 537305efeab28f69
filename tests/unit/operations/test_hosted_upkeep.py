"""The upkeep of hosted repositories: rules, collection, files, and its process."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mirror.config.settings import Hosted, Settings, Storage, build
from mirror.hosted import retention_rows
from mirror.inventory.model import Inventory
from mirror.inventory.read import read_inventory
from mirror.observability.events import Event, HostedChange, LogMessage
from mirror.observability.hosted_events import Actor
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST, referrers_tag
from mirror.oci.errors import ManifestUnknown
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Tag
from mirror.operations import hosted_job
from mirror.operations.cleaning_report import Item
from mirror.operations.hosted_collection import (
    COLLECTION,
    collect_hosted,
    collect_hosted_garbage,
    find_hosted_garbage,
)
from mirror.operations.hosted_job import HOSTED_REPORT, HostedJob, run_upkeep
from mirror.operations.hosted_retention import (
    RETENTION,
    apply_hosted_retention,
    plan_hosted_retention,
)
from mirror.store.layout import Layout
from mirror.store.marks import Lease, Marks, Pin, read_marks
from tests.unit.hosted.kit import (
    ANYBODY,
    CONFIG_DIGEST,
    NOW,
    HostedKit,
    descriptor,
    hosted_kit,
    index_of,
    manifest_of,
)
from tests.unit.operations.cleaning_kit import pull
from tests.unit.store.kit import image
from tests.waiting import until

DAY = 86400.0
NAME = "registry.example"


def no_marks() -> Marks:
    return Marks()


async def retain(
    kit: HostedKit, *rules: dict[str, Any], marks: Marks | None = None, **keys: Any
) -> list[Item]:
    """Apply rules. Checks that a plan has said the same."""
    hosted = Hosted.model_validate(
        {"name": NAME, "listen": "127.0.0.1:0", "retention": rules, **keys}
    )
    given = kit.database, hosted, marks or no_marks(), kit.clock[0]
    planned = await plan_hosted_retention(*given)
    await kit.emitted_changes()
    report = await apply_hosted_retention(*given, RETENTION)
    changes = await kit.emitted_changes()
    assert sorted(map(repr, planned.items)) == sorted(map(repr, report.items))
    assert len(changes) == len(report.removed())
    return report.items


def removed(items: list[Item]) -> set[str]:
    return {str(item.name).removeprefix(f"{NAME}/") for item in items if item.action == "removed"}


async def push_tags(kit: HostedKit, *tags: str, repository: str = "app") -> None:
    """Push an image for each tag, a day after the other."""
    for tag in tags:
        kit.clock[0] += DAY
        await kit.push_image(tag.encode(), tag=tag, repository=repository)


async def tags_of(kit: HostedKit, repository: str = "app") -> list[str]:
    return (await kit.service.lists.tags(repository, None, None))[0]


async def test_keep_last_orders_versions_by_precedence_and_others_by_push(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await push_tags(kit, "1.10", "1.2", "1.9", "dev", "main", "test")
        await push_tags(kit, "1.0", repository="other")
        items = await retain(kit, {"match": "app", "keep_last": 2})
        assert removed(items) == {"app:1.2", "app:dev"}
        assert await tags_of(kit) == ["1.10", "1.9", "main", "test"]
        assert await tags_of(kit, "other") == ["1.0"]


@pytest.mark.parametrize(("age", "left"), [("used", ["v1"]), ("pushed", [])])
async def test_older_than_counts_from_the_last_use_or_from_the_push(
    tmp_path: Path, age: str, left: list[str]
) -> None:
    async with hosted_kit(tmp_path) as kit:
        await push_tags(kit, "v1", "v2")
        kit.clock[0] += 10 * DAY
        kit.service.manifests.mark_pulled("app", await kit.service.manifests.find("app", Tag("v1")))
        await kit.database.write(lambda connection: None)  # The record of the pull comes before.
        kit.clock[0] += DAY
        items = await retain(kit, {"older_than": "5d", "age": age})
        assert await tags_of(kit) == left
        word = "pushed 11 d ago" if age == "pushed" else "last used 11 d ago"
        assert word in {item.why for item in items if item.name == f"{NAME}/app:v2"}


async def test_pull_of_a_platform_by_digest_is_a_use_of_its_indexes(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        platform = await kit.push_image(b"platform", tag=None)
        index = index_of(manifest_of(b"platform"))
        await kit.service.manifests.put("app", Tag("multi"), (), index, OCI_INDEX, actor=ANYBODY)
        outer = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": OCI_INDEX,
                "manifests": [descriptor(index, OCI_INDEX)],
            }
        ).encode()
        await kit.service.manifests.put("app", Tag("nested"), (), outer, OCI_INDEX, actor=ANYBODY)
        await push_tags(kit, "v1")
        kit.clock[0] += 10 * DAY
        kit.service.manifests.mark_pulled("app", await kit.service.manifests.find("app", platform))
        await kit.database.write(lambda connection: None)  # The record of the pull comes before.
        kit.clock[0] += DAY
        assert removed(await retain(kit, {"older_than": "5d"})) == {"app:v1"}
        assert await tags_of(kit) == ["multi", "nested"]


async def test_rules_are_not_about_tags_that_belong_to_a_subject(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        subject = await kit.push_image(b"layer", tag="main")
        await push_tags(kit, f"{referrers_tag(subject)}.sig", referrers_tag(Digest.of(b"mirrored")))
        rule = {"keep_last": 1, "older_than": "0s"}
        assert await retain(kit, {"tags": "sha256-*", **rule}, rule) != []
        assert len(await tags_of(kit)) == 3


async def test_immutable_pinned_and_leased_images_stay(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await push_tags(kit, "v1", "pinned", "gone")
        row = await kit.service.manifests.find("app", Tag("pinned"))
        name = ImageName.parse(f"{NAME}/app:pinned")
        pin = Pin(name=str(name), digest=row.digest, since=NOW)
        marks = Marks(pins={str(name): pin})
        items = await retain(kit, {"keep_last": 0}, marks=marks, immutable_tags=["*:v*"])
        assert removed(items) == {"app:gone"}
        assert {item.why for item in items if item.action == "kept"} == {"immutable", "pinned"}


async def test_untagged_rule_is_about_manifests_that_nothing_names(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        alone = await kit.push_image(b"alone", tag=None)
        await kit.push_image(b"child", tag=None)
        index = index_of(manifest_of(b"child"))
        await kit.service.manifests.put("app", Tag("index"), (), index, OCI_INDEX, actor=ANYBODY)
        subject = descriptor(b"of a mirrored image", OCI_MANIFEST)
        await kit.push_image(b"signature", tag=None, subject=subject)
        await push_tags(kit, "v1")
        kit.clock[0] += 10 * DAY
        items = await retain(kit, {"about": "untagged", "older_than": "5d"})
        assert removed(items) == {f"app@{alone}"}
        assert await tags_of(kit) == ["index", "v1"]


async def test_untagged_rule_is_about_a_manifest_that_an_image_has_as_a_layer(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        alone = await kit.push_image(b"alone", tag=None)
        await kit.push_blob(manifest_of(b"alone"))
        await kit.push_image(manifest_of(b"alone"), tag="v1")
        kit.clock[0] += 10 * DAY
        assert removed(await retain(kit, {"about": "untagged", "older_than": "5d"})) == {
            f"app@{alone}"
        }
        kit.clock[0] += 3 * DAY
        items, changes = await collect_all(kit)
        assert {item.digest for item in items} == {str(alone), str(Digest.of(b"alone"))}
        assert len(changes) == 2
        assert await kit.read_blob(alone) == manifest_of(b"alone")


async def test_use_of_a_manifest_is_no_use_of_an_image_that_has_it_as_a_layer(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        alone = await kit.push_image(b"alone", tag=None)
        await kit.push_blob(manifest_of(b"alone"))
        await kit.push_image(manifest_of(b"alone"), tag="v1")
        kit.clock[0] += 10 * DAY
        await kit.service.manifests.mark_used("app", alone)
        marks = Marks(leases={alone: Lease(alone, kit.clock[0] + DAY, "node")})
        assert removed(await retain(kit, {"older_than": "5d"}, marks=marks)) == {"app:v1"}


async def test_image_that_is_pushed_or_pulled_meanwhile_stays(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await push_tags(kit, "v1")
        kit.clock[0] += 10 * DAY
        rows = await kit.database.read(retention_rows.tagged_images)
        kit.service.manifests.mark_pulled("app", await kit.service.manifests.find("app", Tag("v1")))
        remove = partial(retention_rows.remove_unchanged, rows=rows, now=kit.clock[0])
        assert await kit.database.write(remove) == []
        assert await tags_of(kit) == ["v1"]


# --- collection with files ------------------------------------------------------------------------


def inventory_of(kit: HostedKit) -> Inventory:
    layout = kit.store.layout
    return read_inventory(layout, {}, read_marks(layout), kit.clock[0], kit.service.settings)


async def collect_all(kit: HostedKit) -> tuple[list[Item], list[HostedChange]]:
    await kit.emitted_changes()
    report = await collect_hosted(
        kit.store,
        kit.database,
        kit.service.settings,
        DAY,
        partial(inventory_of, kit),
        COLLECTION,
    )
    return report.items, await kit.emitted_changes()


async def test_removed_image_goes_after_the_grace_with_its_files_and_events(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        await push_tags(kit, "v1", "v2")
        gone = Digest.of(manifest_of(b"v1"))
        await retain(kit, {"keep_last": 1})
        items, _ = await collect_all(kit)
        assert items == []
        kit.clock[0] += 3 * DAY
        items, changes = await collect_all(kit)
        assert {item.digest for item in items} == {str(gone), str(Digest.of(b"v1"))}
        assert sum(item.bytes for item in items) == len(manifest_of(b"v1")) + 2
        assert [(one.action, one.user, one.repository.path) for one in changes] == [
            ("delete", "collection", "app")
        ] * 2
        assert not kit.store.catalog.has_blob(gone)
        assert kit.store.catalog.has_blob(CONFIG_DIGEST)
        assert (await kit.read_blob(Digest.of(b"v2"))) == b"v2"


async def test_file_that_the_cache_needs_stays(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        layer = b"shared with a mirrored image"
        blob = await kit.push_blob(layer)
        await kit.push_blob(b"alone")
        await pull(kit.store, image(layer), "1.0", [b"{}", layer])
        await until(lambda: any(not one.is_hosted for one in inventory_of(kit).images))
        kit.clock[0] += 3 * DAY
        await collect_all(kit)
        assert kit.store.catalog.has_blob(blob)
        assert not kit.store.catalog.has_blob(Digest.of(b"alone"))
        with pytest.raises(Exception, match="does not have this blob"):
            await kit.service.blobs.size("app", blob)


async def test_file_that_becomes_cache_counts_in_the_quota_of_the_cache_at_once(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path, storage=Storage(max_size=10_000)) as kit:
        layers = [letter * 6_000 for letter in (b"a", b"b")]
        await kit.push_blob(layers[0])
        for layer in layers:
            await pull(kit.store, image(layer), "1.0", [b"{}", layer])
        await until(lambda: any(not one.is_hosted for one in inventory_of(kit).images))
        kit.clock[0] += 3 * DAY
        await collect_all(kit)
        left = [kit.store.catalog.has_blob(Digest.of(layer)) for layer in layers]
        assert left.count(True) == 1


async def test_command_plans_and_collects_beside_the_server(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        blob = await kit.push_blob(b"alone")
        kit.clock[0] += 3 * DAY
        hosted, layout = kit.service.settings, kit.store.layout
        planned = await find_hosted_garbage(layout, hosted, kit.clock[0], None)
        assert await find_hosted_garbage(layout, hosted, kit.clock[0], 10 * DAY) == []
        read = partial(inventory_of, kit)
        done = await collect_hosted_garbage(kit.store, hosted, None, read, Actor("local:root"))
        (told,) = await kit.emitted_changes()
        assert (told.action, told.digest, told.user) == ("delete", blob, "local:root")
        assert planned == done
        assert [item.digest for item in done] == [str(blob)]
        assert await collect_hosted_garbage(kit.store, None, None, read, Actor()) == []


# --- the scheduled run ----------------------------------------------------------------------------


def settings_of(root: Path) -> Settings:
    hosted = {"name": NAME, "listen": "127.0.0.1:0", "retention": [{"keep_last": 1}], "grace": 0}
    return build({"data_dir": str(root), "hosted": hosted})


async def push_old_images(root: Path) -> None:
    async with hosted_kit(root, clock=[1_000_000_000.0]) as kit:
        await push_tags(kit, "v1", "v2")
        await kit.push_blob(b"alone")


async def test_server_runs_the_upkeep_in_a_process_and_tells_of_each_change(tmp_path: Path) -> None:
    await push_old_images(tmp_path)
    events: list[Event] = []
    await HostedJob(Layout(tmp_path), events.append).run(settings_of(tmp_path))
    (message,) = events
    assert isinstance(message, LogMessage)
    assert dict(message.fields) == {"images": 1, "contents": 1, "bytes": len(b"alone")}
    saved = json.loads((tmp_path / HOSTED_REPORT).read_bytes())
    assert saved["items"][0]["name"] == f"{NAME}/app:v1"
    async with hosted_kit(tmp_path) as kit:
        changes = await kit.emitted_changes()
        assert [(one.tag, one.user) for one in changes] == [("v1", "retention"), ("", "collection")]
        assert changes[1].digest == Digest.of(b"alone")
        assert await tags_of(kit) == ["v2"]
        with pytest.raises(ManifestUnknown):
            await kit.service.manifests.find("app", Tag("v1"))


async def test_run_is_skipped_if_another_process_has_just_run(tmp_path: Path) -> None:
    await push_old_images(tmp_path)
    (tmp_path / HOSTED_REPORT).write_text("{}")
    os.utime(tmp_path / HOSTED_REPORT, (NOW - 10, NOW - 10))
    hosted = settings_of(tmp_path).hosted
    assert hosted is not None
    layout = Layout(tmp_path)
    document = await run_upkeep(layout, Storage(), hosted, NOW)
    assert document["is_skipped"]
    document = await run_upkeep(layout, Storage(), hosted, NOW + 7200)
    assert (document["error"], document["images"]) == (None, 1)


async def test_failed_run_says_why(tmp_path: Path) -> None:
    await push_old_images(tmp_path)
    (tmp_path / "marks.json").write_text("{")
    events: list[Event] = []
    await HostedJob(Layout(tmp_path), events.append).run(settings_of(tmp_path))
    (message,) = events
    assert isinstance(message, LogMessage)
    assert message.level == "warning"
    assert "marks.json is damaged" in dict(message.fields)["why"]


async def test_run_is_not_due_without_hosted_repositories_nor_right_after_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(job: HostedJob, settings: Settings) -> None:
        raise AssertionError

    monkeypatch.setattr(HostedJob, "run", run)
    job = HostedJob(Layout(tmp_path), lambda event: None)
    await job.run_if_due(settings_of(tmp_path), NOW)
    monkeypatch.setattr(hosted_job, "_FIRST_RUN_S", 0.0)
    await job.run_if_due(settings_of(tmp_path), NOW)
    await job.run_if_due(build({"data_dir": str(tmp_path)}), NOW)
