"""Names of hosted repositories that are lost: nothing begins anew, and nothing is removed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mirror.composition import open_hosted
from mirror.config.settings import Hosted, Settings, Storage
from mirror.hosted.database import Database
from mirror.hosted.staged_names import StagedNames
from mirror.inventory.hosted_names import open_hosted_names
from mirror.observability.events import Event, LogMessage, Observer
from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from mirror.operations.hosted_collection import find_hosted_garbage
from mirror.operations.hosted_job import run_upkeep
from mirror.store.hosted_contents import HostedContents
from mirror.store.hosted_marker import has_hosted_names, note_hosted_names
from mirror.store.layout import Layout
from mirror.store.store import Store
from tests.unit.cli.doctor.test_machine_checks import settings

NOW = 1_000_000.0
HOSTED = Hosted.model_validate({"name": "registry.example", "listen": "127.0.0.1:0"})


def serving(root: Path) -> Settings:
    return settings(root, hosted={"name": "registry.example", "listen": "127.0.0.1:5101"})


async def open_as_server(root: Path, emit: Observer | None = None) -> None:
    store = await Store.open(str(root), Storage(), lambda event: None)
    try:
        async with open_hosted(serving(root), store, lambda: NOW, emit):
            pass
    finally:
        await store.close()


async def lose_names(root: Path) -> Layout:
    await open_as_server(root)
    layout = Layout(root)
    for path in layout.hosted_names.parent.iterdir():
        path.unlink()
    layout.hosted_names.parent.rmdir()
    return layout


async def test_server_does_not_begin_anew_if_its_names_are_gone(tmp_path: Path) -> None:
    layout = await lose_names(tmp_path)
    for _ in range(2):
        with pytest.raises(StorageUnavailable, match="oci-mirror restore BACKUP"):
            await open_as_server(tmp_path)
        assert not layout.hosted_names.exists()
    layout.hosted_marker.unlink()
    await open_as_server(tmp_path)
    assert has_hosted_names(layout)


async def test_server_starts_again_after_a_restore_made_the_database(tmp_path: Path) -> None:
    layout = await lose_names(tmp_path)
    staged = await StagedNames.open(layout)
    await staged.merge(HOSTED, may_replace=False)
    await staged.close()
    await open_as_server(tmp_path)


async def test_names_that_a_killed_restore_has_left_without_tables_are_still_lost(
    tmp_path: Path,
) -> None:
    layout = await lose_names(tmp_path)
    layout.hosted_names.parent.mkdir()
    with closing(sqlite3.connect(layout.hosted_names)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    with pytest.raises(StorageUnavailable, match="oci-mirror restore BACKUP"):
        await open_as_server(tmp_path)
    with pytest.raises(StorageUnavailable, match="nothing is removed"):
        HostedContents(layout).find([Digest.of(b"x")])


async def test_server_warns_of_a_restore_that_was_killed(tmp_path: Path) -> None:
    events: list[Event] = []
    layout = Layout(tmp_path)
    for _ in range(2):
        staged = await StagedNames.open(layout)
        await open_as_server(tmp_path, events.append)
        assert events == [], "it runs"
        await staged.close()
    layout.staged_names.touch()
    await open_as_server(tmp_path, events.append)
    (warning,) = events
    assert isinstance(warning, LogMessage)
    assert "run oci-mirror restore again" in dict(warning.fields)["remedy"]


async def test_data_directory_of_an_earlier_version_gets_the_marker(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    await (await Database.open(layout.hosted_names)).close()
    assert not layout.hosted_marker.exists()
    await open_as_server(tmp_path)
    assert layout.hosted_marker.exists()


def _read_names(layout: Layout) -> None:
    with open_hosted_names(layout, "registry.example") as names:
        list(names.names())


@pytest.mark.parametrize(
    "read",
    [
        lambda layout: HostedContents(layout).find([Digest.of(b"x")]),
        lambda layout: HostedContents(layout).usage(),
        _read_names,
    ],
    ids=["eviction", "usage", "inventory"],
)
async def test_whatever_asks_what_is_hosted_gets_an_error(
    tmp_path: Path, read: Callable[[Layout], Any]
) -> None:
    layout = await lose_names(tmp_path)
    with pytest.raises(StorageUnavailable, match="was there, and is gone"):
        read(layout)


async def test_collection_and_upkeep_make_no_empty_database(tmp_path: Path) -> None:
    layout = await lose_names(tmp_path)
    with pytest.raises(StorageUnavailable, match="was there, and is gone"):
        await find_hosted_garbage(layout, HOSTED, NOW, None)
    (tmp_path / "hosted.json").write_text("{}")
    later = (tmp_path / "hosted.json").stat().st_mtime + 1e6
    report = await run_upkeep(layout, Storage(), HOSTED, later)
    assert "was there, and is gone" in report["error"]
    assert not layout.hosted_names.exists()


def test_marker_is_written_once(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    note_hosted_names(layout)
    written = layout.hosted_marker.stat()
    note_hosted_names(layout)
    assert layout.hosted_marker.stat().st_mtime_ns == written.st_mtime_ns
