"""``schema``: the JSON Schema of the configuration, for editors.

Lives here: the description of each key, and the form in which an editor understands sizes and
durations. Must not know: how a configuration is read, or what a key changes in the server.

The schema is pydantic's, with the sections written in place (each is used once). It accepts all
that ``config/load.py`` accepts, with one exception: a truth value or a whole number that is written
as quoted text. ``config/mirror.schema.json`` is the printed schema; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, TypeAlias, get_args, get_origin

from mirror.config.settings import Frozen, Settings
from mirror.config.values import (
    above_zero,
    finite,
    format_duration,
    format_size,
    parse_duration,
    parse_part,
    parse_size,
)

Schema: TypeAlias = dict[str, Any]

DIALECT: Final = "http://json-schema.org/draft-07/schema#"
"""The newest dialect that the usual editor plug-ins implement in full."""
IDENTIFIER: Final = "urn:oci-mirror:config"
"""A name, not an address: the schema is shipped beside the file that uses it."""
ANY_UPSTREAM: Final = "<host>"
"""Stands for the name of an upstream in the path of a key, as in the README."""

DESCRIPTIONS: Final = {
    "listen": "Address and port to listen on; IPv6 as [::1]:5100.",
    "tls": "Serve HTTPS. Both files are read again when they change.",
    "tls.certificate": "PEM file with the certificate, followed by its intermediates.",
    "tls.key": "PEM file with the private key of the certificate.",
    "data_dir": "Directory of the content; a valid OCI image layout.",
    "workers": "Number of serving processes. They share the store and each fetch.",
    "drain_timeout": "Longest time that running pulls may take after SIGTERM.",
    "abandoned": "Whether a fetch whose last client has left is finished or cancelled.",
    "log": "What is written to standard output.",
    "log.format": "auto is human-readable on a terminal, and JSON otherwise.",
    "log.level": "Least severity that is written.",
    "storage": "How much content is kept, and how long its verification is valid.",
    "storage.max_size": "The quota: most bytes that content may take on disk.",
    "storage.high_water": "Part of max_size at which eviction starts, such as 0.95 or 95%.",
    "storage.low_water": "Part of max_size at which eviction ends. Less than high_water.",
    "storage.reverify": (
        "Age of the last verification at which content is hashed again while it is served. "
        "0: at every use, inf: never."
    ),
    "default_upstream": (
        "Upstream for clients that cannot name one, such as Docker's registry-mirrors. "
        "Must be one of upstreams."
    ),
    "upstreams": "The registries to mirror, by the host or host:port in image references.",
    "upstreams.<host>.endpoints": (
        "URLs of the registry. With more than one: failover in this order."
    ),
    "upstreams.<host>.pull_policy": (
        "What a cached tag needs before it is served. Always: the upstream confirms it. "
        "IfNotPresent: nothing while tag_ttl holds, then as with Always. "
        "Never: nothing, and nothing is fetched."
    ),
    "upstreams.<host>.tag_ttl": (
        "Age at which a tag is checked again, with IfNotPresent. 0: each time, inf: never."
    ),
    "upstreams.<host>.serve_stale": (
        "Serve the last known state of a tag when the upstream cannot be asked."
    ),
    "upstreams.<host>.negative_ttl": "How long a 404 of the upstream is remembered.",
    "upstreams.<host>.credentials": (
        "The mirror's own login, from one source: username and password, docker_config, or "
        "helper. All clients of the mirror can pull what it opens: use it with an allow list."
    ),
    "upstreams.<host>.credentials.username": "User name. Needs password.",
    "upstreams.<host>.credentials.password": (
        "Password, or file:/path of a file that holds it. Needs username."
    ),
    "upstreams.<host>.credentials.docker_config": (
        "A Docker config.json; its auths, credHelpers and credsStore are used."
    ),
    "upstreams.<host>.credentials.helper": (
        "Name of a credential helper: the mirror runs docker-credential-<name> from the PATH."
    ),
    "upstreams.<host>.token_hosts": (
        "Hosts that may issue tokens, beside the endpoint's own host and those that are shipped "
        "for the public registries."
    ),
    "upstreams.<host>.allow": (
        "Shell-style patterns of repositories that may be served. Empty: all."
    ),
    "upstreams.<host>.deny": (
        "Shell-style patterns of repositories that may not be served. They win over allow."
    ),
    "upstreams.<host>.ca": "PEM file of certificate authorities, beside those of the system.",
    "upstreams.<host>.limits": "Limits of one exchange with the upstream.",
    "upstreams.<host>.limits.connect": "Longest time to connect, TLS included.",
    "upstreams.<host>.limits.headers": "Longest time until the response headers are complete.",
    "upstreams.<host>.limits.idle": "Longest silence within a body.",
    "upstreams.<host>.limits.min_rate": (
        "Least rate of a body, in bytes per second over the time of idle. "
        "A slower body is given up and resumed."
    ),
}
"""Path of a key to what an editor shows for it."""

_NUMBER: Final = r"[0-9]{1,15}(\.[0-9]{1,9})?"
_FINITE_TEXT: Final = rf"{_NUMBER}|({_NUMBER}(ms|s|m|h|d|w))+"
_DURATION: Final[Schema] = {
    "type": ["number", "string"],
    "minimum": 0,
    "pattern": rf"^\s*(inf|{_FINITE_TEXT})\s*$",
}
_FINITE_DURATION: Final[Schema] = {**_DURATION, "pattern": rf"^\s*({_FINITE_TEXT})\s*$"}
_SIZE: Final[Schema] = {
    "type": ["number", "string"],
    "minimum": 1,
    "pattern": r"^\s*[0-9]{1,20}(\.[0-9]{1,9})?\s*([kKmMgGtTpPeE][iI]?)?[bB]?\s*$",
}
_PART: Final[Schema] = {
    "type": ["number", "string"],
    "exclusiveMinimum": 0,
    "maximum": 1,
    "pattern": rf"^\s*{_NUMBER}\s*%?\s*$",
}


def text() -> str:
    """The schema as it is printed: JSON, two spaces of indentation, no line end."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False)


def json_schema() -> Schema:
    """The schema of a configuration file, without references."""
    generated = Settings.model_json_schema()
    sections: dict[str, Schema] = generated.get("$defs", {})
    return {
        "$schema": DIALECT,
        "$id": IDENTIFIER,
        "title": "Configuration of oci-mirror",
        **_object(Settings, generated, sections, ""),
    }


def _object(
    model: type[Frozen], generated: Schema, sections: dict[str, Schema], prefix: str
) -> Schema:
    """The schema of one section. ``prefix``: path of the section, with a dot at its end."""
    properties: dict[str, Schema] = {}
    for key, field in model.model_fields.items():
        path = f"{prefix}{key}"
        section = _section(field.annotation)
        if section is None:
            value = _value(field, generated["properties"][key])
        elif get_origin(field.annotation) is dict:
            below = f"{path}.{ANY_UPSTREAM}."
            entry = _object(section, sections[section.__name__], sections, below)
            value = {"type": "object", "additionalProperties": entry}
        else:
            value = _object(section, sections[section.__name__], sections, f"{path}.")
        if not field.is_required():
            value = _with_null(value)
        properties[key] = {"description": DESCRIPTIONS[path], **value}
    required = [key for key, field in model.model_fields.items() if field.is_required()]
    return {
        "type": "object",
        "additionalProperties": False,
        **({"required": required} if required else {}),
        "properties": properties,
    }


def _section(annotation: Any) -> type[Frozen] | None:
    """The settings type of a key that is a section, of ``Tls | None`` too."""
    options = get_args(annotation) or (annotation,)
    return next((one for one in options if isinstance(one, type) and issubclass(one, Frozen)), None)


def _value(field: Any, generated: Schema) -> Schema:
    """The schema of a key that is no section, as the loader accepts its values."""
    value = {name: part for name, part in generated.items() if name not in ("title", "default")}
    for option in value.pop("anyOf", ()):
        if option != {"type": "null"}:
            value.update(option)
    default = None if field.is_required() else field.default
    functions = [getattr(item, "func", None) for item in field.metadata]
    for parse, written, show in _WRITTEN:
        if parse in functions:
            value = {**written}
            default = show(default)
    if parse_duration in functions and (finite in functions or above_zero in functions):
        value = {**_FINITE_DURATION}
    if above_zero in functions:
        value["exclusiveMinimum"] = value.pop("minimum")
    if default is not None:
        value["default"] = list(default) if isinstance(default, tuple) else default
    return value


_WRITTEN: Final[tuple[tuple[object, Schema, Callable[[Any], object]], ...]] = (
    (parse_duration, _DURATION, format_duration),
    (parse_size, _SIZE, format_size),
    (parse_part, _PART, float),
)
"""Function that reads a value, the schema of what it accepts, and how a default is shown."""


def _with_null(value: Schema) -> Schema:
    """``value``, or nothing: a key without a value has its default."""
    types = value["type"] if isinstance(value["type"], list) else [value["type"]]
    choices = {"enum": [*value["enum"], None]} if "enum" in value else {}
    return {**value, "type": [*types, "null"], **choices}
