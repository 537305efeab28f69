"""State of circuit breakers and order of endpoints, with time passed in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from mirror.oci.errors import (
    AllCircuitsOpen,
    BlobUnknown,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.upstream.endpoints import (
    DEFAULT_BACK_OFF_S,
    FAILURE_THRESHOLD,
    FIRST_OPEN_S,
    GROUP_PAUSE_THRESHOLD,
    MAX_BACK_OFF_S,
    MAX_OPEN_S,
    CircuitBreaker,
    Endpoints,
    Pause,
    Pauses,
    RequestScope,
    SendState,
)

A, B, C = (URL(f"https://{name}.example") for name in "abc")


def scope(repository: str = "a/app", kind: str = "GET blob") -> RequestScope:
    return RequestScope(kind, repository)


def fail(
    circuit: CircuitBreaker, now: float, what: RequestScope, *, is_probe: bool = False
) -> None:
    circuit.record_failure(now, what, is_probe=is_probe)


def opened(now: float = 0.0) -> CircuitBreaker:
    """Return a circuit that has just opened, because the endpoint cannot be reached."""
    circuit = CircuitBreaker()
    for _ in range(FAILURE_THRESHOLD):
        is_probe = circuit.begin_request(scope())
        circuit.record_failure(now, scope(), is_probe=is_probe, is_unreachable=True)
    return circuit


def test_circuit_opens_after_failures_of_three_repositories_in_a_row() -> None:
    circuit = CircuitBreaker()
    for repository in "ab":
        fail(circuit, 0.0, scope(repository))
    circuit.record_success()
    for repository in "cd":
        fail(circuit, 0.0, scope(repository))
        assert circuit.may_request(0.0, scope())
    fail(circuit, 0.0, scope("e"))
    assert circuit.is_open
    assert not circuit.may_request(FIRST_OPEN_S - 0.01, scope())
    assert circuit.may_request(FIRST_OPEN_S, scope())


@pytest.mark.row("FB11-late-first-byte")
def test_failures_of_one_repository_never_open_the_circuit() -> None:
    circuit = CircuitBreaker()
    for _ in range(100):
        fail(circuit, 0.0, scope("a"))
    assert circuit.may_request(0.0, scope("a"))
    assert circuit.may_request(0.0, scope("b"))
    assert not circuit.is_open


@pytest.mark.row("FB11-late-first-byte")
def test_failures_of_one_kind_open_the_circuit_for_this_kind_only() -> None:
    circuit = CircuitBreaker()
    for repository in "abc":
        fail(circuit, 0.0, scope(repository, "GET blob"))
    assert circuit.is_open
    assert not circuit.may_request(0.0, scope("d", "GET blob"))
    for kind in ("GET manifest", "HEAD manifest", "HEAD blob", "GET tags"):
        assert circuit.may_request(0.0, scope("a", kind))
        assert not circuit.begin_request(scope("a", kind)), "it is no probe"
    circuit.record_success()
    assert circuit.may_request(0.0, scope("d", "GET blob")), "the endpoint responds"


def test_failures_of_one_repository_in_several_kinds_open_no_circuit() -> None:
    circuit = CircuitBreaker()
    kinds = ("GET manifest", "HEAD manifest", "GET blob", "HEAD blob", "GET tags")
    for kind in kinds:
        fail(circuit, 0.0, scope("a", kind))
    assert not circuit.is_open
    assert all(circuit.may_request(0.0, scope("b", kind)) for kind in kinds)


def test_failure_of_the_whole_endpoint_counts_each_time_and_for_all_kinds() -> None:
    circuit = CircuitBreaker()
    fail(circuit, 0.0, scope("a"))
    for _ in range(FAILURE_THRESHOLD - 1):
        assert circuit.may_request(0.0, scope())
        circuit.record_failure(0.0, scope("a"), is_probe=False, is_unreachable=True)
    assert not circuit.may_request(0.0, scope())
    assert circuit.may_request(0.0, scope(kind="GET tags")), "two failures only"
    circuit.record_failure(0.0, scope("a"), is_probe=False, is_unreachable=True)
    assert not circuit.may_request(0.0, scope(kind="GET tags"))


def test_failed_probe_of_a_failed_repository_doubles_the_open_time() -> None:
    circuit = CircuitBreaker()
    for repository in "abc":
        fail(circuit, 0.0, scope(repository))
    fail(circuit, FIRST_OPEN_S, scope("c"), is_probe=circuit.begin_request(scope("c")))
    assert circuit.open_until == FIRST_OPEN_S + 2 * FIRST_OPEN_S


def test_memory_of_a_circuit_is_bounded_during_a_long_outage() -> None:
    circuit, now = CircuitBreaker(), 0.0
    for number in range(10_000):
        what = scope(f"r{number}")
        if circuit.may_request(now, what):
            fail(circuit, now, what, is_probe=circuit.begin_request(what))
        else:
            now = circuit.open_until
    assert len(circuit.failed) == FAILURE_THRESHOLD


def test_half_open_circuit_permits_one_request() -> None:
    circuit = opened()
    assert circuit.begin_request(scope())
    assert not circuit.may_request(FIRST_OPEN_S, scope())
    assert not circuit.may_request(1e9, scope()), "however long the probe takes"


def test_successful_probe_closes_the_circuit() -> None:
    circuit = opened()
    circuit.begin_request(scope())
    circuit.record_success()
    assert not circuit.is_open
    assert circuit.may_request(FIRST_OPEN_S, scope())
    assert not circuit.begin_request(scope())


def test_failed_probe_doubles_the_open_time_up_to_60_s() -> None:
    circuit, now, pauses = opened(), 0.0, [FIRST_OPEN_S]
    for _ in range(10):
        now = circuit.open_until
        circuit.record_failure(
            now, scope(), is_unreachable=True, is_probe=circuit.begin_request(scope())
        )
        pauses.append(circuit.open_until - now)
    assert pauses[:5] == [2.0, 4.0, 8.0, 16.0, 32.0]
    assert set(pauses[5:]) == {MAX_OPEN_S}
    circuit.record_success()
    for _ in range(FAILURE_THRESHOLD):
        circuit.record_failure(now, scope(), is_unreachable=True, is_probe=False)
    assert circuit.open_until - now == FIRST_OPEN_S, "a success resets the open time"


def test_cancelled_probe_permits_the_next_one() -> None:
    circuit = opened()
    circuit.record_cancellation(is_probe=circuit.begin_request(scope()))
    assert circuit.may_request(FIRST_OPEN_S, scope())
    circuit.begin_request(scope())
    circuit.record_cancellation(is_probe=False)
    assert not circuit.may_request(FIRST_OPEN_S, scope()), "the cancelled request was not the probe"


@pytest.mark.row("U12-flapping-endpoint")
def test_many_concurrent_failures_open_the_circuit_once() -> None:
    circuit = CircuitBreaker()
    for _ in range(100):
        circuit.record_failure(0.0, scope(), is_probe=False, is_unreachable=True)
    assert circuit.may_request(FIRST_OPEN_S, scope()), "later failures do not prolong it"
    circuit.begin_request(scope())
    for _ in range(100):
        circuit.record_failure(FIRST_OPEN_S, scope(), is_probe=False, is_unreachable=True)
    assert not circuit.may_request(1e9, scope()), "late failures do not end the probe"


# --- pauses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [(7.0, 7.0), (0.0, 0.0), (86400.0, MAX_BACK_OFF_S), (None, DEFAULT_BACK_OFF_S)],
)
def test_pause_lasts_as_requested_with_a_default_and_a_maximum(
    retry_after: float | None, seconds: float
) -> None:
    pauses = Pauses()
    pauses.add(100.0, scope(), retry_after)
    assert pauses.find(100.0 + seconds, scope()) is None
    pause = pauses.find(100.0, scope())
    if seconds:
        assert pause == Pause(100.0 + seconds, has_retry_after=retry_after is not None)
    else:
        assert pause is None


def test_second_429_never_shortens_the_pause() -> None:
    pauses = Pauses()
    pauses.add(0.0, scope(), 60.0)
    pauses.add(1.0, scope(), None)
    pauses.add(1.0, scope(), 5.0)
    assert pauses.find(59.0, scope()) == Pause(60.0, has_retry_after=True)


@pytest.mark.row("FD2-limits-of-one-project")
def test_429_pauses_its_repository_and_kind_only() -> None:
    pauses = Pauses()
    pauses.add(0.0, scope("a/app", "GET manifest"), 60.0)
    assert pauses.find(1.0, scope("a/app", "GET manifest"))
    for other in (
        scope("a/app", "HEAD manifest"),
        scope("a/app", "GET blob"),
        scope("a/other", "GET manifest"),
        scope("b/app", "GET manifest"),
        scope("a", "GET manifest"),
    ):
        assert pauses.find(1.0, other) is None, other


@pytest.mark.row("FD2-limits-of-one-project")
def test_429s_of_several_repositories_of_one_project_pause_this_project_only() -> None:
    pauses = Pauses()
    for number in range(GROUP_PAUSE_THRESHOLD):
        assert pauses.find(1.0, scope("a/next")) is None
        pauses.add(1.0, scope(f"a/{number}"), 60.0)
    assert pauses.find(1.0, scope("a/next")) == Pause(61.0, has_retry_after=True)
    assert pauses.find(1.0, scope("a/next", "GET manifest")) is None
    assert pauses.find(1.0, scope("b/app")) is None
    assert pauses.find(1.0, scope("app")) is None
    assert pauses.find(61.0, scope("a/next")) is None


@pytest.mark.row("FD2-limits-of-one-project")
@pytest.mark.parametrize("names", [["a/x", "b/x", "c/x"], ["a", "b", "c"], ["a", "b/x", "c/d/e"]])
def test_429s_of_several_projects_pause_all_repositories_for_this_kind(names: list[str]) -> None:
    pauses = Pauses()
    for name in names:
        assert pauses.find(1.0, scope("other/app")) is None
        pauses.add(1.0, scope(name), None)
    assert pauses.find(1.0, scope("other/app")) == Pause(
        1.0 + DEFAULT_BACK_OFF_S, has_retry_after=False
    )
    assert pauses.find(1.0, scope("other/app", "GET manifest")) is None


def test_ended_pauses_count_for_no_group_and_are_dropped() -> None:
    pauses = Pauses()
    for number in range(10_000):
        pauses.add(float(number), scope(f"p{number}/app"), 1.0)
        assert pauses.find(number + 0.5, scope("other/app")) is None
    assert len(pauses._by_scope) == 1
    assert not pauses._by_group


def test_pauses_stay_few_although_100_000_repositories_meet_a_429() -> None:
    pauses = Pauses()
    sent = 0
    for number in range(100_000):
        what = scope(f"p{number % 1000}/app{number}")
        if pauses.find(0.0, what) is None:
            sent += 1
            pauses.add(0.0, what, 60.0)
    assert sent == GROUP_PAUSE_THRESHOLD
    assert len(pauses._by_scope) == GROUP_PAUSE_THRESHOLD


# --- order ----------------------------------------------------------------------------------------


def test_candidates_are_in_order_and_avoided_ones_last() -> None:
    endpoints = Endpoints((A, B, C))
    assert endpoints.candidates(0.0, scope()) == [A, B, C]
    for avoid, expected in (
        ([A, URL("https://unknown.example")], [B, C, A]),
        ([A, B, C], [A, B, C]),
        ([B, A], [C, B, A]),
        ([A, B, A], [C, B, A]),
    ):
        assert endpoints.candidates(0.0, scope(), list(map(str, avoid))) == expected


def test_candidates_leave_out_open_circuits_and_pauses() -> None:
    endpoints = Endpoints((A, B, C))
    for repository in "xyz":
        fail(endpoints.circuits[A], 0.0, scope(repository))
    endpoints.pauses[B].add(0.0, scope(), 10.0)
    assert endpoints.candidates(1.0, scope()) == [C]
    assert endpoints.candidates(FIRST_OPEN_S, scope()) == [A, C]
    assert endpoints.candidates(10.0, scope()) == [A, B, C]


def test_endpoint_that_failed_for_a_repository_is_asked_last_for_it_for_a_while() -> None:
    endpoints = Endpoints((A, B, C))
    fail(endpoints.circuits[A], 0.0, scope("a"))
    assert endpoints.candidates(1.0, scope("a")) == [B, C, A]
    assert endpoints.candidates(1.0, scope("a"), [str(B)]) == [C, A, B], "avoided ones are last"
    assert endpoints.candidates(1.0, scope("b")) == [A, B, C]
    assert endpoints.candidates(1.0, scope("a", "GET tags")) == [A, B, C]
    now = FIRST_OPEN_S
    assert endpoints.candidates(now, scope("a")) == [A, B, C], "it may have recovered"
    for _ in range(5):
        fail(endpoints.circuits[A], now, scope("a"))
    assert endpoints.candidates(now + 2 * FIRST_OPEN_S - 0.1, scope("a")) == [B, C, A]
    assert endpoints.candidates(now + 2 * FIRST_OPEN_S, scope("a")) == [A, B, C]
    for _ in range(10):
        now += MAX_OPEN_S
        assert endpoints.candidates(now, scope("a")) == [A, B, C]
        fail(endpoints.circuits[A], now, scope("a"))
    endpoints.circuits[A].record_success()
    assert endpoints.candidates(1.0, scope("a")) == [A, B, C]


def test_remaining_pauses_name_only_times_of_the_endpoint() -> None:
    endpoints = Endpoints((A, B, C))
    assert endpoints.remaining_pauses(0.0, scope()) == {}
    endpoints.pauses[A].add(0.0, scope(), 10.0)
    endpoints.pauses[B].add(0.0, scope(), None)
    endpoints.pauses[C].add(0.0, scope("other"), 5.0)
    assert list(endpoints.remaining_pauses(1.0, scope()).values()) == [9.0, None], (
        "clients are told no time that we chose"
    )
    assert endpoints.remaining_pauses(10.0, scope()) == {}


SCOPES = st.builds(scope, st.sampled_from("abcd"), st.sampled_from(["GET blob", "GET tags"]))
STEPS = st.lists(st.tuples(st.sampled_from("cufsa"), SCOPES, st.integers(0, 9), st.floats(0, 30)))


@given(STEPS)
def test_any_sequence_has_one_probe_at_a_time_and_ends_permitted(
    steps: list[tuple[str, RequestScope, int, float]],
) -> None:
    circuit, now = CircuitBreaker(), 0.0
    under_way: list[tuple[RequestScope, bool]] = []
    for step, new, index, seconds in steps:
        now += seconds
        if step == "c":
            if circuit.may_request(now, new):
                is_probe = circuit.begin_request(new)
                under_way.append((new, is_probe))
                assert not (is_probe and circuit.may_request(now + 1e9, new))
        elif under_way:
            what, probe = under_way.pop(index % len(under_way))
            match step:
                case "f" | "u":
                    circuit.record_failure(now, what, is_probe=probe, is_unreachable=step == "u")
                case "s":
                    circuit.record_success()
                case "a":
                    circuit.record_cancellation(is_probe=probe)
    for _, probe in under_way:
        circuit.record_cancellation(is_probe=probe)
    assert circuit.may_request(now + MAX_OPEN_S, scope())


# --- the error of a request ---------------------------------------------------------------------


@pytest.mark.row("U9-rate-limits")
def test_error_without_a_failed_endpoint_has_the_time_of_the_next_request() -> None:
    endpoints = Endpoints((A, B, C))
    for url, seconds in ((A, 20.0), (B, 30.0)):
        endpoints.pauses[url].add(0.0, scope(), seconds)
    refusal = BlobUnknown("404")
    refused = SendState(99.0, tried={C})
    refused.add(C, refusal, is_final=False)
    error = endpoints.final_error(refused, 5.0, scope())
    assert isinstance(error, UpstreamRateLimited)
    assert (error.retry_after, error.next_request_in, error.is_wait) == (15.0, 15.0, True)
    assert error.others == (refusal,)


@pytest.mark.row("U9-rate-limits")
def test_circuit_that_is_open_may_close_at_any_time() -> None:
    endpoints = Endpoints((A, B))
    endpoints.pauses[A].add(0.0, scope(), 20.0)
    endpoints.circuits[B] = opened(4.0)
    error = endpoints.final_error(SendState(99.0), 5.0, scope())
    assert (error.next_request_in, error.is_wait) == (0.0, True)
    endpoints.pauses[A] = Pauses()
    error = endpoints.final_error(SendState(99.0, finished={A: BlobUnknown("404")}), 5.0, scope())
    assert isinstance(error, AllCircuitsOpen)
    assert (error.next_request_in, error.is_wait) == (0.0, True)


def test_endpoint_beyond_the_limit_of_attempts_is_not_waited_for() -> None:
    endpoints, broken = Endpoints((A, B)), UpstreamUnavailable("500")
    state = SendState(99.0, tried={A})
    state.add(A, broken, is_final=False)
    error = endpoints.final_error(state, 5.0, scope())
    assert (error, error.next_request_in, error.is_wait) == (broken, None, False)


@pytest.mark.row("U9-rate-limits")
def test_429_names_the_failures_that_it_hides() -> None:
    endpoints = Endpoints((A, B))
    state = SendState(99.0, tried={A, B})
    broken, limited = UpstreamUnavailable("500"), UpstreamRateLimited("429")
    for endpoint, error in ((B, broken), (A, limited)):
        state.add(endpoint, error, is_final=False)
    assert endpoints.final_error(state, 1.0, scope()) is limited
    assert (limited.others, limited.next_request_in) == ((broken,), None)
    endpoints.pauses[A].add(1.0, scope(), 20.0)
    state = SendState(99.0)
    state.tried.add(B)
    state.add(B, broken, is_final=False)
    paused = endpoints.final_error(state, 2.0, scope())
    assert isinstance(paused, UpstreamRateLimited)
    assert (paused.others, paused.next_request_in) == ((broken,), 19.0)
    assert not paused.is_wait
