"""The settings of event targets: receivers of webhooks.

Lives here: their keys, descriptions and checks. Must not know: how an event is sent.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, Self, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from mirror.config import values
from mirror.config.access import check_repository_pattern
from mirror.config.section import FilePath, PositiveDuration, Section, Size, key_error

EventKind: TypeAlias = Literal["push", "delete", "pull"]
"""The kinds of events that a target may get."""
# It is a label of metrics, and a part of log lines.
_TARGET_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)


def _check_name(text: str) -> str:
    if not _TARGET_NAME.fullmatch(text):
        raise ValueError("must have letters in lower case, digits and . _ - only, at most 63")
    return text


class EventTarget(Section):
    """One receiver of events, to which they are sent as signed webhooks."""

    name: Annotated[str, AfterValidator(_check_name)]
    """Name of the target in the log, in metrics and in the queue."""
    url: Annotated[str, AfterValidator(values.check_webhook_url)]
    """URL that events are sent to by POST. Redirects are not followed."""
    secret_file: FilePath
    """
    File with the secrets that sign each event, one on each line: whsec_ and the base64 form of 24
    to 64 bytes. With two, each event has both signatures. Read again when it changes.
    """
    events: Annotated[tuple[EventKind, ...], Field(min_length=1)] = ("push", "delete", "pull")
    """
    The kinds of events: push and delete (of hosted repositories), and pull, which is a GET of a
    manifest by a client.
    """
    repositories: Annotated[
        tuple[Annotated[str, AfterValidator(check_repository_pattern)], ...], Field(min_length=1)
    ] = ("**",)
    """
    Patterns of whole names, such as registry.example/team/**. * stands for any characters within
    one component, ** for any number of components, and at the end for at least
    one: a/** does not match a itself.
    """
    allow_plain_http: bool = False
    """
    Send events to an http:// URL on another machine. Everybody on the network between can read the
    names of users and images.
    """
    timeout: PositiveDuration = 15.0
    """Longest time until the target has responded."""
    max_queued: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """
    Events that wait for this target at most. The oldest pulls are dropped first, then the oldest of
    the others.
    """
    max_queued_size: Size = 16 * 2**20
    """Bytes of these events at most."""
    ca: FilePath | None = None
    """PEM file of certificate authorities, beside those of the system."""
    client_certificate: FilePath | None = None
    """PEM file of the certificate that the mirror shows to the target."""
    client_key: FilePath | None = None
    """PEM file of the private key of client_certificate. Not needed if that file has it, too."""

    @model_validator(mode="after")
    def _check_plain_http(self) -> Self:
        url = urlsplit(self.url)
        is_local = values.is_loopback_host(url.hostname or "")
        if url.scheme == "http" and not is_local and not self.allow_plain_http:
            raise key_error(
                ("url",),
                "users and images would be sent over the network in plain: use https://, or set"
                " allow_plain_http: true",
            )
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if self.client_key is not None and self.client_certificate is None:
            raise key_error(("client_key",), "needs client_certificate")
        return self


def _check_names(targets: tuple[EventTarget, ...]) -> tuple[EventTarget, ...]:
    names = [target.name for target in targets]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise ValueError(f"two targets have the name {duplicate}")
    return targets


EventTargets = Annotated[tuple[EventTarget, ...], AfterValidator(_check_names)]
"""All targets. Their names differ."""
