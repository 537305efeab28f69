"""Hashing content in a process of its own: results, quarantine, and what it leaves untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mirror.oci.reference import ALGORITHMS, Digest
from mirror.store import scrub as module
from mirror.store.disk import Layout, open_locked
from mirror.store.scrub import Scrubbed, scrub
from tests.unit.store.kit import flip, random_bytes

DATA = random_bytes(600_000)
"""More than two pieces."""


def put(layout: Layout, data: bytes, algorithm: str = "sha256", used: float = 1_000.0) -> Digest:
    digest = Digest.of(data, algorithm)
    layout.blob(digest).parent.mkdir(parents=True, exist_ok=True)
    layout.blob(digest).write_bytes(data)
    os.utime(layout.blob(digest), (used, used))
    return digest


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 600_000])
def test_intact_content_keeps_its_last_use(tmp_path: Path, algorithm: str, size: int) -> None:
    layout = Layout(tmp_path)
    digest = put(layout, DATA[:size], algorithm)
    assert scrub(layout, digest) == Scrubbed(str(digest), "intact", size)
    assert layout.blob(digest).stat().st_mtime == 1_000


@pytest.mark.parametrize("offset", [0, 300_000, 599_999])
def test_flipped_bit_is_damage_and_moves_the_content(tmp_path: Path, offset: int) -> None:
    layout = Layout(tmp_path)
    digest = put(layout, DATA)
    flip(layout.blob(digest), offset)
    assert scrub(layout, digest) == Scrubbed(str(digest), "damaged", 600_000, is_moved=True)
    assert not layout.blob(digest).exists()
    assert layout.quarantine(digest).exists()


def test_cut_content_is_damaged(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    digest = put(layout, DATA)
    os.truncate(layout.blob(digest), 1_000)
    assert scrub(layout, digest).result == "damaged"


def test_missing_content_is_no_damage(tmp_path: Path) -> None:
    digest = Digest.of(b"nowhere")
    assert scrub(Layout(tmp_path), digest) == Scrubbed(str(digest), "missing")


def test_unreadable_content_is_moved_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path)
    digest = put(layout, DATA)

    def refuse(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module.os, "preadv", refuse)
    path, scrubbed = layout.blob(digest), scrub(layout, digest)
    assert scrubbed.failure.startswith(f"{path}: Input/output error: ")
    found = replace(scrubbed, failure="")
    assert found == Scrubbed(str(digest), "unreadable", 600_000, is_moved=True)


def test_intact_content_that_was_copied_is_trusted_from_now_on(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    digest = put(layout, DATA, used=1_000.5)
    assert scrub(layout, digest).result == "intact"
    assert layout.blob(digest).stat().st_mtime_ns == 1_000 * 10**9


def test_content_that_is_being_hashed_is_leased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    digest = put(layout, DATA)
    seen = []

    def pause(seconds: float) -> None:
        with open_locked(layout.blob(digest)) as fd:
            seen.append(fd)

    monkeypatch.setattr(module.time, "sleep", pause)
    scrub(layout, digest)
    assert seen == [None] * 3, "one pause for each piece"


def test_process_answers_each_line_in_order(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    digests = [put(layout, DATA[:1_000]), Digest.of(b"nowhere"), put(layout, b"short")]
    flip(layout.blob(digests[2]), 0)
    lines = "".join(f"{digest}\n" for digest in digests)
    command = [sys.executable, "-m", "mirror.store.scrub", str(tmp_path)]
    output = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    found = [Scrubbed.load(line) for line in output.stdout.splitlines()]
    assert [(one.digest, one.result) for one in found] == list(
        zip(map(str, digests), ["intact", "missing", "damaged"], strict=True)
    )
    assert json.loads(found[0].dump())["size"] == 1_000


def test_process_has_the_lowest_priority() -> None:
    code = (
        "import os; from mirror.store.scrub import give_way; give_way();"
        "print(os.nice(0), os.sched_getscheduler(0) == os.SCHED_IDLE)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.split() == ["19", "True"]
