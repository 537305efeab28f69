"""Mark images: pin, block, freeze, roll back, and take these marks away.

Lives here: what the name of an image means for each mark. Must not know: arguments of a command
line, the file of the marks, how a server applies them.

Every function may be called again after it was interrupted: a mark that is there stays as it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from mirror.config.settings import Hosted, Settings
from mirror.history.queries import find_tag_digests
from mirror.inventory.hosted_names import read_hosted_tag
from mirror.oci.block_target import Target
from mirror.oci.errors import (
    DigestInvalid,
    ManifestUnknown,
    NameInvalid,
    TagInvalid,
)
from mirror.oci.image_name import ImageName
from mirror.oci.reference import UPSTREAM_ALIASES, Digest, Repository, Tag
from mirror.oci.text import count_text
from mirror.operations import tag_digests
from mirror.store import disk
from mirror.store.index import Index
from mirror.store.layout import Layout
from mirror.store.marks import Block, Freeze, Marks, Pin, change_marks
from mirror.store.protection import read_parts
from mirror.threads import HangingCalls, run_in_thread

MAX_REASON_CHARS: Final = 500
"""Characters of the reason of a block: a client prints it in one line."""
_MIN_PREFIX_CHARS: Final = 4
"""Hexadecimal digits of a digest that are needed to name it."""
_CHANGES: Final = HangingCalls("marks", limit=16)
"""Changes of the marks. Each may wait for a process that was stopped."""

CheckUpstream = Callable[[Repository, Digest], Awaitable[None]]
"""Returns if the upstream of a repository has a manifest. Raises ``MirrorError`` otherwise."""


@dataclass(frozen=True, slots=True)
class Rollback:
    """A tag that was rolled back."""

    freeze: Freeze
    missing: int
    """Parts of the image that are not on the disk. The upstream has its manifest."""

    def notes(self) -> list[str]:
        """Return what has to be known about it, as sentences."""
        if not self.missing:
            return []
        note = (
            f"{count_text(self.missing, 'part')} missing here. The upstream has the image, and a "
            "client that asks for it gets them"
        )
        return [note]


async def change(layout: Layout, update: Callable[[Marks], Marks]) -> Marks:
    """Change the marks durably, without blocking the event loop.

    Raises like :func:`mirror.store.marks.change_marks`.
    """
    return await _CHANGES.run(object(), lambda: change_marks(layout, update))


def check_not_hosted(names: Sequence[ImageName], hosted: Hosted | None) -> None:
    """Refuse to keep images of hosted repositories: nothing but a deletion removes these.

    Args:
        names: The images to pin, freeze or roll back.
        hosted: The settings of hosted repositories. None: there are none.

    Raises:
        NameInvalid: One of them is hosted.
    """
    for name in names:
        if hosted is not None and hosted.has_image(str(name)):
            raise NameInvalid(
                f"{name.with_default_tag()} is hosted here: it is never evicted, and needs no pin "
                "and no freeze. To keep its tag at its digest: hosted.immutable_tags"
            )


# --- pins -----------------------------------------------------------------------------------------


async def pin(layout: Layout, index: Index, names: Sequence[ImageName], now: float) -> list[Pin]:
    """Pin images: they are never evicted, nor is the image that the tag has later.

    All of them are pinned, or none. An image that is pinned already stays pinned since then.

    Args:
        layout: The data directory.
        index: Its index.
        names: The images. Without tag and digest, the tag is ``latest``.
        now: Seconds since the epoch.

    Raises:
        ManifestUnknown: A tag is not in the cache.
        StorageUnavailable: The index or the marks cannot be read.
        OSError: The marks cannot be written.
    """
    pins = [await _pin_of(layout, index, name.with_default_tag(), now) for name in names]
    absent = await _find_absent(layout, [one.digest for one in pins])

    def add(marks: Marks) -> Marks:
        new = {one.name: _pin_in(marks, one, absent) for one in pins}
        return replace(marks, pins={**marks.pins, **new})

    marks = await change(layout, add)
    return [marks.pins[one.name] for one in pins]


async def _pin_of(layout: Layout, index: Index, name: ImageName, now: float) -> Pin:
    if isinstance(name.reference, Digest):
        return Pin(str(name), name.reference, now)
    return Pin(str(name), (await _find_served(layout, index, name))[0], now)


async def _find_served(layout: Layout, index: Index, name: ImageName) -> tuple[Digest, ...]:
    """Return the digests that clients get of a tag. There is at least one."""
    served = (await tag_digests.read_tag_digests(layout, index, name)).served
    if not served:
        raise tag_digests.not_here(name)
    return served


def _pin_in(marks: Marks, new: Pin, absent: tuple[Digest, ...]) -> Pin:
    """Return a new pin with the digest that a frozen tag is served as, and the earlier time.

    ``absent``: the manifests that are not on the disk. Those of freezes are known from these.
    """
    freeze, earlier = marks.freezes.get(new.name), marks.pins.get(new.name)
    digest = new.digest if freeze is None else freeze.digest
    known = absent if freeze is None else freeze.absent
    return Pin(
        new.name,
        digest,
        since=new.since if earlier is None else earlier.since,
        absent=(digest,) if digest in known else (),
    )


async def _find_absent(layout: Layout, digests: Sequence[Digest]) -> tuple[Digest, ...]:
    """Return those of some manifests that are not on the disk."""
    return await run_in_thread(
        lambda: tuple(one for one in digests if not disk.has_whole(layout, one))
    )


async def unpin(layout: Layout, names: Sequence[ImageName]) -> list[Pin]:
    """Take pins away. Returns those that were there. Raises as :func:`pin`."""
    wanted = {str(name.with_default_tag()) for name in names}
    removed: list[Pin] = []

    def remove(marks: Marks) -> Marks:
        removed[:] = [one for one in marks.pins.values() if one.name in wanted]
        return replace(marks, pins={n: one for n, one in marks.pins.items() if n not in wanted})

    await change(layout, remove)
    return removed


# --- blocks ---------------------------------------------------------------------------------------


async def block(
    layout: Layout, index: Index, target: Target, reason: str, now: float, hosted: Hosted | None
) -> Block:
    """Refuse images from now on. Running responses end.

    The manifests that an image has now are refused in every repository, and under every tag: its
    digest, and the images that it lists for platforms. Blobs are not: other images share them.

    Args:
        layout: The data directory.
        index: Its index.
        target: An image, a repository (a name without tag and digest), a pattern, or a digest.
        reason: Clients are told it. Empty: none.
        now: Seconds since the epoch.
        hosted: The settings of hosted repositories. None: there are none.

    Raises:
        StorageUnavailable: The index, the hosted names or the marks cannot be read.
        OSError: The marks cannot be written.
        NameInvalid: The reason is too long, or has more than one line.
    """
    if len(reason) > MAX_REASON_CHARS or not reason.isprintable():
        raise NameInvalid(f"a reason is one line of at most {MAX_REASON_CHARS} characters")
    digests = await _digests_of(layout, index, target, hosted)

    def add(marks: Marks) -> Marks:
        earlier = marks.blocks.get(str(target))
        new = Block(str(target), reason, now, frozenset(digests))
        if earlier is not None:
            # Its tag may have had other digests then.
            since = now if reason != earlier.reason else earlier.since
            new = replace(new, since=since, digests=new.digests | earlier.digests)
        return replace(marks, blocks={**marks.blocks, new.target: new})

    return (await change(layout, add)).blocks[str(target)]


def check_registry(target: Target, settings: Settings) -> str | None:
    """Return a warning of a target whose registry is not configured. None: there is none.

    Raises ``NameInvalid`` for the bare name of a registry: it would be a repository of docker.io.
    """
    if isinstance(target, Digest):
        return None
    for name in (*settings.upstreams, *UPSTREAM_ALIASES):
        if str(target) == f"docker.io/library/{name}":
            raise NameInvalid(f"{name} is a registry: block '{name}/*' for all of it")
    registry = str(target).partition("/")[0]
    hosted = () if settings.hosted is None else settings.hosted.names()
    if not _has_wildcard(registry) and registry not in (*settings.upstreams, *hosted):
        return f"{registry} is not one of upstreams, so nothing matches {target}"
    return None


def _has_wildcard(text: str) -> bool:
    return not {"*", "?", "["}.isdisjoint(text)


def why_incomplete(layout: Layout, target: Target, block: Block) -> str | None:
    """Return what a block does not refuse because the image is not here. None: nothing. Blocks.

    Args:
        layout: Where content is.
        target: What the operator has blocked.
        block: The block, as it is in force.
    """
    match target:
        case ImageName(_, Tag()) if not block.digests:
            return "the tag is not here: its digest is not refused under other names"
        case Digest() as digest if not disk.has_whole(layout, digest):
            pass
        case ImageName(_, Digest() as digest) if not disk.has_whole(layout, digest):
            pass
        case _:
            return None
    return (
        "the content is not in the cache: if it is an index, also block the digests of the images "
        "that it lists, or pull it first"
    )


async def unblock(layout: Layout, target: Target) -> Block | None:
    """Serve a blocked target again. Returns its block, or None if there was none."""
    removed: list[Block] = []

    def remove(marks: Marks) -> Marks:
        blocks = dict(marks.blocks)
        removed[:] = [blocks.pop(str(target))] if str(target) in blocks else []
        return replace(marks, blocks=blocks)

    await change(layout, remove)
    return removed[0] if removed else None


async def _digests_of(
    layout: Layout, index: Index, target: Target, hosted: Hosted | None
) -> set[Digest]:
    """Return the manifests of a target: those that it names, and their children."""
    match target:
        case Digest() | ImageName(_, Digest()):
            digests = {target if isinstance(target, Digest) else _digest_of(target)}
        case ImageName(repository, Tag() as tag) if hosted and hosted.has_image(str(target)):
            text = await run_in_thread(read_hosted_tag, layout, repository, tag)
            digests = set() if text is None else {Digest.parse(text)}
        case ImageName(_, Tag()) as name:
            digests = set((await tag_digests.read_tag_digests(layout, index, name)).all)
        case _:
            return set()
    queue = list(digests)
    while queue:
        children, _ = await run_in_thread(read_parts, layout, queue.pop())
        new = set(children) - digests
        digests |= new
        queue += new
    return digests


def _digest_of(name: ImageName) -> Digest:
    assert isinstance(name.reference, Digest)
    return name.reference


# --- freezes --------------------------------------------------------------------------------------


async def freeze(layout: Layout, index: Index, name: ImageName, now: float) -> Freeze:
    """Serve a tag from the digest that it has here, whatever the upstream says of it.

    Clients that do not accept its media type get the manifest that the upstream has for them.

    A tag that is frozen already stays at its digest.

    Args:
        layout: The data directory.
        index: Its index.
        name: The tag. Without one, it is ``latest``.
        now: Seconds since the epoch.

    Raises:
        TagInvalid: The name has a digest, which never changes.
        ManifestUnknown: The tag is not in the cache.
        StorageUnavailable: The marks cannot be read.
        OSError: The marks cannot be written.
    """
    name = _with_tag(name)
    digest, *variants = await _find_served(layout, index, name)
    absent = await _find_absent(layout, [digest, *variants])
    new = Freeze(str(name), digest, now, variants=tuple(variants), absent=absent)

    def add(marks: Marks) -> Marks:
        return replace(marks, freezes={new.name: new, **marks.freezes})

    return (await change(layout, add)).freezes[new.name]


async def unfreeze(layout: Layout, name: ImageName) -> Freeze | None:
    """Let a tag follow the upstream again. Returns its freeze, or None if it had none."""
    key = str(_with_tag(name))
    removed: list[Freeze] = []

    def remove(marks: Marks) -> Marks:
        freezes = dict(marks.freezes)
        removed[:] = [freezes.pop(key)] if key in freezes else []
        return replace(marks, freezes=freezes)

    await change(layout, remove)
    return removed[0] if removed else None


async def roll_back(
    layout: Layout,
    index: Index,
    name: ImageName,
    to: str,
    now: float,
    check_upstream: CheckUpstream,
) -> Rollback:
    """Serve a tag from a digest that it has had, and freeze it there.

    Args:
        layout: The data directory.
        index: Its index.
        name: The tag. Without one, it is ``latest``.
        to: The digest, or the first digits of it.
        now: Seconds since the epoch.
        check_upstream: Asked only if the image is not complete on the disk.

    Raises:
        TagInvalid: The name has a digest.
        ManifestUnknown: The tag has not had this digest.
        DigestInvalid: ``to`` names no digest, or several.
        MirrorError: The image is not complete on the disk, and the upstream does not have it.
        StorageUnavailable: The marks cannot be read.
        OSError: The marks cannot be written.
    """
    name = _with_tag(name)
    digest = choose_digest(name, await _find_all_digests(layout, index, name), to)
    missing = await run_in_thread(count_missing, layout, digest)
    if missing:
        await check_upstream(name.repository, digest)
    new = Freeze(str(name), digest, now, absent=await _find_absent(layout, [digest]))

    def put(marks: Marks) -> Marks:
        previous = marks.freezes.get(new.name)
        is_there = previous is not None and previous.digest == digest
        return marks if is_there else replace(marks, freezes={**marks.freezes, new.name: new})

    return Rollback((await change(layout, put)).freezes[new.name], missing)


# --- images ---------------------------------------------------------------------------------------


async def _find_all_digests(layout: Layout, index: Index, name: ImageName) -> list[Digest]:
    """Return the digests of a tag that ``oci-mirror history`` lists: the index forgets some."""
    assert isinstance(name.reference, Tag)
    earlier = await run_in_thread(find_tag_digests, layout, name.repository, name.reference)
    try:
        known = await tag_digests.find_digests(index, name)
    except ManifestUnknown:
        if not earlier:
            raise
        known = []
    return list(dict.fromkeys([*known, *earlier]))


def choose_digest(name: ImageName, had: Sequence[Digest], prefix: str) -> Digest:
    """Return the one digest of those that a tag has had that begins with ``prefix``.

    Raises ``ManifestUnknown`` or ``DigestInvalid``.
    """
    algorithm, _, digits = prefix.lower().rpartition(":")
    if len(digits) < _MIN_PREFIX_CHARS:
        raise DigestInvalid(f"give at least {_MIN_PREFIX_CHARS} digits of the digest")
    found = [one for one in had if one.hex.startswith(digits) and algorithm in ("", one.algorithm)]
    if not found:
        known = ", ".join(f"{one.algorithm}:{one.hex[:12]}" for one in had)
        raise ManifestUnknown(f"{name} has not had the digest {prefix}: it has had {known}")
    if len(found) > 1:
        raise DigestInvalid(f"several digests of {name} begin with {prefix}: give more digits")
    return found[0]


def notes_of_kept(layout: Layout, kept: Iterable[Pin | Freeze]) -> list[str]:
    """Return a sentence for each mark whose image is not complete on the disk. Blocks."""
    return [
        f"{one.name} is not complete here: what arrives of it is kept. To fetch it: "
        f"oci-mirror warm {one.name}"
        for one in kept
        if count_missing(layout, one.digest)
    ]


def count_missing(layout: Layout, digest: Digest) -> int:
    """Return how many contents of an image are not on the disk. Blocks.

    Of an index, the images that are there have to be complete, and one has to be there: a mirror
    has only the platforms that clients have asked for.
    """
    if not disk.has_whole(layout, digest):
        return 1
    children, blobs = read_parts(layout, digest)
    missing = sum(not disk.has_whole(layout, blob) for blob in blobs)
    here = [child for child in children if disk.has_whole(layout, child)]
    missing += sum(count_missing(layout, child) for child in here)
    return missing + (1 if children and not here else 0)


def _with_tag(name: ImageName) -> ImageName:
    if isinstance(name.reference, Digest):
        raise TagInvalid(f"{name} has a digest, which never changes: give a tag")
    return name.with_default_tag()
