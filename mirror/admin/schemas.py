"""JSON Schemas of the responses of the admin API.

Lives here: one schema for each kind of response, for the OpenAPI document. A test holds the server
to them. Must not know: where the values come from.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

Schema: TypeAlias = dict[str, Any]

TEXT: Final[Schema] = {"type": "string"}
TEXT_OR_NULL: Final[Schema] = {"type": ["string", "null"]}
TIME: Final[Schema] = {"type": "string", "format": "date-time"}
TIME_OR_NULL: Final[Schema] = {"type": ["string", "null"], "format": "date-time"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
COUNT_OR_NULL: Final[Schema] = {"type": ["integer", "null"], "minimum": 0}
DIFFERENCE: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
NUMBER_OR_NULL: Final[Schema] = {"type": ["number", "null"]}
TRUTH: Final[Schema] = {"type": "boolean"}


def list_of(items: Schema) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": items}


def record(**properties: Schema) -> Schema:
    """Return the schema of an object that has all of these properties, and may have more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _map_of(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


SCHEMAS: Final[dict[str, Schema]] = {
    "Problem": record(title=TEXT, status={"type": "integer"}, detail=TEXT),
    "Access": record(is_open=TRUTH),
    "Session": record(
        version=TEXT,
        role={"type": "string", "enum": ["full", "read-only"]},
        is_open=TRUTH,
        upstreams=list_of(TEXT),
        quota=COUNT,
        high_water=COUNT,
        low_water=COUNT,
    ),
    "Image": record(
        name=TEXT,
        kind={"type": "string", "enum": ["image", "referrer"]},
        upstream=TEXT,
        repository=TEXT,
        tag=TEXT_OR_NULL,
        digest=TEXT,
        current_digest=TEXT,
        platforms=list_of(TEXT),
        missing_platforms=list_of(TEXT),
        size=COUNT,
        unique=COUNT,
        last_used=TIME_OR_NULL,
        checked=TIME_OR_NULL,
        state=list_of(TEXT),
        missing_parts=COUNT,
        missing_bytes=COUNT,
        stale_why=TEXT_OR_NULL,
        blocked_why=TEXT_OR_NULL,
    ),
    "Images": record(images=list_of(_ref("Image")), matching=COUNT, total=COUNT, read=TIME),
    "ImageTree": record(image=_ref("Image"), nodes=list_of(_ref("TreeNode"))),
    "TreeNode": record(
        depth=COUNT,
        type=TEXT,
        digest=TEXT,
        media_type=TEXT_OR_NULL,
        platform=TEXT_OR_NULL,
        size=COUNT,
        is_here=TRUTH,
        name=TEXT_OR_NULL,
        shared_with=list_of(TEXT),
    ),
    "Usage": record(
        contents=COUNT,
        bytes=COUNT,
        quota=COUNT,
        rows=list_of(record(type=TEXT, total=COUNT, active=COUNT, size=COUNT, reclaimable=COUNT)),
        upstreams=list_of(
            record(name=TEXT, images=COUNT, contents=COUNT, size=COUNT, shared=COUNT, unique=COUNT)
        ),
        next=list_of(
            record(
                digest=TEXT, type=TEXT, size=COUNT, last_used=TIME, why=TEXT, images=list_of(TEXT)
            )
        ),
        read=TIME,
    ),
    "TagHistory": record(
        digests=list_of(record(digest=TEXT, first_seen=TIME, last_seen=TIME)),
    ),
    "Fetch": record(
        digest=TEXT,
        upstream=TEXT,
        repository=TEXT,
        endpoint=TEXT,
        position=COUNT,
        size=COUNT_OR_NULL,
        rate=NUMBER_OR_NULL,
        connections=COUNT,
        followers=COUNT,
    ),
    "Request": record(
        id=TEXT,
        client=TEXT,
        kind=TEXT,
        upstream=TEXT,
        repository=TEXT,
        reference=TEXT,
        digest=TEXT,
        outcome=TEXT,
        bytes_sent=COUNT,
        rate=NUMBER_OR_NULL,
        duration=NUMBER,
    ),
    "Endpoint": record(
        state={"type": "string", "enum": ["unused", "ok", "failing", "open"]},
        requests=COUNT,
        failures=COUNT,
        last_status=COUNT,
        last_seconds=NUMBER,
        last_at=TIME_OR_NULL,
        last_error=TEXT,
        last_failure=TIME_OR_NULL,
        rate_limited=TIME_OR_NULL,
    ),
    "Upstream": record(
        endpoints=_map_of(_ref("Endpoint")),
        rate_limit={
            "anyOf": [
                record(limit=COUNT, remaining=COUNT, window=COUNT, seen=TIME),
                {"type": "null"},
            ]
        },
        back_offs=list_of(record(at=TIME, endpoint=TEXT, reason=TEXT, connections=COUNT)),
    ),
    "Live": record(
        workers=COUNT,
        fetches=list_of(_ref("Fetch")),
        requests=list_of(_ref("Request")),
        counts=record(fetches=COUNT, requests=COUNT),
        upstreams=_map_of(_ref("Upstream")),
        storage={
            "anyOf": [
                record(contents=COUNT, bytes=COUNT, quota=COUNT, is_writable=TRUTH),
                {"type": "null"},
            ]
        },
    ),
    "Upstreams": record(upstreams=_map_of(_ref("Upstream"))),
    "Pull": record(
        row=COUNT,
        id=TEXT,
        at=TIME,
        client=TEXT,
        name=TEXT,
        kind=TEXT,
        outcome=TEXT,
        status=COUNT,
        error=TEXT,
        bytes_sent=COUNT,
        duration=NUMBER,
    ),
    "Pulls": record(pulls=list_of(_ref("Pull"))),
    "Timeline": record(
        pull=_ref("Pull"),
        stages=list_of(record(name=TEXT, seconds=NUMBER)),
        explanation=list_of(TEXT),
    ),
    "Savings": record(
        period={"type": "string", "enum": ["hour", "day", "month"]},
        totals=_ref("Saving"),
        points=list_of(
            record(
                at=TIME,
                requests=COUNT,
                hits=COUNT,
                hit_ratio=NUMBER_OR_NULL,
                bytes_sent=COUNT,
                bytes_fetched=COUNT,
                bytes_saved=DIFFERENCE,
            )
        ),
        upstreams=list_of(_ref("Saving")),
    ),
    "Saving": record(
        name=TEXT,
        requests=COUNT,
        hit_ratio=NUMBER_OR_NULL,
        bytes_sent=COUNT,
        bytes_fetched=COUNT,
        bytes_saved=DIFFERENCE,
        billable_saved=DIFFERENCE,
    ),
    "Marks": record(
        pins=list_of(record(name=TEXT, digest=TEXT, since=TIME)),
        freezes=list_of(record(name=TEXT, digest=TEXT, since=TIME)),
        blocks=list_of(record(target=TEXT, reason=TEXT, since=TIME)),
        leases=COUNT,
    ),
    "Changed": record(text=TEXT),
    "Job": record(
        id=TEXT,
        kind=TEXT,
        arguments={"type": "object"},
        state={"type": "string", "enum": ["waiting", "running", "done", "failed", "cancelled"]},
        created=TIME,
        started=TIME_OR_NULL,
        ended=TIME_OR_NULL,
        progress=record(done=COUNT, total=COUNT_OR_NULL, unit=TEXT, text=TEXT),
        result={"type": ["object", "null"]},
        error=TEXT_OR_NULL,
    ),
    "Jobs": record(jobs=list_of(_ref("Job"))),
    "JobEvent": record(job=_ref("Job"), notes=list_of(TEXT)),
    "Ticket": record(ticket=TEXT, expires_in=NUMBER),
}
"""Name of a schema in the OpenAPI document -> the schema."""
