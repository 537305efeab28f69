"""The declared fields of a query or a JSON body, and how they are read.

Lives here: one declaration that both checks a request and is written into the OpenAPI document.
Must not know: what a field means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl

from mirror.admin.json_values import JsonObject
from mirror.admin.problems import ApiProblem
from mirror.oci.text import printable

FieldSchema: TypeAlias = Mapping[str, Any]
"""A JSON Schema (2020-12), of the keywords that :func:`_check` knows."""

MAX_QUERY_FIELDS: Final = 20
"""Fields of a query. No operation declares as many."""
_PYTHON_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
}
_YES_NO_TEXTS: Final = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Field:
    """One field. ``default``: its value if it is missing; None if it has none."""

    name: str
    schema: FieldSchema
    description: str
    is_required: bool = False
    default: str | int | bool | None = None


def read_query_fields(fields: Sequence[Field], query: str) -> JsonObject:
    """Return the fields of a query. Raises ``ApiProblem`` (400) if they are not as declared."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS)
    except ValueError:
        raise ApiProblem(400, "the query has too many fields") from None
    values: JsonObject = {}
    types = {field.name: field.schema["type"] for field in fields}
    for name, text in pairs:
        if name in values:
            raise ApiProblem(400, f"{printable(name, 80)} is in the query twice")
        values[name] = _from_text(text, types.get(name, "string"))
    return _read(fields, values)


def read_json_fields(fields: Sequence[Field], body: bytes) -> JsonObject:
    """Return the fields of a JSON object. Raises ``ApiProblem`` (400) for other ones."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiProblem(400, "the body is not JSON") from None
    if not isinstance(values, dict):
        raise ApiProblem(400, "the body must be a JSON object")
    return _read(fields, values)


def _from_text(text: str, kind: str) -> Any:
    """Return the value that a text in a query stands for. The text itself if it stands for none."""
    if kind == "integer" and re.fullmatch(r"-?[0-9]{1,18}", text, re.ASCII):
        return int(text)
    return _YES_NO_TEXTS.get(text, text) if kind == "boolean" else text


def _read(fields: Sequence[Field], values: Mapping[str, Any]) -> JsonObject:
    unknown = sorted(set(values) - {field.name for field in fields})
    if unknown:
        known = ", ".join(field.name for field in fields) or "none"
        raise ApiProblem(400, f"unknown field {printable(unknown[0], 80)}; known: {known}")
    result: JsonObject = {}
    for field in fields:
        if field.name not in values:
            if field.is_required:
                raise ApiProblem(400, f"{field.name} is missing")
            result[field.name] = field.default
            continue
        if reason := _check(field.schema, values[field.name]):
            raise ApiProblem(400, f"{field.name} {reason}")
        result[field.name] = values[field.name]
    return result


def _check(schema: FieldSchema, value: Any) -> str:
    """Return why a value does not have the schema, as the end of a sentence. Empty if it does."""
    kind = schema["type"]
    is_right = isinstance(value, _PYTHON_TYPES[kind])
    if not is_right or (isinstance(value, bool) and kind != "boolean"):
        return f"must be of the type {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"must be one of {', '.join(schema['enum'])}"
    match value:
        case str():
            return _check_text(schema, value)
        case bool():
            return ""
        case int():
            if not schema["minimum"] <= value <= schema["maximum"]:
                return f"must be from {schema['minimum']} to {schema['maximum']}"
        case list():
            if not schema.get("minItems", 0) <= len(value) <= schema["maxItems"]:
                return f"must have {schema.get('minItems', 0)} to {schema['maxItems']} items"
            reasons = (_check(schema["items"], item) for item in value)
            return next((f"has an item that {reason}" for reason in reasons if reason), "")
    return ""


def _check_text(schema: FieldSchema, text: str) -> str:
    least, most = schema.get("minLength", 0), schema.get("maxLength", 1 << 16)
    if not least <= len(text) <= most:
        return f"must have {least} to {most} characters"
    if "pattern" in schema and not re.fullmatch(schema["pattern"], text):
        return f"must match {schema['pattern']}"
    return ""
