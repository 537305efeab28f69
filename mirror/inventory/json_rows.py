"""An image as a row of JSON values, for ``ls --json`` and for the admin API.

Lives here: the fields of the row and their values. Must not know: who prints it. Sizes are bytes,
times RFC 3339 text in UTC; null: not known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mirror.inventory.model import Image, Inventory
from mirror.oci.text import time_text


def image_row(inventory: Inventory, image: Image) -> dict[str, Any]:
    """Return the row of an image."""
    return {
        "name": image.name,
        "kind": _kind_of(inventory, image),
        "upstream": image.repository.upstream,
        "repository": image.repository.path,
        "tag": image.tag.name if image.tag is not None else None,
        "digest": image.root,
        "current_digest": image.current_root,
        "platforms": list(image.platforms),
        "missing_platforms": list(image.missing_platforms),
        "size": image.size,
        "unique": inventory.unique_of(image),
        "last_used": time_text(image.used or None),
        "confirmed": time_text(image.checked),
        "state": state_words(image),
        "missing_parts": len(image.missing),
        "missing_bytes": sum([part.size for part in image.missing]),
        "absent_why": image.absence and image.absence.value,
        "stale_why": image.stale,
        "blocked_why": image.block_reason or None,
        "subject": image.subject,
        "accept": image.variant.strip() or None,
        "pushed": time_text(image.first_seen or None) if image.is_hosted else None,
        "pushed_by": image.pushed_by or None,
    }


def streamed_rows(inventory: Inventory, *, has_referrers: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of ``stream_hosted``, in its order.

    Args:
        inventory: See :func:`mirror.inventory.read.open_listing`.
        has_referrers: Also those of signatures and other referrers.
    """
    last: Image | None = None
    row: dict[str, Any] = {}
    for name, like in inventory.stream_hosted():
        if like.is_referrer and not has_referrers:
            continue
        if like is not last:
            last, row = like, image_row(inventory, like)
        yield {
            **row,
            "name": name.text,
            "repository": name.repository.path,
            "tag": None if name.tag is None else name.tag.name,
            "pushed": time_text(name.first_seen or None),
            "pushed_by": name.pushed_by or None,
        }


def _kind_of(inventory: Inventory, image: Image) -> str:
    if image.is_referrer:
        return "referrer"
    return "platform" if inventory.is_platform(image) else "image"


def state_words(image: Image) -> list[str]:
    """Return the state: ``complete``, ``partial`` or ``absent``; ``stale``; and its marks."""
    whole = "absent" if image.absence is not None else "partial"
    words = ["complete" if image.is_complete else whole]
    if image.stale is not None:
        words.append("stale")
    return [*words, *image.marks]
