"""Rows C4 and C5: what a power cut may leave of a pull, a publish and an eviction.

In each state all that is under ``blobs/`` has to hash to its name (I1), and what was announced as
published has to be there (I3), before a start and after it; then the image can be pulled.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mirror.store.disk import Layout
from mirror.store.recovery import recover
from tests.robustness.crash_driver import MORE, pull, registry
from tests.robustness.crash_states import Operation, State, states, trace

MUTANTS = ["no-file-fsync", "no-directory-fsync", "no-digest-check", "rename-before-fsync"]


def contents(*, wrong: bool = False) -> dict[str, bytes]:
    """What the driver writes, by the name of the file."""
    made, _ = registry(wrong=wrong)
    known = {digest.hex: data for (_, digest), data in made.blobs.items()}
    known |= {digest.hex: body for (_, digest), (body, _) in made.manifests.items()}
    return {**known, hashlib.sha256(MORE).hexdigest(): MORE}


def complaints(layout: Layout, state: State) -> list[str]:
    """What is not as it has to be on the disk."""
    held = {path.name: path for path in (layout.root / "blobs" / "sha256").glob("*")}
    wrong = [
        f"I1: {name}"
        for name, path in held.items()
        if hashlib.sha256(path.read_bytes()).hexdigest() != name
    ]
    lost = {digest.partition(":")[2] for digest in state.announced} - set(held)
    return [*wrong, *(f"I3: {name} is lost" for name in lost)]


def check(
    data: Path,
    operations: Sequence[Operation],
    *,
    wrong: bool = False,
    all_of_them: bool = True,
    pull_every: int | None = None,
) -> tuple[int, list[str]]:
    """How many states there are, and what is wrong with them, as made on a disk and recovered.

    ``pull_every``: after so many states the image is pulled too. Not ``all_of_them``: up to the
    first that is wrong.
    """
    known, found = contents(wrong=wrong), []
    every = states(operations)
    for number, state in enumerate(every):
        target = data.parent / "state"
        layout = Layout(target)
        state.make(data, target, known)
        found += complaints(layout, state)
        assert recover(layout, time.time(), "of another boot") is None
        found += complaints(layout, state)
        assert not list((target / "ingest").glob("*/*")), "what was not synced is not resumed"
        if pull_every is not None and number % pull_every == 0:
            asyncio.run(pull(target, registry()[0]))
            found += complaints(layout, state)
        shutil.rmtree(target)
        if found and not all_of_them:
            break
    return len(every), found


@pytest.mark.row("C4")
@pytest.mark.parametrize("pull_every", [50, pytest.param(1, marks=pytest.mark.long)])
def test_no_crash_state_breaks_an_invariant(
    tmp_path: Path, pull_every: int, tried: Callable[[int], None]
) -> None:
    data, operations = trace(tmp_path, "evict")
    seen = {operation.name for operation in operations}
    assert seen >= {"create", "write", "sync", "rename", "unlink", "announce"}
    count, found = check(data, operations, pull_every=pull_every)
    assert not found, found[:3]
    assert count >= 500, count
    tried(count)


@pytest.mark.row("C5")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_faults_are_found(tmp_path: Path, mutant: str) -> None:
    data, operations = trace(tmp_path, mutant)
    wrong = mutant == "no-digest-check"
    _, found = check(data, operations, wrong=wrong, all_of_them=False)
    assert found, f"{mutant} was not found"
