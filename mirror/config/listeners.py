"""The settings of listeners: the certificate, the admin API, and the hosted repositories.

Lives here: their keys, descriptions and rules. Must not know: how a listener works.
"""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import AfterValidator, model_validator

from mirror.config import values
from mirror.config.hosted_rules import HostedRetentionRule, ImmutableTagsOrText
from mirror.config.section import Age, FilePath, Host, Section, Size, key_error


class Tls(Section):
    """The server's certificate and its private key."""

    certificate: FilePath
    """PEM file with the certificate, followed by its intermediates."""
    key: FilePath
    """PEM file with the private key of the certificate."""


class Admin(Section):
    """The admin API and its page, on a listener of their own."""

    listen: Annotated[str, AfterValidator(values.check_listen)] = "127.0.0.1:5102"
    """
    Address and port to listen on. An address that is not loopback needs token_file or
    read_only_token_file.
    """
    token_file: FilePath | None = None
    """
    File with the tokens that permit everything, one on each line, of at least 16 characters. Read
    again when it changes: once it is empty or deleted, it permits nothing. Without this key and
    read_only_token_file, no token is needed.
    """
    read_only_token_file: FilePath | None = None
    """
    File with the tokens that permit reading only. Without token_file, nothing can be changed.
    """
    hosts: tuple[Host, ...] = ()
    """
    Further names by which the listener is called, such as that of a proxy in front of it. Requests
    with another name in Host are refused; localhost and addresses are always accepted.
    """
    tls: Tls | None = None
    """Serve HTTPS. Both files are read again when they change."""

    @property
    def is_open(self) -> bool:
        """Whether no token is needed."""
        return self.token_file is None and self.read_only_token_file is None

    @model_validator(mode="after")
    def _check_token(self) -> Self:
        if self.is_open and not values.is_loopback_only(self.listen):
            raise key_error(
                ("token_file",),
                f"is needed, because {self.listen} is not a loopback address",
            )
        return self


class Hosted(Section):
    """The repositories that clients push to this server, and the listener for pushes."""

    name: Annotated[str, AfterValidator(values.check_upstream_name)]
    """
    Host or host:port of these repositories in image references. Not the name of an upstream.
    """
    listen: Annotated[str, AfterValidator(values.check_listen)] | None = None
    """
    Address and port of a listener of its own, for pushes and pulls. It uses the certificate of tls.
    """
    hosts: tuple[Host, ...] = ()
    """
    Host names by which clients reach these repositories on the mirror's listener. A name without a
    port counts for every port.
    """
    max_size: Size = 100 * 2**30
    """
    Most bytes of all hosted content, of its metadata, and of uploads. It is apart from
    storage.max_size, and is never evicted: pushes are refused when it is used up.
    """
    max_repository_size: Size | None = None
    """Most bytes of the content and metadata of one repository. Default: only max_size counts."""
    sparse_indexes: bool = False
    """
    Accept an index although manifests that it lists were not pushed to its repository.
    """
    immutable_tags: tuple[ImmutableTagsOrText, ...] = ()
    """
    Tags that cannot be moved to another manifest, and that only an admin can delete: patterns such
    as team/*:v*, or sections with match and tags.
    """
    retention: tuple[HostedRetentionRule, ...] = ()
    """
    Rules that remove images from hosted repositories, each with match, older_than, keep_last, tags,
    about and age. Immutable tags stay. Empty: only deletion removes images.
    """
    grace: Age = 86400.0
    """
    Time for which content stays that nothing refers to any more: blobs that no manifest names, and
    images that a rule has removed. Clients push blobs before the manifest that names them.
    """

    def names(self) -> dict[str, str]:
        """Return each name by which a request to the mirror may call it, to its name."""
        # An image reference accepts letters, digits and separators (Distribution, "name").
        alias = re.sub("[^a-z0-9.-]+", "_", self.name).strip("_")
        return {self.name: self.name, alias: self.name}

    def has_image(self, image: str) -> bool:
        """Return whether an image, by its whole name, is of a hosted repository."""
        return image.startswith(f"{self.name}/")

    @model_validator(mode="after")
    def _check_listener(self) -> Self:
        if self.listen is None and not self.hosts:
            raise key_error(
                ("listen",),
                "set hosted.listen (own port) or hosted.hosts (names on the mirror's port)",
            )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        of_one = self.max_repository_size
        if of_one is not None and of_one > self.max_size:
            raise key_error(
                ("max_repository_size",),
                f"is more than max_size ({values.format_size(self.max_size)}), which then counts",
            )
        return self

    def check_hosts(self, listen: str) -> None:
        """Refuse host names by which clients of the mirror call it. Raises an error of pydantic.

        Args:
            listen: Address and port of the mirror's own listener.
        """
        own_host, own_port = values.split_host(listen)
        for index, text in enumerate(self.hosts):
            host, port = values.split_host(text)
            if host == own_host.lower() and port in (None, own_port):
                raise key_error(
                    ("hosted", "hosts", index),
                    f"would take the mirror's own requests at {listen}: use a name of its own, or"
                    " hosted.listen",
                )

    def check_reach(self, listen: str) -> None:
        """Refuse a push listener that other machines can reach while everybody may push.

        Raises an error of pydantic.

        Args:
            listen: Address and port of the mirror's own listener.
        """
        for key, address in (("listen", self.listen), ("hosts", listen if self.hosts else None)):
            if address is not None and not values.is_loopback_only(address):
                raise key_error(
                    ("hosted", key),
                    f"everybody who can reach {address} could push: add the section access, or use"
                    " a loopback address",
                )
