"""The live states of several workers, and their merge."""

from __future__ import annotations

from typing import Any

from mirror.admin.live_state import LiveState
from mirror.admin.worker_channel import (
    MAX_AGE_S,
    WorkerStates,
    merge_states,
    open_channel,
    send_state,
)
from mirror.observability.events import CircuitChanged, ExchangeEnded, Kind, StorageMeasured
from mirror.oci.reference import Digest, Repository
from mirror.pull.running_fetches import RunningFetch

HUB = "https://registry-1.docker.io"


def fetch(digest: str, connections: int, followers: int) -> RunningFetch:
    return RunningFetch(
        digest=Digest.parse("sha256:" + digest * 64),
        repository=Repository.parse("docker.io", "library/app"),
        endpoint=HUB,
        position=connections * 100,
        size=1000,
        connections=connections,
        followers=followers,
    )


def worker(number: int, at: float, *fetches: RunningFetch) -> dict[str, Any]:
    live = LiveState(number, lambda: 1_767_323_045.0 + number, lambda: at)
    live.fetches = lambda: list(fetches)
    live.observe(ExchangeEnded("docker.io", HUB, "GET", Kind.BLOB, 200 + number, 0.1, False))
    live.observe(StorageMeasured(number, 10, 20, True))
    return live.snapshot()


def test_fetch_of_two_workers_is_one_row_of_the_worker_that_fetches() -> None:
    merged = merge_states(
        [worker(0, 0.0, fetch("a", 0, 2)), worker(1, 0.0, fetch("a", 3, 4), fetch("b", 1, 1))]
    )
    rows = {row["digest"][-1]: row for row in merged["fetches"]}
    assert (rows["a"]["connections"], rows["a"]["position"], rows["a"]["followers"]) == (3, 300, 6)
    assert rows["b"]["followers"] == 1
    assert merged["workers"] == 2


def test_endpoint_of_two_workers_has_the_worst_state_and_the_latest_response() -> None:
    other = LiveState(1, lambda: 1_767_323_099.0)
    other.observe(ExchangeEnded("docker.io", HUB, "GET", Kind.BLOB, 0, 0.1, False, "no route"))
    other.observe(CircuitChanged("docker.io", HUB, True))
    merged = merge_states([worker(0, 0.0), other.snapshot()])
    found = merged["upstreams"]["docker.io"]["endpoints"][HUB]
    assert (found["state"], found["requests"], found["failures"]) == ("open", 2, 1)
    assert (found["last_status"], found["last_error"]) == (0, "no route")
    assert merged["storage"]["contents"] == 0


def test_states_of_other_workers_count_until_they_are_old() -> None:
    now = 100.0
    sender, receiver = open_channel()
    with sender, receiver:
        states = WorkerStates(lambda: worker(0, now), receiver, lambda: now)
        assert send_state(sender, worker(1, 100.0))
        assert send_state(sender, worker(2, 100.0 - MAX_AGE_S - 1))
        assert send_state(sender, worker(0, 100.0))  # An earlier process with our number.
        states.receive()
        assert states.merged()["workers"] == 2
        now += MAX_AGE_S + 1
        assert states.merged()["workers"] == 1


def test_sender_never_waits_for_a_reader() -> None:
    sender, receiver = open_channel()
    with sender, receiver:
        sent = [send_state(sender, worker(1, float(number))) for number in range(3000)]
    assert sent[0]
    assert not sent[-1]


def test_large_state_is_cut_to_the_size_of_a_datagram() -> None:
    state = worker(1, 100.0)
    state["fetches"] = [{"digest": "x" * 1000, "followers": 0, "connections": 0}] * 500
    state["requests"] = [{"id": "y" * 100}] * 50
    sender, receiver = open_channel()
    with sender, receiver:
        states = WorkerStates(lambda: worker(0, 100.0), receiver, lambda: 100.0)
        assert send_state(sender, state)
        states.receive()
        assert len(states.merged()["requests"]) == 10
