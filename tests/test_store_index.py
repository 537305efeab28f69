"""The index: text only, lost without harm, refused pickles."""

from __future__ import annotations

import os
import pickle
import sqlite3
from pathlib import Path

import pytest

from mirror.events import Event
from mirror.oci.digest import Digest
from mirror.oci.reference import Repository, Tag
from mirror.store.index import Index
from mirror.store.records import LEDGER_LIMIT, Membership, confirm

REPO = Repository("docker.io", "library/app")
TAG = Tag("1.0")
ONE, TWO = Digest.of(b"one"), Digest.of(b"two")


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


async def test_what_was_put_is_there_after_a_restart(tmp_path: Path) -> None:
    events: list[Event] = []
    index = await Index.open(tmp_path / "index", events.append)
    record = confirm(None, REPO, TAG, ONE, 1.0)
    await index.put_tag(record)
    await index.put_memberships(REPO, [Membership(ONE, "manifest", "a/b", 3, None, None)])
    await index.set_verified([(ONE, 5.0)])
    await index.pin([ONE])
    await index.close()
    index = await Index.open(tmp_path / "index", events.append)
    assert await index.tag(REPO, TAG) == record
    assert await index.tags_of(REPO) == [TAG]
    known = await index.membership(REPO, ONE)
    assert known
    assert known.media_type == "a/b"
    assert [named.name for named in await index.manifests()] == [
        f"{REPO}@{ONE}",
        "docker.io/library/app:1.0",
    ]
    assert await index.verified_at(ONE) == 5.0
    assert await index.pinned() == {ONE}
    await index.withdraw(REPO, ONE)
    await index.pin([ONE], pinned=False)
    assert await index.membership(REPO, ONE) is None
    assert await index.pinned() == set()
    await index.close()
    assert not events


@pytest.mark.row("M10")
async def test_a_planted_pickle_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    events: list[Event] = []
    index = await Index.open(tmp_path / "index", events.append)
    await index.put_tag(confirm(None, REPO, TAG, ONE, 1.0))
    await index.close()
    target = tmp_path / "unpickled"
    database = sqlite3.connect(tmp_path / "index" / "named" / "cache.db")
    with database:
        database.execute("UPDATE Cache SET mode = 4, value = ?", (pickle.dumps(Evil(str(target))),))
    database.close()
    index = await Index.open(tmp_path / "index", events.append)
    assert await index.tag(REPO, TAG) is None
    assert await index.tag_records() == []
    await index.close()
    assert not target.exists()
    assert events


@pytest.mark.row("M10")
async def test_a_busy_database_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.store.rows._BUSY", 0.1)
    events: list[Event] = []
    index = await Index.open(tmp_path / "index", events.append)
    await index.put_tag(confirm(None, REPO, TAG, ONE, 1.0))
    other = sqlite3.connect(tmp_path / "index" / "named" / "cache.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    await index.put_tag(confirm(None, REPO, TAG, TWO, 2.0))
    assert events, "it was dropped, and noted"
    other.execute("ROLLBACK")
    other.close()
    await index.put_tag(confirm(None, REPO, TAG, TWO, 2.0))
    record = await index.tag(REPO, TAG)
    assert record
    assert record.digest == TWO
    await index.close()


def test_a_ledger_is_bounded() -> None:
    record = None
    for number in range(100):
        record = confirm(record, REPO, TAG, Digest.of(str(number).encode()), float(number))
    assert record
    assert len(record.ledger) == LEDGER_LIMIT
    assert record.ledger[0].digest == Digest.of(b"98")
