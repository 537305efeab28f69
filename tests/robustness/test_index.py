"""Rows G3, G4, G8: the index is damaged, busy or refused while the mirror serves."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import index_costs, store_costs
from mirror import housekeeping
from mirror.observability.events import IndexDamaged, IndexRestored, LogMessage
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store import index_directory, rows
from mirror.store.blobs import WholeReader
from mirror.store.store import Store
from tests.fakes.registry import FakeRegistry
from tests.real import images
from tests.real.process import wait_until
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror
from tests.server_kit import Server, running
from tests.unit.store import damages
from tests.unit.store.damages import Damage
from tests.unit.store.kit import fill_up, small_disk
from tests.waiting import until

NAMES = 60
ACCEPT = {"Accept": OCI_MANIFEST}


def add_images(fake: FakeRegistry) -> dict[str, str]:
    """Add images. Returns tag -> digest."""
    added = {}
    for number in range(NAMES):
        added[f"v{number}"] = str(fake.add_image(b"layer %d" % number, tag=f"v{number}"))
    return added


async def assert_all_are_served(server: Server, names: dict[str, str], when: str) -> None:
    """Request each manifest by tag and by digest."""
    for references in (list(names), list(names.values())):
        answers = [await server.get(server.manifest(r), ACCEPT) for r in references]
        served = sum(status == 200 for status, _, _ in answers)
        assert served == NAMES, f"{when}: {served} of {NAMES}, e.g. {references[0]}"


@pytest.mark.row("G3-index-damage-while-running")
@pytest.mark.parametrize(
    "damage",
    [
        *damages.IN_USE[:3],
        *(pytest.param(one, marks=pytest.mark.long) for one in damages.IN_USE[3:]),
    ],
)
async def test_cached_names_are_served_while_the_upstream_is_down_and_the_index_damaged(
    tmp_path: Path, damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_CACHE_PAGES", 1)
    # All names are served within the second for which memory needs no index.
    monkeypatch.setattr("mirror.pull.manifests.MEMORY_TTL_S", 0.0)
    async with FakeRegistry() as fake:
        names = add_images(fake)
        async with running(tmp_path, fake.url) as server:
            await assert_all_are_served(server, names, "from the upstream")
            await server.store.save_image_layout(share=1.0)
    async with running(tmp_path) as server:
        await assert_all_are_served(server, names, "from the cache")
        damage(tmp_path / "index")
        await assert_all_are_served(server, names, "after the damage")
        await server.store.save_image_layout(share=1.0)
        reports = [e for e in server.events if isinstance(e, (IndexDamaged, IndexRestored))]
    async with running(tmp_path) as server:
        await assert_all_are_served(server, names, "after a restart")
        reports += [e for e in server.events if isinstance(e, (IndexDamaged, IndexRestored))]
    # Damage to a file whose pages SQLite has in memory can be harmless.
    assert reports or damage in (damages.cut_log, damages.overwrite_log)


@pytest.mark.row("G3-index-damage-while-running")
async def test_layers_are_served_at_once_after_the_index_was_restored(tmp_path: Path) -> None:
    """A client requests them as soon as it has the manifest: before the housekeeping runs."""
    layer = Digest.of(b"layer")
    async with FakeRegistry() as fake:
        root = fake.add_image(b"layer", tag="latest")
        async with running(tmp_path, fake.url) as server:
            for path in (server.manifest("latest"), server.manifest(root), server.blob(layer)):
                await server.get(path)
            await server.store.save_image_layout(share=1.0)
    for policy in ("IfNotPresent", "Never"):
        async with running(tmp_path, pull_policy=policy) as server:
            await assert_served(server, root, layer)
            damages.lose(tmp_path / "index")
            await assert_served(server, root, layer)


@pytest.mark.row("G3-index-damage-while-running")
async def test_layer_is_served_if_the_restore_of_the_index_ends_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record was looked for before it was restored."""
    layer = Digest.of(b"layer")
    async with FakeRegistry() as fake:
        root = fake.add_image(b"layer", tag="latest")
        async with running(tmp_path, fake.url) as server:
            await assert_served(server, root, layer)
            await server.store.save_image_layout(share=1.0)
    async with running(tmp_path, pull_policy="Never") as server:
        find = server.store.blobs.find

        async def find_late(digest: Digest, size: int | None = None) -> WholeReader | None:
            await server.store.restore_parts()
            return await find(digest, size)

        monkeypatch.setattr(server.store.blobs, "find", find_late)
        damages.lose(tmp_path / "index")
        assert (await server.get(server.blob(layer)))[0] == 200


async def assert_served(server: Server, root: Digest, layer: Digest) -> None:
    for path in (server.manifest("latest"), server.manifest(root), server.blob(layer)):
        assert (await server.get(path, ACCEPT))[0] == 200, path


@pytest.mark.row("G3-index-damage-while-running")
@pytest.mark.parametrize(
    "damage", [damages.overwrite, pytest.param(damages.delete_files, marks=pytest.mark.long)]
)
def test_workers_share_one_index_after_it_was_damaged(damage: Damage) -> None:
    with DockerRegistry() as registry:
        pushed = images.image()
        tags = [f"v{number}" for number in range(10)]
        for tag in tags:
            registry.push("library/app", pushed, tag)
        mirror = Mirror({"docker.io": registry.url}, workers=2).start()
        try:
            paths = [f"/v2/library/app/manifests/{tag}" for tag in tags]
            for path in paths:
                assert mirror.ask(path, headers=images.ACCEPT).status == 200
            names = mirror.data_dir / "index.json"
            assert wait_for_names(names, len(tags))
            registry.stop()
            damage(mirror.data_dir / "index")
            for _ in range(3):
                for path in paths:
                    assert mirror.ask(path, headers=images.ACCEPT).status == 200, path
            mirror.stop()
            assert set(tags) <= saved_tags(names)
            mirror.start()
            for path in paths:
                assert mirror.ask(path, headers=images.ACCEPT).status == 200, path
        finally:
            mirror.close()


def saved_tags(names: Path) -> set[str]:
    """The tags in ``index.json``."""
    if not names.exists():
        return set()
    manifests = json.loads(names.read_text())["manifests"]
    full = (m["annotations"]["org.opencontainers.image.ref.name"] for m in manifests)
    return {name.rpartition(":")[2] for name in full if "@" not in name}


def wait_for_names(names: Path, count: int) -> bool:
    wait_until(lambda: len(saved_tags(names)) >= count, "index.json has all names", 30)
    return True


@pytest.mark.row("G3-index-damage-while-running")
async def test_housekeeping_goes_on_and_is_logged_after_any_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = dict.fromkeys(("measure", "keep_up_index", "save_image_layout"), 0)
    for name in calls:
        monkeypatch.setattr(Store, name, failing(calls, name))
    for interval in ("_MEASURE_INTERVAL_S", "_INDEX_INTERVAL_S", "_SAVE_INTERVAL_S"):
        monkeypatch.setattr(housekeeping, interval, 0.01)
    async with running(tmp_path) as server:
        await until(lambda: min(calls.values()) >= 3)
        failures = {
            dict(event.fields)["job"]: event.level
            for event in server.events
            if isinstance(event, LogMessage) and event.message == "housekeeping failed"
        }
        assert failures == dict.fromkeys(("measure", "index", "save"), "error")
        monkeypatch.undo()


def failing(calls: dict[str, int], name: str) -> object:
    async def fail(store: Store, **named: object) -> None:
        calls[name] += 1
        if not named:  # The last save, at the close, has an argument.
            raise KeyError(name)

    return fail


@pytest.mark.row("G4-busy-index")
async def test_first_answers_of_a_start_do_not_wait_for_the_look_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``quick_check`` of a large index takes seconds."""
    may_end, begun = threading.Event(), threading.Event()

    def held_check(tables: rows.Tables, is_stopping: Callable[[], bool]) -> None:
        begun.set()
        assert may_end.wait(60)

    async with FakeRegistry() as fake:
        names = add_images(fake)
        async with running(tmp_path, fake.url) as server:
            await assert_all_are_served(server, names, "from the upstream")
    monkeypatch.setattr(rows.Tables, "check", held_check)
    async with running(tmp_path) as server:
        try:
            await until(begun.is_set)
            await assert_all_are_served(server, names, "while the index is checked")
            written = Repository("docker.io", "org/new"), Tag("1")
            await server.store.index.confirm_tag(*written, Digest.of(b"new"))
            assert await server.store.index.tag(*written)
        finally:
            may_end.set()


@pytest.mark.row("G1-cost-of-a-miss")
@pytest.mark.row("G10-range-of-aged-content")
async def test_benchmark_of_the_store_prints_its_lines(tmp_path: Path) -> None:
    line = await store_costs.many_contents(tmp_path / "many", 20)
    assert "       20: first scan" in line
    line = await store_costs.aged_range(tmp_path / "aged", 16 * 1024 * 1024)
    assert line.startswith("1 MiB of 16 MiB, aged: ")


@pytest.mark.row("G4-busy-index")
async def test_benchmark_of_the_index_measures_all_its_rows(tmp_path: Path) -> None:
    lines = await index_costs.measure(tmp_path, 20)
    assert len(lines) == 9
    assert len({line.split("|")[1] for line in lines}) == 9


@pytest.mark.row("G8-start-on-a-full-disk")
async def test_server_that_started_on_a_full_disk_tells_so_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_directory, "_RETRY_INTERVAL_S", 0.0)
    monkeypatch.setattr(housekeeping, "_INDEX_INTERVAL_S", 0.05)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with small_disk(tmp_path / "disk", "20m") as root:
        async with FakeRegistry() as fake:
            names = add_images(fake)
            async with running(root, fake.url) as server:
                await assert_all_are_served(server, names, "from the upstream")
        fill_up(root)
        async with running(root) as server:
            await assert_all_are_served(server, names, "on a full disk")
            _, _, report = await server.get(f"{server.url}/readyz")
            assert b"the index cannot be written" in report
            (root / "filler").unlink()
            await until(lambda: server.store.unwritable_reason is None)
            _, _, report = await server.get(f"{server.url}/readyz")
            assert b"index" not in report
            await assert_all_are_served(server, names, "with room again")
