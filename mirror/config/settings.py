"""Typed settings, and what must hold between them. Nothing here does I/O.

Lives here: every key, its type and its default. Must not know: where values come from
(``load.py``), how they are written (``values.py``).

Every value is accepted as text too, as YAML scalars and environment variables bring it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mirror.config.values import (
    above_zero,
    check_endpoint,
    check_filled,
    check_helper,
    check_host,
    check_listen,
    check_pattern,
    check_upstream_name,
    finite,
    format_duration,
    format_size,
    parse_duration,
    parse_part,
    parse_size,
)

_as_duration = PlainSerializer(format_duration, return_type=str, when_used="json")
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size, return_type=str, when_used="json"),
]
Duration = Annotated[float, BeforeValidator(parse_duration), _as_duration]
Limit = Annotated[float, AfterValidator(above_zero), BeforeValidator(parse_duration), _as_duration]
Bounded = Annotated[float, AfterValidator(finite), BeforeValidator(parse_duration), _as_duration]
Part = Annotated[float, BeforeValidator(parse_part)]
Filled = Annotated[str, AfterValidator(check_filled)]
Endpoint = Annotated[str, AfterValidator(check_endpoint)]
Host = Annotated[str, AfterValidator(check_host)]
Pattern = Annotated[str, AfterValidator(check_pattern)]
PullPolicy: TypeAlias = Literal["Always", "IfNotPresent", "Never"]

# --- settings -------------------------------------------------------------------------------------


def _wrong(below: tuple[str | int, ...], why: str) -> PydanticCustomError:
    """An error of a whole section that is about one key in it."""
    return PydanticCustomError("between", "{why}", {"why": why, "below": below})


class Frozen(BaseModel):
    """The base of every settings type: unknown keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Tls(Frozen):
    """The listener's certificate; both files are read again when they change."""

    certificate: Filled
    key: Filled


class Log(Frozen):
    """``auto`` is human-readable on a terminal, JSON otherwise."""

    format: Literal["auto", "human", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Storage(Frozen):
    """Sizes in bytes, times in seconds, marks as parts of ``max_size``."""

    max_size: Size = 50 * 2**30
    high_water: Part = 0.95
    low_water: Part = 0.85
    reverify: Duration = 86400.0
    """Age at which content is hashed again while it is served; 0 = at every use, inf = never."""

    @model_validator(mode="after")
    def _marks(self) -> Self:
        if self.low_water >= self.high_water:
            raise _wrong(
                ("low_water",),
                f"{self.low_water:g} is not less than high_water, {self.high_water:g}",
            )
        return self


class Limits(Frozen):
    """Time limits in seconds and rates in bytes per second, for one upstream exchange."""

    connect: Limit = 5.0
    headers: Limit = 15.0
    idle: Limit = 30.0
    min_rate: Size = 1024
    """A body slower than this over ``idle`` seconds is given up and resumed."""


class Credentials(Frozen):
    """At most one source. ``password`` may be ``file:/path`` (see ``upstream/credentials.py``)."""

    username: Filled | None = None
    password: Filled | None = Field(default=None, repr=False)
    docker_config: Filled | None = None
    """A Docker ``config.json``: ``auths``, ``credHelpers`` and ``credsStore`` are honoured."""
    helper: Annotated[str, AfterValidator(check_helper)] | None = None
    """The name of a credential helper: ``docker-credential-<helper>`` on the PATH."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.username is None) != (self.password is None):
            raise ValueError("username and password go together")
        named = {
            "username": self.username,
            "docker_config": self.docker_config,
            "helper": self.helper,
        }
        given = [name for name, value in named.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"more than one source: {' and '.join(given)}")
        if self.password == "file:":  # noqa: S105 - the prefix of a reference, no password
            raise _wrong(("password",), "file: names no file")
        return self


class Upstream(Frozen):
    """One registry that is mirrored. Times in seconds."""

    endpoints: tuple[Endpoint, ...]
    pull_policy: PullPolicy = "IfNotPresent"
    tag_ttl: Duration = 300.0
    serve_stale: bool = True
    negative_ttl: Bounded = 10.0
    credentials: Credentials = Credentials()
    token_hosts: tuple[Host, ...] = ()
    allow: tuple[Pattern, ...] = ()
    """Patterns of repositories (``fnmatch``); empty allows all."""
    deny: tuple[Pattern, ...] = ()
    ca: Filled | None = None
    """A PEM file of certificate authorities for this upstream, beside the system's."""
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _endpoints(self) -> Self:
        if not self.endpoints:
            raise _wrong(("endpoints",), "must not be empty")
        ends = [endpoint.rstrip("/") for endpoint in self.endpoints]
        twice = next((end for end in ends if ends.count(end) > 1), None)
        if twice is not None:
            raise _wrong(("endpoints",), f"{twice} is there twice")
        return self


class Settings(Frozen):
    """The whole configuration."""

    listen: Annotated[str, AfterValidator(check_listen)] = "127.0.0.1:5100"
    tls: Tls | None = None
    data_dir: Filled = "./data"
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    drain_timeout: Bounded = 30.0
    """Seconds that pulls in flight may take after SIGTERM."""
    abandoned: Literal["finish", "cancel"] = "finish"
    """What becomes of a fetch when its last client left."""
    log: Log = Log()
    storage: Storage = Storage()
    default_upstream: str = "docker.io"
    upstreams: dict[Annotated[str, AfterValidator(check_upstream_name)], Upstream] = {}

    @model_validator(mode="after")
    def _upstreams(self) -> Self:
        # Not asked for, it may be missing: clients that name no upstream get NAME_UNKNOWN then.
        if (
            "default_upstream" in self.model_fields_set
            and self.default_upstream not in self.upstreams
        ):
            raise _wrong(("default_upstream",), "is not one of upstreams")
        for name, upstream in self.upstreams.items():
            for key in ("allow", "deny"):
                for index, pattern in enumerate(getattr(upstream, key)):
                    if pattern.startswith(f"{name}/"):
                        # It would match nothing, and a deny-list that denies nothing is silent.
                        raise _wrong(
                            ("upstreams", name, key, index),
                            "a pattern does not begin with the upstream's name",
                        )
        return self


# --- from plain values ----------------------------------------------------------------------------


class Invalid(ValueError):
    """A value that cannot be used: ``path`` of the key, ``message`` without the value."""

    def __init__(self, path: tuple[str | int, ...], message: str, more: int) -> None:
        super().__init__(message)
        self.path = path
        self.message = message
        self.more = more
        """How many other values cannot be used either."""


def build(tree: Mapping[str, Any]) -> Settings:
    """Settings from plain values. Raises :class:`Invalid` for the first value that is wrong."""
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        first = found[0]
        below = first["ctx"]["below"] if first["type"] == "between" else ()
        path = (*(part for part in first["loc"] if part != "[key]"), *below)
        raise Invalid(path, _message(first["type"], first["msg"]), len(found) - 1) from None


_MESSAGES: Final = {
    "missing": "is missing",
    "extra_forbidden": "unknown key",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "string_type": "must be text",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
}


def _message(kind: str, text: str) -> str:
    text = text.removeprefix("Value error, ").replace("Input should be", "must be")
    return _MESSAGES.get(kind, text)
