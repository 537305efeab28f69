"""The marks of an operator, changed through the API.

Lives here: from the texts of a request to a mark, and to the JSON of an answer. Must not know: what
a mark means (:mod:`mirror.operations.marking`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mirror.admin.json_values import JsonObject
from mirror.composition import Mirror
from mirror.oci.block_target import parse_target
from mirror.oci.errors import NotFound
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Repository
from mirror.oci.text import time_text
from mirror.operations import marking
from mirror.operations.asking import fetch_manifest
from mirror.store.marks import Freeze, Pin, read_marks
from mirror.threads import run_in_thread


class StoreMarks:
    """:class:`mirror.admin.sources.MarkSource`, in the data directory of a mirror."""

    def __init__(self, mirror: Mirror, now: Callable[[], float]) -> None:
        """Change the marks of ``mirror``. ``now``: returns the Unix time in seconds."""
        self._mirror = mirror
        self._layout = mirror.store.layout
        self._index = mirror.store.index
        self._now = now

    async def list(self) -> JsonObject:
        """Return all marks."""
        marks = await run_in_thread(read_marks, self._layout)
        return {
            "pins": [
                {"name": one.name, "digest": str(one.digest), "since": time_text(one.since)}
                for one in marks.pins.values()
            ],
            "freezes": [
                {"name": one.name, "digest": str(one.digest), "since": time_text(one.since)}
                for one in marks.freezes.values()
            ],
            "blocks": [
                {
                    "target": one.target,
                    "reason": one.reason,
                    "since": time_text(one.since),
                    "digests": sorted(map(str, one.digests)),
                }
                for one in marks.blocks.values()
            ],
            "leases": len(marks.leases),
        }

    async def pin(self, image: str) -> JsonObject:
        """Keep an image for ever."""
        name = ImageName.parse(image)
        marking.check_not_hosted([name], self._mirror.settings.hosted)
        (pin,) = await marking.pin(self._layout, self._index, [name], self._now())
        return _changed(f"pinned {pin.name}", await self._notes_of(pin))

    async def unpin(self, image: str) -> JsonObject:
        """Let an image be evicted again."""
        name = ImageName.parse(image)
        if not await marking.unpin(self._layout, [name]):
            raise NotFound(f"{name.with_default_tag()} is not pinned")
        return _changed(f"unpinned {name.with_default_tag()}")

    async def freeze(self, image: str, digest: str | None) -> JsonObject:
        """Serve a tag as one digest."""
        name = ImageName.parse(image)
        marking.check_not_hosted([name], self._mirror.settings.hosted)
        if digest is None:
            freeze = await marking.freeze(self._layout, self._index, name, self._now())
            notes = await self._notes_of(freeze)
        else:
            rollback = await marking.roll_back(
                *(self._layout, self._index, name, digest, self._now(), self._check_upstream)
            )
            freeze, notes = rollback.freeze, rollback.notes()
        return _changed(f"frozen {freeze.name} at {freeze.digest}", notes)

    async def _notes_of(self, mark: Pin | Freeze) -> Sequence[str]:
        return await run_in_thread(marking.notes_of_kept, self._layout, [mark])

    async def _check_upstream(self, repository: Repository, digest: Digest) -> None:
        await fetch_manifest(self._mirror, repository, digest, "rollback")

    async def unfreeze(self, image: str) -> JsonObject:
        """Let a tag follow its upstream again."""
        name = ImageName.parse(image)
        freeze = await marking.unfreeze(self._layout, name)
        if freeze is None:
            raise NotFound(f"{name.with_default_tag()} is not frozen")
        return _changed(f"unfroze {freeze.name}")

    async def block(self, target: str, reason: str) -> JsonObject:
        """Refuse images from now on."""
        parsed, settings = parse_target(target), self._mirror.settings
        warning = marking.check_registry(parsed, settings)
        block = await marking.block(
            self._layout, self._index, parsed, reason, self._now(), settings.hosted
        )
        why = await run_in_thread(marking.why_incomplete, self._layout, parsed, block)
        return _changed(f"blocked {block.target}", [one for one in (warning, why) if one])

    async def unblock(self, target: str) -> JsonObject:
        """Serve them again."""
        parsed = parse_target(target)
        if await marking.unblock(self._layout, parsed) is None:
            raise NotFound(f"{parsed} is not blocked")
        return _changed(f"unblocked {parsed}")


def _changed(text: str, notes: Sequence[str] = ()) -> JsonObject:
    """Return the response of a change. ``notes``: what has to be known about it, as sentences."""
    return {"text": text, "notes": list(notes)}
