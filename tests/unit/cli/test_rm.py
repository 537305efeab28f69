"""``rm``: what it prints, its exit codes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mirror.oci.reference import Digest
from mirror.store.layout import Layout
from mirror.store.marks import Marks, Pin, change_marks
from tests.unit.cli.cleaning_kit import LAYERS, NAME, URL, content, fill, rows
from tests.unit.cli.kit import Run, make_run
from tests.unit.store.kit import image


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return make_run(tmp_path, capsys)


def test_removed_image_is_printed_with_what_stays(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    result = run(URL, "rm", f"{NAME}:1.0")
    assert result.code == 0
    first, *stays, last = result.out.splitlines()
    assert first.startswith(f"removed {NAME}:1.0 (")
    assert "  stays: 2.0KiB, shared by ghcr.io/org/other:v1" in stays
    assert last.startswith("1 image removed, ")
    assert not content(data, image(LAYERS[0])).exists()
    assert content(data, LAYERS[0]).exists(), "another image has it"


def test_pattern_is_wrong_usage_that_names_the_command_for_patterns(run: Run) -> None:
    result = run(URL, "rm", "ghcr.io/org/*")
    assert result.code == 2
    assert "rm takes no pattern: use `oci-mirror prune --match 'ghcr.io/org/*'`" in result.err


def test_malformed_digest_is_wrong_usage_that_says_where_whole_ones_are(run: Run) -> None:
    result = run(URL, "rm", "app@sha256:28c")
    assert (result.code, "`oci-mirror ls --no-trunc` prints them whole" in result.err) == (2, True)


def test_dry_run_removes_nothing(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    result = run(URL, "rm", "--dry-run", f"{NAME}:1.1")
    assert result.out.startswith(f"would remove {NAME}:1.1 (")
    assert content(data, LAYERS[1]).exists()


def test_unknown_image_removes_nothing_at_all(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    result = run(URL, "rm", f"{NAME}:1.1", "app:9.9")
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        f"oci-mirror: {NAME}:9.9 is not in the cache: `oci-mirror ls` lists the images\n"
    )
    assert content(data, LAYERS[1]).exists()


def test_pinned_image_stays_and_is_a_failure(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    pin = Pin(f"{NAME}:1.1", Digest.of(image(LAYERS[1])), time.time())
    change_marks(Layout(data), lambda marks: Marks(pins={pin.name: pin}))
    result = run(URL, "rm", f"{NAME}:1.1", f"{NAME}:1.2")
    assert result.code == 1
    assert f"pinned: unpin it first: oci-mirror unpin {NAME}:1.1" in result.out
    assert content(data, LAYERS[1]).exists()
    assert not content(data, LAYERS[2]).exists()


def test_json_follows_the_schema(run: Run, tmp_path: Path) -> None:
    fill(tmp_path)
    removed, *kept = rows("rm", run(URL, "rm", "--json", f"{NAME}:1.0"))
    assert (removed["action"], removed["kind"]) == ("removed", "image")
    assert {(row["action"], row["kind"]) for row in kept} == {("kept", "content")}


def test_missing_data_directory_is_one_line_with_a_remedy(run: Run) -> None:
    result = run(URL, "rm", "app:1.0")
    assert result.code == 1
    assert "data is no data directory of a mirror: start the server once" in result.err
    assert result.err.count("\n") == 1
