"""Verify content: its hashes, and the completeness of images. Fetch again what is broken.

Lives here: which content is hashed, what the results mean for images, and the remedies. Must not
know: how content is hashed (:mod:`mirror.store.scrub`) or fetched (:mod:`mirror.pull`).
"""

from __future__ import annotations

from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self, TypeAlias

from mirror.inventory.model import (
    MANIFEST_PART_TYPES,
    Absence,
    ContentType,
    DigestText,
    Image,
    Inventory,
)
from mirror.observability.events import Kind
from mirror.oci.reference import Digest, Repository
from mirror.operations.scrubbing import scrub_each
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.scrub import Scrubbed, ScrubResult
from mirror.store.store import Store
from mirror.threads import run_in_thread

_RECORD_STEP: Final = 1000
"""Verification times that are written to the index at once."""
_MAX_NAMES: Final = 3
"""Names of images in one finding."""
_IN_QUARANTINE: Final = "is in quarantine/"
_NOTHING_RESTORES: Final = (
    "; no upstream has hosted content: push the image again, or restore it from a backup"
)
_MAX_REPAIR_ROUNDS: Final = 5
"""Rounds of a repair: an index, its manifests, their layers, and one more after a new damage."""

_CONTENT_WORDS: Final[Mapping[ContentType, str]] = {
    ContentType.INDEX: "an index",
    ContentType.MANIFEST: "a manifest",
    ContentType.CONFIG: "a config",
    ContentType.LAYER: "a layer",
    ContentType.REFERRER: "a referrer",
    ContentType.OTHER: "content",
}

ProblemKind: TypeAlias = Literal["damaged", "unreadable", "lost", "incomplete", "absent"]
"""- ``damaged``: content does not hash to its digest. Until it is fetched again, also later runs
  find it, in ``quarantine/``.
- ``unreadable``: the disk cannot read content.
- ``lost``: the manifest of an image that a mark keeps is not on the disk, or hosted content that
  no image has.
- ``incomplete``: an image lacks content.
- ``absent``: the manifest of a tag is not on the disk. It was evicted, or is lost.

The last two are no damage: a node may have had the layers already, and an eviction removes
content. The next pull fetches it."""
_NO_DAMAGE: Final[frozenset[ProblemKind]] = frozenset({"incomplete", "absent"})


@dataclass(frozen=True, slots=True)
class Subset:
    """A part of all content, by digest: ``number`` of ``count`` equal parts."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``1/7``. Raises ``ValueError``, with the reason."""
        first, _, second = text.partition("/")
        if not (first.isascii() and first.isdigit() and second.isascii() and second.isdigit()):
            raise ValueError("not of the form 1/7")
        number, count = int(first[:9]), int(second[:9])
        if not 1 <= number <= count:
            raise ValueError(f"not a number from 1 to {count}")
        return cls(number, count)

    def has_content(self, digest: Digest) -> bool:
        """Return whether a content is in this part."""
        return int(digest.hex[:12], 16) % self.count == self.number - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A finding, and the command that repairs it."""

    problem: ProblemKind
    image: str | None
    """The first image that it is about. None: no image has the content."""
    digest: str
    """The content. Of an incomplete image: its manifest."""
    bytes: int
    """Bytes of the content; of an incomplete image, of its missing parts."""
    what: str
    """The problem in words, for people."""
    command: str | None
    """Repairs it. None: no image has the content, or no command can bring it back."""
    is_repaired: bool = False
    is_hosted: bool = False
    """Whether a hosted repository has it, and nothing else: no command brings it back."""
    failure: str = ""
    """Path, reason and remedy, if the disk has refused something. Empty: it has not."""

    @property
    def is_damage(self) -> bool:
        """Whether an image has damaged content, or lacks some that is hosted or marked."""
        if self.is_hosted:
            return self.problem != "absent"
        return self.command is not None and self.problem not in _NO_DAMAGE

    def row(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {
            "problem": self.problem,
            "image": self.image,
            "digest": self.digest,
            "bytes": self.bytes,
            "what": self.what,
            "command": self.command,
            "is_repaired": self.is_repaired,
            "is_hosted": self.is_hosted,
        }


@dataclass(slots=True)
class VerifyReport:
    """The result of a verification."""

    contents: int = 0
    """Contents that were hashed."""
    bytes: int = 0
    images: int = 0
    """Images whose completeness was checked."""
    problems: list[Problem] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Why content could not be fetched again, each in one line."""
    index_failure: str = ""
    """Why the times of verification were not recorded. Empty: they were."""

    @property
    def failures(self) -> list[str]:
        """Path, reason and remedy of each refusal of the disk that no repair has mended."""
        found = [one.failure for one in self.problems if one.failure and not one.is_repaired]
        return [*found, self.index_failure] if self.index_failure else found

    @property
    def has_damage(self) -> bool:
        """Whether damage was found that no repair has fetched again."""
        return any(problem.is_damage and not problem.is_repaired for problem in self.problems)


OnProgress: TypeAlias = Callable[[int, int], None]
"""Receives the bytes that were hashed so far, and those of all content that is to be hashed."""
Refetch: TypeAlias = Callable[[Repository, Digest, Kind], Awaitable[str | None]]
"""Fetches content through a repository. Returns why it could not, or None."""
ReadInventory: TypeAlias = Callable[[], Awaitable[Inventory]]


async def verify(
    store: Store,
    inventory: Inventory,
    images: Collection[Image] | None,
    subset: Subset | None,
    on_progress: OnProgress = lambda done, total: None,
) -> VerifyReport:
    """Hash content, move damaged content to ``quarantine/``, and check that images are complete.

    Args:
        store: The open data directory.
        inventory: Its content.
        images: Only these images, with or without a manifest, and their content. None: all.
        subset: Only the content of this part is hashed. None: all.
        on_progress: Called after each content.

    Raises:
        StorageUnavailable: No process can be started for it.
    """
    report = VerifyReport()
    chosen = (*inventory.images, *inventory.absent) if images is None else images
    here = [image for image in chosen if image.absence is None]
    digests = _digests(inventory, images, subset)
    broken = await _hash(store, inventory, digests, report, on_progress)
    places = await run_in_thread(_places, store.layout, broken, inventory.hosted)
    found = {text: one.result for text, one in broken.items()}
    # What an earlier run has moved there, and nobody has fetched again.
    for text in inventory.quarantined:
        is_hosted = images is None and text in inventory.hosted
        if is_hosted or any(text in inventory.sharing.reached(image.root) for image in chosen):
            found[text] = "damaged"
    report.images = len(here)
    failures = {text: one.failure for text, one in broken.items()}
    report.problems += _damage(inventory, found, places, failures)
    report.problems += _incomplete(here, found)
    report.problems += _absent(image for image in chosen if image.absence and not image.is_referrer)
    if images is None:
        report.problems += await run_in_thread(_lost_hosted, store.layout, inventory)
    return report


def _digests(
    inventory: Inventory, images: Collection[Image] | None, subset: Subset | None
) -> list[Digest]:
    contents = inventory.contents
    found: Collection[Digest] = contents
    if images is not None:
        texts = (one for image in images for one in inventory.sharing.reached(image.root))
        found = [one for one in map(Digest.parse, dict.fromkeys(texts)) if one in contents]
    return [digest for digest in found if subset is None or subset.has_content(digest)]


async def _hash(
    store: Store,
    inventory: Inventory,
    digests: Sequence[Digest],
    report: VerifyReport,
    on_progress: OnProgress,
) -> dict[DigestText, Scrubbed]:
    """Hash content. Returns the results of that which is damaged or cannot be read."""
    broken: dict[DigestText, Scrubbed] = {}
    verified: list[tuple[Digest, float]] = []
    total = sum(inventory.contents[digest].size for digest in digests)
    async with aclosing(scrub_each(store.layout, digests)) as results:
        async for result in results:
            digest = Digest.parse(result.digest)
            report.contents += result.result != "missing"
            report.bytes += result.size
            if result.result == "intact":
                verified.append((digest, store.now()))
            elif result.result != "missing":
                broken[result.digest] = result
                if result.is_moved:
                    store.count_quarantined(result.size)
            if len(verified) >= _RECORD_STEP:
                await _record(store, verified, report)
                verified = []
            on_progress(report.bytes, max(total, report.bytes))
    await _record(store, verified, report)
    return broken


async def _record(store: Store, verified: list[tuple[Digest, float]], report: VerifyReport) -> None:
    """Record verification times. A busy index is none of the disk's failures."""
    if not await store.index.set_verified(verified) and store.index.refusal is not None:
        report.index_failure = (
            f"{store.layout.index}: {store.index.refusal}: free space on the disk, or make it"
            " writable, so that these contents are not hashed again"
        )


def _places(
    layout: Layout, broken: Mapping[DigestText, Scrubbed], hosted: Collection[DigestText]
) -> dict[DigestText, str]:
    """Return, in words, where broken content is now. Blocks."""
    places = {}
    for text, scrubbed in broken.items():
        digest = Digest.parse(text)
        if layout.quarantine(digest).exists():
            places[text] = _IN_QUARANTINE
        elif scrubbed.result == "unreadable" and text in hosted:
            places[text] = "stays in its place, because the error may pass"
        elif scrubbed.is_moved:
            places[text] = "was removed: quarantine/ cannot be written"
        else:
            places[text] = "the disk refuses to move it: it is never served"
    return places


def _damage(
    inventory: Inventory,
    found: Mapping[DigestText, ScrubResult],
    places: Mapping[DigestText, str],
    failures: Mapping[DigestText, str],
) -> Iterator[Problem]:
    """Return a finding for each content, by the images that have it: those with a tag first."""
    names: dict[DigestText, list[str]] = {}
    images = (*inventory.images, *inventory.absent) if found else ()
    cached: set[DigestText] = set()
    # Those of an upstream come first: it has their content.
    for image in sorted(images, key=lambda one: (one.is_hosted, one.is_referrer, one.tag is None)):
        for digest in found.keys() & set(inventory.sharing.reached(image.root)):
            names.setdefault(digest, []).append(image.name)
            if not image.is_hosted:
                cached.add(digest)
    roots = {image.root for image in images}
    for digest, result in found.items():
        is_hosted = digest in inventory.hosted and digest not in cached
        of = list(dict.fromkeys(names.get(digest, [])))
        kind = inventory.type_of(digest)
        kind = ContentType.MANIFEST if kind is ContentType.OTHER and digest in roots else kind
        words = "cannot be read" if result == "unreadable" else "does not hash to its digest"
        more = f" and {len(of) - _MAX_NAMES} more" if len(of) > _MAX_NAMES else ""
        where = f"of {', '.join(of[:_MAX_NAMES])}{more}" if of else "of no image"
        content = inventory.contents.get(Digest.parse(digest))
        place = places.get(digest, _IN_QUARANTINE)
        yield Problem(
            problem="unreadable" if result == "unreadable" else "damaged",
            image=of[0] if of else None,
            digest=digest,
            bytes=content.size if content is not None else 0,
            what=f"{_CONTENT_WORDS[kind]} {where} {words}, and {place}"
            f"{_NOTHING_RESTORES if is_hosted else ''}",
            command=_command(of[0]) if of and not is_hosted else None,
            is_hosted=is_hosted,
            failure=failures.get(digest, ""),
        )


def _incomplete(images: Collection[Image], broken: Collection[DigestText]) -> Iterator[Problem]:
    for image in images:
        missing = [part for part in image.missing if part.text not in broken]
        if missing:
            yield Problem(
                problem="incomplete",
                image=image.name,
                digest=image.root,
                bytes=sum(part.size for part in missing),
                what=f"lacks {len(missing)} of its contents, such as {missing[0].text}"
                f"{_NOTHING_RESTORES if image.is_hosted else ''}",
                command=None if image.is_hosted else _command(image.name),
                is_hosted=image.is_hosted,
            )


def _absent(images: Iterable[Image]) -> Iterator[Problem]:
    """Return a finding for each name without a manifest, but for those that are quarantined."""
    for image in images:
        assert image.absence is not None
        if image.absence is not Absence.DAMAGED:
            yield Problem(
                problem="lost" if image.is_lost else "absent",
                image=image.name,
                digest=image.root,
                bytes=0,
                what=f"its manifest is not in the cache: {image.absence.value}",
                command=_command(image.name) if image.is_lost else f"oci-mirror warm {image.name}",
            )


def _lost_hosted(layout: Layout, inventory: Inventory) -> list[Problem]:
    """Return a finding for each hosted content that is gone, and that no image reaches. Blocks."""
    gone = inventory.hosted.difference(
        inventory.present, inventory.quarantined, inventory.sharing.owners
    )
    return [
        Problem(
            problem="lost",
            image=None,
            digest=text,
            bytes=0,
            what=f"hosted content of no image is not on the disk{_NOTHING_RESTORES}",
            command=None,
            is_hosted=True,
        )
        for text in sorted(gone)
        # It may have been pushed after the directories were listed.
        if not disk.has_whole(layout, Digest.parse(text))
    ]


def _command(name: str) -> str:
    return f"oci-mirror verify --repair {name}"


# --- repair ---------------------------------------------------------------------------------------


async def repair(
    report: VerifyReport, inventory: Inventory, read_inventory: ReadInventory, fetch: Refetch
) -> None:
    """Fetch what a verification has found broken. Updates the findings of ``report``.

    Content is fetched as for a client, so the upstream must have it. An index is fetched before its
    manifests, and those before their layers.

    Args:
        report: The result of :func:`verify`.
        inventory: The content at that time.
        read_inventory: Reads it again: fetched manifests refer to further content.
        fetch: Fetches one content, until it is on the disk.
    """
    due = {one.digest for one in report.problems if one.command and one.problem != "absent"}
    failed: set[tuple[Repository, Digest]] = set()
    lost = [image for image in inventory.absent if image.is_lost]
    cached = (image for image in (*lost, *inventory.images) if not image.is_hosted)
    images = [one for one in cached if _is_due(inventory, one, due)]
    wanted = _broken_contents(inventory, images, due)
    names = {(image.name, image.root) for image in images}
    for _ in range(_MAX_REPAIR_ROUNDS):
        for repository, digest, kind in wanted:
            why = await fetch(repository, digest, kind)
            if why is not None:
                failed.add((repository, digest))
                report.errors.append(f"{repository}@{digest}: {why}")
        latest = await read_inventory()
        again = [image for image in latest.images if (image.name, image.root) in names]
        wanted = [
            (image.repository, part.digest, _kind(part.type in MANIFEST_PART_TYPES))
            for image in again
            for part in image.missing
            if (image.repository, part.digest) not in failed
        ]
        wanted = list(dict.fromkeys(wanted))
        if not wanted:
            break
    incomplete = {image.name for image in again if image.missing}
    report.problems = [
        replace(problem, is_repaired=_is_repaired(problem, latest, incomplete))
        for problem in report.problems
    ]


def _is_due(inventory: Inventory, image: Image, due: Set[DigestText]) -> bool:
    return not due.isdisjoint(inventory.sharing.reached(image.root))


def _broken_contents(
    inventory: Inventory, images: Collection[Image], due: Set[DigestText]
) -> list[tuple[Repository, Digest, Kind]]:
    """Return the content that was damaged, through one repository each, manifests first."""
    found: dict[DigestText, tuple[Repository, Digest, Kind]] = {}
    for image in images:
        reached = inventory.sharing.reached(image.root)
        listed = {image.root}  # A damaged manifest is known as such by the index that lists it.
        for manifest in filter(None, map(inventory.manifests.get, reached)):
            columns = zip(manifest.columns.digests, manifest.columns.types, strict=True)
            listed.update(text for text, kind in columns if kind in MANIFEST_PART_TYPES)
        for text in reached:
            is_manifest = text in inventory.manifests or text in listed
            if text in due and text not in found:
                found[text] = (image.repository, Digest.parse(text), _kind(is_manifest))
    return sorted(found.values(), key=lambda one: one[2] is not Kind.MANIFEST)


def _kind(is_manifest: bool) -> Kind:
    return Kind.MANIFEST if is_manifest else Kind.BLOB


def _is_repaired(problem: Problem, latest: Inventory, incomplete: Collection[str]) -> bool:
    if problem.problem == "incomplete":
        return problem.image not in incomplete
    if problem.problem == "absent":
        return False
    is_nothing_due = problem.command is None and not problem.is_hosted
    return is_nothing_due or problem.digest in latest.present
