"""Rows C4 and C5: the states that a power cut may leave of a pull, a publish and an eviction.

In each state every file under ``blobs/`` must hash to its name (I1), and content that was announced
as published must be there (I3), before a start and after it. Then the image can be pulled.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mirror.store.layout import Layout
from mirror.store.recovery import recover
from tests.extent import Extent
from tests.robustness.crash_driver import MORE, pull, registry
from tests.robustness.crash_states import Operation, State, states, trace

MUTANTS = ["no-file-fsync", "no-directory-fsync", "no-digest-check", "rename-before-fsync"]


def contents(*, wrong: bool = False) -> dict[str, bytes]:
    """Return the contents that the driver writes, by file name."""
    made, _ = registry(wrong=wrong)
    known = {digest.hex: data for (_, digest), data in made.blobs.items()}
    known |= {digest.hex: body for (_, digest), (body, _) in made.manifests.items()}
    return {**known, hashlib.sha256(MORE).hexdigest(): MORE}


def complaints(layout: Layout, state: State) -> list[str]:
    """Return the violations of I1 and I3 on the disk."""
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
    part: slice = slice(None),
) -> tuple[int, int, list[str]]:
    """Make states on a disk and recover them. Returns (states, checked states, complaints).

    ``pull_every``: the image is pulled, too, after every so many states. ``part``: the states to
    check. Without ``all_of_them``: end at the first state that is wrong.
    """
    known, found = contents(wrong=wrong), []
    every = states(operations)
    checked = every[part]
    for number, state in enumerate(checked):
        # In memory: hundreds of states are written and removed.
        with TemporaryDirectory(dir="/dev/shm") as directory:
            target = Path(directory)
            layout = Layout(target)
            state.make(data, target, known)
            found += complaints(layout, state)
            assert recover(layout, time.time(), "of another boot") is None
            found += complaints(layout, state)
            assert not list((target / "ingest").glob("*/*")), (
                "bytes that were not synced are not resumed"
            )
            if pull_every is not None and number % pull_every == 0:
                asyncio.run(pull(target, registry()[0]))
                found += complaints(layout, state)
        if found and not all_of_them:
            break
    return len(every), len(checked), found


@pytest.mark.row("C4-power-cut-states")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("pull_every", "part"),
    [
        (50, slice(None)),
        *(pytest.param(1, slice(first, None, 4), marks=pytest.mark.long) for first in range(4)),
    ],
    ids=["some-pulls", *(f"all-pulls-{first}-of-4" for first in range(1, 5))],
)
def test_no_crash_state_breaks_an_invariant(
    tmp_path: Path, pull_every: int, part: slice, extent: Extent
) -> None:
    data, operations = trace(tmp_path, "evict")
    seen = {operation.name for operation in operations}
    assert seen >= {"create", "write", "sync", "rename", "unlink", "announce"}
    pull_every *= extent.stride
    count, checked, found = check(data, operations, pull_every=pull_every, part=part)
    assert not found, found[:3]
    assert count >= 500, count
    extent.tried(checked)


@pytest.mark.row("C5-planted-faults")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_planted_fault_breaks_an_invariant(tmp_path: Path, mutant: str) -> None:
    data, operations = trace(tmp_path, mutant)
    wrong = mutant == "no-digest-check"
    *_, found = check(data, operations, wrong=wrong, all_of_them=False)
    assert found, f"{mutant} was not found"
