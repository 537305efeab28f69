"""The table of operations: what a reader may call, and that the API has a method for each."""

from __future__ import annotations

import re

from mirror.admin.admin_api import Api
from mirror.admin.job_process import KINDS
from mirror.admin.operations import API_PREFIX, JOBS, OPERATIONS


def test_each_operation_is_unique_and_below_the_prefix() -> None:
    assert len({one.name for one in OPERATIONS}) == len(OPERATIONS)
    assert len({(one.method, one.path) for one in OPERATIONS}) == len(OPERATIONS)
    for one in OPERATIONS:
        assert one.path.startswith(f"{API_PREFIX}/")
        assert one.path.count("{id}") <= 1
        assert one.summary.endswith(".")


def test_api_has_a_method_for_each_operation() -> None:
    for one in OPERATIONS:
        name = "start_job" if one.name.startswith("start_") else one.name
        assert callable(getattr(Api, name, None)), one.name


def test_what_changes_something_is_a_post_and_no_read_is_a_change() -> None:
    may_read_by_post = {"issue_ticket"}
    for one in OPERATIONS:
        assert one.is_change == (one.method == "POST" and one.name not in may_read_by_post)
    assert [one.name for one in OPERATIONS if one.is_public] == ["access"]


def test_each_kind_of_job_is_run_by_this_process_or_by_one_of_its_own() -> None:
    assert set(JOBS) == {"warm", "refresh", *KINDS}
    assert all(re.fullmatch("[a-z]+", kind) for kind in JOBS)
