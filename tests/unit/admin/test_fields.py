"""Fields of queries and bodies, read by their declaration."""

from __future__ import annotations

from typing import Any

import pytest

from mirror.admin.fields import Field, read_json_fields, read_query_fields
from mirror.admin.problems import ApiProblem

FIELDS = (
    Field("name", {"type": "string", "minLength": 2, "maxLength": 4}, "", is_required=True),
    Field("limit", {"type": "integer", "minimum": 1, "maximum": 9}, "", default=5),
    Field("deep", {"type": "boolean"}, "", default=False),
    Field("order", {"type": "string", "enum": ("asc", "desc")}, ""),
    Field("part", {"type": "string", "pattern": "^[0-9]/[0-9]$"}, ""),
    Field(
        "tags",
        {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "",
    ),
)
DEFAULTS = {"name": "app", "limit": 5, "deep": False, "order": None, "part": None, "tags": None}


@pytest.mark.parametrize(
    ("query", "more"),
    [
        ("name=app", {}),
        ("name=app&limit=9&deep=true", {"limit": 9, "deep": True}),
        ("name=a%2Fb&order=asc&part=1/7", {"name": "a/b", "order": "asc", "part": "1/7"}),
    ],
)
def test_query_has_the_types_of_its_fields(query: str, more: dict[str, Any]) -> None:
    assert read_query_fields(FIELDS, query) == {**DEFAULTS, **more}


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("", "name is missing"),
        ("name=a", "name must have 2 to 4 characters"),
        ("name=app&limit=0", "limit must be from 1 to 9"),
        ("name=app&limit=five", "limit must be of the type integer"),
        ("name=app&limit=5.5", "limit must be of the type integer"),
        ("name=app&deep=yes", "deep must be of the type boolean"),
        ("name=app&order=up", "order must be one of asc, desc"),
        ("name=app&part=1%2F7%0A", "part must match"),
        ("name=app&name=app", "name is in the query twice"),
        ("name=app&nmae=x", "unknown field nmae; known: name, limit"),
        ("a=1&" * 21, "too many fields"),
    ],
)
def test_other_query_is_a_problem_that_names_the_field(query: str, why: str) -> None:
    with pytest.raises(ApiProblem, match=why) as raised:
        read_query_fields(FIELDS, query)
    assert raised.value.status == 400


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"name": 5}', "name must be of the type string"),
        (b'{"name": null}', "name must be of the type string"),
        (b'{"name": "app", "limit": true}', "limit must be of the type integer"),
        (b'{"name": "app", "tags": ["a", "b", "c"]}', "tags must have 0 to 2 items"),
        (b'{"name": "app", "tags": ["abcd"]}', "tags has an item that must have 0 to 3 characters"),
        (b'{"name": "app", "\\u202e": 1}', r"unknown field \\u202e"),
    ],
)
def test_other_body_is_a_problem(body: bytes, why: str) -> None:
    with pytest.raises(ApiProblem, match=why):
        read_json_fields(FIELDS, body)


def test_body_has_the_defaults_of_missing_fields() -> None:
    assert read_json_fields(FIELDS, b'{"name": "app", "tags": ["a"]}') == {
        **DEFAULTS,
        "tags": ["a"],
    }
