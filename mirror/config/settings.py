"""The settings: each key, its type, its default and its description.

Lives here: one pydantic model for each section, and the rules between keys. The text below a key
is its only description: ``oci-mirror schema`` prints it for editors. Does no I/O. Must not know:
where values come from (``load.py``), how they are written (``values.py``).

Every value is accepted as text, too, because YAML scalars and environment variables are text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self, TypeAlias, get_args, get_origin

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from yarl import URL

from mirror.config import values
from mirror.config.access import AccessSection as AccessSection
from mirror.config.event_target import EventTarget as EventTarget
from mirror.config.event_target import EventTargets
from mirror.config.listeners import Admin as Admin
from mirror.config.listeners import Hosted as Hosted
from mirror.config.listeners import Tls as Tls
from mirror.config.prefetch import Prefetch as Prefetch
from mirror.config.retention import RetentionRule as RetentionRule
from mirror.config.section import (
    Duration,
    FilePath,
    FiniteDuration,
    Host,
    NonEmptyText,
    PositiveDuration,
    Ratio,
    Size,
    key_error,
)
from mirror.config.section import KeyPath as KeyPath
from mirror.config.section import Section as Section
from mirror.config.transfers import Limits as Limits
from mirror.config.transfers import Parallel as Parallel
from mirror.oci.reference import UPSTREAM_ALIASES

Endpoint = Annotated[str, AfterValidator(values.normalise_endpoint)]
Network = Annotated[str, AfterValidator(values.check_network)]
RedirectHost = Annotated[str, AfterValidator(values.check_redirect_host)]
UpstreamName = Annotated[str, AfterValidator(values.check_upstream_name)]
Pattern = Annotated[str, AfterValidator(values.check_pattern)]
PullPolicy: TypeAlias = Literal["Always", "IfNotPresent", "Never"]

# --- sections -------------------------------------------------------------------------------------


class Log(Section):
    """The log lines on standard output."""

    format: Literal["auto", "human", "json"] = "auto"
    """
    auto is human-readable on a terminal, and JSON otherwise. Only JSON has the date and all fields.
    """
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Minimum severity that is written."""


class Storage(Section):
    """The quota of the content on disk, the memory for it, and the lifetime of its verification."""

    max_size: Size = 50 * 2**30
    """
    The quota: most bytes that content may take on disk. The history of pulls may take 2 % of it
    beside the content, but 4 MiB at least and 84 MiB at most.
    """
    high_water: Ratio = 0.95
    """Ratio of max_size at which eviction starts, such as 0.95 or 95%."""
    low_water: Ratio = 0.85
    """Ratio of max_size at which eviction ends. Less than high_water."""
    memory: Size = 48 * 2**20
    """
    Most bytes that running fetches hold in memory together, in each worker process: bytes that wait
    for the disk or, if the disk refuses, for clients. Each fetch may hold 256 KiB anyway.
    When it is used up, upstreams are read more slowly. Bytes that arrive before earlier ones
    (several connections, single ranges) have a limit of their own of the same size. Both together
    may use a third more.
    """
    reverify: Duration = 86400.0
    """
    Age of the last verification at which content is hashed again while it is served.
    0: at every use, inf: never.
    """

    @model_validator(mode="after")
    def _check_marks(self) -> Self:
        if self.low_water >= self.high_water:
            raise key_error(
                ("low_water",),
                f"{self.low_water:g} is not less than high_water, {self.high_water:g}",
            )
        return self


class Credentials(Section):
    """The mirror's login at one upstream, from at most one source."""

    username: NonEmptyText | None = None
    """User name. Needs password."""
    password: NonEmptyText | None = Field(default=None, repr=False)
    """Password, or file:/path of a file that holds it. Needs username."""
    docker_config: NonEmptyText | None = None
    """A Docker config.json; its auths, credHelpers and credsStore are used."""
    helper: Annotated[str, AfterValidator(values.check_helper)] | None = None
    """Name of a credential helper: the mirror runs docker-credential-<name> from the PATH."""
    hosts: tuple[Host, ...] = ()
    """
    Hosts that username and password are sent to, as host or host:port. Default: the host of the
    first endpoint.
    """

    @model_validator(mode="after")
    def _check_one_source(self) -> Self:
        if (self.username is None) != (self.password is None):
            raise ValueError("username and password must be set together")
        sources = {
            "username": self.username,
            "docker_config": self.docker_config,
            "helper": self.helper,
        }
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"more than one source: {' and '.join(given)}")
        if self.hosts and self.username is None:
            raise key_error(("hosts",), "needs username: other sources name their hosts themselves")
        for name, text in (("username", self.username), ("password", self.password)):
            # A password may contain such characters. One that is a variable is a mistake.
            if text is not None and re.fullmatch(r"\$\{\w+\}|\$\(.*\)|\{\{.*\}\}", text):
                raise key_error((name,), "is a variable, and none is expanded: use file:/path")
        if self.password == "file:":  # noqa: S105 - the prefix of a reference, no password
            raise key_error(("password",), "file: must be followed by a path")
        return self


class Upstream(Section):
    """One registry that is mirrored."""

    endpoints: tuple[Endpoint, ...]
    """
    URLs of the registry. With more than one: failover in this order, also if one refuses. A path
    is the prefix of its repositories (https://harbor.example/hub-proxy), unless it has the /v2 of
    the API.
    """
    alias: Annotated[str, AfterValidator(values.check_alias)] | None = None
    """
    Name of the upstream in paths such as mirror:5100/<alias>/app, for clients that accept no colon
    there. Default: the upstream's name, with _ in place of the colon.
    """
    hosts: tuple[Host, ...] = ()
    """
    Host names of the mirror itself. A request to one of them is for this upstream, and its whole
    path is the repository. A name without a port counts for every port of the mirror.
    """
    pull_policy: PullPolicy = "IfNotPresent"
    """
    Condition on which a cached tag is served. Always: the upstream confirms it.
    IfNotPresent: it was confirmed within tag_ttl; otherwise as with Always.
    Never: no condition, and nothing is fetched.
    """
    tag_ttl: Duration = 300.0
    """Age at which a tag is checked again, with IfNotPresent. 0: each time, inf: never."""
    serve_stale: bool = True
    """
    Serve cached tags, lists and content if the upstream is unavailable, or does not confirm them
    within 5 s.
    """
    negative_ttl: FiniteDuration = 10.0
    """How long a 404 of the upstream is remembered."""
    credentials: Credentials = Credentials()
    """
    The mirror's own login, from one source: username and password, docker_config, or helper.
    All clients of the mirror can pull what this login can pull: use it with an allow list.
    """
    token_hosts: tuple[Host, ...] = ()
    """
    Hosts that may issue tokens, beside the endpoint's own host and the built-in list for the
    public registries.
    """
    allow: tuple[Pattern, ...] = ()
    """Shell-style patterns of repositories that may be served. Empty: all."""
    deny: tuple[Pattern, ...] = ()
    """Shell-style patterns of repositories that may not be served. They win over allow."""
    redirect_hosts: tuple[RedirectHost, ...] = ()
    """
    Hosts, *.domains, addresses and networks to which the registry may redirect although they are
    private. A registry on a private network may redirect to others there without this key.
    """
    ca: FilePath | None = None
    """PEM file of certificate authorities, beside those of the system."""
    client_certificate: FilePath | None = None
    """PEM file of the certificate that the mirror shows to the endpoints and token services."""
    client_key: FilePath | None = None
    """PEM file of the private key of client_certificate. Not needed if that file has it, too."""
    insecure: bool = False
    """
    Accept any certificate of this upstream. Everybody on the network between can read the
    credentials for it, and forge its tags.
    """
    limits: Limits = Limits()
    """Limits of one exchange with the upstream."""
    parallel: Parallel = Parallel()
    """Several connections for one blob."""

    def alias_of(self, name: str) -> str:
        """Return the alias, or its default for an upstream of this name."""
        # An image reference accepts letters, digits and separators (Distribution, "name").
        return self.alias or re.sub("[^a-z0-9.-]+", "_", name).strip("_")

    @model_validator(mode="after")
    def _check_endpoints(self) -> Self:
        if not self.endpoints:
            raise key_error(("endpoints",), "must not be empty")
        ends = self.endpoints
        duplicate = next((end for end in ends if ends.count(end) > 1), None)
        if duplicate is not None:
            raise key_error(("endpoints",), f"{duplicate} is listed twice")
        hosts = [URL(endpoint).host_port_subcomponent for endpoint in self.endpoints]
        for index, host in enumerate(self.credentials.hosts):
            if host not in hosts:
                names = " or ".join(host or "" for host in hosts)
                message = f"{host} is the host of no endpoint: use {names}"
                raise key_error(("credentials", "hosts", index), message)
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if self.client_key is not None and self.client_certificate is None:
            raise key_error(("client_key",), "needs client_certificate")
        if self.insecure and self.ca is not None:
            raise key_error(("insecure",), "no certificate is checked, so leave out ca")
        return self


class Settings(Section):
    """The whole configuration."""

    listen: Annotated[str, AfterValidator(values.check_listen)] = "127.0.0.1:5100"
    """Address and port to listen on; IPv6 as [::1]:5100."""
    tls: Tls | None = None
    """Serve HTTPS. Both files are read again when they change."""
    data_dir: FilePath = "./data"
    """Directory of the content; a valid OCI image layout."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Number of server processes. They share the store and each fetch."""
    drain_timeout: FiniteDuration = 30.0
    """Longest time that running pulls may take after SIGTERM, SIGINT or SIGQUIT."""
    trusted_proxies: tuple[Network, ...] = ()
    """
    Addresses or networks of proxies in front of the mirror, such as 10.0.0.0/8. Their
    X-Forwarded-For (or Forwarded, without it) names the client. A proxy must add to the field, or
    replace it. X-Forwarded-Prefix names a prefix that they remove from paths.
    """
    max_client_connections: Annotated[int, Field(ge=0)] = 0
    """
    Connections that one client address may have to one worker. Further ones get a 429. For clients
    behind trusted_proxies it counts requests. 0: no limit.
    """
    catalog: bool = False
    """
    Serve /v2/_catalog: the repositories with a manifest on disk, as far as allow and deny permit.
    All clients of the mirror can read it.
    """
    abandoned: Literal["finish", "cancel"] = "finish"
    """Finish or cancel a fetch whose last client has left."""
    admin: Admin | None = None
    """Serve the admin API and its page. Without this section, neither is served."""
    hosted: Hosted | None = None
    """Host repositories, which clients push to. Without this section, nothing can be pushed."""
    events: EventTargets = ()
    """
    Webhook receivers for pushes, deletions and pulls, each with name, url, secret_file, events and
    repositories.
    """
    access: AccessSection | None = None
    """Users and rules. Without this section, everybody may pull, and push at hosted.listen."""
    log: Log = Log()
    """The log lines on standard output."""
    storage: Storage = Storage()
    """How much content is kept, in how much memory, and how long its verification is valid."""
    prefetch: tuple[Prefetch, ...] = ()
    """
    Images that the server fetches ahead, again and again, each entry with images, tags, newest,
    platforms, referrers and interval.
    """
    retention: tuple[RetentionRule, ...] = ()
    """
    Rules that remove images, each with match, older_than, keep_last and tags. Pinned, frozen and
    leased images stay. Empty: only eviction removes content.
    """
    retention_interval: PositiveDuration = 21600.0
    """Time between two runs of the rules of retention, by one process of a data directory."""
    default_upstream: Annotated[str, AfterValidator(values.usual_name)] = "docker.io"
    """
    Upstream for clients that cannot name one, such as Docker with registry-mirrors.
    Must be one of upstreams.
    """
    upstreams: dict[UpstreamName, Upstream] = Field(default={})
    """The registries to mirror, by the host or host:port in image references."""

    @model_validator(mode="before")
    @classmethod
    def _check_aliases(cls, tree: Any) -> Any:
        upstreams = tree.get("upstreams") if isinstance(tree, Mapping) else None
        usual: set[str] = set()
        for name in upstreams if isinstance(upstreams, Mapping) else ():
            if values.usual_name(name) in usual:
                raise key_error(("upstreams", name), "is docker.io, which is configured already")
            usual.add(values.usual_name(name))
        return tree

    @model_validator(mode="after")
    def _check_upstreams(self) -> Self:
        # The built-in default may be missing from upstreams: then a client that names no upstream
        # gets NAME_UNKNOWN. A default that was set must be one of them.
        if (
            "default_upstream" in self.model_fields_set
            and self.default_upstream not in self.upstreams
        ):
            raise key_error(("default_upstream",), "is not one of upstreams")
        self._check_unique("alias", lambda name, one: (one.alias_of(name),), self.upstreams)
        self._check_unique("hosts", lambda _, one: one.hosts, ())
        for name, upstream in self.upstreams.items():
            for key in ("allow", "deny"):
                for index, pattern in enumerate(getattr(upstream, key)):
                    first, slash, _ = pattern.partition("/")
                    if slash and values.usual_name(first) == name:
                        # It would match no repository, so a deny list would deny nothing.
                        raise key_error(
                            ("upstreams", name, key, index),
                            "a pattern must not begin with the upstream's name",
                        )
        return self

    @model_validator(mode="after")
    def _check_prefetch(self) -> Self:
        for number, entry in enumerate(self.prefetch):
            for index, name in enumerate(entry.upstreams()):
                if name not in self.upstreams:
                    path = ("prefetch", number, "images", index)
                    raise key_error(path, f"{name} is not one of upstreams")
        return self

    @model_validator(mode="after")
    def _check_hosted(self) -> Self:
        if self.hosted is None:
            return self
        names = self.upstream_names()
        for name in self.hosted.names():
            if name in names:
                message = f"{names[name]} is an upstream: choose a name that no upstream has"
                raise key_error(("hosted", "name"), message)
        owners = {host: name for name, one in self.upstreams.items() for host in one.hosts}
        for index, host in enumerate(self.hosted.hosts):
            if host in owners:
                message = f"{host} is already a name of {owners[host]}"
                raise key_error(("hosted", "hosts", index), message)
        self.hosted.check_hosts(self.listen)
        return self

    @model_validator(mode="after")
    def _check_listeners(self) -> Self:
        listeners: list[tuple[KeyPath, str]] = [(("listen",), self.listen)]
        if self.admin is not None:
            listeners.append((("admin", "listen"), self.admin.listen))
        if self.hosted is not None and self.hosted.listen is not None:
            listeners.append((("hosted", "listen"), self.hosted.listen))
        for index, (key, address) in enumerate(listeners):
            for other_key, other in listeners[:index]:
                if values.may_collide(address, other):
                    name = ".".join(map(str, other_key))
                    raise key_error(key, f"is the port of {name} ({other}): use another one")
        return self

    @model_validator(mode="after")
    def _check_reach(self) -> Self:
        self.check_reach()
        return self

    def check_reach(self) -> None:
        """Refuse listeners through which too many could push, or read passwords.

        Raises an error of pydantic. Called again for settings of which only a part was read again.
        """
        hosted, access = self.hosted, self.access
        if hosted is not None and access is None:
            hosted.check_reach(self.listen)
        if access is not None:
            listeners = [("listen", self.listen)]
            if hosted is not None and hosted.listen is not None:
                listeners.append(("hosted.listen", hosted.listen))
            access.check_reach(tuple(listeners), has_tls=self.tls is not None)

    def upstream_names(self) -> dict[str, str]:
        """Return each name by which a request may call an upstream, to the upstream's own name."""
        aliases = {upstream.alias_of(name): name for name, upstream in self.upstreams.items()}
        aliases |= {
            other: name for other, name in UPSTREAM_ALIASES.items() if name in self.upstreams
        }
        return {**aliases, **{name: name for name in self.upstreams}}

    def registry_names(self) -> dict[str, str]:
        """Return the same for upstreams and the hosted repositories together."""
        hosted = {} if self.hosted is None else self.hosted.names()
        return {**self.upstream_names(), **hosted}

    def _check_unique(
        self,
        key: str,
        names_of: Callable[[str, Upstream], tuple[str, ...]],
        taken: Collection[str],
    ) -> None:
        """Refuse a name that two upstreams have. ``taken``: names of other upstreams."""
        owner = {name: name for name in taken}
        for name, upstream in self.upstreams.items():
            for one in names_of(name, upstream):
                other = owner.setdefault(one, name)
                if other != name:
                    raise key_error(("upstreams", name, key), f"{one} is already a name of {other}")


def section_type(model: type[Section], key: str) -> type[Section] | None:
    """Return the type of a key that is a section, also of ``Tls | None``.

    None for a plain value, and for a list of sections.

    For ``upstreams`` this is the type of one entry.
    """
    annotation = model.model_fields[key].annotation
    if get_origin(annotation) is tuple:
        return None
    options = get_args(annotation) or (annotation,)
    return next(
        (one for one in options if isinstance(one, type) and issubclass(one, Section)), None
    )


# --- from plain values ----------------------------------------------------------------------------


class InvalidSetting(ValueError):
    """A value was refused. Raised by :func:`build`; ``load.py`` turns it into a ``ConfigError``.

    ``path`` is that of the key. ``message`` is the reason, without the value, which may be a
    secret. ``others``: path and reason of each other value that was refused.
    """

    def __init__(
        self, path: KeyPath, message: str, others: Sequence[tuple[KeyPath, str]] = ()
    ) -> None:
        super().__init__(message)
        self.path = path
        self.message = message
        self.others = others


def build(tree: Mapping[str, Any]) -> Settings:
    """Build settings from plain values. Raises :class:`InvalidSetting` for the first bad value."""
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first, *others = map(_refused, error.errors(include_url=False, include_input=False))
        raise InvalidSetting(*first, others) from None


def _refused(error: ErrorDetails) -> tuple[KeyPath, str]:
    """Return the path of a value that was refused, and the reason."""
    below = error["ctx"]["below"] if error["type"] == "key_error" else ()
    path = (*(part for part in error["loc"] if part != "[key]"), *below)
    return path, _message(error["type"], error["msg"])


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
"""Type of pydantic's error to our message for it."""


def _message(error_type: str, text: str) -> str:
    text = text.removeprefix("Value error, ").replace("Input should be", "must be")
    return _MESSAGES.get(error_type, text)
