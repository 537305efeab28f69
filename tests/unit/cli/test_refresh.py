"""``refresh``: what it prints, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from mirror.cli.schemas import SCHEMAS
from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry
from tests.unit.cli.kit import Run, make_data_directory, make_run

NAME = "docker.io/library/app:v1"


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    make_data_directory(tmp_path / "data")
    run_command = make_run(tmp_path, capsys)
    return lambda url, *arguments: run_command(url, "refresh", *arguments)


async def test_new_unchanged_and_moved_tags_are_one_line_each(run: Run) -> None:
    async with FakeRegistry() as registry:
        first = registry.add_image(b"one", tag="v1")
        new = await run_in_thread(run, registry.url, "app:v1")
        same = await run_in_thread(run, registry.url, "app:v1")
        second = registry.add_image(b"two", tag="v1")
        moved = await run_in_thread(run, registry.url, "app:v1")

    assert new.out == f"{NAME}  new  {first}\n"
    assert same.out == f"{NAME}  unchanged  {first}\n"
    assert moved.out == f"{NAME}  moved  from {first} to {second}\n"
    assert (new.code, same.code, moved.code) == (0, 0, 0)


async def test_failure_is_one_line_and_the_others_are_asked(run: Run) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"one", tag="v1")
        result = await run_in_thread(run, registry.url, "app:v2", "app:v1")

    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert result.out.startswith(NAME)


async def test_json_fits_the_schema(run: Run) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"one", tag="v1")
        first = await run_in_thread(run, registry.url, "--json", "app:v1")
        second = await run_in_thread(run, registry.url, "--json", "app:v1", "app:v2")

    rows = [json.loads(line) for line in (first.out + second.out).splitlines()]
    for row in rows:
        jsonschema.validate(row, SCHEMAS["refresh"])
    assert [row["state"] for row in rows] == ["new", "unchanged", "failed"]
    assert rows[1]["previous_confirmed"].endswith("Z")
    assert rows[2]["error"]


def test_refresh_does_not_create_a_data_directory_that_no_server_uses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = make_run(tmp_path, capsys)("http://127.0.0.1:9", "refresh", "app:v1")
    assert (result.code, "is no data directory of a mirror" in result.err) == (1, True)
    assert not (tmp_path / "data").exists()
