"""Bring the live state of all workers to the one that has the admin listener.

Lives here: one pair of sockets for all workers of a server, and the merge of their states. Must not
know: what observes the states, HTTP.

Theory of operation: the supervisor makes one pair of datagram sockets before it forks. Each worker
sends its snapshot into it, once a second. The worker with the listener reads all of them. Nothing
touches a disk, and a worker that dies leaves nothing behind: a snapshot that is old does not count.
If nobody reads, the kernel's buffer is full, and further snapshots are dropped.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from mirror.admin.json_values import JsonObject

SEND_INTERVAL_S: Final = 1.0
"""Seconds between two snapshots of a worker."""
MAX_AGE_S: Final = 5.0
"""Seconds after which the snapshot of a worker no longer counts: it has ended, or it hangs."""
_MAX_DATAGRAM_BYTES: Final = 160 * 1024
"""Bytes of a datagram. Linux allows 208 KiB by default (net.core.wmem_default)."""
_MAX_READS: Final = 256
"""Snapshots that are read at one turn of the event loop: one for each possible worker."""
_SEVERITY: Final = ("unused", "ok", "failing", "open")
"""States of an endpoint. That of several workers is the worst one of those that have used it."""


def open_channel() -> tuple[socket.socket, socket.socket]:
    """Return the sockets (to send, to receive). All workers share them."""
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in (sender, receiver):
        end.setblocking(False)
    return sender, receiver


def send_state(sender: socket.socket, snapshot: JsonObject) -> bool:
    """Send the snapshot of this worker. Returns False if it was dropped. Never waits."""
    body = json.dumps(snapshot, separators=(",", ":")).encode()
    if len(body) > _MAX_DATAGRAM_BYTES:
        shorter = {**snapshot, "requests": snapshot["requests"][:10], "fetches": []}
        body = json.dumps(shorter, separators=(",", ":")).encode()
    try:
        sender.send(body)
    except OSError:  # Nobody reads, or the datagram is too large for this system.
        return False
    return True


class WorkerStates:
    """The live states of all workers, of this process without delay."""

    def __init__(
        self,
        own: Callable[[], JsonObject],
        receiver: socket.socket | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with the state of this process.

        Args:
            own: Returns the snapshot of this process.
            receiver: Snapshots of the others arrive here. None: there is one process.
            clock: Returns monotonic seconds: the same for all processes of the machine.
        """
        self._own = own
        self._receiver = receiver
        self._clock = clock
        self._others: dict[int, JsonObject] = {}

    def start(self) -> None:
        """Begin to read."""
        if self._receiver is not None:
            asyncio.get_running_loop().add_reader(self._receiver, self.receive)

    def stop(self) -> None:
        """Read no more."""
        if self._receiver is not None:
            asyncio.get_running_loop().remove_reader(self._receiver)

    def receive(self) -> None:
        """Read the snapshots that have arrived."""
        assert self._receiver is not None
        with suppress(BlockingIOError):
            for _ in range(_MAX_READS):
                snapshot = json.loads(self._receiver.recv(_MAX_DATAGRAM_BYTES))
                self._others[snapshot["worker"]] = snapshot

    def merged(self) -> JsonObject:
        """Return the state of all workers together."""
        own, now = self._own(), self._clock()
        others = (
            one
            for number, one in sorted(self._others.items())
            if number != own["worker"] and now - one["at"] <= MAX_AGE_S
        )
        return merge_states([own, *others])


def merge_states(states: list[JsonObject]) -> JsonObject:
    """Return the states of all workers as one. The first one is that of the process itself."""
    upstreams: dict[str, JsonObject] = {}
    for state in states:
        for name, upstream in state["upstreams"].items():
            upstreams[name] = _merge_upstream(upstreams.get(name), upstream)
    return {
        "workers": len(states),
        "fetches": _merge_fetches(row for state in states for row in state["fetches"]),
        "requests": [row for state in states for row in state["requests"]],
        "counts": {
            key: sum(state["counts"][key] for state in states) for key in ("fetches", "requests")
        },
        "upstreams": upstreams,
        "storage": states[0]["storage"],
    }


def _merge_fetches(rows: Iterable[JsonObject]) -> list[JsonObject]:
    """Return one row for each digest: of the process that fetches, with the clients of all."""
    merged: dict[str, JsonObject] = {}
    for row in rows:
        other = merged.get(row["digest"])
        if other is None:
            merged[row["digest"]] = dict(row)
            continue
        leader = row if row["connections"] > other["connections"] else other
        followers = row["followers"] + other["followers"]
        merged[row["digest"]] = {**leader, "followers": followers}
    return list(merged.values())


def _merge_upstream(one: JsonObject | None, other: JsonObject) -> JsonObject:
    if one is None:
        return other
    endpoints = dict(one["endpoints"])
    for url, endpoint in other["endpoints"].items():
        known = endpoints.get(url)
        endpoints[url] = endpoint if known is None else _merge_endpoint(known, endpoint)
    limits = [limit for limit in (one["rate_limit"], other["rate_limit"]) if limit is not None]
    back_offs = sorted([*one["back_offs"], *other["back_offs"]], key=lambda row: row["at"])
    return {
        "endpoints": endpoints,
        "rate_limit": max(limits, key=lambda limit: limit["seen"], default=None),
        "back_offs": back_offs[-10:],
    }


def _merge_endpoint(one: JsonObject, other: JsonObject) -> JsonObject:
    newer = max(one, other, key=lambda row: row["last_at"] or "")
    failed = max(one, other, key=lambda row: row["last_failure"] or "")
    return {
        **newer,
        "state": max(one["state"], other["state"], key=_SEVERITY.index),
        "requests": one["requests"] + other["requests"],
        "failures": one["failures"] + other["failures"],
        "last_error": failed["last_error"],
        "last_failure": failed["last_failure"],
        "rate_limited": max(one["rate_limited"] or "", other["rate_limited"] or "") or None,
    }
