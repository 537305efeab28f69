"""``schema``: the JSON Schema of the configuration, for editors.

Lives here: the form of the schema that editors understand best. Each section is written in place
(it is used once), and each key has its description, and its default as a user would write it. Must
not know: how a configuration is read, or what a key changes in the server.

The schema accepts all that ``config/load.py`` accepts, with two exceptions that an editor marks as
errors: a truth value or a whole number that is written as quoted text, and a number without quotes
where text is wanted (a password of digits). ``config/mirror.schema.json`` is the printed schema; a
test compares the two.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator, Mapping
from textwrap import dedent
from typing import Any, Final, TypeAlias

from mirror.config.settings import Section, Settings

Schema: TypeAlias = dict[str, Any]

DIALECT: Final = "http://json-schema.org/draft-07/schema#"
"""The newest dialect that the usual editor plug-ins implement in full."""
IDENTIFIER: Final = "urn:oci-mirror:config"
"""A name, not an address: the schema is shipped beside the file that uses it."""


def schema_text() -> str:
    """Return the schema as it is printed: JSON, two spaces of indentation, no line end."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False)


def json_schema() -> Schema:
    """Return the schema of a configuration file, without references."""
    # In this mode pydantic gives defaults as text, such as "5m" and "50GiB".
    generated = Settings.model_json_schema(mode="serialization")
    sections = generated.pop("$defs")
    descriptions = _descriptions()
    for name, section in ((Settings.__name__, generated), *sections.items()):
        for key, text in descriptions.get(name, {}).items():  # No keys: an enumeration.
            section["properties"][key]["description"] = text
    title = "Configuration of oci-mirror"
    return {"$schema": DIALECT, "$id": IDENTIFIER, "title": title, **_inline(generated, sections)}


def _descriptions() -> dict[str, dict[str, str]]:
    """Return the texts below the keys of each section, by the name of its type.

    They are read here and not by pydantic, which would do it at the start of every command.
    """
    found: dict[str, dict[str, str]] = {}
    for model in _sections(Section):
        texts: dict[str, str] = {}
        for base in reversed(model.__mro__[: model.__mro__.index(Section)]):
            (definition,) = ast.parse(dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            for one, following in zip(definition.body, definition.body[1:], strict=False):
                match one, following:
                    case (
                        ast.AnnAssign(target=ast.Name(id=key)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ) if key in model.model_fields:
                        texts[key] = inspect.cleandoc(text)
        found[model.__name__] = texts
    return found


def _sections(model: type[Section]) -> Iterator[type[Section]]:
    for one in model.__subclasses__():
        yield one
        yield from _sections(one)


def _inline(
    generated: Schema, sections: Mapping[str, Schema], *, is_required: bool = True
) -> Schema:
    """Return a generated schema with its sections written in place.

    ``sections``: the generated schemas of the sections, by the name of the type. A key that is not
    required may be null, too: a key without a value has its default.
    """
    schema = dict(generated)
    for option in schema.pop("anyOf", ()):  # of ``Tls | None``
        if option != {"type": "null"}:
            schema.update(option)
    if reference := schema.pop("$ref", None):
        schema = {**sections[reference.removeprefix("#/$defs/")], **schema}
    description = " ".join(schema.pop("description").split())
    del schema["title"]
    if schema["type"] == "object" or schema.get("default") is None:
        schema.pop("default", None)
    entry = schema.get("additionalProperties")
    if isinstance(entry, dict) and "$ref" in entry:  # of a mapping of sections
        schema["additionalProperties"] = _inline(entry, sections)
    if "$ref" in (items := schema.get("items") or {}):  # of a list of sections
        schema["items"] = _inline(items, sections)
    if properties := schema.pop("properties", None):
        required = schema.get("required", ())
        schema["properties"] = {
            key: _inline(value, sections, is_required=key in required)
            for key, value in properties.items()
        }
    if not is_required:
        types = schema["type"]
        schema["type"] = [*(types if isinstance(types, list) else [types]), "null"]
        if "enum" in schema:
            schema["enum"] = [*schema["enum"], None]
    return {"description": description, **schema}
