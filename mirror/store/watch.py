"""What the process that fetches growing content says of it, as another one sees it.

Lives here: reading the state beside the growing file, and what follows from a change of it. Must
not know: the event loop, followers, what to do about it.
"""

from __future__ import annotations

import time
from typing import Final

from mirror.oci.errors import ContentLost, UpstreamUnavailable
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.disk import Layout

_SHARED_FAILURES: Final = frozenset({"UNAVAILABLE", "TOOMANYREQUESTS"})


class Watch:
    """Follows the state of one growing file. Cheap to look at often: it is read when it changes."""

    def __init__(self, layout: Layout, digest: Digest) -> None:
        self.state: disk.IngestState | None = None
        self._layout = layout
        self._digest = digest
        self._stamp: tuple[int, int] | None = None
        self._sign = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds without a sign of life."""
        return time.monotonic() - self._sign

    def look(self, held: int, *, grown: bool) -> None:
        """Look again. ``held`` bytes were handed out; ``grown``: the file has more than that.

        Look after the file's length was, and before its bytes are handed out: whoever goes on with
        less than there was says so before the first byte.

        Raises ``UpstreamUnavailable`` if the fetch has failed for everybody, and ``ContentLost`` if
        another one went on from before ``held``: its bytes need not go with those.
        """
        if grown:
            self._sign = time.monotonic()
        stamp = disk.stamp_of_state(self._layout, self._digest)
        if stamp is None or stamp == self._stamp:
            return
        found = disk.read_state(self._layout, self._digest)
        if found is None:
            return
        before, self.state = self.state, found[0]
        self._stamp, self._sign = stamp, time.monotonic()
        if before is None:
            return  # a failure that was here before us is not an answer to us
        # What a fetch was refused, it was refused for its repository: we ask for ours.
        if self.state.error is not None and self.state.error[0] in _SHARED_FAILURES:
            raise UpstreamUnavailable(self.state.error[1])
        if before.holder != self.state.holder and self.state.kept < held:
            raise ContentLost("growing content was begun anew")
