"""What the cache saves: bytes, billable requests, and the hit ratio."""

from __future__ import annotations

from mirror.history.stored_pull import PeriodCount
from mirror.history.sums import Grouping, build_savings, build_total


def count(outcome: str, **fields: object) -> PeriodCount:
    given: dict[str, object] = {"start": 0, "upstream": "docker.io", "requests": 1}
    given |= {"bytes_sent": 0, "bytes_fetched": 0, "billable": 0, "billed": 0}
    return PeriodCount(**{**given, "outcome": outcome, **fields})  # type: ignore[arg-type] # of a test


COUNTS = [
    count("hit", repository="a", network="10.0.0.0/24", requests=6, bytes_sent=60, billable=4),
    count("miss", repository="a", network="10.0.0.0/24", bytes_sent=10, bytes_fetched=10, billed=1),
    count("join", repository="b", network="10.0.1.0/24", bytes_sent=10, billable=1),
    count("denied", network="10.0.1.0/24", requests=5),
    count("miss", upstream="other", repository="a", bytes_sent=1, bytes_fetched=9),
]


def test_savings_are_bytes_and_billable_requests_that_were_not_asked_for() -> None:
    assert build_total(COUNTS).to_json() == {
        "name": "total",
        "requests": 14,
        "hit_ratio": round(7 / 9, 4),
        "bytes_sent": 81,
        "bytes_fetched": 19,
        "bytes_saved": 62,
        "billable": 5,
        "billed": 1,
        "billable_saved": 4,
    }


def test_refused_requests_do_not_change_the_hit_ratio() -> None:
    assert build_total([count("denied"), count("negative")]).hit_ratio is None


def test_groups_are_sorted_by_saved_bytes() -> None:
    def named(by: Grouping) -> list[tuple[str, int]]:
        return [(one.name, one.bytes_saved) for one in build_savings(COUNTS, by)]

    assert named("upstream") == [("docker.io", 70), ("other", -8)]
    assert named("repository") == [
        ("docker.io/a", 60),
        ("docker.io/b", 10),
        ("", 0),
        ("other/a", -8),
    ]
    assert named("network") == [("10.0.0.0/24", 60), ("10.0.1.0/24", 10), ("", -8)]


def test_rest_of_many_names_is_one_sum() -> None:
    found = build_savings(COUNTS, "network", 1)
    assert [one.name for one in found] == ["10.0.0.0/24", ""]
    assert sum(one.requests for one in found) == build_total(COUNTS).requests
