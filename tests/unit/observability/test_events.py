"""Events: frozen values, and the record of a pull as it fills."""

from __future__ import annotations

import dataclasses
import inspect
import typing

import pytest

from mirror.observability import events
from mirror.observability.events import Kind, Outcome, Pull

EVENTS = typing.get_args(events.Event)


def test_every_event_is_one_of_them_and_none_ever_changes() -> None:
    defined = {
        kind
        for _, kind in inspect.getmembers(events, inspect.isclass)
        if kind.__module__ == events.__name__ and dataclasses.is_dataclass(kind)
    }
    assert defined == {*EVENTS, Pull}
    noted = events.LogMessage("info", "x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        noted.message = "y"  # type: ignore[misc] # that it cannot be set is what is shown
    for kind in EVENTS:
        assert kind.__dataclass_params__.frozen, kind
        assert (kind.__doc__ or "").strip(), kind


def test_nobody_has_to_listen() -> None:
    events.ignore(events.LogMessage("info", "x"))


def test_a_record_begins_with_nothing_told() -> None:
    """Until it is known what a request is about, it is invalid, and an error."""
    pull = Pull("id", "GET", "/")
    assert (pull.kind, pull.outcome, pull.upstream) == (Kind.INVALID, Outcome.ERROR, "")
    assert not pull.complete
    assert pull.first_byte is None
    assert Pull("id", "GET", "/").stages is not pull.stages


def test_stages_are_kept_in_order_with_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 2.5, 4.0, 6.0])
    pull = Pull("id", "GET", "/", started=0.0)
    monkeypatch.setattr("mirror.observability.events.time.monotonic", lambda: next(clock))
    with pull.stage("index"):
        pass
    with pull.stage("wait"):
        pass
    with pull.stage("index"):
        pass
    assert pull.stages == [("index", 1.0), ("wait", 0.5), ("index", 2.0)]


def test_a_stage_that_fails_is_measured_as_well() -> None:
    pull = Pull("id", "GET", "/")
    with pytest.raises(ZeroDivisionError), pull.stage("upstream"):
        raise ZeroDivisionError
    ((name, seconds),) = pull.stages
    assert name == "upstream"
    assert seconds >= 0


def test_labels_are_words() -> None:
    """They stand in metrics and log lines, where a space or a quote would break what reads them."""
    for label in (*Kind, *Outcome):
        assert label.value.isascii()
        assert label.value.isalpha()
