"""The checks of this machine: configuration, data directory, index, marks, port and clock.

Lives here: one function for each check, which returns findings and raises nothing for what it
checks. Must not know: upstreams, printing.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from mirror.cli.doctor.findings import Checked, Finding
from mirror.cli.health import WILDCARD_ADDRESSES, own_url
from mirror.cli.own_server import OwnServer, failure_text
from mirror.config.settings import Settings, Storage
from mirror.config.values import is_loopback_only, split_host
from mirror.oci.errors import MirrorError
from mirror.oci.text import count_text, size_text, time_text
from mirror.store.layout import Layout
from mirror.store.marks import Marks
from mirror.store.protection import find_holding
from mirror.store.quarantine import quarantined_files
from mirror.store.sqlite_connection import connect

_MOUNTS: Final = Path("/proc/self/mountinfo")
# proc_pid_mountinfo(5): "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw"
_MOUNT: Final = re.compile(r"\S+ \S+ \S+ \S+ (?P<path>\S+) \S+ .*?- (?P<type>\S+) ")
_OCTAL: Final = re.compile(r"\\([0-7]{3})")
_NETWORK_FILE_SYSTEMS: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs"})
"""File systems whose ``flock`` may not reach other machines, and that can hang."""
_LITTLE_SPACE_SHARE: Final = 0.05
"""Share of free space, or of free inodes, below which a warning is given."""
_QUICK_CHECK_S: Final = 5.0
"""Seconds for which a database is read: one of 100,000 rows takes less than one."""
_PROGRESS_STEP: Final = 10_000
"""Instructions of SQLite's virtual machine between two looks at the time."""
_CLOCK_WARNING_S: Final = 30.0
"""Seconds. ``Date`` has whole seconds, and a response takes a while."""
_CLOCK_PROBLEM_S: Final = 300.0
"""Seconds. Token services and certificates usually accept a difference of a few minutes."""


# --- the data directory ---------------------------------------------------------------------------


def check_data_directory(settings: Settings) -> Iterator[Finding]:
    """Check that content can be stored: directory, owner, file system, space, inodes."""
    root = Path(settings.data_dir)
    subject = Checked("data directory", str(root))
    if not os.path.lexists(root):
        yield subject.warning(
            "it does not exist yet",
            "start the server, which creates it; if it had content before, mount its volume",
        )
        return
    if not root.is_dir():
        yield subject.problem("it is not a directory", "set data_dir to a directory")
        return
    refusal = _write_refusal(root)
    if refusal is not None:
        yield subject.problem(
            f"user {os.getuid()} cannot write to it: {refusal}",
            "run this command as the user of the server; for that user, make the directory "
            f"writable (chown -R USER {root}) and its mount, too",
        )
    else:
        yield subject.ok("it exists and is writable")
    yield from _check_owners(root)
    yield _check_file_system(root)
    yield _check_space(root, settings.storage)
    yield _check_inodes(root)


def _write_refusal(root: Path) -> str | None:
    """Return why no file can be created. None: one can be."""
    try:
        with tempfile.TemporaryFile(dir=root):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _check_owners(root: Path) -> Iterator[Finding]:
    """Find files that a command has created as another user than the server."""
    names: dict[int, list[str]] = {}
    for path in (*root.glob("*"), *root.glob("index/*"), *root.glob("history/*")):
        if path.name != "lost+found":
            names.setdefault(path.lstat().st_uid, []).append(str(path.relative_to(root)))
    if len(names) > 1:
        uid = min(names, key=lambda one: len(names[one]))
        yield Checked("owner", str(root)).warning(
            f"{', '.join(sorted(names[uid])[:3])} belong to user {uid}, and other files do not",
            f"stop the server, chown -R USER {root}, and run commands as the user of the server",
        )


def _check_file_system(root: Path) -> Finding:
    subject = Checked("file system", str(root))
    kind = file_system_of(root.resolve(), _read_mounts())
    if kind in _NETWORK_FILE_SYSTEMS:
        return subject.warning(
            f"{kind}: a network file system can hang, and may not share file locks",
            "use a local disk, and let only one machine use the directory",
        )
    if kind == "tmpfs":
        return subject.warning(
            "tmpfs: content takes memory, and is lost at a restart", "use a disk or a volume"
        )
    if kind == "overlay":
        return subject.warning(
            "overlay: content is in the container, and is lost together with it",
            "mount a volume at data_dir",
        )
    return subject.ok(kind or "not known")


def _read_mounts() -> str:
    try:
        return _MOUNTS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def file_system_of(path: Path, mounts: str) -> str:
    """Return the type of the file system of ``path``. Empty if it is not known.

    ``path``: without symbolic links. ``mounts``: the text of ``/proc/self/mountinfo``.
    """
    best, kind = "", ""
    for line in mounts.splitlines():
        found = _MOUNT.match(line)
        if found is None:
            continue
        mount = _OCTAL.sub(lambda octal: chr(int(octal[1], 8)), found["path"])
        if len(mount) >= len(best) and path.is_relative_to(mount):
            best, kind = mount, found["type"]
    return kind


def _check_space(root: Path, storage: Storage) -> Finding:
    subject = Checked("disk space", str(root))
    status = os.statvfs(root)
    free, size = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    quota = storage.max_size
    text = f"{size_text(free)} of {size_text(size)} free, storage.max_size {size_text(quota)}"
    if free < size * 0.01:
        return subject.problem(
            f"{text}: the disk is full, so content is served but not stored",
            "find what fills it: oci-mirror du, and other programs on the same disk; "
            "then oci-mirror prune, or a smaller storage.max_size",
        )
    if quota > size:
        return subject.warning(
            f"{text}: the quota is larger than the disk",
            f"set storage.max_size to at most 90 % of the disk ({size_text(int(size * 0.9))})",
        )
    if free < size * _LITTLE_SPACE_SHARE:
        return subject.warning(
            f"{text}: less than 5 % are free",
            "the mirror evicts content when the disk is full; a smaller storage.max_size "
            "leaves room for other programs",
        )
    return subject.ok(text)


def _check_inodes(root: Path) -> Finding:
    subject = Checked("inodes", str(root))
    status = os.statvfs(root)
    if status.f_files == 0:
        return subject.ok("the file system has no limit")
    share = status.f_favail / status.f_files
    text = f"{status.f_favail} of {status.f_files} free"
    if share < 0.01:
        return subject.problem(
            f"{text}: no file can be created soon", "remove small files, or use a larger disk"
        )
    if share < _LITTLE_SPACE_SHARE:
        return subject.warning(f"{text}: less than 5 %", "remove small files, or use a larger disk")
    return subject.ok(text)


# --- the index and the marks ----------------------------------------------------------------------


def check_index(root: Path, clock: Callable[[], float] = time.monotonic) -> Iterator[Finding]:
    """Check that the databases of the index open, and are not damaged.

    ``root``: the data directory. ``clock``: returns seconds.
    """
    index = root / "index"
    subject = Checked("index", str(index))
    aside = root / "index.damaged"
    if os.path.lexists(aside):
        yield Checked("index", str(aside)).warning(
            "an index was damaged, and the server has made a new one from index.json",
            f"check the disk (dmesg, smartctl); then delete {aside}",
        )
    if not index.is_dir():
        yield subject.ok("there is none yet")
        return
    databases = sorted(index.rglob("*.db"))
    for database in databases:
        damage = damage_of(database, clock)
        if damage is not None:
            yield Checked("index", str(database)).problem(
                f"it cannot be used: {damage}",
                f"stop the server, delete {index} and start it again: names come back from "
                "index.json, and no content is lost",
            )
            return
    yield subject.ok(f"{len(databases)} databases open, and are not damaged")


def damage_of(database: Path, clock: Callable[[], float]) -> str | None:
    """Return what is wrong with an SQLite database. None: nothing was found in time.

    Args:
        database: Its file.
        clock: Returns seconds.
    """
    deadline = clock() + _QUICK_CHECK_S
    try:
        with closing(connect(database, "ro")) as connection:
            connection.set_progress_handler(lambda: int(clock() > deadline), _PROGRESS_STEP)
            (result,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        is_late = error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT
        return None if is_late else str(error)
    except sqlite3.Error as error:
        return str(error)
    # "*** in database main ***" is a heading, in a line before what was found.
    found = [line for line in str(result).splitlines() if not line.startswith("***")]
    return None if result == "ok" else ", ".join(found)


def check_marks(path: Path, read: Callable[[], Marks]) -> Finding:
    """Check that pins, freezes, blocks and leases can be read. ``read`` raises if they cannot.

    Also names the images for whose damaged or missing manifest a whole repository stays.
    """
    subject = Checked("marks", str(path))
    try:
        marks = read()
        holding = find_holding(Layout(path.parent), marks)
    except (OSError, MirrorError) as error:
        reason = error.message if isinstance(error, MirrorError) else str(error.strerror or error)
        return subject.problem(
            f"{reason}: nothing is evicted or removed until this is repaired",
            f"make {path} readable for the server, restore it from a backup, or delete it and "
            "pin, freeze and block again",
        )
    if holding:
        return subject.problem(
            f"the manifest of {', '.join(holding[:3])} is damaged or missing, so nothing of its "
            "repository is evicted or removed",
            f"fetch it: oci-mirror verify --repair {holding[0]}; or take its mark away",
        )
    return subject.ok("readable" if path.exists() else "there are none")


def check_quarantine(layout: Layout) -> Iterator[Finding]:
    """Yield a warning if content was found damaged on the disk. Blocks."""
    files = quarantined_files(layout)
    if not files:
        return
    newest, status = max(files, key=lambda pair: pair[1].st_ctime)
    size = size_text(sum(one.st_size for _, one in files))
    yield Checked("quarantine", str(layout.root / "quarantine")).warning(
        f"{count_text(len(files), 'content')} ({size}) had wrong bytes on the disk, the latest at "
        f"{time_text(status.st_ctime)}: {newest.parent.name}:{newest.name[:12]}",
        "look for errors of the disk (dmesg, smartctl), and run oci-mirror verify; oci-mirror gc "
        "removes the damaged files, but for those of hosted images: push these again",
    )


# --- the port and the clock -----------------------------------------------------------------------


def check_port(settings: Settings) -> Finding:
    """Check whether the server listens, or could listen."""
    subject = Checked("port", settings.listen)
    url = own_url(settings.listen, has_tls=settings.tls is not None)
    server = OwnServer(url.removesuffix("/healthz"))
    try:
        response = server.get("/healthz")
    except ConnectionRefusedError:
        return _check_free(subject, settings.listen)
    except (OSError, ValueError) as error:
        return subject.problem(
            f"the program that listens there gives no usable response: {failure_text(error)}",
            "see which program it is (ss -ltnp), and stop it or change listen",
        )
    if not response.is_ours:
        return subject.problem(
            "another program listens there",
            "see which program it is (ss -ltnp), and stop it or change listen",
        )
    if response.status != 200:
        return subject.problem(
            f"the server responds with {response.status}", "read the log of the server"
        )
    if is_loopback_only(settings.listen):
        return subject.ok(
            "the server listens there, for this machine only: for other nodes, set listen to an "
            "address of the network"
        )
    return subject.ok("the server listens there")


def _check_free(subject: Checked, listen: str) -> Finding:
    host, port = split_host(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port or 0))
    except OSError as error:
        remedy = {
            errno.EADDRINUSE: "see which program has it (ss -ltnp), and stop it or change listen",
            errno.EACCES: "use a port from 1024 on",
            errno.EADDRNOTAVAIL: "set listen to an address of this machine, or to 0.0.0.0",
        }.get(error.errno or 0, "change listen")
        return subject.problem(f"it cannot be used: {error.strerror}", remedy)
    except ValueError as error:
        return subject.problem(f"it cannot be used: {error}", "change listen")
    where = "" if host not in WILDCARD_ADDRESSES else " on all addresses"
    return subject.warning(f"it is free{where}: no server listens", "start it: oci-mirror serve")


def check_clock(offsets: Sequence[float]) -> Finding:
    """Compare the clock with those of the endpoints.

    ``offsets``: for each endpoint that sent a ``Date``, our time minus its time, in seconds.
    """
    subject = Checked("clock", "this machine")
    if not offsets:
        return subject.warning(
            "it was not compared: no endpoint has sent a Date", "compare it with timedatectl"
        )
    # The median: one endpoint may be wrong itself.
    offset = statistics.median(offsets)
    text = f"{abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} the endpoints"
    remedy = "synchronise it (timedatectl set-ntp true, or chrony)"
    if abs(offset) > _CLOCK_PROBLEM_S:
        return subject.problem(f"{text}: certificates and tokens will be refused", remedy)
    if abs(offset) > _CLOCK_WARNING_S:
        return subject.warning(text, remedy)
    return subject.ok("it agrees with the endpoints")
