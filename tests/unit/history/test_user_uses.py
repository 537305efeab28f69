"""When each user has last used the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.history.user_uses import USERS_FILE, UserUses, read_user_uses
from mirror.observability.events import Outcome, RequestEnded, RequestRecord
from mirror.store.layout import Layout


def ended(user: str, outcome: Outcome = Outcome.HIT, status: int = 200) -> RequestEnded:
    pull = RequestRecord("id", "GET", "/v2/")
    pull.user, pull.outcome, pull.status = user, outcome, status
    return RequestEnded(pull)


def test_last_use_and_last_push_of_each_user_are_kept(tmp_path: Path) -> None:
    clock = [1000.0]
    uses = UserUses(Layout(tmp_path), lambda: clock[0])
    assert read_user_uses(Layout(tmp_path)) == []
    uses.save()
    assert list(tmp_path.iterdir()) == [], "nobody has used it"
    for at, event in (
        (1000.0, ended("ci", Outcome.PUSHED, 201)),
        (1001.0, ended("")),
        (1002.0, ended("ann")),
        (1003.0, ended("ci", Outcome.PUSHED, 403)),
    ):
        clock[0] = at
        uses.observe(event)
    uses.save()
    clock[0] = 1010.0
    uses.observe(ended("ann"))
    uses.save()
    found = read_user_uses(Layout(tmp_path))
    assert [(one.name, one.used_at, one.pushed_at, one.requests) for one in found] == [
        ("ann", 1010.0, None, 2),
        ("ci", 1003.0, 1000.0, 2),
    ]


def test_later_push_replaces_the_earlier_one(tmp_path: Path) -> None:
    clock = [1.0]
    uses = UserUses(Layout(tmp_path), lambda: clock[0])
    for at in (1.0, 2.0):
        clock[0] = at
        uses.observe(ended("ci", Outcome.PUSHED, 201))
        uses.save()
    assert read_user_uses(Layout(tmp_path))[0].pushed_at == 2.0


def test_damaged_file_is_an_error_and_no_empty_list(tmp_path: Path) -> None:
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / USERS_FILE).write_bytes(b"no database" * 500)
    with pytest.raises(OSError, match="may be deleted"):
        read_user_uses(Layout(tmp_path))
    uses = UserUses(Layout(tmp_path))
    uses.observe(ended("ci"))
    with pytest.raises(OSError, match="is not recorded"):
        uses.save()
