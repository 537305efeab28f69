"""Typed settings. Nothing here does I/O but reading the configuration and the files it names."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

PullPolicy: TypeAlias = Literal["Always", "IfNotPresent", "Never"]


class Frozen(BaseModel):
    """The base of every settings type: unknown keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Tls(Frozen):
    """The listener's certificate; both files are read again when they change."""

    certificate: str
    key: str


class Log(Frozen):
    """``auto`` is human-readable on a terminal, JSON otherwise."""

    format: Literal["auto", "human", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Storage(Frozen):
    """Sizes in bytes, times in seconds, marks as parts of ``max_size``."""

    max_size: int = 50 * 2**30
    high_water: float = 0.95
    low_water: float = 0.85
    reverify: float = 86400.0
    """Age at which content is hashed again while it is served; 0 = at every use, inf = never."""


class Limits(Frozen):
    """Time limits in seconds and rates in bytes per second, for one upstream exchange."""

    connect: float = 5.0
    headers: float = 15.0
    idle: float = 30.0
    min_rate: int = 1024
    """A body slower than this over ``idle`` seconds is given up and resumed."""


class Credentials(Frozen):
    """At most one source. ``password`` may be ``file:/path`` (read at each use)."""

    username: str | None = None
    password: str | None = Field(default=None, repr=False)
    docker_config: str | None = None
    """A Docker ``config.json``: ``auths``, ``credHelpers`` and ``credsStore`` are honoured."""
    helper: str | None = None
    """The name of a credential helper: ``docker-credential-<helper>`` on the PATH."""


class Upstream(Frozen):
    """One registry that is mirrored. Times in seconds."""

    endpoints: tuple[str, ...]
    pull_policy: PullPolicy = "IfNotPresent"
    tag_ttl: float = 300.0
    serve_stale: bool = True
    negative_ttl: float = 10.0
    credentials: Credentials = Credentials()
    token_hosts: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    """Patterns of repositories (``fnmatch``); empty allows all."""
    deny: tuple[str, ...] = ()
    ca: str | None = None
    """A PEM file of certificate authorities for this upstream, beside the system's."""
    limits: Limits = Limits()


class Settings(Frozen):
    """The whole configuration."""

    listen: str = "127.0.0.1:5100"
    tls: Tls | None = None
    data_dir: str = "./data"
    workers: int = 1
    drain_timeout: float = 30.0
    """Seconds that pulls in flight may take after SIGTERM."""
    abandoned: Literal["finish", "cancel"] = "finish"
    """What becomes of a fetch when its last client left."""
    log: Log = Log()
    storage: Storage = Storage()
    default_upstream: str = "docker.io"
    upstreams: dict[str, Upstream] = {}


NEVER = math.inf
