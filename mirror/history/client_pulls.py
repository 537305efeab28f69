"""The requests of one client for one image, which belong together.

Lives here: how the requests of the history are grouped. Must not know: how they are shown.

A client pulls an image by several requests: the tag, its platform, the config, each layer. The
history has one row for each, those of several clients mixed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mirror.history.stored_pull import StoredPull

_MAX_REQUEST_GAP_S: Final = 5.0
"""Seconds between two requests of one pull, at most: a client unpacks the layers that it has."""


@dataclass(slots=True)
class ClientPull:
    """One or more requests, in the order of their begin."""

    requests: list[StoredPull]

    @property
    def begin(self) -> float:
        """Unix time in seconds at which the first request began."""
        return self.requests[0].at

    @property
    def end(self) -> float:
        """Unix time in seconds at which the last request ended."""
        return max(one.at + one.duration for one in self.requests)

    @property
    def tag(self) -> str:
        """The tag that was pulled. Empty: only digests were requested."""
        return next((one.reference for one in self.requests if _has_tag(one)), "")

    @property
    def name(self) -> str:
        """The name of the image: with its tag if one was requested."""
        return next((one.name for one in self.requests if _has_tag(one)), self.requests[0].name)

    @property
    def slowest(self) -> StoredPull:
        """The request that took longest."""
        return max(self.requests, key=lambda one: one.duration)

    @property
    def outcomes(self) -> Counter[str]:
        """Outcome -> number of requests, in the order of the requests."""
        return Counter(one.outcome for one in self.requests)

    def may_have(self, request: StoredPull) -> bool:
        """Return whether a later request of the same client and repository may belong to it."""
        is_same_tag = not _has_tag(request) or self.tag in ("", request.reference)
        return is_same_tag and request.at <= self.end + _MAX_REQUEST_GAP_S


def group_requests(requests: Iterable[StoredPull]) -> list[ClientPull]:
    """Return the requests by pull, the newest pull first. One without a repository is alone."""
    pulls: list[ClientPull] = []
    latest: dict[tuple[str, str, str, str], ClientPull] = {}
    for request in sorted(requests, key=lambda one: one.at):
        key = request.client, request.command, request.upstream, request.repository
        pull = latest.get(key)
        if pull is not None and request.repository and pull.may_have(request):
            pull.requests.append(request)
        else:
            latest[key] = pull = ClientPull([request])
            pulls.append(pull)
    return pulls[::-1]


def _has_tag(request: StoredPull) -> bool:
    return request.kind == "manifest" and bool(request.reference) and ":" not in request.reference
