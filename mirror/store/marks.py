"""The marks of an operator: pins, freezes, blocks, and leases of what nodes use.

Lives here: the marks as values, reading and changing them, and which content they protect from
removal. Must not know: the form of the file (:mod:`mirror.store.marks_file`), the index, clients.

Marks are no cache: a lost index does not touch them, and a damaged file is never replaced. Each
change is written to the disk before :func:`change_marks` returns. It holds the exclusive lock of
``marks.lock``. An eviction holds the shared lock while it removes a few contents, and compares the
marks before (:mod:`mirror.store.protection`). So no eviction removes what a mark protects once the
command that has set the mark has ended.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Final, TypeAlias

from mirror.oci.errors import StorageUnavailable
from mirror.oci.reference import Digest
from mirror.store import disk
from mirror.store.layout import Layout
from mirror.store.marks_file import Entry, dump_entries, load_entries
from mirror.store.records import MALFORMED
from mirror.store.spare_file import NotDurable, replace_durably

CHANGE_TIMEOUT_S: Final = 30.0
"""Seconds that a change waits for another one. Each takes less than a second, even of 50,000
leases, so a longer wait means that a process was stopped."""
_LOCK_INTERVAL_S: Final = 0.002
"""Seconds between two attempts to lock. An eviction pauses as often as it removes content."""
_LINE_LEASES: Final = 100
"""Leases of one entry of the file: it is parsed in 0.2 ms."""
_UNCHANGED: Final = "are as they were"

Stamp: TypeAlias = tuple[int, ...]
"""Differs after each write of the file."""


# --- the marks ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pin:
    """An image that is never evicted."""

    name: str
    """The whole name of the image, ``host/path:tag`` or ``host/path@digest``."""
    digest: Digest
    """Its digest when it was pinned. The digest that its tag has later is protected, too."""
    since: float
    """Seconds since the epoch."""
    absent: tuple[Digest, ...] = ()
    """``digest`` if it was not on the disk when it was pinned. That it is missing is no loss."""

    @property
    def digests(self) -> tuple[Digest, ...]:
        """The one digest that it names."""
        return (self.digest,)


@dataclass(frozen=True, slots=True)
class Freeze:
    """A tag that is served as one digest, and not asked for."""

    name: str
    """The whole name, ``host/path:tag``."""
    digest: Digest
    since: float
    """Seconds since the epoch."""
    variants: tuple[Digest, ...] = ()
    """Manifests for clients that do not accept the type of ``digest``: a registry sends old clients
    another one. The first one that a client accepts is served."""
    absent: tuple[Digest, ...] = ()
    """Manifests among ``digests`` that were not on the disk when the tag was frozen."""

    @property
    def digests(self) -> tuple[Digest, ...]:
        """All digests as which the tag is served, that for most clients first."""
        return self.digest, *self.variants


@dataclass(frozen=True, slots=True)
class Block:
    """Images that are refused."""

    target: str
    """The whole name of an image or a repository, a pattern of repositories, or a digest."""
    reason: str
    """Clients are told it."""
    since: float
    """Seconds since the epoch."""
    digests: frozenset[Digest] = frozenset()
    """Manifests that are refused in every repository: those of the image when it was blocked."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Content that a node uses. It is not evicted while the lease lasts."""

    digest: Digest
    until: float
    """Seconds since the epoch."""
    source: str
    """Name of the list of used content. A newer list of this name replaces it."""


@dataclass(frozen=True)
class Marks:
    """All marks of a data directory."""

    pins: Mapping[str, Pin] = field(default_factory=dict)
    """By name."""
    freezes: Mapping[str, Freeze] = field(default_factory=dict)
    """By name."""
    blocks: Mapping[str, Block] = field(default_factory=dict)
    """By target."""
    leases: Mapping[Digest, Lease] = field(default_factory=dict)
    """By digest: of each, the lease that lasts longest."""
    shorter_leases: tuple[Lease, ...] = ()
    """Leases of digests that another source has leased for longer. They count once that source no
    longer lists the digest."""

    def all_kept(self) -> Iterator[Pin | Freeze]:
        """Return the freezes and the pins: they keep images, until an operator takes them away."""
        yield from self.freezes.values()
        yield from self.pins.values()

    def all_leases(self) -> Iterator[Lease]:
        """Return the leases of all sources."""
        yield from self.leases.values()
        yield from self.shorter_leases


class MarksDamaged(StorageUnavailable):
    """``marks.json`` exists, and cannot be understood. Nothing may be removed then."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"marks.json is damaged ({why}): restore it from a backup, or delete it, after which "
            "nothing is pinned, frozen, blocked or leased"
        )


def protected_roots(marks: Marks, now: float) -> set[Digest]:
    """Return the digests that pins, freezes and leases name: they and all their parts stay.

    ``now``: seconds since the epoch. A lease that has ended protects nothing.
    """
    roots = {pin.digest for pin in marks.pins.values()}
    roots.update(*(freeze.digests for freeze in marks.freezes.values()))
    roots |= {lease.digest for lease in marks.leases.values() if lease.until > now}
    return roots


def kept_manifests(marks: Marks) -> dict[str, set[Digest]]:
    """Return the digests that pins and freezes name, by the whole name of the repository."""
    found: dict[str, set[Digest]] = {}
    for mark in marks.all_kept():
        found.setdefault(repository_part(mark.name), set()).update(mark.digests)
    return found


def expected_manifests(marks: Marks) -> set[Digest]:
    """Return the manifests that were on the disk when they were pinned or frozen.

    If one of them is missing, it is lost. One that was evicted before it was marked is not.
    """
    kept = marks.all_kept()
    return {one for mark in kept for one in mark.digests if one not in mark.absent}


def repository_part(name: str) -> str:
    """Return the repository of the whole name of an image, ``host/path:tag`` or ``…@digest``."""
    repository, separator, _ = name.partition("@")
    return repository if separator else name.rpartition(":")[0]


def with_leases(marks: Marks, leases: Iterable[Lease]) -> Marks:
    """Return marks with these leases, of all sources, in place of those that they have."""
    longest: dict[Digest, Lease] = {}
    shorter: list[Lease] = []
    for lease in leases:
        other = longest.setdefault(lease.digest, lease)
        if other is not lease:
            shorter.append(min(other, lease, key=lambda one: one.until))
            longest[lease.digest] = max(other, lease, key=lambda one: one.until)
    return replace(marks, leases=longest, shorter_leases=tuple(shorter))


def replace_leases(
    marks: Marks, source: str, digests: Collection[Digest], until: float, now: float
) -> Marks:
    """Return marks with new leases of one source, and without all leases that have ended.

    Args:
        marks: The marks to change.
        source: Where the list came from. Its earlier leases end now.
        digests: What nodes use. Empty: the source has no lease any more.
        until: When the leases end, in seconds since the epoch.
        now: Seconds since the epoch.
    """
    others = (one for one in marks.all_leases() if one.source != source and one.until > now)
    own = (Lease(digest, until, source) for digest in sorted(digests))
    return with_leases(marks, (*others, *own))


# --- reading --------------------------------------------------------------------------------------


def stamp_of_marks(layout: Layout) -> Stamp | None:
    """Return a value that differs after each change of the marks. None if there is no file.

    Raises ``OSError`` if the disk does not say whether there is one.
    """
    try:
        status = layout.marks.lstat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_marks(layout: Layout) -> Marks:
    """Read the marks. There are none if the file is missing. Blocks: 50,000 leases take 0.1 s.

    Raises:
        OSError: The file cannot be read.
        MarksDamaged: It cannot be understood.
    """
    try:
        fd = os.open(layout.marks, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return Marks()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise MarksDamaged("it is a link") from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise MarksDamaged("it is no regular file")
    with os.fdopen(fd, encoding="utf-8") as file:
        try:
            return _load(load_entries(file))
        except ValueError as error:
            raise MarksDamaged(str(error)) from None


# --- the entries of the file ----------------------------------------------------------------------


def _entries(marks: Marks) -> Iterator[Entry]:
    for pin in marks.pins.values():
        yield {"pin": pin.name, "digest": str(pin.digest), "since": pin.since} | _absent_of(pin)
    for freeze in marks.freezes.values():
        variants = {"variants": list(map(str, freeze.variants))} if freeze.variants else {}
        entry = {"freeze": freeze.name, "digest": str(freeze.digest), "since": freeze.since}
        yield entry | variants | _absent_of(freeze)
    for block in marks.blocks.values():
        digests = [str(digest) for digest in sorted(block.digests)]
        yield {
            "block": block.target,
            "reason": block.reason,
            "since": block.since,
            "digests": digests,
        }
    for (source, until), leases in groupby(marks.all_leases(), lambda one: (one.source, one.until)):
        digests = [str(lease.digest) for lease in leases]
        for start in range(0, len(digests), _LINE_LEASES):
            some = digests[start : start + _LINE_LEASES]
            yield {"leases": source, "until": until, "digests": some}


def _absent_of(mark: Pin | Freeze) -> Entry:
    return {"absent": list(map(str, mark.absent))} if mark.absent else {}


def _load(entries: Iterable[Entry]) -> Marks:
    """Return the marks of a file. Raises ``ValueError`` for an entry that is not understood.

    Nothing is passed over: the entry could be a block.
    """
    pins: dict[str, Pin] = {}
    freezes: dict[str, Freeze] = {}
    blocks: dict[str, Block] = {}
    leases: list[Lease] = []
    for number, entry in enumerate(entries, start=1):
        try:
            match entry:
                case {"pin": name, **rest}:
                    since, absent = _time(rest["since"]), _digests(rest, "absent")
                    pins[_text(name)] = Pin(name, _digest(rest), since, absent)
                case {"freeze": name, **rest}:
                    variants, absent = _digests(rest, "variants"), _digests(rest, "absent")
                    since = _time(rest["since"])
                    freezes[_text(name)] = Freeze(
                        name, _digest(rest), since, variants=variants, absent=absent
                    )
                case {"block": target, **rest}:
                    digests = frozenset(map(Digest.parse, rest["digests"]))
                    reason, since = str(rest["reason"]), _time(rest["since"])
                    blocks[_text(target)] = Block(target, reason, since, digests)
                case {"leases": source, **rest}:
                    until = _time(rest["until"])
                    leases += [Lease(Digest.parse(one), until, source) for one in rest["digests"]]
                    _text(source)
                case _:
                    raise ValueError
        except MALFORMED:
            raise ValueError(f"mark {number} is not understood") from None
    return with_leases(Marks(pins=pins, freezes=freezes, blocks=blocks), leases)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _digest(fields: Entry) -> Digest:
    return Digest.parse(fields["digest"])


def _digests(fields: Entry, name: str) -> tuple[Digest, ...]:
    return tuple(map(Digest.parse, fields.get(name, ())))


def _time(value: Any) -> float:
    # Not isinstance: JSON's ``true`` is an int in Python.
    if type(value) not in (int, float) or math.isnan(value):
        raise ValueError
    return float(value)


# --- changing -------------------------------------------------------------------------------------


def change_marks(layout: Layout, change: Callable[[Marks], Marks]) -> Marks:
    """Change the marks durably. Waits for other changes, and for the current step of an eviction.

    Args:
        layout: The data directory. It is created if it is missing.
        change: Returns the new marks, from those on the disk. Its exceptions are passed on, and
            nothing has changed then.

    Returns:
        The new marks, which are on the disk.

    Raises:
        TimeoutError: Another process holds the lock for :data:`CHANGE_TIMEOUT_S`.
        OSError: The disk refuses. The text says whether the marks have changed.
        MarksDamaged: The file cannot be understood, so it is not replaced.
    """
    layout.root.mkdir(parents=True, exist_ok=True)
    fd = os.open(layout.marks_lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with suppress(PermissionError):  # Another user has created it, for all to read.
            os.fchmod(fd, 0o644)
        _wait_for_lock(fd)
        earlier = read_marks(layout)
        marks = change(earlier)
        if marks != earlier:
            _write(layout, marks)
        return marks
    finally:
        os.close(fd)


def _wait_for_lock(fd: int) -> None:
    deadline = time.monotonic() + CHANGE_TIMEOUT_S
    while not disk.try_lock(fd):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"another process has held marks.lock for {CHANGE_TIMEOUT_S:.0f} s: end it, and "
                "try again"
            )
        time.sleep(_LOCK_INTERVAL_S)


def _write(layout: Layout, marks: Marks) -> None:
    try:
        replace_durably(layout.marks, "".join(dump_entries(_entries(marks))).encode())
    except OSError as error:
        is_changed = isinstance(error, NotDurable)
        consequence = "have changed, but a power cut may undo that" if is_changed else _UNCHANGED
        message = f"{error.strerror}: the marks {consequence}"
        raise OSError(error.errno, message, str(layout.marks)) from None


@contextmanager
def marks_held(layout: Layout) -> Iterator[None]:
    """Let no command change the marks while the block runs. For a few milliseconds at a time.

    Blocks until a running change has ended. The block also runs if the lock file cannot be created:
    no command can change the marks on such a disk.

    Raises ``OSError`` if there are too few descriptors.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(layout.marks_lock, flags | os.O_CREAT, 0o644)
    except OSError as error:
        if disk.reason_of(error) == "descriptors":
            raise
        yield
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)
