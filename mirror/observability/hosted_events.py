"""The event of a change to a hosted repository.

Lives here: what the log, the metrics and webhooks get to know of a push, a deletion or a mount.
Must not know: who observes, how a change is made.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from mirror.oci.reference import Digest, Repository

ChangeAction: TypeAlias = Literal["push", "delete", "mount"]
"""- ``push``: a manifest was pushed, or a tag was set. The push of a blob is none.
- ``delete``: a tag, a manifest with its tags, or a blob was deleted.
- ``mount``: a blob of another repository was mounted."""


@dataclass(frozen=True, slots=True)
class Actor:
    """The user and the address behind a change. Rules of the server have a name, and no address."""

    user: str = ""
    """Empty: anonymous."""
    client: str = ""
    """Address of the client. Empty: the server itself."""


SERVER: Final = Actor()
"""The server itself: a test, or a command that has no name of its own."""


@dataclass(frozen=True, slots=True)
class HostedMeasured:
    """The content of all hosted repositories now, and the uploads in progress. Sizes are bytes."""

    repositories: int
    contents: int
    """Number of contents. One that several repositories have counts once."""
    bytes: int
    quota: int
    uploads: int
    reserved: int
    """Bytes that uploads have reserved of the quota."""


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
    id: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)
    """The same each time that observers are told of the change."""
