"""Events are frozen, and the record of a request measures its stages."""

from __future__ import annotations

import dataclasses
import inspect
import typing

import pytest

from mirror.observability import events, hosted_events, job_events, notification_events
from mirror.observability.events import Kind, Outcome, RequestRecord

EVENTS = typing.get_args(events.Event)


def test_every_event_type_is_frozen_documented_and_part_of_the_union() -> None:
    modules = (events, hosted_events, job_events, notification_events)
    defined = {
        kind
        for module in modules
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if kind.__module__ == module.__name__ and dataclasses.is_dataclass(kind)
    }
    assert defined == {*EVENTS, RequestRecord, hosted_events.Actor, hosted_events.HostedUsage}
    message = events.LogMessage("info", "x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.message = "y"  # type: ignore[misc] # the assignment that must fail
    for kind in EVENTS:
        assert kind.__dataclass_params__.frozen, kind
        assert (kind.__doc__ or "").strip(), kind


def test_new_record_is_an_invalid_request_that_ended_with_an_error() -> None:
    pull = RequestRecord("id", "GET", "/")
    assert (pull.kind, pull.outcome, pull.upstream) == (Kind.INVALID, Outcome.ERROR, "")
    assert not pull.is_complete
    assert pull.first_byte is None
    assert RequestRecord("id", "GET", "/").stages is not pull.stages


def test_stages_are_recorded_in_order_with_their_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 2.5, 4.0, 6.0])
    pull = RequestRecord("id", "GET", "/", started=0.0)
    monkeypatch.setattr("mirror.observability.events.time.monotonic", lambda: next(clock))
    with pull.stage("index"):
        pass
    with pull.stage("wait"):
        pass
    with pull.stage("index"):
        pass
    assert pull.stages == [("index", 1.0), ("wait", 0.5), ("index", 2.0)]


def test_stage_whose_block_raises_is_measured() -> None:
    pull = RequestRecord("id", "GET", "/")
    with pytest.raises(ZeroDivisionError), pull.stage("upstream"):
        raise ZeroDivisionError
    ((name, seconds),) = pull.stages
    assert name == "upstream"
    assert seconds >= 0


def test_labels_are_single_ascii_words() -> None:
    """A space or a quote would break programs that read metrics and log lines."""
    for label in (*Kind, *Outcome):
        assert label.value.isascii()
        assert label.value.isalpha()
