"""Names with the beginning of a digest, as arguments of commands."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mirror.oci.reference import Digest
from mirror.store.marks import read_marks
from tests.unit.cli.inventory_kit import CONFIG, Site
from tests.unit.hosted.kit import hosted_kit, manifest_of
from tests.unit.inventory.kit import text

HOSTED = "hosted: {name: registry.example, listen: '127.0.0.1:0'}\n"


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Site:
    """Return a directory with a hosted image."""
    made = Site(tmp_path, capsys)
    made.config.write_text(CONFIG.format(data_dir=made.data.layout.root) + HOSTED)

    async def push() -> None:
        async with hosted_kit(made.data.layout.root, clock=[made.now - 60]) as kit:
            await kit.push_image(b"layer", repository="team/app")

    asyncio.run(push())
    return made


def test_commands_take_the_beginning_of_a_digest(site: Site) -> None:
    digest = text(site.data.image("app:v1", "one", b"layer one"))
    site.data.image("app:v2", "two", b"layer two")
    site.data.image("other:v1", "one", b"layer one")
    short = f"app@{digest[:19]}"
    whole = f"docker.io/library/app@{digest}"
    assert site.rows("show", short)[0]["digest"] == digest
    assert site.run("verify", short)[0] == 0
    assert site.run("explain", short)[2].startswith("oci-mirror: the history is empty")
    assert site.lines("pin", short) == [f"pinned {whole}"]
    assert list(read_marks(site.data.layout).pins) == [whole]
    assert site.lines("unpin", short) == [f"unpinned {whole}"]
    removed = site.rows("rm", short, "--dry-run")
    assert [row["name"] for row in removed if row["kind"] == "image"] == [
        "docker.io/library/app:v1"
    ]


def test_hosted_manifest_is_named_so_too(site: Site) -> None:
    digest = str(Digest.of(manifest_of(b"layer")))
    rows = site.rows("show", f"registry.example/team/app@{digest[:12]}")
    assert rows[0]["digest"] == digest


def test_beginning_of_several_digests_is_refused_and_names_some(site: Site) -> None:
    path = site.data.layout.hosted_names
    digests = [f"sha256:abcd{number}{'0' * 59}" for number in range(4)]
    with closing(sqlite3.connect(path)) as database, database:
        columns = "repository, media_type, artifact_type, subject, size, annotations, pushed_at"
        database.executemany(
            f"INSERT INTO manifests ({columns}, pushed_by, digest)"
            " VALUES ('team/app', '', '', '', 1, '{}', 0, '', ?)",
            [(digest,) for digest in digests],
        )
    code, out, err = site.run("show", "registry.example/team/app@sha256:abcd")
    assert (code, out) == (1, "")
    assert err == (
        "oci-mirror: registry.example/team/app@sha256:abcd is the beginning of"
        f" {', '.join(digests[:3])}, and others: write more of its digits\n"
    )
    (row,) = site.rows("show", "registry.example/team/app@sha256:abcd1")
    assert row["digest"] == digests[1]


def test_beginning_of_no_digest_is_refused(site: Site) -> None:
    site.data.image("app:v1", "one", b"layer one")
    code, _, err = site.run("rm", "app@sha256:abcdabcd")
    assert code == 1
    assert err == (
        "oci-mirror: no manifest of docker.io/library/app has a digest that begins with"
        " sha256:abcdabcd: `oci-mirror ls --all --no-trunc` prints them whole\n"
    )
    assert site.run("rm", "app@sha256:abc")[0] == 2, "fewer than four digits"
    assert site.run("rm", "app@sha256:ABCD")[0] == 2


def test_look_up_uses_an_index_of_each_database(site: Site) -> None:
    site.data.image("app:v1", "one", b"layer one")
    site.data.save()
    layout = site.data.layout
    for path, query in (
        (layout.index / "named" / "cache.db", "SELECT key FROM Cache WHERE key >= '' AND key < ''"),
        (
            layout.hosted_names,
            "SELECT digest FROM manifests WHERE repository = '' AND digest >= '' AND digest < ''",
        ),
    ):
        with closing(sqlite3.connect(path)) as database:
            plan = database.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
        assert [row[3].startswith("SEARCH") for row in plan] == [True], plan
