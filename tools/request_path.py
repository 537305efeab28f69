"""Trace which functions of ``mirror/`` the ``GET`` of one blob calls.

The server of the tests runs in this process, before the fake registry of the tests.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

_BLOB_BYTES: Final = 1 << 20
"""Bytes: needs several reads of the upstream's socket, and is fetched in a moment."""
_RUNS: Final = 3
"""Runs. A call that one run in four makes, by timing, is in all three once in 64 times."""
_SETTLE_S: Final = 0.5
"""Seconds after which the work at start, and the work behind a response, has ended."""


class Call(NamedTuple):
    """A function that was called. ``file`` is relative to the checkout."""

    file: str
    function: str


class CallRecorder:
    """Record the calls of functions whose file is in ``root / package``, in all threads.

    Install it before the threads start that it must see: Python 3.11 cannot add a profile function
    to a running thread. Only calls while ``is_active`` is true are recorded. Lambdas and
    comprehensions are not: Python 3.12 calls no function for some of them.
    """

    def __init__(self, root: Path, package: str) -> None:
        self._root = f"{root}{os.sep}"
        self._prefix = f"{self._root}{package}{os.sep}"
        self.is_active = False
        self.calls: set[Call] = set()

    def install(self) -> None:
        """Watch the calling thread, and each thread that starts from now on."""
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)

    def remove(self) -> None:
        """Watch neither the calling thread nor new threads any more."""
        self.is_active = False
        threading.setprofile(None)
        sys.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        if not self.is_active or event != "call":
            return
        code = frame.f_code
        if code.co_filename.startswith(self._prefix) and not code.co_name.startswith("<"):
            self.calls.add(Call(code.co_filename.removeprefix(self._root), code.co_qualname))


def trace(root: Path) -> tuple[set[Call], set[Call]]:
    """Return the calls of a cold request and those of a warm one. ``root`` is the checkout.

    Both requests name a repository whose manifest was not pulled, so the cold one has to ask the
    upstream for access, too. The work after the response (publishing, the access record) belongs
    to the request. All is repeated, with another blob and another server. Only calls of every run
    are returned, so background work that runs by the clock is left out.
    """
    sys.path.insert(0, str(root))  # the script's own directory is there, the checkout is not
    recorder = CallRecorder(root, "mirror")
    recorder.install()
    try:
        runs = [asyncio.run(_pull_twice(recorder, f"library/app{run}")) for run in range(_RUNS)]
    finally:
        recorder.remove()
        sys.path.remove(str(root))
    cold, warm = zip(*runs, strict=True)
    return set.intersection(*cold), set.intersection(*warm)


async def _pull_twice(recorder: CallRecorder, repository: str) -> tuple[set[Call], set[Call]]:
    """Pull a new blob, then pull it again. Returns the calls of each request."""
    import mirror.housekeeping
    from tests.fakes.registry import FakeRegistry
    from tests.server_kit import running

    # The comparisons of the marks and of the files of users run by the clock, and would fall into
    # each request.
    vars(mirror.housekeeping)["WATCH_INTERVAL_S"] = 3600.0
    vars(mirror.housekeeping)["CREDENTIALS_INTERVAL_S"] = 3600.0
    recorded = []
    data = os.urandom(_BLOB_BYTES)
    async with FakeRegistry() as upstream:
        digest = upstream.add_blob(data, repository)
        with tempfile.TemporaryDirectory() as directory:
            async with running(Path(directory), upstream.url) as server:
                for _ in range(2):
                    await asyncio.sleep(_SETTLE_S)
                    recorder.calls = set()
                    recorder.is_active = True
                    status, _headers, body = await server.get(server.blob(digest, repository))
                    await asyncio.sleep(_SETTLE_S)
                    recorder.is_active = False
                    if (status, body) != (200, data):
                        raise RuntimeError(f"the blob was not served: status {status}")
                    recorded.append(recorder.calls)
    cold, warm = recorded
    return cold, warm
