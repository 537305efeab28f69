"""Verify content: its hashes, and the completeness of images. Fetch again what is broken.

Lives here: which content is hashed, what the results mean for images, and the remedies. Must not
know: how content is hashed (:mod:`mirror.store.scrub`) or fetched (:mod:`mirror.pull`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence, Set
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self, TypeAlias

from mirror.inventory.model import MANIFEST_PART_TYPES, DigestText, Image, Inventory
from mirror.observability.events import Kind
from mirror.oci.reference import Digest, Repository
from mirror.operations.scrubbing import scrub_each
from mirror.store.store import Store

_RECORD_STEP: Final = 1000
"""Verification times that are written to the index at once."""
_MAX_NAMES: Final = 3
"""Names of images in one finding."""
_NOTHING_RESTORES: Final = (
    "; no upstream has hosted content: push the image again, or restore it from a backup"
)
_MAX_REPAIR_ROUNDS: Final = 5
"""Rounds of a repair: an index, its manifests, their layers, and one more after a new damage."""

ProblemKind: TypeAlias = Literal["damaged", "unreadable", "incomplete"]
"""- ``damaged``: content does not hash to its digest.
- ``unreadable``: the disk cannot read content.
- ``incomplete``: an image lacks content."""


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
    """A finding, and the command that mends it."""

    problem: ProblemKind
    image: str | None
    """The first image that it is about. None: no image has the content."""
    digest: str
    """The content. Of an incomplete image: its manifest."""
    bytes: int
    """Bytes of the content, or of what lacks."""
    what: str
    """The problem in words, for people."""
    command: str | None
    """Mends it. None: nothing has to be mended, or no command can."""
    is_mended: bool = False
    is_hosted: bool = False
    """Whether a hosted repository has it, and nothing else: no command brings it back."""

    def row(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {
            "problem": self.problem,
            "image": self.image,
            "digest": self.digest,
            "bytes": self.bytes,
            "what": self.what,
            "command": self.command,
            "is_mended": self.is_mended,
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

    @property
    def has_damage(self) -> bool:
        """Whether damage was found that no repair has mended."""
        return any(
            (p.problem != "incomplete" or p.is_hosted) and not p.is_mended for p in self.problems
        )


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
        images: Only these images and their content. None: all content.
        subset: Only the content of this part is hashed. None: all.
        on_progress: Called after each content.

    Raises:
        StorageUnavailable: No process can be started for it.
    """
    report = VerifyReport()
    chosen = inventory.images if images is None else images
    digests = _digests(inventory, images, subset)
    damaged = await _hash(store, inventory, digests, report, on_progress)
    report.images = len(chosen)
    report.problems += _damage(inventory, damaged)
    report.problems += _incomplete(chosen, damaged)
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
) -> dict[DigestText, ProblemKind]:
    """Hash content. Returns that which is broken."""
    broken: dict[DigestText, ProblemKind] = {}
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
                broken[result.digest] = result.result
                if result.is_moved:
                    store.count_quarantined(result.size)
            if len(verified) >= _RECORD_STEP:
                await store.index.set_verified(verified)
                verified = []
            on_progress(report.bytes, max(total, report.bytes))
    await store.index.set_verified(verified)
    return broken


def _damage(inventory: Inventory, broken: dict[DigestText, ProblemKind]) -> Iterator[Problem]:
    names: dict[DigestText, list[str]] = {}
    cached: set[DigestText] = set()
    # Cached images come first: an upstream has their content.
    for image in sorted(inventory.images, key=lambda one: one.is_hosted) if broken else ():
        for digest in broken.keys() & set(inventory.sharing.reached(image.root)):
            names.setdefault(digest, []).append(image.name)
            if not image.is_hosted:
                cached.add(digest)
    for digest, problem in broken.items():
        of = names.get(digest, [])
        is_hosted = digest in inventory.hosted and digest not in cached
        is_manifest = (
            digest in inventory.names_by_root or inventory.type_of(digest) in MANIFEST_PART_TYPES
        )
        words = "does not hash to its digest" if problem == "damaged" else "cannot be read"
        more = f" and {len(of) - _MAX_NAMES} more" if len(of) > _MAX_NAMES else ""
        where = f"part of {', '.join(of[:_MAX_NAMES])}{more}" if of else "part of no image"
        yield Problem(
            problem=problem,
            image=of[0] if of else None,
            digest=digest,
            bytes=inventory.contents[Digest.parse(digest)].size,
            what=f"{inventory.type_of(digest)} {words}: it is in quarantine/, {where}"
            f"{_NOTHING_RESTORES if is_hosted else ''}",
            command=_command(of[0], is_manifest=is_manifest) if of and not is_hosted else None,
            is_hosted=is_hosted,
        )


def _incomplete(images: Collection[Image], broken: Collection[DigestText]) -> Iterator[Problem]:
    for image in images:
        missing = [part for part in image.missing if part.text not in broken]
        if missing:
            yield Problem(
                problem="incomplete",
                image=image.name,
                digest=str(image.digest),
                bytes=sum(part.size for part in missing),
                what=f"lacks {len(missing)} of its contents, such as {missing[0].text}"
                f"{_NOTHING_RESTORES if image.is_hosted else ''}",
                command=None if image.is_hosted else _command(image.name, is_manifest=False),
                is_hosted=image.is_hosted,
            )


def _command(name: str, *, is_manifest: bool) -> str:
    # A manifest is in quarantine/ now. So verify does not know what the image has.
    return f"oci-mirror warm {name}" if is_manifest else f"oci-mirror verify --repair {name}"


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
    due = {problem.digest for problem in report.problems if problem.command}
    failed: set[tuple[Repository, Digest]] = set()
    cached = (image for image in inventory.images if not image.is_hosted)
    images = [image for image in cached if _is_due(inventory, image, due)]
    wanted = _broken_contents(inventory, images, due)
    names = {(image.name, image.digest) for image in images}
    for _ in range(_MAX_REPAIR_ROUNDS):
        for repository, digest, kind in wanted:
            why = await fetch(repository, digest, kind)
            if why is not None:
                failed.add((repository, digest))
                report.errors.append(f"{repository}@{digest}: {why}")
        latest = await read_inventory()
        again = [image for image in latest.images if (image.name, image.digest) in names]
        wanted = [
            (image.repository, part.digest, _kind(part.type in MANIFEST_PART_TYPES))
            for image in again
            for part in image.missing
            if (image.repository, part.digest) not in failed
        ]
        wanted = list(dict.fromkeys(wanted))
        if not wanted:
            break
    incomplete = {image.name for image in latest.images if image.missing}
    report.problems = [
        replace(problem, is_mended=_is_mended(problem, latest, incomplete))
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
        for text in inventory.sharing.reached(image.root):
            is_manifest = text in inventory.manifests or text == image.root
            if text in due and text not in found:
                found[text] = (image.repository, Digest.parse(text), _kind(is_manifest))
    return sorted(found.values(), key=lambda one: one[2] is not Kind.MANIFEST)


def _kind(is_manifest: bool) -> Kind:
    return Kind.MANIFEST if is_manifest else Kind.BLOB


def _is_mended(problem: Problem, latest: Inventory, incomplete: Collection[str]) -> bool:
    if problem.problem == "incomplete":
        return problem.image not in incomplete
    is_nothing_due = problem.command is None and not problem.is_hosted
    return is_nothing_due or problem.digest in latest.present
