"""Remove images by name: from the cache, and from hosted repositories.

Lives here: which of both an image is in, and the deletion of a hosted one. Must not know: how
cached content is removed (:mod:`mirror.operations.removal`).

A hosted image is deleted as a client deletes it: a tag goes, and its manifest stays; or a manifest
goes, with all its tags. Its content stays until a collection, since other manifests may need it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Final

from mirror.composition import open_hosted
from mirror.config.settings import Settings
from mirror.hosted.immutable_tags import ImmutableTagRules
from mirror.inventory.keeping import HOSTED
from mirror.inventory.model import Image, Inventory
from mirror.observability.hosted_events import Actor
from mirror.oci.errors import (
    Denied,
    ManifestUnknown,
    StorageUnavailable,
    TagImmutable,
    UploadUnknown,
)
from mirror.operations.cleaning_report import CleaningReport, Item
from mirror.operations.removal import plan_removal, remove_images
from mirror.store.layout import Layout
from mirror.store.sqlite_connection import connect_to_read
from mirror.store.store import Store

_TAG_STAYS: Final = "its manifest stays: remove NAME@DIGEST to free its content"
_CONTENT_STAYS: Final = (
    "oci-mirror gc removes what no other image needs after hosted.grace (--grace 10m: sooner)"
)


def plan_removal_by_name(
    settings: Settings,
    inventory: Inventory,
    images: Iterable[Image],
    whys: Mapping[Image, str],
    *,
    may_change_immutable: bool = False,
) -> CleaningReport:
    """Return what :func:`remove_by_name` would do now. Blocks. Changes nothing.

    Args:
        settings: The configuration.
        inventory: The content of the data directory.
        images: The images to remove.
        whys: Image -> the reason of its removal.
        may_change_immutable: Whether hosted images of immutable tags go, too.

    Raises ``StorageUnavailable`` if the names of hosted repositories cannot be read.
    """
    hosted, cached = _split(images)
    report = plan_removal(inventory, cached, whys)
    protected = {} if may_change_immutable else _find_immutable(settings, hosted)
    for image in hosted:
        if image in protected:
            report.items.append(_kept(image, protected[image]))
        else:
            report.items += _deleted(image, whys)
    return report


def _find_immutable(settings: Settings, images: Iterable[Image]) -> dict[Image, str]:
    """Return the images that immutable tags protect, with the reason."""
    protected: dict[Image, str] = {}
    if settings.hosted is None or not settings.hosted.immutable_tags:
        return protected
    rules = ImmutableTagRules(settings.hosted)
    path = Layout(Path(settings.data_dir)).hosted_names
    try:
        with closing(connect_to_read(path)) as database:
            for image in images:
                name, reference = image.repository.path, image.tag or image.digest
                try:
                    rules.check_deletion(database, name, reference)
                except TagImmutable as error:
                    protected[image] = _with_force(error)
    except sqlite3.Error as error:
        raise StorageUnavailable(f"{path}: {error}") from error
    return protected


def _with_force(error: TagImmutable) -> str:
    return f"{error.message}, with --force"


async def remove_by_name(
    settings: Settings,
    store: Store,
    inventory: Inventory,
    images: Iterable[Image],
    whys: Mapping[Image, str],
    actor: Actor,
    *,
    may_change_immutable: bool = False,
) -> CleaningReport:
    """Remove images from the cache, and delete hosted ones. Says what stays, and why.

    Args:
        settings: The configuration.
        store: The open data directory.
        inventory: It, as it was when the images were chosen.
        images: The images. Those that a mark keeps stay.
        whys: Image -> the reason of its removal.
        actor: Who removes them.
        may_change_immutable: Whether hosted images of immutable tags go, too.

    Raises:
        NamesDamaged: The names of hosted repositories cannot be used.
        StorageUnavailable: The marks, the index or these names cannot be read or written.
        OSError: Another process does not release the eviction lock, or the disk refuses.
    """
    hosted, cached = _split(images)
    report = await remove_images(store, inventory, cached, whys)
    if not hosted:
        return report
    async with open_hosted(settings, store, store.now, None) as service:
        assert service is not None, "an image is hosted only with the section"
        for image in hosted:
            try:
                path, reference = image.repository.path, image.tag or image.digest
                await service.manifests.delete(
                    path, reference, actor, may_change_immutable=may_change_immutable
                )
            except TagImmutable as error:
                report.items.append(_kept(image, _with_force(error)))
            except (Denied, ManifestUnknown) as error:
                report.items.append(_kept(image, error.message))
            else:
                report.items += _deleted(image, whys)
    return report


async def end_uploads(
    settings: Settings, store: Store, upload_ids: Iterable[str]
) -> CleaningReport:
    """End uploads in progress, of any user. Says which have ended.

    Args:
        settings: The configuration.
        store: The open data directory.
        upload_ids: Ids, as ``ls --uploads`` lists them.

    Raises:
        UploadUnknown: There is no such upload. Those before it have ended.
        NamesDamaged: The names cannot be used.
        StorageUnavailable: They cannot be written.
    """
    report = CleaningReport()
    async with open_hosted(settings, store, store.now, None) as service:
        for upload_id in upload_ids:
            if service is None:
                raise UploadUnknown("nothing is hosted: the configuration has no hosted")
            try:
                size = await service.uploads.end(upload_id)
            except UploadUnknown:
                raise UploadUnknown(
                    f"{upload_id}: there is no such upload: `oci-mirror ls --uploads` lists them"
                ) from None
            report.items.append(
                Item(
                    action="removed",
                    kind="leftover",
                    name=upload_id,
                    bytes=size,
                    why="the upload was cancelled",
                )
            )
    return report


def _split(images: Iterable[Image]) -> tuple[list[Image], list[Image]]:
    """Return the hosted images to delete, and all others. Those that a mark keeps are others."""
    hosted: list[Image] = []
    cached: list[Image] = []
    for image in dict.fromkeys(images):
        is_deletable = image.keeper is not None and image.keeper.why == HOSTED
        (hosted if is_deletable else cached).append(image)
    return hosted, cached


def _deleted(image: Image, whys: Mapping[Image, str]) -> list[Item]:
    stays = _CONTENT_STAYS if image.tag is None else _TAG_STAYS
    name, digest = image.name, image.root
    return [
        Item(
            action="removed",
            kind="image",
            name=name,
            digest=digest,
            count=0,
            why=f"hosted, {whys[image]}",
        ),
        Item(action="kept", kind="content", name=name, digest=digest, bytes=image.size, why=stays),
    ]


def _kept(image: Image, why: str) -> Item:
    return Item(
        action="kept", kind="image", name=image.name, digest=image.root, bytes=image.size, why=why
    )
