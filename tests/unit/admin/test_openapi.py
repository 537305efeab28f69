"""The OpenAPI document: the one that is checked in, and the server held to it by schemathesis."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode, checks
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks as openapi_checks

from mirror.admin.openapi import document, openapi_text
from mirror.admin.operations import OPERATIONS
from mirror.admin.response_schemas import RESPONSE_SCHEMAS
from tests.extent import Extent
from tests.unit.admin.kit import FULL, running_admin

CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
    openapi_checks.unsupported_method,
]
REFUSAL = openapi_checks.negative_data_rejection
STREAMS = {"stream_events", "follow_job"}
"""Operations whose response does not end. Other tests have them."""


def test_checked_in_document_is_the_generated_one() -> None:
    file = resources.files("mirror.admin").joinpath("openapi.json")
    assert file.read_text(encoding="utf-8") == openapi_text(), (
        "run: python -m mirror.admin.openapi > mirror/admin/openapi.json"
    )


def test_every_schema_is_valid_and_used() -> None:
    text = openapi_text()
    for name, schema in RESPONSE_SCHEMAS.items():
        Draft202012Validator.check_schema(schema)
        assert f'"#/components/schemas/{name}"' in text, name
    assert len({one.name for one in OPERATIONS}) == len(OPERATIONS)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The listener in a thread: schemathesis sends its requests by a library that blocks."""
    started, address = threading.Event(), ""

    async def serve(directory: Path) -> None:
        nonlocal address
        async with running_admin(directory) as kit:
            address = kit.url
            loop.call_soon(started.set)
            await stop.wait()

    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(serve(tmp_path_factory.mktemp("admin")))
    )
    thread.start()
    assert started.wait(10)
    yield address
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


def has_to_be_refused(case: Any, status: int) -> bool:
    """Whether schemathesis is right that a request is wrong, and that its answer must say so.

    A list without items is no part of a query. And a body that is too large is refused as such.
    """
    return status != 413 and not any(value in ([], {}, None) for value in case.query.values())


def hold_to_document(
    url: str, name: str, mode: GenerationMode, examples: int, described: Any = None
) -> None:
    # Each request has the token, so schemathesis shall not leave it out.
    schema = schemathesis.openapi.from_dict({**(described or document()), "security": []})
    schema.config.update(base_url=url)
    operation = next(one for one in schema.get_all_operations() if one.ok().label == name).ok()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = case.call(headers={"Authorization": f"Bearer {FULL}"})
        left_out = [] if has_to_be_refused(case, response.status_code) else [REFUSAL]
        case.validate_response(response, checks=CHECKS, excluded_checks=left_out)

    run()


LABELS = [f"{one.method} {one.path}" for one in OPERATIONS if one.name not in STREAMS]


RIGHT = GenerationMode.POSITIVE
WRONG = GenerationMode.NEGATIVE
WITH_FIELDS = [
    f"{one.method} {one.path}"
    for one in OPERATIONS
    if one.name not in STREAMS and (one.query or one.body or "{id}" in one.path)
]


@pytest.mark.parametrize("label", LABELS)
def test_right_requests_get_documented_responses(url: str, label: str) -> None:
    hold_to_document(url, label, RIGHT, examples=5)


@pytest.mark.parametrize("label", WITH_FIELDS)
def test_wrong_requests_are_refused(url: str, label: str) -> None:
    hold_to_document(url, label, WRONG, examples=8)


@pytest.mark.long
@pytest.mark.parametrize("mode", [RIGHT, WRONG])
@pytest.mark.parametrize("label", WITH_FIELDS)
def test_server_follows_the_document_for_many_requests(
    url: str, label: str, mode: GenerationMode, extent: Extent
) -> None:
    hold_to_document(url, label, mode, examples=extent.of(300))


def test_response_that_differs_from_the_document_is_found(url: str) -> None:
    """The checks are on: a document that promises another response is not followed."""
    other = document()
    other["components"]["schemas"]["Access"]["required"].append("nothing")
    with pytest.raises(FailureGroup, match="nothing"):
        hold_to_document(url, "GET /admin/v1/access", RIGHT, examples=1, described=other)


async def test_document_is_served(tmp_path: Path) -> None:
    async with running_admin(tmp_path) as kit:
        status, body = await kit.get("/admin/v1/openapi.json")
    assert (status, body) == (200, json.loads(openapi_text()))
