"""The requests of one client for one image are one pull."""

from __future__ import annotations

from mirror.history.client_pulls import group_requests
from mirror.history.stored_pull import StoredPull


def request(at: float, reference: str, client: str = "10.0.0.1", **more: object) -> StoredPull:
    kind = "blob" if more.pop("is_blob", False) else "manifest"
    fields = {"duration": 1.0, "repository": "app", "upstream": "docker.io", "kind": kind} | more
    return StoredPull(
        at=at, request_id="", method="GET", client=client, reference=reference, **fields
    )  # type: ignore[arg-type]  # fields are any


def shown(*requests: StoredPull) -> list[list[str]]:
    return [[one.reference for one in pull.requests] for pull in group_requests(requests)]


def test_requests_of_a_client_for_an_image_are_one_pull_although_others_come_between() -> None:
    first = [request(0, "v1"), request(1, "sha256:a", is_blob=True), request(30, "v2")]
    second = [request(0.5, "v1", client="10.0.0.2")]
    assert shown(*first, *second) == [["v2"], ["v1"], ["v1", "sha256:a"]]


def test_another_tag_another_repository_and_a_long_pause_begin_another_pull() -> None:
    assert shown(request(0, "v1"), request(1, "v2")) == [["v2"], ["v1"]]
    assert shown(request(0, "v1"), request(1, "v1", repository="b")) == [["v1"], ["v1"]]
    assert shown(request(0, "v1", duration=20), request(24, "sha256:a")) == [["v1", "sha256:a"]]
    assert shown(request(0, "v1"), request(7, "v1")) == [["v1"], ["v1"]]


def test_requests_without_a_repository_are_alone() -> None:
    assert len(group_requests([request(0, "", repository=""), request(0, "", repository="")])) == 2


def test_pull_has_its_name_its_time_and_its_slowest_request() -> None:
    layer = request(1, "sha256:a", duration=16.0, outcome="miss", is_blob=True)
    (pull,) = group_requests([request(0, "v1", outcome="hit"), layer])
    assert (pull.name, pull.begin, pull.end) == ("docker.io/app:v1", 0, 17.0)
    assert pull.slowest is layer
    assert dict(pull.outcomes) == {"hit": 1, "miss": 1}
