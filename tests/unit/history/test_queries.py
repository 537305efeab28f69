"""Reading the history: filters, paging, a missing and a damaged file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mirror.history.queries import HistoryReader, HistoryUnreadable, open_history
from mirror.observability.events import Kind, Outcome
from mirror.oci.reference import Repository, Tag
from mirror.store.layout import Layout
from tests.unit.history.kit import NOON, a_pull, recording

A = "sha256:" + "a" * 64
APP = Repository("docker.io", "library/app")


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        (lambda history: history.pulls(), "fedcba"),
        (lambda history: history.pulls(last=2), "fe"),
        (lambda history: history.pulls(last=2, before=3), "ba"),
        (lambda history: history.pulls(repository=APP), "fdba"),
        (lambda history: history.pulls(repository=APP, tag="v1"), "db"),
        (lambda history: history.pulls(digest=A), "d"),
        (lambda history: history.pulls(request_id="c"), "c"),
        (lambda history: history.pulls(client="10.0.0.1"), "ca"),
        (lambda history: history.pulls(client="10.0.0.0/24"), "cba"),
        (lambda history: history.pulls(client="2001:db8::/32", last=1), "d"),
        (lambda history: history.pulls(client="no network/"), ""),
        (lambda history: history.pulls(outcomes=[Outcome.MISS, Outcome.STALE]), "fba"),
        (lambda history: history.refused(), "edc"),
        (lambda history: history.refused(last=1), "e"),
    ],
)
async def test_pulls_are_filtered_newest_first(
    tmp_path: Path, query: Callable[[HistoryReader], list[object]], ids: str
) -> None:
    other = {"repository": "library/other", "digest": "", "reference": ""}
    with recording(tmp_path) as made:
        for fields in (
            {"client": "10.0.0.1", "outcome": Outcome.MISS, "reference": "v2", "digest": ""},
            {"client": "10.0.0.2", "outcome": Outcome.STALE, "reference": "v1", "digest": ""},
            {"client": "10.0.0.1", "outcome": Outcome.DENIED, **other},
            {"client": "2001:db8::1", "outcome": Outcome.ERROR, "reference": A},
            {"client": "10.0.1.1", "outcome": Outcome.NEGATIVE, "upstream": "o", **other},
            {"client": "", "outcome": Outcome.MISS, "reference": "v3", "digest": ""},
        ):
            made.now += 1
            made.end(a_pull(request_id="abcdef"[int(made.now - NOON) - 1], **fields))
            made.recorder.hand_over()
        made.write()
        with open_history(made.layout) as history:
            found = query(history)
    assert "".join(pull.request_id for pull in found) == ids  # type: ignore[attr-defined] # a StoredPull


def test_missing_history_has_no_rows(tmp_path: Path) -> None:
    with open_history(Layout(tmp_path)) as history:
        assert history.pulls() == history.minutes(0, NOON) == history.counts(0, NOON) == []
        assert history.tag_digests(APP, Tag("latest")) == []
        assert history.access_trace().accesses == []


def test_damaged_history_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "history.1.db").write_bytes(b"no database" * 1000)
    with (
        pytest.raises(HistoryUnreadable, match=r"not a database .*may be deleted"),
        open_history(Layout(tmp_path)) as history,
    ):
        history.pulls()


async def test_history_is_read_while_it_is_written_and_after_a_stop(tmp_path: Path) -> None:
    with recording(tmp_path) as made:
        made.end(a_pull(outcome=Outcome.MISS, kind=Kind.MANIFEST))
        made.write()
        made.end(a_pull(outcome=Outcome.MISS, kind=Kind.MANIFEST))
        made.write()
        with open_history(made.layout) as history:
            assert len(history.pulls()) == 2
    (tmp_path / "history").chmod(0o500)
    try:
        with open_history(made.layout) as history:
            assert len(history.pulls()) == 2
    finally:
        (tmp_path / "history").chmod(0o755)
    assert sorted(path.name for path in (tmp_path / "history").iterdir()) == [
        "history.1.db",
        "lock",
    ]


def test_file_whose_tables_are_being_created_has_no_rows(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.history.mkdir()
    (layout.history / "history.1.db").touch()
    with open_history(layout) as history:
        assert history.pulls() == []
        assert history.counts(0, NOON) == []
