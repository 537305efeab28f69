"""Every path there is below ``data_dir``. Nothing else joins paths.

::

    oci-layout, index.json   the directory is a valid OCI image layout
    blobs/<alg>/<hex>        whole and verified content
    ingest/<alg>/<hex>       growing content; ``flock`` on it = somebody is fetching it
    ingest/<alg>/<hex>.json  what its fetcher knows: declared size, failure
    quarantine/<alg>/<hex>   content that did not hash to its name
    index/                   diskcache
    eviction.lock            ``flock`` = an eviction is running
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mirror.oci.reference import ALGORITHMS, Digest


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one data directory. A digest is parsed before it gets here."""

    root: Path

    def blob(self, digest: Digest) -> Path:
        """Where whole content is."""
        return self.root / "blobs" / digest.algorithm / digest.hex

    def ingest(self, digest: Digest) -> Path:
        """Where growing content is."""
        return self.root / "ingest" / digest.algorithm / digest.hex

    def ingest_state(self, digest: Digest) -> Path:
        """What the fetcher of growing content knows of it."""
        return self.root / "ingest" / digest.algorithm / f"{digest.hex}.json"

    def quarantine(self, digest: Digest) -> Path:
        """Where damaged content is put aside."""
        return self.root / "quarantine" / digest.algorithm / digest.hex

    @property
    def index(self) -> Path:
        """The directory of small things with a time to live."""
        return self.root / "index"

    @property
    def eviction_lock(self) -> Path:
        """The file whose lock says that an eviction is running."""
        return self.root / "eviction.lock"

    def content_directories(self) -> list[Path]:
        """``blobs/<alg>`` for each registered algorithm."""
        return [self.root / "blobs" / algorithm for algorithm in ALGORITHMS]

    def ingest_directories(self) -> list[Path]:
        """``ingest/<alg>`` for each registered algorithm."""
        return [self.root / "ingest" / algorithm for algorithm in ALGORITHMS]
