"""Answers about a store and its history, and the process that gives them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from mirror.admin.hosted_uploads import HostedUploads
from mirror.admin.openapi import document
from mirror.admin.problems import ApiProblem
from mirror.admin.sources import ImageQuery, PullQuery
from mirror.admin.store_answers import StoreAnswers
from mirror.admin.store_reader import ReadHistory, ReadImages, StoreReader, reader_settings
from mirror.config.settings import Settings
from mirror.history.user_uses import UserUse, UserUses
from mirror.observability.events import Outcome
from mirror.oci.errors import InvalidRequest, NotFound
from mirror.oci.reference import Digest
from mirror.store.layout import Layout
from mirror.store.marks import Pin
from tests.unit.history.kit import NOON, a_pull, recording
from tests.unit.hosted.kit import hosted_kit
from tests.unit.inventory.kit import NOW, DataDirectory, content

SECRET = "a-password-of-the-tests"


def settings(root: Path) -> Settings:
    credentials = {"username": "me", "password": SECRET}
    hub = {"endpoints": ["https://r.example"], "credentials": credentials}
    return Settings.model_validate(
        {"data_dir": str(root), "storage": {"max_size": 10_000}, "upstreams": {"docker.io": hub}}
    )


def check(name: str, answer: object) -> None:
    """Hold an answer to its schema in the OpenAPI document."""
    resource = Resource(contents=document(), specification=DRAFT202012)
    registry: Registry[Any] = Registry().with_resource("urn:api", resource)
    schema = {"$ref": f"urn:api#/components/schemas/{name}"}
    Draft202012Validator(schema, registry=registry).validate(answer)


def filled(root: Path) -> DataDirectory:
    directory = DataDirectory(root)
    shared = content("shared", 1000)
    directory.image("app:v1", "1", content("one", 300), shared)
    directory.image("app:v2", "2", content("two", 200), shared)
    directory.image("other:v1", "3", content("three", 4000))
    directory.remove(content("three", 4000))
    directory.add(content("orphan", 50))
    directory.save()
    return directory


def page(**more: Any) -> ImageQuery:
    given: dict[str, Any] = {
        "search": "",
        "state": "",
        "sort": "name",
        "is_descending": False,
        "offset": 0,
        "limit": 50,
    }
    return ImageQuery(**{**given, **more})


@pytest.mark.parametrize(
    ("more", "names", "matching"),
    [
        ({}, ["app:v1", "app:v2", "other:v1"], 3),
        ({"search": "APP"}, ["app:v1", "app:v2"], 2),
        ({"sort": "unique", "is_descending": True}, ["other:v1", "app:v1", "app:v2"], 3),
        ({"sort": "size", "is_descending": True, "limit": 1}, ["app:v1"], 3),
        ({"offset": 1, "limit": 1}, ["app:v2"], 3),
        ({"state": "partial"}, ["other:v1"], 1),
        ({"state": "complete"}, ["app:v1", "app:v2"], 2),
        ({"state": "pinned"}, [], 0),
        ({"state": "referrer"}, [], 0),
    ],
)
def test_page_of_images_is_searched_sorted_and_cut(
    tmp_path: Path, more: dict[str, Any], names: list[str], matching: int
) -> None:
    filled(tmp_path)
    queries = StoreAnswers(DataDirectory(tmp_path).layout, settings(tmp_path), lambda: NOW)
    found = queries.find(page(**more))
    check("Images", found)
    shown = [image["name"].removeprefix("docker.io/library/") for image in found["images"]]
    if more.get("sort") != "unique":
        assert shown == names
    assert (sorted(shown), found["matching"], found["total"]) == (sorted(names), matching, 3)


def test_image_is_shown_with_its_parts_and_who_shares_them(tmp_path: Path) -> None:
    queries = StoreAnswers(filled(tmp_path).layout, settings(tmp_path), lambda: NOW)
    shown = queries.show("app:v1")
    check("ImageTree", shown)
    assert [node["type"] for node in shown["nodes"]] == ["manifest", "config", "layer", "layer"]
    assert shown["nodes"][-1]["shared_with"] == ["docker.io/library/app:v2"]
    assert [node["is_cached"] for node in queries.show("other:v1")["nodes"]] == [True, True, False]
    with pytest.raises(NotFound):
        queries.show("app:v3")
    with pytest.raises(InvalidRequest):
        queries.show("UPPER")


def test_tags_whose_content_is_gone_are_found_by_their_state(tmp_path: Path) -> None:
    directory = filled(tmp_path)
    directory.remove(directory.image("gone:v1", "4"))
    directory.save()
    queries = StoreAnswers(directory.layout, settings(tmp_path), lambda: NOW)
    (image,) = queries.find(page(state="absent"))["images"]
    assert image["name"] == "docker.io/library/gone:v1"
    assert image["state"] == ["absent"]
    every = queries.find(page())
    assert (every["lost"], "gone:v1" in str(every["images"])) == (0, False)


def test_lost_images_are_listed_as_ls_lists_them(tmp_path: Path) -> None:
    directory = filled(tmp_path)
    body = directory.image("gone:v1", "4")
    directory.save()
    name, digest = "docker.io/library/gone:v1", Digest.of(body)
    directory.mark(lambda marks: replace(marks, pins={name: Pin(name, digest, 1.0)}))
    directory.remove(body)
    queries = StoreAnswers(directory.layout, settings(tmp_path), lambda: NOW)
    found = queries.find(page(search="gone"))
    check("Images", found)
    assert (found["lost"], found["matching"]) == (1, 1)
    (image,) = found["images"]
    assert (image["state"], image["absent_why"]) == (
        ["absent", "pinned"],
        "it is lost, although a mark keeps it",
    )
    assert queries.find(page(state="partial", search="gone"))["images"] == []
    shown = queries.show("gone:v1")
    check("ImageTree", shown)
    assert [node["is_cached"] for node in shown["nodes"]] == [False]


def test_usage_says_what_goes_next(tmp_path: Path) -> None:
    queries = StoreAnswers(filled(tmp_path).layout, settings(tmp_path), lambda: NOW)
    usage = queries.usage()
    check("Usage", usage)
    assert usage["quota"] == 10_000
    assert {"type": "other", "total": 1, "active": 0, "size": 50, "reclaimable": 50} in usage[
        "rows"
    ]
    assert usage["next"]
    assert usage["upstreams"][0]["images"] == 3


async def test_hosted_images_and_uploads_are_shown(tmp_path: Path) -> None:
    layout = filled(tmp_path).layout
    async with hosted_kit(tmp_path, clock=[NOW - 60]) as kit:
        await kit.push_image(b"layer", repository="team/app")
        await kit.service.uploads.begin("team/app", "ci", 100)
        given = settings(tmp_path).model_copy(update={"hosted": kit.service.settings})
        queries = StoreAnswers(layout, given, lambda: NOW)
        (image,) = queries.find(page(state="hosted"))["images"]
        assert image["name"] == "registry.example/team/app:v1"
        usage = queries.usage()
        check("Usage", usage)
        assert (usage["hosted"]["uploads"], usage["hosted"]["reserved"]) == (1, 100)
        check("Uploads", {"uploads": queries.uploads()})
        (upload,) = queries.uploads()
        assert (upload["user"], upload["size"], upload["age"]) == ("ci", 0, 60)
        uploads = HostedUploads(cast(Any, SimpleNamespace(hosted=kit.service)))
        ended = await uploads.end(upload["id"])
        check("Changed", ended)
        assert ended["text"].startswith(f"cancelled the upload {upload['id']}")
        assert queries.uploads() == []
        for upload_id in (upload["id"], "..", "x"):
            with pytest.raises(NotFound, match="no such upload"):
                await uploads.end(upload_id)
    with pytest.raises(NotFound, match="nothing is hosted"):
        await HostedUploads(cast(Any, SimpleNamespace(hosted=None))).end("x")


def test_latest_users_and_their_number_are_listed(tmp_path: Path) -> None:
    queries = StoreAnswers(Layout(tmp_path), settings(tmp_path), lambda: NOW)
    assert queries.users(limit=50) == {"users": [], "total": 0}
    uses = UserUses(Layout(tmp_path), lambda: NOW)
    for number in range(5):
        uses._uses[f"user-{number}"] = UserUse(f"user-{number}", NOW + number, None, 3)
    uses.save()
    found = queries.users(limit=2)
    check("Users", found)
    assert ([one["user"] for one in found["users"]], found["total"]) == (["user-4", "user-3"], 5)


def test_inventory_is_read_again_when_it_is_old_or_something_was_changed(tmp_path: Path) -> None:
    now, directory = NOW, filled(tmp_path)
    queries = StoreAnswers(directory.layout, settings(tmp_path), lambda: now)
    first = queries.inventory()
    assert queries.inventory() is first
    queries.forget()
    second = queries.inventory()
    assert second is not first
    now += 3600
    assert queries.inventory() is not second


async def test_history_is_shown_explained_and_summed_up(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        for outcome in (Outcome.MISS, Outcome.HIT, Outcome.DENIED):
            made.now += 1
            made.end(a_pull(request_id=outcome.value, client="10.0.0.1", outcome=outcome))
            made.recorder.hand_over()
        made.write()
        queries = StoreAnswers(made.layout, settings(tmp_path), lambda: made.now + 1)
        pulls = queries.pulls(PullQuery("app", "10.0.0.0/24", ("hit", "miss"), None, 10))
        check("Pulls", {"pulls": pulls})
        assert [one["id"] for one in pulls] == ["hit", "miss"]
        timeline = queries.pull("miss")
        check("Timeline", timeline)
        assert timeline["explanation"][0].startswith("Miss")
        assert [one["id"] for one in queries.refused(5)] == ["denied"]
        for period, points in (("hour", 60), ("day", 144), ("month", 120)):
            savings = queries.savings(period)
            check("Savings", savings)
            assert len(savings["points"]) == points
            assert sum(point["requests"] for point in savings["points"]) == 3
            assert savings["totals"]["hit_ratio"] == 0.5
        with pytest.raises(NotFound):
            queries.pull("none")
        with pytest.raises(InvalidRequest):
            queries.pulls(PullQuery("", "nonsense", (), None, 10))
        with pytest.raises(InvalidRequest):
            queries.tag_digests("app@sha256:" + "a" * 64)
    assert made.now - NOON < 60


# --- the process ----------------------------------------------------------------------------------


async def test_process_answers_and_is_started_again_when_it_has_ended(tmp_path: Path) -> None:
    filled(tmp_path)
    reader = StoreReader(lambda: settings(tmp_path), str(tmp_path))
    images, history = ReadImages(reader), ReadHistory(reader)
    try:
        assert (await images.find(page(search="other")))["matching"] == 1
        images.forget_read()
        assert (await images.usage())["quota"] == 10_000
        with pytest.raises(ApiProblem, match="is not in the cache") as raised:
            await images.show("app:v9")
        assert raised.value.status == 404
        assert await history.refused(5) == []
        assert reader._process is not None
        reader._process.kill()
        await reader._process.wait()
        with pytest.raises(ApiProblem, match="has ended: try again") as raised:
            await history.pulls(PullQuery("", "", (), None, 5))
        assert raised.value.status == 503
        assert await history.pulls(PullQuery("", "", (), None, 5)) == []
    finally:
        await reader.close()


def test_process_gets_no_login(tmp_path: Path) -> None:
    given = reader_settings(settings(tmp_path), "/data")
    assert SECRET not in json.dumps(given)
    assert given["data_dir"] == "/data"
