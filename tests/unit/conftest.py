"""Files of unit tests are in memory where there is much, so that no test waits for a disk.

Processes that tests start have their data in ``/tmp``. Tests of disks mount their own, and those of
``tests/robustness`` use the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

_MEMORY = "/dev/shm"
_MIN_FREE_BYTES = 4 << 30


def _directory_in_memory() -> str | None:
    """Return where the files of tests go. None: not into memory, which is small or has no exec."""
    values = os.statvfs(_MEMORY)
    is_large = values.f_bavail * values.f_frsize >= _MIN_FREE_BYTES
    return _MEMORY if is_large and not values.f_flag & os.ST_NOEXEC else None


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory for the files of one test."""
    where = _directory_in_memory()
    with TemporaryDirectory(prefix="om-", dir=where, ignore_cleanup_errors=True) as directory:
        yield Path(directory)
