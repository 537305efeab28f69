"""The paths of the data directory.

Lives here: where each file is. Must not know: what is done with it.

::

    oci-layout, index.json   the directory is a valid OCI image layout
    blobs/<alg>/<hex>        whole and verified content
    ingest/<alg>/<hex>       content of a running or interrupted fetch
    ingest/<alg>/<hex>.json  its state: declared size, bytes written, failure
    quarantine/<alg>/<hex>   content that did not hash to its name
    index/                   databases of the index
    history/                 the history of pulls, and users' last use (see :mod:`mirror.history`)
    notifications/           the queue of notifications (see :mod:`mirror.notifications`)
    hosted/names.db          names of the hosted repositories (no cache: see ``mirror/hosted``)
    hosted/names.spare       space for deletions on a full disk (``mirror/hosted/spare_space.py``)
    hosted/snapshot.db       their copy for a running backup, whose ``flock`` is on snapshot.lock
    hosted/restore.db        names of a running restore, whose ``flock`` is on restore.lock
    access/names             names of users (no cache: see ``mirror/access/known_names.py``)
    uploads/<id>             bytes of an upload to a hosted repository
    eviction.lock            its ``flock`` means that content is being removed
    index.json.lock          its ``flock`` means that ``index.json`` is being written
    marks.json               pins, freezes, blocks, leases (see :mod:`mirror.store.marks`)
    marks.spare              room for the next one (see :mod:`mirror.store.spare_file`)
    marks.lock               its ``flock`` means that ``marks.json`` is being changed
    totals                   the running total of all processes (see :mod:`mirror.store.space`)

``<alg>`` and ``<hex>`` are the two parts of a digest, ``<algorithm>:<hex>``. An exclusive ``flock``
on an ingest file means that a process is fetching the content.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mirror.oci.reference import ALGORITHMS, Digest


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one data directory. Digests are parsed before, so no path leaves ``root``."""

    root: Path

    def blob(self, digest: Digest) -> Path:
        """Return the path of whole content."""
        # One join of strings: three of paths take most of the time where there are many.
        return Path(f"{self.root}/blobs/{digest.algorithm}/{digest.hex}")

    def ingest(self, digest: Digest) -> Path:
        """Return the path of the file that a fetch appends to."""
        return self.root / "ingest" / digest.algorithm / digest.hex

    def ingest_state(self, digest: Digest) -> Path:
        """Return the path of the state of a fetch (:class:`IngestState`)."""
        return self.root / "ingest" / digest.algorithm / f"{digest.hex}.json"

    def quarantine(self, digest: Digest) -> Path:
        """Return the path of damaged content."""
        return self.root / "quarantine" / digest.algorithm / digest.hex

    @property
    def index(self) -> Path:
        """The directory of the index's databases."""
        return self.root / "index"

    @property
    def history(self) -> Path:
        """The directory of the history (:mod:`mirror.history`)."""
        return self.root / "history"

    @property
    def notifications(self) -> Path:
        """The directory of the queue of notifications (:mod:`mirror.notifications`)."""
        return self.root / "notifications"

    @property
    def user_names(self) -> Path:
        """The file of the names that users have, or once had."""
        return self.root / "access" / "names"

    @property
    def hosted_names(self) -> Path:
        """The database of the names of the hosted repositories."""
        return self.root / "hosted" / "names.db"

    @property
    def hosted_marker(self) -> Path:
        """The file that says that :attr:`hosted_names` was made once."""
        return self.root / "hosted.created"

    @property
    def snapshot(self) -> Path:
        """The copy of the names that a running backup reads."""
        return self.root / "hosted" / "snapshot.db"

    @property
    def snapshot_lock(self) -> Path:
        """The file whose lock is held while a backup runs."""
        return self.root / "hosted" / "snapshot.lock"

    @property
    def staged_names(self) -> Path:
        """The names that a running restore has brought here. No client sees them yet."""
        return self.root / "hosted" / "restore.db"

    @property
    def restore_lock(self) -> Path:
        """The file whose lock is held while a restore runs."""
        return self.root / "hosted" / "restore.lock"

    @property
    def uploads(self) -> Path:
        """The directory of the uploads to hosted repositories."""
        return self.root / "uploads"

    @property
    def save_lock(self) -> Path:
        """The file whose lock is held while ``index.json`` is written."""
        return self.root / "index.json.lock"

    @property
    def eviction_lock(self) -> Path:
        """The file whose lock is held while an eviction or a command removes content."""
        return self.root / "eviction.lock"

    @property
    def marks(self) -> Path:
        """The file of the operator's marks."""
        return self.root / "marks.json"

    @property
    def marks_lock(self) -> Path:
        """The file whose lock is held while the marks are changed, or must not be."""
        return self.root / "marks.lock"

    @property
    def totals(self) -> Path:
        """The file of the running total."""
        return self.root / "totals"

    def content_directories(self) -> list[Path]:
        """Return ``blobs/<alg>`` for each registered algorithm."""
        return [self.root / "blobs" / algorithm for algorithm in ALGORITHMS]

    def ingest_directories(self) -> list[Path]:
        """Return ``ingest/<alg>`` for each registered algorithm."""
        return [self.root / "ingest" / algorithm for algorithm in ALGORITHMS]
