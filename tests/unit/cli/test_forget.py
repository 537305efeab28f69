"""``forget``: what it prints, its exit codes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import jsonschema
import pytest

from mirror.cli.schemas import SCHEMAS
from mirror.oci.reference import Digest
from mirror.store.layout import Layout
from mirror.store.marks import Marks, Pin, change_marks
from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry
from tests.unit.cli.kit import Run, make_data_directory, make_run

NAME = "docker.io/library/app:v1"


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    make_data_directory(tmp_path / "data")
    return make_run(tmp_path, capsys)


async def test_forgotten_image_is_one_line_with_what_was_known(run: Run) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"one", tag="v1")
        await run_in_thread(run, registry.url, "warm", "app:v1", "app:v2")
        known = await run_in_thread(run, registry.url, "forget", "app:v1")
        unknown = await run_in_thread(run, registry.url, "forget", "app:v1")
        refused = await run_in_thread(run, registry.url, "forget", "app:v2")

    assert known.out == f"{NAME}  forgotten  1 tag, 1 manifest, 2 blobs\n"
    assert unknown.out == f"{NAME}  nothing was known\n"
    assert refused.out.endswith("app:v2  forgotten  1 404 response\n")
    assert (known.code, unknown.code, refused.code) == (0, 0, 0)


async def test_repository_is_forgotten_with_all_tags(run: Run) -> None:
    async with FakeRegistry() as registry:
        for tag in ("v1", "v2"):
            registry.add_image(tag.encode(), tag=tag)
        await run_in_thread(run, registry.url, "warm", "app:v1", "app:v2")
        result = await run_in_thread(run, registry.url, "forget", "--all-tags", "app", "--json")

    row = json.loads(result.out)
    jsonschema.validate(row, SCHEMAS["forget"])
    assert (row["image"], row["tags"]) == ("docker.io/library/app", ["v1", "v2"])


async def test_pinned_image_is_refused_and_index_json_keeps_no_forgotten_name(
    run: Run, tmp_path: Path
) -> None:
    pin = Pin(NAME, Digest.of(b"x"), time.time())
    async with FakeRegistry() as registry:
        for tag in ("v1", "v2"):
            registry.add_image(tag.encode(), tag=tag)
        await run_in_thread(run, registry.url, "warm", "app:v1", "app:v2")
        change_marks(Layout(tmp_path / "data"), lambda marks: Marks(pins={NAME: pin}))
        result = await run_in_thread(run, registry.url, "forget", "app:v1", "app:v2")
        as_json = await run_in_thread(run, registry.url, "forget", "--json", "app:v1")

    assert result.code == as_json.code == 1
    assert (
        result.err == f"oci-mirror: {NAME}: {NAME} is pinned: run `oci-mirror unpin {NAME}` first\n"
    )
    row = json.loads(as_json.out)
    jsonschema.validate(row, SCHEMAS["forget"])
    assert "pinned" in row["error"]
    saved = (tmp_path / "data" / "index.json").read_text()
    assert "app:v1" in saved
    assert "app:v2" not in saved


def test_tag_beside_all_tags_is_wrong_usage(run: Run) -> None:
    result = run("http://127.0.0.1:9", "forget", "--all-tags", "app:v1")

    assert result.code == 2
    assert "write docker.io/library/app" in result.err


def test_directory_that_is_no_data_directory_is_a_failure(run: Run, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data")
    result = run("http://127.0.0.1:9", "forget", "app:v1")

    assert result.code == 1
    assert "is no data directory of a mirror" in result.err
    assert not (tmp_path / "data").exists()
