"""The commands that list, remove and verify, on a data directory with hosted repositories."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Coroutine
from contextlib import closing
from dataclasses import replace
from os import geteuid
from pathlib import Path
from pwd import getpwuid
from typing import Any

import pytest

from mirror.config.settings import Hosted
from mirror.inventory.json_rows import image_row, streamed_rows
from mirror.inventory.read import open_listing, read_inventory
from mirror.observability.hosted_events import Actor, HostedChange
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.reference import Digest, Tag
from mirror.store.marks import Block, Pin, change_marks, read_marks
from tests.unit.cli.inventory_kit import CONFIG, Site
from tests.unit.history.kit import a_pull, recording
from tests.unit.hosted.kit import ANYBODY, HostedKit, hosted_kit, index_of, manifest_of
from tests.unit.hosted.kit import CONFIG as HOSTED_CONFIG

NAME = "registry.example"
HOSTED = f"hosted: {{name: {NAME}, listen: '127.0.0.1:0', max_size: 1000000}}\n"
LAYERS = (b"first layer" * 100, b"second layer" * 100)
TAGGED = Digest.of(manifest_of(*LAYERS))


@pytest.fixture
def site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Site:
    """Return a directory with ``team/app:v1``, which shares a layer with a cached image."""
    made = Site(tmp_path, capsys)
    made.config.write_text(CONFIG.format(data_dir=made.data.layout.root) + HOSTED)
    made.data.image("docker.io/library/nginx:1", "cached", LAYERS[0], checked=made.now - 5)

    async def push(kit: HostedKit) -> None:
        await kit.push_image(*LAYERS, repository="team/app")

    change(made, push)
    return made


def change(site: Site, work: Callable[[HostedKit], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with hosted_kit(site.data.layout.root, clock=[site.now - 60]) as kit:
            await work(kit)

    asyncio.run(run())


def blob(site: Site, digest: Digest) -> Path:
    return site.data.layout.blob(digest)


def names(site: Site, *arguments: str) -> list[str]:
    return [row["name"] for row in site.rows("ls", *arguments)]


def test_hosted_image_is_listed_with_its_push(site: Site) -> None:
    cached, hosted = site.rows("ls")
    assert cached["name"] == "docker.io/library/nginx:1"
    assert hosted["name"] == f"{NAME}/team/app:v1"
    assert hosted["state"] == ["complete", "hosted"]
    assert (hosted["digest"], hosted["current_digest"]) == (str(TAGGED), str(TAGGED))
    assert (hosted["unique"], hosted["stale_why"], hosted["confirmed"]) == (0, None, None)
    assert hosted["pushed"] is not None
    assert names(site, "--filter", "state=hosted", "*/team/*") == [hosted["name"]]


def test_images_are_listed_one_by_one_as_those_of_an_inventory(site: Site) -> None:
    async def push(kit: HostedKit) -> None:
        for tag in ("v3", "v2", "latest"):
            await kit.push_image(*LAYERS, repository="team/app", tag=tag)
        await kit.push_image(LAYERS[1], repository="team", tag="v1")
        await kit.push_image(LAYERS[1], repository="team/app", tag=None)
        fallback = str(TAGGED).replace(":", "-")
        await kit.push_image(b"list", repository="team/app", tag=fallback)
        subject = {"digest": str(TAGGED), "size": 1, "mediaType": OCI_MANIFEST}
        await kit.push_image(b"sbom", repository="team/app", tag=None, subject=subject)
        lost = await kit.push_image(b"lost", repository="zoo", tag="v1")
        kit.store.layout.blob(lost).unlink()

    change(site, push)
    site.data.image("zzz.example/last:1", "last", b"own")
    site.data.save()
    hosted = Hosted.model_validate({"name": NAME, "listen": "127.0.0.1:0"})
    layout = site.data.layout
    block = Block(f"{NAME}/team/app:v2", "why", 1.0, frozenset())
    for blocks in ({}, {block.target: block}):
        change_marks(layout, lambda marks, new=blocks: replace(marks, blocks=new))
        whole = read_inventory(layout, {}, read_marks(layout), site.now, hosted)
        expected = [image_row(whole, image) for image in whole.images]
        for has_all in (True, False):
            listed = names(site, *(["--all"] if has_all else []))
            wanted = [row for row in expected if has_all or row["kind"] == "image"]
            assert listed == [row["name"] for row in wanted]
        with open_listing(layout, {}, read_marks(layout), site.now, hosted) as listing:
            streamed = list(streamed_rows(listing, has_referrers=True))
            assert {image.is_hosted for image in listing.images} == {False}
        assert streamed == [row for row in expected if "hosted" in row["state"]]
        assert len(streamed) == 9
        assert sum("blocked" in row["state"] for row in streamed) == len(blocks)


def test_explain_says_which_tags_need_hosted_content(site: Site) -> None:
    digests = [Digest.of(LAYERS[1]), TAGGED, Digest.of(b"gone"), Digest.of(b"untagged")]

    async def push(kit: HostedKit) -> None:
        await kit.push_image(LAYERS[1], repository="team/multi", tag=None)
        body = index_of(manifest_of(LAYERS[1]))
        await kit.service.manifests.put(
            "team/multi", Tag("all"), (), body, OCI_INDEX, actor=ANYBODY
        )
        await kit.push_blob(b"untagged", "team/app")

    change(site, push)

    async def record() -> None:
        with recording(site.data.layout.root, site.now) as made:
            for repository in ("team/app", "team/multi"):
                for digest in digests:
                    text, request_id = str(digest), f"{repository}-{digest.hex[:8]}"
                    place = {"upstream": NAME, "repository": repository, "reference": text}
                    made.end(a_pull(request_id=request_id, digest=text, duration=2.0, **place))
            made.write()

    asyncio.run(record())
    found = {
        row["request_id"]: row["sentences"][-1] for row in site.rows("explain", "--last", "20")
    }
    app, multi = f"{NAME}/team/app", f"{NAME}/team/multi"
    gone = "does not have it now: it was deleted, or never pushed there."
    expected = [
        (app, digests[0], f"Hosted: {app} has it, by the tag v1."),
        (app, digests[1], f"Hosted: {app} has it, by the tag v1."),
        (app, digests[2], f"Hosted: {app} {gone}"),
        (app, digests[3], f"Hosted: {app} has it, and no tag names it now."),
        (multi, digests[0], f"Hosted: {multi} has it, by the tag all."),
        (multi, digests[1], f"Hosted: {multi} {gone}"),
    ]
    for repository, digest, sentence in expected:
        path = repository.removeprefix(f"{NAME}/")
        assert found[f"{path}-{digest.hex[:8]}"] == sentence


def test_many_hosted_tags_are_listed_in_flat_memory(site: Site) -> None:
    tags = 30_000
    with closing(sqlite3.connect(site.data.layout.hosted_names)) as database, database:
        (row,) = database.execute("SELECT repository, digest, pushed_at, pushed_by FROM tags")
        database.executemany(
            "INSERT INTO tags (repository, tag, digest, pushed_at, pushed_by)"
            " VALUES (?, ?, ?, ?, ?)",
            [(row[0], f"v2.{number}", *row[1:]) for number in range(tags)],
        )
    site.data.save()
    code = (
        "import sys\n"
        "from mirror.cli.main import main\n"
        f"assert main(['ls', '--config', {str(site.config)!r}]) == 0\n"
        "status = open('/proc/self/status').read()\n"
        "print(status.partition('VmHWM:')[2].split()[0], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert done.stdout.count(b"\n") == tags + 3
    assert int(done.stderr) * 1024 < 75_000_000, "more than 110 MB with all rows in memory"


def test_manifest_that_an_index_lists_is_no_row_of_its_own(site: Site) -> None:
    async def push(kit: HostedKit) -> None:
        child = await kit.push_image(LAYERS[1], repository="team/multi", tag=None)
        body = index_of(manifest_of(LAYERS[1]))
        await kit.service.manifests.put(
            "team/multi", Digest.of(body), (), body, OCI_INDEX, Actor("ci")
        )
        assert child == Digest.of(manifest_of(LAYERS[1]))

    change(site, push)
    index = Digest.of(index_of(manifest_of(LAYERS[1])))
    assert names(site, "multi*") == []
    (row,) = site.rows("ls", "team/multi*")
    assert (row["name"], row["pushed_by"]) == (f"{NAME}/team/multi@{index}", "ci")


def test_manifest_that_an_image_has_as_a_layer_is_a_row_of_its_own(site: Site) -> None:
    body = manifest_of(LAYERS[1])

    async def push(kit: HostedKit) -> None:
        await kit.push_image(LAYERS[1], repository="team/both", tag=None)
        await kit.push_blob(body, "team/both")
        await kit.push_image(body, repository="team/both")

    change(site, push)
    rows = site.rows("ls", "team/both*")
    name = f"{NAME}/team/both@{Digest.of(body)}"
    assert {row["name"] for row in rows} == {f"{NAME}/team/both:v1", name}
    assert [row["type"] for row in site.rows("show", name)] == ["manifest", "config", "layer"]
    assert site.lines("rm", name)[0].startswith(f"removed {name}")
    assert names(site, "team/both*") == [f"{NAME}/team/both:v1"]


def test_show_has_the_parts_of_a_hosted_image_and_who_shares_them(site: Site) -> None:
    rows = site.rows("show", f"{NAME}/team/app:v1")
    assert [row["type"] for row in rows] == ["manifest", "config", "layer", "layer"]
    shared = {row["digest"]: row["shared_with"] for row in rows}
    assert shared[str(Digest.of(LAYERS[0]))] == ["docker.io/library/nginx:1"]


def test_hosted_images_are_not_listed_without_the_section_and_keep_their_content(
    site: Site,
) -> None:
    site.config.write_text(CONFIG.format(data_dir=site.data.layout.root))
    assert names(site) == ["docker.io/library/nginx:1"]
    assert all(row["reclaimable"] == 0 for row in site.rows("du") if row["kind"] == "type")


def test_du_counts_hosted_content_with_its_own_quota(site: Site) -> None:
    line = next(line for line in site.lines("du") if line.startswith("hosted"))
    assert line.startswith(
        "hosted: 2.8KiB, 14.4KiB of metadata, and 0B reserved by 0 uploads, of 976.6KiB (2%)"
    )
    assert line.endswith("; it is never evicted")
    total = next(row["bytes"] for row in site.rows("du") if row["kind"] == "hosted")
    assert total == sum(map(len, (*LAYERS, HOSTED_CONFIG, manifest_of(*LAYERS))))
    assert all(row["reclaimable"] == 0 for row in site.rows("du") if row["kind"] == "type")
    evicted = {row["digest"] for row in site.rows("du", "-v") if row["kind"] == "eviction"}
    assert str(TAGGED) not in evicted


def test_uploads_in_progress_are_listed_with_their_user_and_progress(site: Site) -> None:
    async def begin(kit: HostedKit) -> None:
        upload = await kit.service.uploads.begin("team/app", "ci", 100)
        feed = await kit.service.uploads.open(upload, "team/app", "ci")
        await feed.write(b"x" * 40)
        await feed.flush()
        feed.close()

    change(site, begin)
    (row,) = site.rows("ls", "--uploads")
    assert (row["repository"], row["user"]) == (f"{NAME}/team/app", "ci")
    assert (row["size"], row["reserved"]) == (40, 40)  # No request feeds it: only its bytes count.
    assert 60 <= row["age"] < 120
    assert site.rows("ls", "--uploads", "other/*") == []
    assert "uploads" in next(line for line in site.lines("du") if line.startswith("hosted"))


def test_rm_of_an_upload_cancels_that_of_any_user(site: Site) -> None:
    async def begin(kit: HostedKit) -> None:
        for user in ("ci", "other"):
            await kit.service.uploads.begin("team/app", user, 100)

    change(site, begin)
    first, other = (row["id"] for row in site.rows("ls", "--uploads"))
    assert site.lines("rm", "--upload", first) == [
        f"removed {first} (0B): the upload was cancelled"
    ]
    assert [row["id"] for row in site.rows("ls", "--uploads")] == [other]
    assert not (site.data.layout.uploads / first).exists()
    code, _, errors = site.run("rm", "--upload", first)
    assert code == 1
    assert errors.count("\n") == 1
    assert "there is no such upload" in errors
    assert "`oci-mirror ls --uploads` lists them" in errors
    assert site.run("rm")[0] == site.run("rm", "--upload", other, f"{NAME}/team/app:v1")[0] == 2


def test_uploads_without_hosted_repositories_are_an_error_with_a_remedy(site: Site) -> None:
    site.config.write_text(CONFIG.format(data_dir=site.data.layout.root))
    code, _, errors = site.run("ls", "--uploads")
    assert code == 1
    assert errors == (
        "oci-mirror: there are no hosted repositories: the configuration has no hosted\n"
    )


def test_rm_of_a_tag_leaves_the_manifest_and_rm_of_the_digest_deletes_it(site: Site) -> None:
    first, stays, last = site.lines("rm", f"{NAME}/team/app:v1")
    assert first == f"removed {NAME}/team/app:v1 (0B): hosted, as asked for"
    assert stays.endswith("its manifest stays: remove NAME@DIGEST to free its content")
    assert last == "1 image removed, 0B freed"
    assert names(site, "team/app*") == [f"{NAME}/team/app@{TAGGED}"]
    assert "no other image needs" in "".join(site.lines("rm", f"{NAME}/team/app@{TAGGED}"))
    assert names(site, "team/app*") == []
    assert blob(site, TAGGED).exists(), "its blobs are still in the repository"


def told(site: Site) -> list[HostedChange]:
    """Return the changes that the next server tells of."""
    changes: list[HostedChange] = []

    async def start(kit: HostedKit) -> None:
        changes.extend(await kit.emitted_changes())

    change(site, start)
    return changes


def test_next_server_tells_of_the_changes_of_commands_and_their_user(site: Site) -> None:
    site.lines("rm", f"{NAME}/team/app:v1")
    site.lines("rm", f"{NAME}/team/app@{TAGGED}")
    user = f"local:{getpwuid(geteuid()).pw_name}"
    assert [(one.action, one.tag, one.digest, one.user, one.client) for one in told(site)] == [
        ("delete", "v1", TAGGED, user, ""),
        ("delete", "", TAGGED, user, ""),
    ]
    assert told(site) == []


def test_immutable_image_is_removed_with_force_only(site: Site) -> None:
    rules = f"hosted: {{name: {NAME}, listen: '127.0.0.1:0', immutable_tags: ['**:v*']}}\n"
    site.config.write_text(CONFIG.format(data_dir=site.data.layout.root) + rules)
    for name in (f"{NAME}/team/app:v1", f"{NAME}/team/app@{TAGGED}"):
        code, out, _ = site.run("rm", name)
        assert code == 1
        assert "kept" in out
        assert "the tag v1 is immutable: only an admin can delete it, with --force" in out
        code, out, _ = site.run("rm", "--dry-run", name)
        assert code == 1
        assert "the tag v1 is immutable: only an admin can delete it, with --force" in out
        assert site.lines("rm", "--dry-run", "--force", name)[0].startswith("would remove")
    assert names(site, "team/app*") == [f"{NAME}/team/app:v1"]
    site.lines("rm", "--force", f"{NAME}/team/app:v1")
    assert names(site, "team/app*") == [f"{NAME}/team/app@{TAGGED}"]
    assert [one.tag for one in told(site)] == ["v1"]


def test_dry_run_of_rm_deletes_no_hosted_image(site: Site) -> None:
    assert site.lines("rm", "--dry-run", f"{NAME}/team/app:v1")[0].startswith("would remove")
    assert names(site, "team/app*") == [f"{NAME}/team/app:v1"]


def test_rm_of_a_cached_image_leaves_what_a_hosted_one_shares(site: Site) -> None:
    (row,) = site.rows("ls", "nginx*")
    removed = site.lines("rm", "docker.io/library/nginx:1")
    assert any("shared by" in line for line in removed)
    assert blob(site, Digest.of(LAYERS[0])).exists()
    assert not blob(site, Digest.parse(row["digest"])).exists()


def test_prune_is_not_about_hosted_images(site: Site) -> None:
    _, out, _ = site.run("prune", "--older-than", "1s", "--dry-run")
    assert NAME not in out


def test_verify_says_that_nothing_restores_damaged_hosted_content(site: Site) -> None:
    blob(site, Digest.of(LAYERS[1])).write_bytes(b"wrong")
    code, out, _ = site.run("verify")
    assert code == 1
    assert "push the image again, or restore it from a backup" in out
    assert "repair it with" not in out
    # It is in quarantine now.
    code, out, _ = site.run("verify", "--json", f"{NAME}/team/app:v1")
    (problem,) = map(json.loads, out.splitlines())
    assert (code, problem["problem"], problem["is_hosted"]) == (1, "damaged", True)
    assert problem["command"] is None


def test_verify_reports_broken_hosted_content_of_no_image_in_each_run_until_it_is_pushed(
    site: Site,
) -> None:
    body = b"no manifest names it yet"

    async def push(kit: HostedKit) -> None:
        await kit.push_blob(body, "team/app")

    def verified() -> tuple[int, list[tuple[str, str]]]:
        code, out, _ = site.run("verify", "--json")
        rows = [json.loads(line) for line in out.splitlines()]
        assert all(row["is_hosted"] and "push the image again" in row["what"] for row in rows)
        return code, [(row["problem"], row["digest"]) for row in rows]

    digest = Digest.of(body)
    change(site, push)
    assert verified() == (0, [])
    blob(site, digest).write_bytes(b"wrong")
    for _ in range(2):
        assert verified() == (1, [("damaged", str(digest))])
    site.run("gc", "--grace", "0s")
    assert verified() == (1, [("damaged", str(digest))])
    # As if later damage had taken its place in quarantine/.
    site.data.layout.quarantine(digest).unlink()
    for _ in range(2):
        assert verified() == (1, [("lost", str(digest))])
    change(site, push)
    assert verified() == (0, [])


@pytest.mark.parametrize(
    "words",
    [
        ("pin", f"{NAME}/team/app:v1"),
        ("pin", f"{NAME}/team/app@{TAGGED}"),
        ("freeze", f"{NAME}/team/app:v1"),
        ("rollback", f"{NAME}/team/app:v1", "--to", str(TAGGED)),
    ],
)
def test_hosted_image_is_refused_a_mark_that_it_does_not_need(
    site: Site, words: tuple[str, ...]
) -> None:
    code, out, errors = site.run(*words)
    assert (code, out) == (2, "")
    assert "is hosted here: it is never evicted, and needs no pin" in errors
    assert site.rows("pin") == []


def test_pin_of_an_image_that_is_hosted_since_then_is_not_absent(site: Site) -> None:
    pins = {
        name: Pin(name, Digest.of(name.encode()), 1.0)
        for name in (f"{NAME}/team/app:v1", f"{NAME}/team/gone:v1", "docker.io/library/gone:v1")
    }
    change_marks(site.data.layout, lambda marks: replace(marks, pins=pins))
    absent = names(site, "--all", "--filter", "state=absent")
    assert absent == ["docker.io/library/gone:v1"]
    _, out, _ = site.run("verify")
    assert f"absent {NAME}" not in out


def test_block_of_a_hosted_repository_gets_no_warning(site: Site) -> None:
    _, _, errors = site.run("block", f"{NAME}/team/*")
    assert errors == ""


def test_block_of_a_hosted_tag_has_the_digest_of_its_image(site: Site) -> None:
    _, _, errors = site.run("block", f"{NAME}/team/app:v1")
    assert errors == ""
    (block,) = read_marks(site.data.layout).blocks.values()
    assert block.digests == {TAGGED}
    _, _, errors = site.run("block", f"{NAME}/team/app:missing")
    assert "the tag is not here: its digest is not refused under other names" in errors


def test_verify_names_the_command_if_an_upstream_has_the_content_too(site: Site) -> None:
    blob(site, Digest.of(LAYERS[0])).write_bytes(b"wrong")
    _, out, _ = site.run("verify")
    assert "repair it with: oci-mirror verify --repair docker.io/library/nginx:1" in out


def test_hosted_image_whose_manifest_is_lost_is_listed_as_partial(site: Site) -> None:
    blob(site, TAGGED).unlink()
    (row,) = site.rows("ls", "team/app*")
    assert row["state"] == ["partial", "hosted"]
    assert site.run("verify")[0] == 1


def test_damaged_names_are_an_error_and_no_empty_list(site: Site) -> None:
    path = site.data.layout.hosted_names
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(b"no database at all" * 100)
    code, out, errors = site.run("ls")
    assert (code, out) == (1, "")
    assert "names.db cannot be read" in errors
    assert "oci-mirror doctor says how to restore it" in errors
