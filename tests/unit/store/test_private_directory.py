"""What other users of the machine can read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirror.operations.backup_files import opened_target
from mirror.store.private_directory import close_to_others, make_private_directory
from tests.server_kit import running
from tests.unit.hosted.kit import PushClient
from tests.unit.web.test_access_listeners import both_listeners, push_image


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_new_directory_is_for_its_owner_and_an_old_one_for_its_group_too(tmp_path: Path) -> None:
    new, old = tmp_path / "parent" / "new", tmp_path / "old"
    old.mkdir()
    for path, mode in ((new, 0o700), (old, 0o750)):
        make_private_directory(path)
        make_private_directory(path)
        assert mode_of(path) == mode
    close_to_others(tmp_path / "missing")


async def test_names_and_uploads_are_for_the_owner_only(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with running(data, hosted={}) as server:
        client = PushClient(server)
        assert (await client.push_image()).status == 201
        assert mode_of(data / "hosted") == mode_of(data / "uploads") == 0o700
        assert mode_of(data) == 0o755


async def test_data_directory_is_closed_to_others_once_there_are_rules(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    (tmp_path / "data" / "hosted").mkdir(mode=0o755)
    async with both_listeners(tmp_path) as both:
        await push_image(both)
        assert mode_of(tmp_path / "data") == mode_of(tmp_path / "data" / "hosted") == 0o750


def test_new_backup_is_for_its_owner_only(tmp_path: Path) -> None:
    with opened_target(tmp_path / "backup"):
        assert mode_of(tmp_path / "backup") == 0o700
    with opened_target(tmp_path / "backup.tar"):
        assert mode_of(tmp_path / "backup.tar.tmp") == 0o600
