"""``verify``: what it prints, its exit codes, and a repair from a registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.oci.reference import Digest
from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry
from tests.unit.cli.cleaning_kit import LAYERS, NAME, URL, content, damage, fill, rows
from tests.unit.cli.kit import Run, make_data_directory, make_run


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    make_data_directory(tmp_path / "data")
    return make_run(tmp_path, capsys)


def test_intact_content_is_a_success(run: Run, tmp_path: Path) -> None:
    fill(tmp_path)
    result = run(URL, "verify")
    assert result.code == 0
    assert result.out.endswith("hashed, 4 images checked: 0 problems\n")


def test_damage_is_a_failure_and_names_the_command_that_mends_it(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    damage(content(data, LAYERS[1]))
    result = run(URL, "verify", f"{NAME}:1.1")
    assert result.code == 1
    assert result.out.splitlines()[0].startswith(f"damaged {NAME}:1.1 sha256:")
    assert f"  repair it with: oci-mirror verify --repair {NAME}:1.1" in result.out.splitlines()
    assert not content(data, LAYERS[1]).exists()


def test_summary_counts_damage_apart_from_what_the_next_pull_fetches(
    run: Run, tmp_path: Path
) -> None:
    data = fill(tmp_path)
    damage(content(data, LAYERS[1]))
    content(data, LAYERS[2]).unlink()
    for _ in range(2):
        result = run(URL, "verify")
        assert result.code == 1
        assert result.out.endswith("4 images checked: 1 problem; 1 image lacks content\n")


def manifest_of_1_1(run: Run, data: Path) -> tuple[Path, Digest]:
    digest = Digest.parse(rows("ls", run(URL, "ls", "app:1.1", "--json"))[0]["digest"])
    return data / "blobs" / digest.algorithm / digest.hex, digest


@pytest.mark.parametrize("command", ["pin", "freeze"])
def test_mark_of_an_evicted_image_is_noted_and_no_loss(
    run: Run, tmp_path: Path, command: str
) -> None:
    manifest, _ = manifest_of_1_1(run, fill(tmp_path))
    manifest.unlink()
    note = f"{NAME}:1.1 is not complete here: what arrives of it is kept"
    assert note in run(URL, command, f"{NAME}:1.1").err
    assert run(URL, "verify", "app:1.1").code == 0
    listed = run(URL, "ls", "app:1.1", "--all")
    assert "it was evicted, or is lost" in listed.out.replace("\n", " ")
    assert "nothing of" not in listed.err


def test_image_without_a_manifest_is_found_by_its_name(run: Run, tmp_path: Path) -> None:
    name = f"{NAME}:1.1"
    manifest, digest = manifest_of_1_1(run, fill(tmp_path))
    body = manifest.read_bytes()
    manifest.unlink()
    result = run(URL, "verify", "app:1.1")
    assert result.code == 0
    assert result.out.splitlines() == [
        f"absent {name} {digest}: its manifest is not in the cache: it was evicted, or is lost",
        f"  fetch it with: oci-mirror warm {name}",
        "0 contents (0B) hashed, 0 images checked: 0 problems; 1 image is not in the cache",
    ]
    assert run(URL, "ls", "app:1.1", "--json").out == ""
    (row,) = rows("ls", run(URL, "ls", "app:1.1", "--all", "--json"))
    assert (row["state"][0], row["missing_parts"]) == ("absent", 1)
    manifest.write_bytes(body)
    run(URL, "pin", name)
    manifest.unlink()
    assert run(URL, "verify", "app:1.1").code == 1
    listed = run(URL, "ls", "app:1.1")
    why = "its manifest is not in the cache: it is lost, although a mark keeps it"
    state = f"absent ({why}), pinned"
    assert state in listed.out
    assert f"nothing of {NAME} is evicted or removed, since the manifest of {name}" in listed.err


def test_json_follows_the_schema(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    damage(content(data, LAYERS[1]))
    content(data, LAYERS[2]).unlink()
    found = rows("verify", run(URL, "verify", "--json"))
    assert [row["problem"] for row in found] == ["damaged", "incomplete"]


@pytest.mark.parametrize("subset", ["8/7", "x"])
def test_malformed_subset_is_wrong_usage(run: Run, subset: str) -> None:
    assert run(URL, "verify", "--subset", subset).code == 2


async def test_command_that_is_named_for_a_damaged_manifest_mends_it(
    run: Run, tmp_path: Path
) -> None:
    async with FakeRegistry() as registry:
        digest = registry.add_image(b"one", tag="v1")
        await run_in_thread(run, registry.url, "warm", "app:v1")
        manifest = tmp_path / "data" / "blobs" / digest.algorithm / digest.hex
        damage(manifest)
        result = await run_in_thread(run, registry.url, "verify")
        (command,) = (line for line in result.out.splitlines() if "repair it with" in line)
        assert command == f"  repair it with: oci-mirror verify --repair {NAME}:v1"
        assert not manifest.exists()
        mended = await run_in_thread(run, registry.url, *command.split()[4:])
    assert mended.code == 0
    assert Digest.of(manifest.read_bytes()) == digest


async def test_repair_fetches_damaged_content_from_the_registry(run: Run, tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"one", tag="v1")
        await run_in_thread(run, registry.url, "warm", "app:v1")
        before = {path: path.read_bytes() for path in (tmp_path / "data").glob("blobs/*/*")}
        largest = max(before, key=lambda path: len(before[path]))
        damage(largest)
        result = await run_in_thread(run, registry.url, "verify", "--repair")
    assert "  fetched again" in result.out.splitlines()
    assert result.code == 0
    assert {path: path.read_bytes() for path in (tmp_path / "data").glob("blobs/*/*")} == before


async def test_repair_that_the_upstream_refuses_is_a_failure_with_its_reason(
    run: Run, tmp_path: Path
) -> None:
    data = await run_in_thread(fill, tmp_path)
    damage(content(data, LAYERS[1]))
    async with FakeRegistry() as registry:
        result = await run_in_thread(run, registry.url, "verify", "--repair", f"{NAME}:1.1")
    assert result.code == 1
    assert "not fetched: docker.io/library/app@sha256:" in result.err
