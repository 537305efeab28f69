"""Endpoints in order of preference, with a circuit breaker and the pauses of each.

Theory of operation. A failure or a 429 counts for its :class:`RequestScope` only: requests of one
kind to one repository. It counts for more when several different scopes have met it.

A circuit breaker is closed, open, or half open:

- closed: requests are sent. Failures of ``FAILURE_THRESHOLD`` different repositories in a row open
  it for the kind of request that failed. As many failures of the endpoint as a whole (it cannot be
  reached) open it for all kinds.
- open: no request is sent for ``open_seconds``.
- half open: after that time, exactly one request is sent: the probe. If it succeeds, the circuit
  closes. If it fails, the circuit stays open for twice as long.

A 4xx is a response, so it counts as a success.

No I/O, no clock: the caller passes the time. Must not know: requests, responses.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from yarl import URL

from mirror.oci.errors import (
    AllCircuitsOpen,
    MirrorError,
    NotFound,
    UpstreamError,
    UpstreamRateLimited,
)
from mirror.upstream.retry import MAX_ATTEMPTS_PER_REQUEST

FAILURE_THRESHOLD: Final = 3
"""Failures in a row that open a circuit. A single one is often a connection that was closed."""
GROUP_PAUSE_THRESHOLD: Final = 3
"""Different repositories, or projects, that must meet a 429 before it counts for the others. Two
repositories of one image pull are often limited together."""
FIRST_OPEN_S: Final = 2.0
"""Seconds for which a circuit opens first: short, since most outages are restarts."""
MAX_OPEN_S: Final = 60.0
"""Seconds between two probes at most, so that a recovered endpoint is used within a minute."""
DEFAULT_BACK_OFF_S: Final = 2.0
"""Seconds to pause after a 429 without ``Retry-After``: clients repeat theirs at once."""
MAX_BACK_OFF_S: Final = 300.0
"""Seconds to pause after a 429 at most: an endpoint must not switch itself off for hours."""


@dataclass(frozen=True, slots=True)
class RequestScope:
    """The requests to an endpoint that a failure or a 429 counts for."""

    kind: str
    """Method and kind of object, such as ``GET manifest``: registries limit each on its own."""
    repository: str

    @property
    def project(self) -> str:
        """First component of the repository. Registries set limits by project, too."""
        return self.repository.partition("/")[0]


@dataclass(slots=True)
class CircuitBreaker:
    """State of one endpoint's circuit. All times are in seconds of one clock."""

    failures: int = 0
    """Failures of the endpoint as a whole, since its last success."""
    failed: dict[RequestScope, tuple[float, float]] = field(default_factory=dict)
    """Scope that failed since the last success of the endpoint -> (time until which the endpoint
    is asked last for it, seconds of the next such time). At most ``FAILURE_THRESHOLD`` scopes of
    each kind."""
    open_until: float = 0.0
    open_seconds: float = FIRST_OPEN_S
    is_probing: bool = False
    """Whether the probe of the half-open circuit is under way."""

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open or half open, for any kind of request."""
        return self.failures >= FAILURE_THRESHOLD or any(map(self._is_open_for, self.failed))

    def _is_open_for(self, scope: RequestScope) -> bool:
        same_kind = sum(1 for failed in self.failed if failed.kind == scope.kind)
        return self.failures + same_kind >= FAILURE_THRESHOLD

    def may_request(self, now: float, scope: RequestScope) -> bool:
        """Return whether a request may be sent."""
        if not self._is_open_for(scope):
            return True
        return not self.is_probing and now >= self.open_until

    def begin_request(self, scope: RequestScope) -> bool:
        """Record that a permitted request is sent. Returns True if it is the probe.

        The caller reports its outcome with exactly one of ``record_success``, ``record_failure``
        and ``record_cancellation``.
        """
        is_probe = self._is_open_for(scope)
        self.is_probing = self.is_probing or is_probe
        return is_probe

    def record_success(self) -> None:
        """Close the circuit: the endpoint responded."""
        self.failures, self.open_until = 0, 0.0
        self.failed.clear()
        self.open_seconds, self.is_probing = FIRST_OPEN_S, False

    def record_failure(
        self, now: float, scope: RequestScope, *, is_probe: bool, is_unreachable: bool = False
    ) -> None:
        """Count a failure, and open the circuit if there are enough.

        Requests that were under way when the circuit opened do not prolong it.

        Args:
            now: The time.
            scope: The scope of the request.
            is_probe: The result of ``begin_request``.
            is_unreachable: Whether the endpoint as a whole failed: then each failure counts.
                Otherwise repeated failures of one scope count once.
        """
        was_open = self.is_open
        if is_unreachable:
            self.failures += 1
        elif scope in self.failed or not self._is_open_for(scope):
            until, seconds = self.failed.get(scope, (now, FIRST_OPEN_S))
            if until <= now:
                self.failed[scope] = now + seconds, min(seconds * 2, MAX_OPEN_S)
        if is_probe or self.is_open != was_open:
            self.open_until = now + self.open_seconds
            self.open_seconds = min(self.open_seconds * 2, MAX_OPEN_S)
        if is_probe:
            self.is_probing = False

    def record_cancellation(self, *, is_probe: bool) -> None:
        """Let another request be the probe: this one was cancelled without an outcome."""
        if is_probe:
            self.is_probing = False


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause after a 429."""

    until: float
    has_retry_after: bool
    """Whether the 429 had a ``Retry-After``. Otherwise clients get no ``Retry-After``."""


@dataclass(slots=True)
class Pauses:
    """The pauses of one endpoint after its 429s.

    A 429 pauses its scope. When ``GROUP_PAUSE_THRESHOLD`` repositories of a project pause for one
    kind of request, the project pauses for it. When repositories of as many projects do, all pause.
    """

    _by_scope: dict[RequestScope, Pause] = field(default_factory=dict)
    _by_group: dict[RequestScope, Pause] = field(default_factory=dict)
    """Pauses of a project, named like a repository, and of all repositories: the empty name."""

    def add(self, now: float, scope: RequestScope, seconds: float | None) -> None:
        """Pause after a 429. ``seconds``: its ``Retry-After``, or None.

        A second 429 never shortens a pause. Pauses that have ended are dropped here. A group that
        pauses sends nothing, so the number of pauses stays small.
        """
        for pauses in (self._by_scope, self._by_group):
            for ended in [key for key, pause in pauses.items() if pause.until <= now]:
                del pauses[ended]
        end = now + (DEFAULT_BACK_OFF_S if seconds is None else min(seconds, MAX_BACK_OFF_S))
        if end <= now:
            return
        pause = Pause(end, has_retry_after=seconds is not None)
        _prolong(self._by_scope, scope, pause)
        same_kind = [other for other in self._by_scope if other.kind == scope.kind]
        if sum(1 for other in same_kind if other.project == scope.project) >= GROUP_PAUSE_THRESHOLD:
            _prolong(self._by_group, RequestScope(scope.kind, scope.project), pause)
        if len({other.project for other in same_kind}) >= GROUP_PAUSE_THRESHOLD:
            _prolong(self._by_group, RequestScope(scope.kind, repository=""), pause)

    def find(self, now: float, scope: RequestScope) -> Pause | None:
        """Return the pause of ``scope`` that ends last. None if requests may be sent."""
        if not self._by_scope:
            return None
        pauses = (
            self._by_scope.get(scope),
            self._by_group.get(RequestScope(scope.kind, scope.project)),
            self._by_group.get(RequestScope(scope.kind, repository="")),
        )
        running = [pause for pause in pauses if pause is not None and pause.until > now]
        return max(running, key=lambda pause: pause.until, default=None)


def _prolong(pauses: dict[RequestScope, Pause], key: RequestScope, pause: Pause) -> None:
    current = pauses.get(key)
    if current is None or current.until < pause.until:
        pauses[key] = pause


@dataclass(slots=True)
class Endpoints:
    """The endpoints of one upstream, in the order of the configuration."""

    urls: tuple[URL, ...]
    circuits: dict[URL, CircuitBreaker] = field(default_factory=dict)
    pauses: dict[URL, Pauses] = field(default_factory=dict)
    last_failure: str = ""
    """Message of the last failure that a circuit breaker has counted."""

    def __post_init__(self) -> None:
        self.circuits = {url: CircuitBreaker() for url in self.urls}
        self.pauses = {url: Pauses() for url in self.urls}

    def may_request(self, url: URL, now: float, scope: RequestScope) -> bool:
        """Return whether a request may be sent to the endpoint ``url``."""
        if self.pauses[url].find(now, scope) is not None:
            return False
        return self.circuits[url].may_request(now, scope)

    def candidates(self, now: float, scope: RequestScope, avoid: Collection[str] = ()) -> list[URL]:
        """Return the endpoints to try, the best one first.

        Endpoints that may get no request are left out. Those that have failed for ``scope`` come
        after the others for a while: an endpoint that accepts connections and does not respond
        would delay each request. Those in ``avoid`` come last, in the order of ``avoid``.
        """
        permitted = [url for url in self.urls if self.may_request(url, now, scope)]
        ranks = {name: rank for rank, name in enumerate(avoid)}

        def rank(url: URL) -> tuple[int, bool]:
            return ranks.get(str(url), -1), self.has_failed(url, now, scope)

        return sorted(permitted, key=rank)

    def has_failed(self, url: URL, now: float, scope: RequestScope) -> bool:
        """Return whether the endpoint has failed for ``scope`` a moment ago."""
        until, _ = self.circuits[url].failed.get(scope, (now, 0.0))
        return now < until

    def remaining_pauses(self, now: float, scope: RequestScope) -> dict[URL, float | None]:
        """Return the endpoints that pause after a 429, with the remaining seconds.

        None stands for a pause whose length we chose: clients get no ``Retry-After`` for it.
        """
        found = {url: pauses.find(now, scope) for url, pauses in self.pauses.items()}
        return {
            url: pause.until - now if pause.has_retry_after else None
            for url, pause in found.items()
            if pause is not None
        }

    def final_error(self, state: SendState, now: float, scope: RequestScope) -> UpstreamError:
        """Return the error to raise if not all endpoints refused, with what it hides."""
        error = self._choose_error(state, now, scope)
        error.others = tuple(other for other in state.errors if other is not error)
        error.next_request_in = self._seconds_until_request(state, now, scope)
        error.is_wait = not state.failures and error.next_request_in is not None
        return error

    def _seconds_until_request(
        self, state: SendState, now: float, scope: RequestScope
    ) -> float | None:
        """Return ``next_request_in`` of the error (:class:`mirror.oci.errors.MirrorError`)."""
        pauses = (
            self.pauses[url].find(now, scope)
            for url in self.urls
            if not (url in state.tried or url in state.finished)
            and not self.may_request(url, now, scope)
        )
        seconds = [0.0 if pause is None else pause.until - now for pause in pauses]
        for url, error in state.finished.items():
            if url not in state.tried and error.next_request_in is not None:
                seconds.append(error.next_request_in)
        return min(seconds, default=None)

    def _choose_error(self, state: SendState, now: float, scope: RequestScope) -> UpstreamError:
        """Choose the error of a request that not all endpoints refused.

        A 429 takes precedence over failures of other endpoints, then the last failure. Without any
        failure, an endpoint gets no request now.
        """
        errors = (*state.failures[-1:], *state.finished.values())
        failures = [error for error in errors if isinstance(error, UpstreamError)]
        limited = (error for error in failures if isinstance(error, UpstreamRateLimited))
        if (error := next(limited, None)) is not None:
            return error
        if pauses := self.remaining_pauses(now, scope):
            delays = (seconds for seconds in pauses.values() if seconds is not None)
            return rate_limited(min(delays, default=None))
        if failures:
            return failures[0]
        blocked = [url for url in self.urls if not self.may_request(url, now, scope)]
        names = " and ".join(map(str, blocked or self.urls))
        return AllCircuitsOpen(
            f"no request is sent to {names} for a while; last failure: {self.last_failure}"
        )


@dataclass(slots=True)
class SendState:
    """State of one request: its attempts, the last failure, and the endpoints that are done."""

    retry_deadline: float
    """Time after which neither a round nor a third attempt begins."""
    attempts: int = 0
    errors: list[MirrorError] = field(default_factory=list)
    """All failures and refusals, in their order."""
    tried: set[URL] = field(default_factory=set)
    finished: dict[URL, MirrorError] = field(default_factory=dict)
    """Endpoint that is not asked again -> its refusal, or why its response cannot be used."""

    @property
    def failures(self) -> list[UpstreamError]:
        """The failures, in their order."""
        return [error for error in self.errors if isinstance(error, UpstreamError)]

    def may_attempt(self, now: float) -> bool:
        """Return whether a further endpoint may be asked in this round."""
        return len(self.failures) < MAX_ATTEMPTS_PER_REQUEST and (
            self.attempts < 2 or now < self.retry_deadline
        )

    def may_begin_round(self, now: float) -> bool:
        """Return whether another round is within the limits."""
        return len(self.failures) < MAX_ATTEMPTS_PER_REQUEST and now < self.retry_deadline

    def add(self, endpoint: URL, error: MirrorError, *, is_final: bool) -> None:
        """Count an attempt that has failed, or that was refused.

        ``is_final``: the endpoint is not asked again. It is not asked again after a refusal either.
        """
        self.errors.append(error)
        if is_final or not isinstance(error, UpstreamError):
            self.finished[endpoint] = error

    def refusals(self) -> list[MirrorError]:
        """Return the refusals (401, 403, 404), one for each endpoint that has refused."""
        return [error for error in self.finished.values() if not isinstance(error, UpstreamError)]

    def final_refusal(self) -> MirrorError:
        """Choose the error to raise if all endpoints refused: the first 401 or 403, else a 404."""
        refusals = self.refusals()
        denials = (error for error in refusals if not isinstance(error, NotFound))
        return next(denials, refusals[0])


def rate_limited(seconds: float | None) -> UpstreamRateLimited:
    """Return the error of an endpoint that pauses for ``seconds``, see ``remaining_pauses``."""
    return UpstreamRateLimited("the upstream limits the rate", retry_after=seconds)
