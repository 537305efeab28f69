"""Recent memory: bounded in bytes and in time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.pull.ttl_cache import TtlLruCache


def test_a_value_ends_with_its_lifetime() -> None:
    clock = [0.0]
    recent: TtlLruCache[bytes] = TtlLruCache(100, 1.0, len, lambda: clock[0])
    recent.put("a", b"x")
    clock[0] = 1.0
    assert recent.get("a") == b"x"
    clock[0] = 1.01
    assert recent.get("a") is None


@pytest.mark.row("K1-wrong-clock")
def test_a_value_from_the_future_has_ended() -> None:
    clock = [1000.0]
    recent: TtlLruCache[bytes] = TtlLruCache(100, 60.0, len, lambda: clock[0])
    recent.put("a", b"x")
    clock[0] = 999.0
    assert recent.get("a") is None


def test_the_least_recently_used_goes_first() -> None:
    recent: TtlLruCache[bytes] = TtlLruCache(2, 60.0, len)
    recent.put("a", b"x")
    recent.put("b", b"x")
    recent.get("a")
    recent.put("c", b"x")
    assert [recent.get(key) for key in "abc"] == [b"x", None, b"x"]


@given(st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=40))))
def test_the_bound_holds_and_the_newest_is_there(puts: list[tuple[int, bytes]]) -> None:
    recent: TtlLruCache[bytes] = TtlLruCache(64, 60.0, len)
    model: dict[int, bytes] = {}
    for key, value in puts:
        recent.put(key, value)
        model[key] = value
        assert recent.get(key) == value
        held = {k: recent.get(k) for k in range(10)}
        assert sum(len(v) for v in held.values() if v is not None) <= 64
        assert all(v is None or v == model[k] for k, v in held.items())
