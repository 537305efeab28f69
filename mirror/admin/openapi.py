"""The OpenAPI document of the admin API.

Lives here: the form of OpenAPI 3.1. ``mirror/admin/openapi.json`` is the printed document; a test
compares the two. ``python -m mirror.admin.openapi`` prints it. Must not know: how an operation is
carried out.
"""

from __future__ import annotations

import json
import sys
from typing import Final

from mirror.admin import problems
from mirror.admin.fields import Field
from mirror.admin.json_values import JsonObject
from mirror.admin.operations import OPERATIONS, Operation
from mirror.admin.response_schemas import RESPONSE_SCHEMAS

_PROBLEMS: Final = {
    400: "The request has wrong fields, or names nothing that exists in this form.",
    401: "The token is missing or wrong.",
    403: "The token is read-only, or another web site has caused the request.",
    404: "There is no such thing.",
    405: "The path has no such method.",
    409: "It cannot be done in this state.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many jobs wait, or too many streams are open.",
    500: "A fault of the server. Its log has more.",
    502: "The upstream has failed.",
    503: "The disk refuses, or the server stops.",
}
"""Status -> its meaning in every operation."""


def openapi_text() -> str:
    """Return the document as it is checked in: JSON, two spaces of indentation, a line end."""
    return json.dumps(document(), indent=2) + "\n"


def document() -> JsonObject:
    """Return the document."""
    paths: JsonObject = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _describe(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "oci-mirror admin API",
            "version": "1",
            "description": "See docs/admin.md. Times are RFC 3339 in UTC, sizes bytes, durations"
            " seconds.",
        },
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": {**RESPONSE_SCHEMAS, "OpenApi": {"type": "object"}},
            "responses": {
                str(status): {
                    "description": text,
                    "content": {
                        problems.PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}
                    },
                }
                for status, text in _PROBLEMS.items()
            },
        },
    }


def _describe(operation: Operation) -> JsonObject:
    schema = {"$ref": f"#/components/schemas/{operation.response}"}
    is_json = operation.media_type == "application/json"
    # OpenAPI 3.1 cannot say what a line or an event of a stream is.
    body = {"schema": schema} if is_json else {"x-item": schema}
    described: JsonObject = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {
            str(operation.status): {
                "description": "Done.",
                "content": {operation.media_type: body},
            },
            **{str(status): {"$ref": f"#/components/responses/{status}"} for status in _PROBLEMS},
        },
    }
    if operation.is_public:
        described["security"] = []
    parameters: list[JsonObject] = [_parameter(field) for field in operation.query]
    if "{id}" in operation.path:
        pattern = "^[A-Za-z0-9._-]{1,64}$"
        identifier = {"type": "string", "pattern": pattern}
        parameters.append({"name": "id", "in": "path", "required": True, "schema": identifier})
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _body(operation.body)}},
        }
    return described


def _parameter(field: Field) -> JsonObject:
    return {
        "name": field.name,
        "in": "query",
        "required": field.is_required,
        "description": field.description,
        "schema": _schema(field),
    }


def _body(fields: tuple[Field, ...]) -> JsonObject:
    schema: JsonObject = {
        "type": "object",
        "properties": {
            field.name: {**_schema(field), "description": field.description} for field in fields
        },
        "additionalProperties": False,
    }
    required = [field.name for field in fields if field.is_required]
    return {**schema, "required": required} if required else schema


def _schema(field: Field) -> JsonObject:
    schema = dict(field.schema)
    return schema if field.default is None else {**schema, "default": field.default}


if __name__ == "__main__":
    sys.stdout.write(openapi_text())
