"""The images that a hosted content belongs to: what is found, and at what cost."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise

import pytest

from mirror.hosted import subject_rows
from mirror.hosted.name_tables import create_schema
from mirror.hosted.subject_rows import find_subjects
from mirror.oci.reference import Digest, Tag

APP = "docker.io/library/app"
IMAGE = Digest.of(b"image")
CONFIG = Digest.of(b"config")


def digest(name: object) -> Digest:
    return Digest.of(str(name).encode())


@pytest.fixture
def names() -> Iterator[sqlite3.Connection]:
    """A database without rows."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        create_schema(connection)
        yield connection


def add(
    names: sqlite3.Connection, manifest: Digest, *parts: Digest, subject: str = "", tag: str = ""
) -> None:
    names.execute(
        "INSERT INTO manifests VALUES (?, ?, '', '', ?, 1, '{}', 0, '', 0, 0)",
        (APP, str(manifest), subject),
    )
    rows = [(APP, str(manifest), str(part), kind) for part in parts for kind in (False, True)]
    names.executemany("INSERT INTO parts VALUES (?, ?, ?, ?)", rows)
    if tag:
        names.execute("INSERT INTO tags VALUES (?, ?, ?, 0, '')", (APP, tag, str(manifest)))


def test_content_belongs_to_the_subjects_and_tags_of_what_is_above_it(
    names: sqlite3.Connection,
) -> None:
    layer, manifest, index, top = map(digest, ("layer", "manifest", "index", "top"))
    tag = f"sha256-{IMAGE.hex}.att"
    add(names, manifest, CONFIG, layer)
    assert find_subjects(names, APP, layer) == []
    add(names, index, manifest, subject=str(CONFIG))
    add(names, top, index, tag=tag)
    for content in (layer, manifest, index):
        assert find_subjects(names, APP, content) == [CONFIG, IMAGE]
    assert find_subjects(names, APP, top) == find_subjects(names, APP, Tag(tag)) == [IMAGE]
    assert find_subjects(names, APP, Tag("sha256-none")) == []
    assert find_subjects(names, "docker.io/library/other", layer) == []
    # A cycle cannot be pushed. If it were there, the search would end.
    names.execute("INSERT INTO parts VALUES (?, ?, ?, 1)", (APP, str(layer), str(top)))
    assert find_subjects(names, APP, layer) == [CONFIG, IMAGE]


def test_search_goes_on_from_subjects_that_may_be_followed(names: sqlite3.Connection) -> None:
    chain = [IMAGE, *(digest(number) for number in range(6))]
    for subject, manifest in pairwise(chain):
        add(names, manifest, CONFIG, subject=str(subject))
    assert find_subjects(names, APP, chain[1]) == [IMAGE]
    # That which the repository does not have is the first one. It is too far from the last one.
    assert find_subjects(names, APP, chain[4]) == [IMAGE, *chain[3:0:-1]]
    assert find_subjects(names, APP, chain[5]) == chain[4:0:-1]
    assert find_subjects(names, APP, chain[4], lambda one: one != chain[2]) == chain[3:1:-1]
    names.execute("UPDATE manifests SET subject = ? WHERE digest = ?", (*map(str, chain[3:1:-1]),))
    assert IMAGE not in find_subjects(names, APP, chain[3]), "a cycle ends"


def test_content_does_not_belong_to_an_image_by_what_may_not_be_followed(
    names: sqlite3.Connection,
) -> None:
    layer, blocked, other = digest("layer"), digest("blocked"), digest("other")
    add(names, blocked, layer, subject=str(IMAGE))
    assert find_subjects(names, APP, layer, lambda one: one != blocked) == []
    add(names, other, layer, subject=str(CONFIG))
    assert find_subjects(names, APP, layer, lambda one: one != blocked) == [CONFIG]


def test_search_reads_few_rows_of_100_000_manifests(names: sqlite3.Connection) -> None:
    names.execute("BEGIN")
    hexes = [f"{number:064x}" for number in range(100_000)]
    names.executemany(
        "INSERT INTO manifests VALUES (?, ?, '', '', ?, 1, '{}', 0, '', 0, 0)",
        ((APP, f"sha256:{name}", str(IMAGE)) for name in hexes),
    )
    parts = ((APP, f"sha256:{name}", str(CONFIG)) for name in hexes)
    names.executemany("INSERT INTO parts VALUES (?, ?, ?, 1)", parts)
    names.execute("COMMIT")
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    names.set_progress_handler(count, 1000)
    assert find_subjects(names, APP, CONFIG) == [IMAGE]
    names.set_progress_handler(None, 0)
    assert steps < 100, "thousands of instructions of SQLite"
    values = {"repository": APP, "names": json.dumps([str(CONFIG)]), "count": 1, "least": 0}
    for query, index in (
        (subject_rows._SUBJECTS, "PRIMARY KEY (repository=? AND digest=?)"),
        (subject_rows._SUBJECT_TAGS, "tags_by_digest (repository=? AND digest=? AND tag>? AND"),
        (
            subject_rows._MANIFESTS_ABOVE,
            "parts_by_digest (repository=? AND digest=? AND is_manifest>?)",
        ),
    ):
        plan = [row[3] for row in names.execute(f"EXPLAIN QUERY PLAN {query}", values)]
        assert plan[0].startswith("SCAN n VIRTUAL TABLE"), plan
        assert index in plan[1], plan


def test_number_of_subjects_is_limited(names: sqlite3.Connection) -> None:
    for number in range(40):
        add(names, digest(number), CONFIG, subject=str(digest(f"subject {number}")))
    assert len(find_subjects(names, APP, CONFIG)) == subject_rows._MAX_SUBJECTS
