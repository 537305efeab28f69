"""The event of a change to a hosted repository.

Lives here: what the log, the metrics and webhooks get to know of a push, a deletion or a mount.
Must not know: who observes, how a change is made.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest, Repository
from mirror.oci.text import time_text

ChangeAction: TypeAlias = Literal["push", "delete", "mount"]
"""- ``push``: a manifest was pushed, or a tag was set. The push of a blob is none.
- ``delete``: a tag, a manifest with its tags, or a blob was deleted.
- ``mount``: a blob of another repository was mounted."""

_LINE_MESSAGES: Final = {"push": "pushed", "delete": "deleted", "mount": "mounted"}
"""Action -> the message of its line in the log."""


@dataclass(frozen=True, slots=True)
class Actor:
    """The user and the address behind a change. Rules of the server have a name, and no address."""

    user: str = ""
    """Empty: anonymous."""
    client: str = ""
    """Address of the client. Empty: the server itself."""
    network: str = ""
    """The client's address as it is counted: of IPv6 its network."""

    @property
    def owner(self) -> str:
        """The user, or the network of an anonymous one. Each has a limit of uploads."""
        return self.user or self.network


@dataclass(frozen=True, slots=True)
class HostedUsage:
    """The use of the quota by hosted repositories, and by uploads to them. Sizes are bytes."""

    contents: int
    """Number of contents. One that several repositories have counts once."""
    bytes: int
    repositories: int
    uploads: int
    """Number of uploads in progress."""
    reserved: int
    """Bytes that uploads have reserved."""
    metadata: int
    """Bytes that tags, and the rows of content, take."""

    @property
    def total(self) -> int:
        """Bytes of content, of metadata, and those that are reserved."""
        return self.bytes + self.metadata + self.reserved


@dataclass(frozen=True, slots=True)
class HostedMeasured(HostedUsage):
    """The use of the quota of hosted repositories now."""

    quota: int


@dataclass(frozen=True, slots=True)
class HostedChange:
    """A hosted repository has changed, and the change is durable.

    Each tag that a push sets has an event of its own. Rules, collection and commands change
    repositories, too: ``user`` is then the name of the rule, or that of the operating system's user
    (``local:root``), and ``client`` is empty. A server that was killed may have told of it before.
    """

    action: ChangeAction
    repository: Repository
    digest: Digest
    tag: str
    """Empty: the change is about a digest."""
    media_type: str
    """Of the manifest. ``application/octet-stream`` for a blob."""
    size: int
    """Bytes of the manifest or the blob."""
    user: str
    """Empty: anonymous."""
    client: str
    """Address of the client. Empty: the server itself."""
    at: float
    """Seconds since the epoch."""
    image_size: int | None = field(default=None, compare=False)
    """Bytes of a pushed manifest and of the blobs that it lists, as it states them. None: not
    known. It is an index, the change was no push, or a server was killed before it could tell."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)
    """The same each time that observers are told of the change."""

    @property
    def is_blob(self) -> bool:
        """Whether it is about a blob, and no manifest."""
        return self.media_type == OCTET_STREAM

    @property
    def log_message(self) -> str:
        """The message of its line in the log."""
        return _LINE_MESSAGES[self.action]

    def log_fields(self) -> dict[str, Any]:
        """Return the fields of its line in the log. Sizes are bytes."""
        return {
            "user": self.user or "anonymous",
            "client": self.client or "server",
            "repository": f"{self.repository.upstream}/{self.repository.path}",
            **({"tag": self.tag} if self.tag else {}),
            "digest": str(self.digest),
            "blob_bytes" if self.is_blob else "manifest_bytes": self.size,
            **({} if self.image_size is None else {"image_bytes": self.image_size}),
            "at": time_text(self.at),
        }
