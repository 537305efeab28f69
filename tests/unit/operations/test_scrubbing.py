"""The process that hashes: all results in order, and its end."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import pytest

from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from mirror.operations import scrubbing
from mirror.operations.scrubbing import scrub_each
from mirror.store.layout import Layout


def put(layout: Layout, count: int) -> list[Digest]:
    """Store small contents."""
    digests = []
    for number in range(count):
        data = b"%d" % number
        digests.append(Digest.of(data))
        layout.blob(digests[-1]).parent.mkdir(parents=True, exist_ok=True)
        layout.blob(digests[-1]).write_bytes(data)
    return digests


async def test_more_contents_than_are_sent_ahead_have_one_result_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrubbing, "_AHEAD", 3)
    digests = put(Layout(tmp_path), 10)
    async with aclosing(scrub_each(Layout(tmp_path), digests)) as results:
        found = [result async for result in results]
    assert [result.digest for result in found] == [str(digest) for digest in digests]
    assert {result.result for result in found} == {"intact"}


async def test_process_that_ends_early_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrubbing.sys, "executable", "/bin/false")
    with pytest.raises(StorageUnavailable, match="has ended"):
        async for _ in scrub_each(Layout(tmp_path), put(Layout(tmp_path), 1)):
            pass


async def test_process_that_cannot_be_started_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrubbing.sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(StorageUnavailable, match="no process can be started"):
        async for _ in scrub_each(Layout(tmp_path), put(Layout(tmp_path), 1)):
            pass


async def test_nothing_to_hash_has_no_result(tmp_path: Path) -> None:
    assert [result async for result in scrub_each(Layout(tmp_path), [])] == []
