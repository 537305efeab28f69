"""Following an ingest that another process fetches, by its file and its state file.

Lives here: the loop that reads how far the other process is, and decides when this process takes
over. Must not know: this process's followers, upstreams.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from mirror.oci.errors import ContentLost, UpstreamUnavailable
from mirror.oci.reference import Digest, Verifier
from mirror.store import disk
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import Role
from mirror.store.layout import Layout

STALLED_S: Final = 10.0
"""Seconds without a heartbeat or a byte after which the other process counts as stopped.

Ten heartbeats: a loaded machine may miss some of them.
"""
_FIRST_POLL_S: Final = 0.002
"""Seconds from the first poll of the file to the second: small content is complete by then."""
_POLL_S: Final = 0.01
"""Seconds between two polls while bytes arrive: the delay that a follower here has at most."""
_MAX_POLL_S: Final = 4 * _POLL_S
"""Seconds at most between two polls while none arrive. Each poll costs a few system calls."""
_POLLS_PER_LOCK: Final = 5
"""Polls between two attempts to take the lock. Only such an attempt notices that the other process
died (after 0.05 to 0.2 s)."""
_REPORTED_FAILURES: Final = frozenset({"UNAVAILABLE", "TOOMANYREQUESTS"})
"""OCI codes of failures that end following: the upstream, the bytes or the disk of the other
process failed. The caller then tries once to fetch by itself."""


async def follow_other_process(ingest: Ingest) -> None:
    """Follow another process's fetch, after :meth:`Ingest.try_lead` has returned ``FOLLOWER``.

    Returns when the content is complete or when this process has to take over. Either way, call
    ``try_lead`` next.

    Raises:
        UpstreamUnavailable: The other process's fetch has failed (see :meth:`LeaderState.refresh`).
        ContentLost: The file no longer continues what followers here already have.
    """
    leader = LeaderState(ingest.context.layout, ingest.digest, ingest.context.boot)
    pause_s, polls = _FIRST_POLL_S, 0
    while not ingest.is_verified:
        has_grown = _read_progress(ingest, leader)
        ingest.wake_followers()
        if ingest.is_verified:
            return await ingest.end_following()
        if not ingest.lock.is_path_ours and not ingest.lock.is_published:
            if not ingest.on_disk:
                # The fetch ended before its first byte. Start with a new file.
                ingest.is_confirmed = False
                return ingest.lock.release()
            ingest.continue_in_memory("handover")
        elif leader.silence_s > STALLED_S:
            ingest.continue_in_memory("stalled")
        polls += 1
        if ingest.window is not None or (
            polls % _POLLS_PER_LOCK == 0 and await ingest.try_lead() is not Role.FOLLOWER
        ):
            return None
        pause_s = _POLL_S if has_grown else min(pause_s * 1.2, _MAX_POLL_S)
        await asyncio.sleep(pause_s)
    return None


def _read_progress(ingest: Ingest, leader: LeaderState) -> bool:
    """Take over the length of the file into ``ingest``. Returns whether the file has grown."""
    # Publication is checked before the length: a published file is complete, so its length is its
    # size. The other way round, it could be published between the two.
    is_published = ingest.lock.is_published
    length = ingest.lock.length
    has_grown = leader.refresh(ingest.on_disk, length)
    if is_published:
        ingest.size = length
    elif leader.state is None:
        return has_grown
    elif ingest.size is None or not ingest.on_disk:
        ingest.size = leader.state.size
    ingest.is_confirmed = ingest.lock.has_followed = True
    ingest.on_disk = ingest.position = max(ingest.on_disk, length)
    if has_grown:
        ingest.last_progress = time.monotonic()
    # A file of full length is verified. But an empty file is complete only if the digest is that
    # of no bytes.
    if length == ingest.size and (length > 0 or Verifier(ingest.digest).is_match()):
        ingest.is_verified = True
    return has_grown


class LeaderState:
    """The state file of an ingest, read by another process each time that it changes.

    Only a live state counts: one of this boot, and of a fetch that runs. The lock says less than
    that: a scan of the directories (:mod:`mirror.store.eviction`) holds it for a moment, too. The
    state file beside it may be that of a fetch that ended before a crash of the machine. Such a
    crash can leave any bytes in the file.
    """

    def __init__(self, layout: Layout, digest: Digest, boot: str) -> None:
        """Start without a state. ``boot``: the kernel's boot id."""
        self.state: disk.IngestState | None = None
        """The live state that was read last; None if there was none."""
        self._layout = layout
        self._digest = digest
        self._boot = boot
        self._length = 0
        self._stamp: tuple[int, int] | None = None
        self._last_sign_at = time.monotonic()

    @property
    def silence_s(self) -> float:
        """Seconds without a heartbeat or a new byte."""
        return time.monotonic() - self._last_sign_at

    def refresh(self, served: int, length: int) -> bool:
        """Read the state file if it has changed. Returns whether the ingest file has grown.

        Call it after reading the file's length, and before handing out the bytes up to there: a new
        leader that keeps fewer bytes than the file had says so before it writes the first one.

        Args:
            served: Bytes that followers in this process already have.
            length: Bytes in the ingest file.

        Raises:
            UpstreamUnavailable: The other process's fetch has failed, with a code in
                ``_REPORTED_FAILURES``.
            ContentLost: A new leader continues from before ``served``. Its bytes may differ
                from those that followers already have.
        """
        has_grown, self._length = length > self._length, length
        if has_grown and self.state is not None:
            self._last_sign_at = time.monotonic()
        stamp = disk.stamp_of_state(self._layout, self._digest)
        if stamp is None or stamp == self._stamp:
            return has_grown
        record = disk.read_state(self._layout, self._digest)
        if record is None:
            return has_grown
        # A state that changes while we watch has a writer. The writer of the first state that we
        # read may have died.
        has_changed, self._stamp = self._stamp is not None, stamp
        state = record[0]
        if state.boot == self._boot and (has_changed or self._is_running(state)):
            self._last_sign_at = time.monotonic()
            previous, self.state = self.state, state
            self._raise_if_ended(previous, state, served)
        return has_grown

    def _is_running(self, state: disk.IngestState) -> bool:
        """Return whether the first state that was read is that of a fetch that runs.

        No heartbeat is written while content is published. Its file has the full length then.
        """
        return state.error is None and (state.is_recent(STALLED_S) or self._length == state.size)

    def _raise_if_ended(
        self, previous: disk.IngestState | None, state: disk.IngestState, served: int
    ) -> None:
        # A 401, 403 or 404 of the other process applies to its repository only. Ask for our own.
        if state.error is not None and state.error[0] in _REPORTED_FAILURES:
            raise UpstreamUnavailable(state.error[1])
        if previous is not None and previous.holder != state.holder and state.resumed_from < served:
            raise ContentLost("another process restarted the ingest before the bytes served here")
