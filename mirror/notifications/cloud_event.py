"""One event in the form of CloudEvents 1.0.

Lives here: the attributes, and the JSON format ("JSON Event Format for CloudEvents", sections 2 and
3). Must not know: who gets it.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

from mirror.access.rules import compile_pattern
from mirror.config.settings import EventTarget
from mirror.observability.events import HostedChange, RequestRecord

EVENT_CONTENT_TYPE: Final = "application/cloudevents+json; charset=utf-8"
"""``Content-Type`` of the structured content mode ("HTTP Protocol Binding", section 3.2)."""
TYPE_PREFIX: Final = "oci-mirror."
"""Prefix of ``type``. The kind of the event follows."""
_MAX_USER_AGENT_CHARS: Final = 256
"""Characters of ``User-Agent`` at most: a client chooses it."""


def _new_id() -> str:
    # Without a dot: the signature separates its parts by dots.
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class CloudEvent:
    """An event. Fields that are not known are empty, and left out of its JSON form."""

    kind: str
    """push, delete or pull (:data:`mirror.config.event_target.EventKind`)."""
    registry: str
    """Name of the upstream, or of the hosted repositories."""
    repository: str
    """Path of the repository, without the registry."""
    digest: str
    at: float
    """Seconds since the epoch."""
    tag: str = ""
    media_type: str = ""
    size: int = 0
    """Bytes of the manifest or blob."""
    user: str = ""
    client: str = ""
    """Address of the client."""
    user_agent: str = ""
    id: str = field(default_factory=_new_id)
    """The same for all targets, and for each attempt to send it."""

    @classmethod
    def of_change(cls, change: HostedChange) -> CloudEvent:
        """Return the event of a change. The change must not be a mount."""
        return cls(
            change.action,
            change.repository.upstream,
            change.repository.path,
            str(change.digest),
            change.at,
            tag=change.tag,
            media_type=change.media_type,
            size=change.size,
            user=change.user,
            client=change.client,
            id=change.id,
        )

    @classmethod
    def of_pull(cls, pull: RequestRecord, at: float) -> CloudEvent:
        """Return the event of a ``GET`` of a manifest that has ended at ``at``."""
        return cls(
            "pull",
            pull.upstream,
            pull.repository,
            pull.digest,
            at,
            tag="" if ":" in pull.reference else pull.reference,
            size=pull.bytes_sent,
            user=pull.user,
            client=pull.client,
            user_agent=pull.user_agent[:_MAX_USER_AGENT_CHARS],
        )

    def to_json(self, host: str) -> bytes:
        """Return the JSON form. ``host``: the name of this machine, a part of ``source``."""
        separator, reference = (":", self.tag) if self.tag else ("@", self.digest)
        data = {
            "registry": self.registry,
            "repository": self.repository,
            "tag": self.tag,
            "digest": self.digest,
            "mediaType": self.media_type,
            "size": self.size,
            "user": self.user,
            "client": self.client,
            "userAgent": self.user_agent,
        }
        at = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds")
        document: dict[str, Any] = {
            "specversion": "1.0",
            "id": self.id,
            "source": f"//{quote(host, safe='')}/{quote(self.registry, safe=':')}",
            "type": f"{TYPE_PREFIX}{self.kind}",
            "subject": f"{self.repository}{separator}{reference}",
            "time": at.replace("+00:00", "Z"),
            "datacontenttype": "application/json",
            "data": {key: value for key, value in data.items() if value},
        }
        return json.dumps(document, separators=(",", ":")).encode()


def is_wanted(target: EventTarget, kind: str, name: str) -> bool:
    """Return whether a target gets events of a kind. ``name``: of the repository, in whole."""
    patterns = map(compile_pattern, target.repositories)
    return kind in target.events and any(pattern.fullmatch(name) for pattern in patterns)
