"""The check of hosted repositories: each finding says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirror.cli.doctor.findings import Finding, Status
from mirror.cli.doctor.hosted_checks import check_hosted
from mirror.hosted.staged_names import StagedNames
from tests.unit.cli.doctor.test_machine_checks import settings
from tests.unit.hosted.kit import hosted_kit

LAYER = b"layer" * 1000


def check(root: Path, **hosted: Any) -> list[Finding]:
    section = {"name": "registry.example", "listen": "127.0.0.1:5101", **hosted}
    return list(check_hosted(settings(root, hosted=section)))


async def test_hosted_repositories_are_counted_and_measured(tmp_path: Path) -> None:
    assert list(check_hosted(settings(tmp_path))) == []
    (finding,) = check(tmp_path)
    assert (finding.status, finding.message) == (Status.OK, "nothing was pushed yet")
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(LAYER)
    (finding,) = check(tmp_path, max_size=100_000)
    assert finding.status is Status.OK
    assert finding.message.startswith(
        "1 repositories, 5.3KiB of 97.7KiB, 11.2KiB of metadata, 0B in 0 uploads"
    )


async def test_quota_that_is_nearly_used_up_or_larger_than_the_disk_is_a_warning(
    tmp_path: Path,
) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(LAYER)
    (finding,) = check(tmp_path, max_size=17_000)
    assert finding.status is Status.WARNING
    assert "raise hosted.max_size" in finding.remedy
    (finding,) = check(tmp_path, max_size="1000PiB")
    assert finding.status is Status.WARNING
    assert "use a larger disk" in finding.remedy


async def test_hosted_content_without_its_section_is_a_warning(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(LAYER)
    (finding,) = check_hosted(settings(tmp_path))
    assert finding.status is Status.WARNING
    assert "nobody can pull" in finding.message


def test_damaged_names_are_a_problem_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "hosted").mkdir()
    (tmp_path / "hosted/names.db").write_bytes(b"no database" * 1000)
    (finding,) = check(tmp_path)
    assert finding.status is Status.PROBLEM
    assert "run oci-mirror restore BACKUP" in finding.remedy


def test_names_that_are_gone_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "hosted.created").touch()
    (finding,) = check(tmp_path)
    assert (finding.status, finding.message) == (Status.PROBLEM, "it was there, and is gone")
    assert "oci-mirror restore BACKUP" in finding.remedy


async def test_restore_that_was_killed_is_a_warning(tmp_path: Path) -> None:
    async with hosted_kit(tmp_path) as kit:
        await kit.push_image(LAYER)
        staged = await StagedNames.open(kit.store.layout)
        assert len(check(tmp_path)) == 1, "it runs"
        await staged.close()
        kit.store.layout.staged_names.touch()
    _, finding = check(tmp_path)
    assert finding.status is Status.WARNING
    assert "run oci-mirror restore again" in finding.remedy
