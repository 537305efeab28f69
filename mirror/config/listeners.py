"""The settings of listeners: the certificate, and the admin API.

Lives here: their keys, descriptions and rules. Must not know: how a listener works.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, model_validator

from mirror.config import values
from mirror.config.section import FilePath, Host, Section, key_error


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
