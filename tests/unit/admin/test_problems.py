"""Errors as problem details: statuses, texts, and what an unknown error shows."""

from __future__ import annotations

import json

import pytest

from mirror.admin.problems import ApiProblem, problem_of
from mirror.oci.errors import (
    Denied,
    Draining,
    InvalidRequest,
    NotFound,
    StorageUnavailable,
    UpstreamError,
)


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (InvalidRequest("no image name"), 400, "no image name"),
        (NotFound("not in the cache"), 404, "not in the cache"),
        (Draining("stops"), 503, "stops"),
        (StorageUnavailable("full"), 503, "full"),
        (UpstreamError("no route"), 502, "no route"),
        (Denied("frozen"), 409, "frozen"),
        (PermissionError(13, "Permission denied"), 503, "Permission denied"),
        (KeyError("secret"), 500, "an unexpected error: see the log of the server"),
    ],
)
def test_error_has_a_status_and_a_text_of_its_own(
    error: Exception, status: int, detail: str
) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.detail) == (status, detail)


def test_body_has_the_title_of_the_status_and_no_control_characters() -> None:
    problem = ApiProblem(429, "a\x1b[31m" + "b" * 1000, Retry_After="5")
    fields = json.loads(problem.body())
    assert (fields["title"], fields["status"]) == ("Too Many Requests", 429)
    assert "\x1b" not in fields["detail"]
    assert len(fields["detail"]) <= 500
    assert problem.headers == {"Retry-After": "5"}
