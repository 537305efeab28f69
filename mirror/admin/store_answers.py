"""Answer the questions that need the whole store, or the history. Blocks.

Lives here: from an inventory and a history to the JSON of the API. Must not know: HTTP, in which
process it runs (:mod:`mirror.admin.reader_process`).

An inventory is kept for a while, since to read one takes a second for 10,000 images.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

from mirror.admin.json_values import JsonObject
from mirror.admin.sources import ImageQuery, PullQuery
from mirror.config.settings import Settings
from mirror.history.queries import HistoryReader, open_history
from mirror.history.sentences import explain
from mirror.history.stored_pull import PeriodCount, StoredPull
from mirror.history.sums import Saving, build_savings, build_total
from mirror.history.user_uses import count_users, read_user_uses
from mirror.inventory import usage
from mirror.inventory.hosted_names import read_hosted_usage, read_uploads
from mirror.inventory.json_rows import image_row
from mirror.inventory.leftovers import find_other_files
from mirror.inventory.model import Image, Inventory
from mirror.inventory.read import read_inventory
from mirror.inventory.tree import image_tree, node_row
from mirror.observability.events import Outcome
from mirror.observability.hosted_events import HostedUsage
from mirror.oci.errors import InvalidRequest, NotFound
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Tag
from mirror.oci.text import time_text
from mirror.store.layout import Layout
from mirror.store.marks import read_marks

MIN_AGE_S: Final = 3.0
"""Seconds for which an inventory is used at least, unless something was changed here."""
_READ_SHARE: Final = 0.05
"""Part of the time that reading inventories may take: one that takes 1 s is used for 20 s."""
_NEXT_EVICTIONS: Final = 8
"""Contents that eviction takes next, of which the page shows some."""
_MAX_NODES: Final = 2000
"""Nodes of the tree of one image. An index of 40 platforms with 20 layers each has 880."""
_MAX_SHARING: Final = 20
"""Names of other images that share one content."""
PERIOD_STEPS: Final = {"hour": (3600, 60), "day": (86400, 600), "month": (30 * 86400, 21600)}
"""Period -> (its seconds, the seconds between two points of its plot)."""


class StoreAnswers:
    """The questions of the API about one data directory."""

    def __init__(
        self, layout: Layout, settings: Settings, now: Callable[[], float] = time.time
    ) -> None:
        """Read nothing yet.

        Args:
            layout: The data directory.
            settings: The configuration. Logins are not needed.
            now: Returns the Unix time in seconds.
        """
        self._layout = layout
        self._settings = settings
        self._now = now
        self._inventory: Inventory | None = None
        self._read_seconds = 0.0

    def inventory(self) -> Inventory:
        """Return the inventory, read again if it is old. Raises what reading it raises."""
        now, known = self._now(), self._inventory
        max_age = max(MIN_AGE_S, self._read_seconds / _READ_SHARE)
        if known is not None and 0 <= now - known.now < max_age:
            return known
        begun = time.monotonic()
        marks = read_marks(self._layout)
        self._inventory = read_inventory(
            self._layout, self._settings.upstreams, marks, now, self._settings.hosted
        )
        self._read_seconds = time.monotonic() - begun
        return self._inventory

    def forget(self) -> None:
        """Read the inventory again at the next question."""
        self._inventory = None

    # --- images ---------------------------------------------------------------------------------

    def find(self, query: ImageQuery) -> JsonObject:
        """Return a page of images."""
        inventory = self.inventory()
        wanted = query.search.lower()
        is_wanted = _state_filter(query.state)
        images: Iterable[Image] = inventory.absent
        if query.state != "absent":  # As `ls`, what should be here is listed, too.
            images = (*inventory.images, *inventory.lost)
        found = [one for one in images if wanted in one.name.lower() and is_wanted(one)]
        key = _sort_key(inventory, query.sort)
        found.sort(key=key, reverse=query.is_descending)
        page = found[query.offset : query.offset + query.limit]
        return {
            "images": [image_row(inventory, image) for image in page],
            "matching": len(found),
            "total": sum(not image.is_referrer for image in inventory.images),
            "lost": len(inventory.lost),
            "read": time_text(inventory.now),
        }

    def show(self, image: str) -> JsonObject:
        """Return one image and its tree. Raises ``NotFound`` or ``InvalidRequest``."""
        inventory = self.inventory()
        found = self._one(inventory, image)
        nodes = []
        for node in image_tree(inventory, found):
            row = node_row(found, node)
            nodes.append({**row, "shared_with": list(node.shared_with)[:_MAX_SHARING]})
            if len(nodes) >= _MAX_NODES:
                break
        return {"image": image_row(inventory, found), "nodes": nodes}

    def _one(self, inventory: Inventory, name: str) -> Image:
        parsed = ImageName.parse(name).with_default_tag()
        found = inventory.find(parsed) or [
            image for image in inventory.lost if image.name == str(parsed)
        ]
        exact = [image for image in found if image.name == str(parsed)]
        if not found:
            raise NotFound(f"{parsed} is not in the cache")
        return (exact or found)[0]

    def usage(self) -> JsonObject:
        """Return what takes up the disk. Hosted content is no part of ``bytes``."""
        inventory, storage = self.inventory(), self._settings.storage
        hosted = read_hosted_usage(self._layout)
        leftovers = find_other_files(self._layout)
        types = usage.usage_by_type(inventory, leftovers)
        groups = usage.usage_by_group(inventory, lambda image: image.repository.upstream)
        enough = max(1, int(storage.max_size * (storage.high_water - storage.low_water)))
        return {
            "contents": len(inventory.present),
            "bytes": max(0, usage.total_size(types) - hosted.bytes),
            "quota": storage.max_size,
            "rows": [asdict(one) for one in types],
            "upstreams": [
                {
                    "name": one.name,
                    "images": one.images,
                    "contents": one.contents,
                    "size": one.size,
                    "shared": one.shared,
                    "unique": one.unique,
                }
                for one in groups
            ],
            "next": [
                {
                    "digest": str(one.digest),
                    "type": one.type,
                    "size": one.size,
                    "last_used": time_text(one.used),
                    "why": one.why,
                    "images": [image.name for image in one.images][:_MAX_SHARING],
                }
                for one in usage.next_evictions(inventory, leftovers, enough, _NEXT_EVICTIONS)
            ],
            "hosted": self._hosted_row(hosted),
            "read": time_text(inventory.now),
        }

    def _hosted_row(self, hosted: HostedUsage) -> JsonObject | None:
        section = self._settings.hosted
        return None if section is None else {**asdict(hosted), "quota": section.max_size}

    def uploads(self) -> list[JsonObject]:
        """Return the uploads in progress. Raises ``StorageUnavailable``."""
        hosted = self._settings.hosted
        found = [] if hosted is None else read_uploads(self._layout, hosted.name)
        return [upload.row(self._now()) for upload in found]

    def users(self, limit: int) -> JsonObject:
        """Return the users of the server, the latest one first. Raises ``OSError``."""
        users = [one.row() for one in read_user_uses(self._layout, limit)]
        return {"users": users, "total": count_users(self._layout)}

    # --- history --------------------------------------------------------------------------------

    def pulls(self, query: PullQuery) -> list[JsonObject]:
        """Return pulls that have ended. Raises ``InvalidRequest``."""
        name = ImageName.parse(query.image) if query.image else None
        reference = name.reference if name is not None else None
        if query.client:
            _check_network(query.client)
        with open_history(self._layout) as history:
            found = history.pulls(
                last=query.limit,
                repository=name.repository if name is not None else None,
                tag=reference.name if isinstance(reference, Tag) else "",
                digest=str(reference) if isinstance(reference, Digest) else "",
                client=query.client,
                outcomes=[Outcome(one) for one in query.outcomes],
                before=query.before,
            )
            return [pull_row(pull) for pull in found]

    def pull(self, request_id: str) -> JsonObject:
        """Return one pull, explained. Raises ``NotFound``."""
        with open_history(self._layout) as history:
            found = history.pulls(last=1, request_id=request_id)
        if not found:
            raise NotFound("no such pull: the history keeps the latest ones")
        pull = found[0]
        return {
            "pull": pull_row(pull),
            "stages": [{"name": name, "seconds": value} for name, value in pull.stages.items()],
            "explanation": explain(pull),
        }

    def refused(self, limit: int) -> list[JsonObject]:
        """Return requests that got no content."""
        with open_history(self._layout) as history:
            return [pull_row(pull) for pull in history.refused(limit)]

    def tag_digests(self, image: str) -> list[JsonObject]:
        """Return the digests of a tag. Raises ``InvalidRequest``."""
        name = ImageName.parse(image).with_default_tag()
        if not isinstance(name.reference, Tag):
            raise InvalidRequest(f"{name} has a digest, which never changes: give a tag")
        with open_history(self._layout) as history:
            return [
                {
                    "digest": one.digest,
                    "first_seen": time_text(one.first_seen),
                    "last_seen": time_text(one.last_seen),
                }
                for one in history.tag_digests(name.repository, name.reference, 200)
            ]

    def savings(self, period: str) -> JsonObject:
        """Return sums and the points of a plot."""
        seconds, step = PERIOD_STEPS[period]
        until = self._now()
        with open_history(self._layout) as history:
            counts = _read_counts(history, period, until - seconds, until)
        return {
            "period": period,
            "totals": _saving_row(build_total(counts)),
            "points": list(_points(counts, until, seconds, step)),
            "upstreams": [_saving_row(one) for one in build_savings(counts, "upstream")],
        }


def _state_filter(state: str) -> Callable[[Image], bool]:
    """Return whether an image has a state. Signatures and SBOMs are no images of their own."""
    match state:
        case "referrer":
            return lambda image: image.is_referrer
        case "complete":
            return lambda image: image.is_complete and not image.is_referrer
        case "partial":
            return lambda image: not (image.is_complete or image.absence or image.is_referrer)
        case "absent":
            return lambda image: image.absence is not None
        case "stale":
            return lambda image: image.stale is not None and not image.is_referrer
        case "":
            return lambda image: not image.is_referrer
        case mark:
            return lambda image: mark in image.marks and not image.is_referrer


def _sort_key(inventory: Inventory, key: str) -> Callable[[Image], Any]:
    match key:
        case "size":
            return lambda image: image.size
        case "unique":
            return inventory.unique_of
        case "last_used":
            return lambda image: image.used
        case "confirmed":
            return lambda image: image.checked or 0.0
        case _:
            return lambda image: image.name


def _check_network(client: str) -> None:
    with suppress(ValueError):
        ipaddress.ip_network(client, strict=False)
        return
    raise InvalidRequest("client is not an address or a network, such as 10.0.0.0/24")


def pull_row(pull: StoredPull) -> JsonObject:
    """Return a pull as the API shows it: the fields of ``explain --json``, and its place."""
    return {
        **pull.to_json(),
        "row": pull.row_id,
        "id": pull.request_id,
        "at": time_text(pull.at),
        "client": pull.client or (f"oci-mirror {pull.command}" if pull.command else ""),
        "error": pull.error,
    }


def _read_counts(
    history: HistoryReader, period: str, since: float, until: float
) -> list[PeriodCount]:
    if period == "month":
        return history.counts(since, until)
    return history.minutes(since, until)


def _points(
    counts: Iterable[PeriodCount], until: float, seconds: int, step: int
) -> Iterable[JsonObject]:
    """Return one point for each step of the period, also for those without a request."""
    last = int(until // step) * step
    groups: dict[int, Saving] = {
        start: Saving(name="") for start in range(last - seconds + step, last + step, step)
    }
    for count in counts:
        group = groups.get(count.start // step * step)
        if group is not None:
            group.add(count)
    for start, group in groups.items():
        yield {
            "at": time_text(start),
            "requests": group.requests,
            "hits": group.hits,
            "hit_ratio": None if group.hit_ratio is None else round(group.hit_ratio, 4),
            "bytes_sent": group.bytes_sent,
            "bytes_fetched": group.bytes_fetched,
            "bytes_saved": group.bytes_saved,
        }


def _saving_row(saving: Saving) -> JsonObject:
    return saving.to_json()
