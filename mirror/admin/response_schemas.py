"""JSON Schemas of the responses of the admin API.

Lives here: one schema for each kind of response, for the OpenAPI document. A test holds the server
to them. Must not know: where the values come from.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

ResponseSchema: TypeAlias = dict[str, Any]

A_TEXT: Final[ResponseSchema] = {"type": "string"}
A_TEXT_OR_NULL: Final[ResponseSchema] = {"type": ["string", "null"]}
A_TIME: Final[ResponseSchema] = {"type": "string", "format": "date-time"}
A_TIME_OR_NULL: Final[ResponseSchema] = {"type": ["string", "null"], "format": "date-time"}
A_COUNT: Final[ResponseSchema] = {"type": "integer", "minimum": 0}
A_COUNT_OR_NULL: Final[ResponseSchema] = {"type": ["integer", "null"], "minimum": 0}
A_DIFFERENCE: Final[ResponseSchema] = {"type": "integer"}
A_NUMBER: Final[ResponseSchema] = {"type": "number"}
A_NUMBER_OR_NULL: Final[ResponseSchema] = {"type": ["number", "null"]}
A_YES_NO: Final[ResponseSchema] = {"type": "boolean"}


def list_of(items: ResponseSchema) -> ResponseSchema:
    """Return the schema of a list."""
    return {"type": "array", "items": items}


def record(**properties: ResponseSchema) -> ResponseSchema:
    """Return the schema of an object that has all of these properties, and may have more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _ref(name: str) -> ResponseSchema:
    return {"$ref": f"#/components/schemas/{name}"}


def _map_of(values: ResponseSchema) -> ResponseSchema:
    return {"type": "object", "additionalProperties": values}


RESPONSE_SCHEMAS: Final[dict[str, ResponseSchema]] = {
    "Problem": record(title=A_TEXT, status={"type": "integer"}, detail=A_TEXT),
    "Access": record(is_open=A_YES_NO),
    "Session": record(
        version=A_TEXT,
        role={"type": "string", "enum": ["full", "read-only"]},
        is_open=A_YES_NO,
        upstreams=list_of(A_TEXT),
        quota=A_COUNT,
        high_water=A_COUNT,
        low_water=A_COUNT,
    ),
    "Image": record(
        name=A_TEXT,
        kind={"type": "string", "enum": ["image", "platform", "referrer"]},
        upstream=A_TEXT,
        repository=A_TEXT,
        tag=A_TEXT_OR_NULL,
        digest=A_TEXT,
        current_digest=A_TEXT,
        platforms=list_of(A_TEXT),
        missing_platforms=list_of(A_TEXT),
        size=A_COUNT,
        unique=A_COUNT,
        last_used=A_TIME_OR_NULL,
        confirmed=A_TIME_OR_NULL,
        state=list_of(A_TEXT),
        missing_parts=A_COUNT,
        missing_bytes=A_COUNT,
        absent_why=A_TEXT_OR_NULL,
        stale_why=A_TEXT_OR_NULL,
        blocked_why=A_TEXT_OR_NULL,
        pushed=A_TIME_OR_NULL,
        pushed_by=A_TEXT_OR_NULL,
    ),
    "Images": record(
        images=list_of(_ref("Image")),
        matching=A_COUNT,
        total=A_COUNT,
        lost=A_COUNT,
        read=A_TIME,
    ),
    "ImageTree": record(image=_ref("Image"), nodes=list_of(_ref("TreeNode"))),
    "TreeNode": record(
        depth=A_COUNT,
        type=A_TEXT,
        digest=A_TEXT,
        media_type=A_TEXT_OR_NULL,
        platform=A_TEXT_OR_NULL,
        size=A_COUNT,
        is_cached=A_YES_NO,
        name=A_TEXT_OR_NULL,
        shared_with=list_of(A_TEXT),
    ),
    "Usage": record(
        contents=A_COUNT,
        bytes=A_COUNT,
        quota=A_COUNT,
        rows=list_of(
            record(type=A_TEXT, total=A_COUNT, active=A_COUNT, size=A_COUNT, reclaimable=A_COUNT)
        ),
        upstreams=list_of(
            record(
                name=A_TEXT,
                images=A_COUNT,
                contents=A_COUNT,
                size=A_COUNT,
                shared=A_COUNT,
                unique=A_COUNT,
            )
        ),
        next=list_of(
            record(
                digest=A_TEXT,
                type=A_TEXT,
                size=A_COUNT,
                last_used=A_TIME,
                why=A_TEXT,
                images=list_of(A_TEXT),
            )
        ),
        hosted={
            "anyOf": [
                record(
                    repositories=A_COUNT,
                    contents=A_COUNT,
                    bytes=A_COUNT,
                    uploads=A_COUNT,
                    reserved=A_COUNT,
                    metadata=A_COUNT,
                    quota=A_COUNT,
                ),
                {"type": "null"},
            ]
        },
        read=A_TIME,
    ),
    "Uploads": record(
        uploads=list_of(
            record(
                id=A_TEXT,
                repository=A_TEXT,
                user=A_TEXT_OR_NULL,
                size=A_COUNT,
                reserved=A_COUNT,
                started=A_TIME,
                last_byte=A_TIME,
                age=A_COUNT,
                idle=A_COUNT,
            )
        )
    ),
    "Users": record(
        users=list_of(
            record(
                user=A_TEXT,
                last_used=A_TIME,
                last_push={"type": ["string", "null"]},
                requests=A_COUNT,
            )
        ),
        total=A_COUNT,
    ),
    "TagHistory": record(
        digests=list_of(record(digest=A_TEXT, first_seen=A_TIME, last_seen=A_TIME)),
    ),
    "Fetch": record(
        digest=A_TEXT,
        upstream=A_TEXT,
        repository=A_TEXT,
        endpoint=A_TEXT,
        position=A_COUNT,
        size=A_COUNT_OR_NULL,
        rate=A_NUMBER_OR_NULL,
        connections=A_COUNT,
        followers=A_COUNT,
    ),
    "Request": record(
        id=A_TEXT,
        client=A_TEXT,
        kind=A_TEXT,
        upstream=A_TEXT,
        repository=A_TEXT,
        reference=A_TEXT,
        digest=A_TEXT,
        outcome=A_TEXT,
        bytes_sent=A_COUNT,
        rate=A_NUMBER_OR_NULL,
        duration=A_NUMBER,
    ),
    "Endpoint": record(
        state={"type": "string", "enum": ["unused", "ok", "failing", "open"]},
        requests=A_COUNT,
        failures=A_COUNT,
        last_status=A_COUNT,
        last_seconds=A_NUMBER,
        last_at=A_TIME_OR_NULL,
        last_error=A_TEXT,
        last_failure=A_TIME_OR_NULL,
        rate_limited=A_TIME_OR_NULL,
    ),
    "Upstream": record(
        endpoints=_map_of(_ref("Endpoint")),
        rate_limit={
            "anyOf": [
                record(limit=A_COUNT, remaining=A_COUNT, window=A_COUNT, seen=A_TIME),
                {"type": "null"},
            ]
        },
        back_offs=list_of(record(at=A_TIME, endpoint=A_TEXT, reason=A_TEXT, connections=A_COUNT)),
    ),
    "Live": record(
        workers=A_COUNT,
        fetches=list_of(_ref("Fetch")),
        requests=list_of(_ref("Request")),
        counts=record(fetches=A_COUNT, requests=A_COUNT),
        upstreams=_map_of(_ref("Upstream")),
        storage={
            "anyOf": [
                record(contents=A_COUNT, bytes=A_COUNT, quota=A_COUNT, is_writable=A_YES_NO),
                {"type": "null"},
            ]
        },
    ),
    "Upstreams": record(upstreams=_map_of(_ref("Upstream"))),
    "Pull": record(
        row=A_COUNT,
        id=A_TEXT,
        at=A_TIME,
        client=A_TEXT,
        name=A_TEXT,
        kind=A_TEXT,
        outcome=A_TEXT,
        status=A_COUNT,
        error=A_TEXT,
        bytes_sent=A_COUNT,
        duration=A_NUMBER,
    ),
    "Pulls": record(pulls=list_of(_ref("Pull"))),
    "Timeline": record(
        pull=_ref("Pull"),
        stages=list_of(record(name=A_TEXT, seconds=A_NUMBER)),
        explanation=list_of(A_TEXT),
    ),
    "Savings": record(
        period={"type": "string", "enum": ["hour", "day", "month"]},
        totals=_ref("Saving"),
        points=list_of(
            record(
                at=A_TIME,
                requests=A_COUNT,
                hits=A_COUNT,
                hit_ratio=A_NUMBER_OR_NULL,
                bytes_sent=A_COUNT,
                bytes_fetched=A_COUNT,
                bytes_saved=A_DIFFERENCE,
            )
        ),
        upstreams=list_of(_ref("Saving")),
    ),
    "Saving": record(
        name=A_TEXT,
        requests=A_COUNT,
        hit_ratio=A_NUMBER_OR_NULL,
        bytes_sent=A_COUNT,
        bytes_fetched=A_COUNT,
        bytes_saved=A_DIFFERENCE,
        billable_saved=A_DIFFERENCE,
    ),
    "Marks": record(
        pins=list_of(record(name=A_TEXT, digest=A_TEXT, since=A_TIME)),
        freezes=list_of(record(name=A_TEXT, digest=A_TEXT, since=A_TIME)),
        blocks=list_of(record(target=A_TEXT, reason=A_TEXT, since=A_TIME, digests=list_of(A_TEXT))),
        leases=A_COUNT,
    ),
    "Changed": record(text=A_TEXT, notes=list_of(A_TEXT)),
    "Job": record(
        id=A_TEXT,
        kind=A_TEXT,
        arguments={"type": "object"},
        state={"type": "string", "enum": ["waiting", "running", "done", "failed", "cancelled"]},
        created=A_TIME,
        started=A_TIME_OR_NULL,
        ended=A_TIME_OR_NULL,
        progress=record(done=A_COUNT, total=A_COUNT_OR_NULL, unit=A_TEXT, text=A_TEXT),
        result={"type": ["object", "null"]},
        error=A_TEXT_OR_NULL,
    ),
    "Jobs": record(jobs=list_of(_ref("Job"))),
    "JobEvent": record(job=_ref("Job"), notes=list_of(A_TEXT)),
    "Ticket": record(ticket=A_TEXT, expires_in=A_NUMBER),
}
"""Name of a schema in the OpenAPI document -> the schema."""
