"""The changes of hosted repositories: one server tells its observers of each, at least once."""

from __future__ import annotations

from pathlib import Path
from sqlite3 import Connection

import pytest

from mirror.hosted.change_feed import RETAKE_S, ChangeFeed
from mirror.hosted.change_rows import record_change
from mirror.observability.events import HostedChange
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.errors import ManifestUnknown
from mirror.oci.reference import Digest, Repository, Tag
from tests.unit.hosted.kit import ANYBODY, NOW, HostedKit, hosted_kit


async def recorded(kit: HostedKit) -> int:
    """Return the number of records."""
    query = "SELECT count(*) FROM changes"
    return int(await kit.database.read(lambda connection: connection.execute(query).fetchone()[0]))


def other_server(kit: HostedKit) -> tuple[ChangeFeed, list[HostedChange]]:
    """Return the feed of another process of the same data directory, and what it tells."""
    told: list[HostedChange] = []

    def observe(event: object) -> None:
        assert isinstance(event, HostedChange)
        told.append(event)

    return ChangeFeed(kit.database, "registry.example", lambda: kit.clock[0], observe), told


async def test_server_tells_of_its_own_change_at_once_and_its_record_goes(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(b"layer")
        assert [type(event) for event in kit.events] == [HostedChange]
        other, told = other_server(kit)
        await other.relay()
        assert await recorded(kit) == 1
        for _ in range(2):  # Observers have this time to write it down.
            await kit.service.changes.relay()
        assert await recorded(kit) == 0
        kit.clock[0] += 10 * RETAKE_S
        await other.relay()
        assert told == []


async def test_change_of_a_server_that_was_killed_is_told_by_another_one_under_its_id(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(b"layer")
        other, told = other_server(kit)
        kit.clock[0] += RETAKE_S + 1  # The first one has ended before it has removed the record.
        await other.relay()
        assert told == kit.events
        assert [one.id for one in told] == [one.id for one in kit.events if one in told]
        third, told_again = other_server(kit)
        await third.relay()
        assert told_again == []


async def test_change_of_a_killed_server_is_told_though_its_clock_was_ahead(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(b"layer")
        other, told = other_server(kit)
        kit.clock[0] = NOW - 0.1  # Another process has read the clock a moment later.
        await other.relay()
        assert told == []
        kit.clock[0] = NOW - 7200
        await other.relay()
        assert told == kit.events


async def test_failed_change_leaves_no_record(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        with pytest.raises(ManifestUnknown):
            await kit.service.manifests.delete("app", Tag("v1"), actor=ANYBODY)
        assert await recorded(kit) == 0


async def test_many_changes_of_commands_are_told_in_order(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        changes = [an_event(number) for number in range(600)]
        for start in range(0, 600, 200):

            def record(connection: Connection, some: slice = slice(start, start + 200)) -> None:
                for one in changes[some]:
                    record_change(connection, one)

            await kit.database.write(record)
        assert await kit.emitted_changes() == changes
    async with hosted_kit(tmp_path) as kit:
        assert await recorded(kit) == 0


def an_event(number: int) -> HostedChange:
    digest = Digest.of(b"%d" % number)
    repository = Repository("registry.example", "app")
    return HostedChange("delete", repository, digest, "", OCI_MANIFEST, 1, "local:root", "", NOW)
