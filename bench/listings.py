"""What the commands that list the data directory cost, beside few and many contents.

Each runs as a user runs it: a new process, its standard output a pipe. The images are made up:
their manifests and configs are real, and their layers are sparse files, which have a length and
take up no space. The cache of parsed manifests is filled, except in the row that says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench.table import Run
from mirror.hosted.database import open_checked
from mirror.hosted.name_rows import add_blob, add_manifest
from mirror.hosted.pushed_manifest import PushedManifest, read_pushed_manifest
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.layout import Layout
from mirror.store.names import ACCESS, NAMED, manifest_key
from mirror.store.records import TagRecord, dump_access_record, dump_tag, manifest_record
from mirror.store.rows import Tables

TAGS: Final = (20, 10_000)
"""Tags of the two data directories. Each has ten times as many contents."""
OWN_LAYERS: Final = 6
"""Layers that no other image has."""
SHARED_LAYERS: Final = 2
"""Layers of an image that others have, too: each one is in four images."""
TAGS_PER_REPOSITORY: Final = 20
LAYER_BYTES: Final = 1_000_000
_CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
BOUNDS: Final = {"ls": (0.3, 1.0), "du": (0.3, 2.0)}
"""Command -> the most seconds that it may take, for each of :data:`TAGS`."""

HOSTED_TAGS: Final = 100_000
"""Tags of the row about memory."""
TAGGED_IMAGES: Final = 10_000
"""Images that have these tags."""
MAX_LISTING_MB: Final = 150
"""Megabytes that a listing of them may take up."""


class ImageMaker:
    """Puts made-up images into a data directory, without a mirror."""

    def __init__(self, data_dir: Path, now: float) -> None:
        """Start with an empty directory. ``now``: last use of the newest image."""
        self._directory = data_dir / "blobs" / "sha256"
        self._directory.mkdir(parents=True, exist_ok=True)
        (data_dir / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self._index = data_dir / "index"
        self._now = now
        self._rows: list[tuple[str, str]] = []
        self._named: list[tuple[Repository, Tag, Digest]] = []

    def add_images(self, tags: int) -> None:
        """Add ``tags`` images of one platform, with an index that has two, and some orphans."""
        for number in range(tags):
            used = int(self._now) - (tags - number)
            own = [self._layer(f"own {number} {n}", used) for n in range(OWN_LAYERS)]
            shared = [self._layer(f"shared {number // 4} {n}", used) for n in range(SHARED_LAYERS)]
            config = self._json(
                {"os": "linux", "architecture": "amd64", "config": {"Env": [f"N={number}"]}}, used
            )
            manifest = self._json(
                {
                    "schemaVersion": 2,
                    "mediaType": OCI_MANIFEST,
                    "config": {"mediaType": _CONFIG_TYPE, **config},
                    "layers": [{"mediaType": _LAYER_TYPE, **layer} for layer in shared + own],
                },
                used,
            )
            self._name(number, self._index_of(number, manifest, used))
        for number in range(tags // 2):
            self._layer(f"orphan {number}", int(self._now) - 2 * tags)

    def push(self) -> None:
        """Name the images as clients have pushed them, in place of :meth:`save`."""
        with closing(open_checked(Layout(self._directory.parent.parent).hosted_names)) as database:
            database.execute("BEGIN IMMEDIATE")
            for repository, tag, root in self._named:
                index = self._read(root)
                child = self._read(index.children[0])
                for blob in child.blobs:
                    size = (self._directory / blob.hex).stat().st_size
                    add_blob(database, repository.path, blob, size, self._now)
                add_manifest(database, repository.path, child, [], self._now, "ci")
                add_manifest(database, repository.path, index, [tag], self._now, "ci")
            database.execute("COMMIT")
        self._rows.clear()
        self.save()

    def _read(self, digest: Digest) -> PushedManifest:
        return read_pushed_manifest((self._directory / digest.hex).read_bytes(), None, digest)

    def save(self) -> None:
        """Write the names of the images into the index."""
        bounds = {NAMED: None, ACCESS: None, "answers": 2**26}
        with closing(Tables(self._index, bounds)) as tables, tables.transaction(NAMED):
            tables.write_all(NAMED, [*self._rows, ("restored", "all")])

    def _index_of(self, number: int, manifest: dict[str, Any], used: int) -> dict[str, Any]:
        other = {"digest": str(Digest.of(b"%d" % number)), "size": 1000}
        entries = [
            {"mediaType": OCI_MANIFEST, **one, "platform": {"os": "linux", "architecture": on}}
            for one, on in ((manifest, "amd64"), (other, "arm64"))
        ]
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
        return self._json(document, used)

    def _name(self, number: int, index: dict[str, Any]) -> None:
        repository = Repository("docker.io", f"team/app{number // TAGS_PER_REPOSITORY}")
        tag, digest = Tag(f"v{number % TAGS_PER_REPOSITORY}"), Digest.parse(index["digest"])
        self._named.append((repository, tag, digest))
        record = TagRecord(repository, tag, digest, first_seen=self._now, confirmed=self._now)
        self._rows += [
            (f"{repository}:{tag}", dump_tag(record)),
            (
                manifest_key(repository, digest),
                dump_access_record(manifest_record(digest, OCI_INDEX, index["size"])),
            ),
        ]

    def _json(self, document: dict[str, Any], used: int) -> dict[str, Any]:
        """Write a document, and return its descriptor without a media type."""
        body = json.dumps(document).encode()
        digest = Digest.of(body)
        path = self._directory / digest.hex
        path.write_bytes(body)
        os.utime(path, (used, used))
        return {"digest": str(digest), "size": len(body)}

    def _layer(self, seed: str, used: int) -> dict[str, Any]:
        digest = Digest("sha256", hashlib.sha256(seed.encode()).hexdigest())
        path = self._directory / digest.hex
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.truncate(fd, LAYER_BYTES)
        os.utime(fd, (used, used))
        os.close(fd)
        return {"digest": str(digest), "size": LAYER_BYTES}


def write_config(data_dir: Path, root: Path) -> Path:
    """Write a configuration for a data directory below ``root``, and return its path."""
    file = root / "mirror.yaml"
    file.write_text(
        f"data_dir: {data_dir}\nupstreams:\n  docker.io:\n    endpoints: [https://127.0.0.1:9]\n"
        "hosted: {name: registry.example, listen: '127.0.0.1:0'}\n"
    )
    return file


def seconds_of(command: str, config: Path) -> float:
    """Return the seconds that one run of a command takes, as a process of its own."""
    begun = time.perf_counter()
    arguments = [sys.executable, "-m", "mirror", command, "--config", str(config)]
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def _measure(command: str, run: Run, *, is_hosted: bool) -> Iterator[str]:
    yield "| contents | tags | first run, s | median, s | bound, s | |"
    yield "|--:|--:|--:|--:|--:|---|"
    for tags, bound in zip(TAGS, BOUNDS[command], strict=True):
        with tempfile.TemporaryDirectory(prefix="listings-") as directory:
            root = Path(directory)
            maker = ImageMaker(root / "data", time.time())
            maker.add_images(tags)
            (maker.push if is_hosted else maker.save)()
            config = write_config(root / "data", root)
            first = seconds_of(command, config)
            median = statistics.median(seconds_of(command, config) for _ in range(run.rounds))
            contents = sum(1 for _ in (root / "data" / "blobs" / "sha256").iterdir())
        verdict = "" if median <= bound else "MISSED"
        yield f"| {contents:,} | {tags:,} | {first:.2f} | {median:.2f} | {bound} | {verdict} |"


def _measure_tags(run: Run) -> Iterator[str]:
    """Measure ``ls`` beside many hosted tags of few images: what CI leaves behind."""
    yield "| tags | images | CPU, s | peak memory, MB | bound, MB | |"
    yield "|--:|--:|--:|--:|--:|---|"
    with tempfile.TemporaryDirectory(prefix="listings-") as directory:
        root = Path(directory)
        maker = ImageMaker(root / "data", time.time())
        maker.add_images(TAGGED_IMAGES)
        maker.push()
        names = Layout(root / "data").hosted_names
        with closing(open_checked(names)) as database, database:
            columns = "repository, tag, digest, pushed_at, pushed_by"
            rows = database.execute(f"SELECT {columns} FROM tags").fetchall()
            database.executemany(
                f"INSERT INTO tags ({columns}) VALUES (?, ?, ?, ?, ?)",
                [
                    (path, f"{tag}-{number}", *others)
                    for path, tag, *others in rows
                    for number in range(1, HOSTED_TAGS // TAGGED_IMAGES)
                ],
            )
        config = write_config(root / "data", root)
        seconds_of("ls", config)
        used = [_usage_of("ls", config) for _ in range(run.rounds)]
    cpu = statistics.median(seconds for seconds, _ in used)
    peak = max(megabytes for _, megabytes in used)
    verdict = "" if peak <= MAX_LISTING_MB else "MISSED"
    yield (
        f"| {HOSTED_TAGS:,} | {TAGGED_IMAGES:,} | {cpu:.2f} | {peak:.0f} | {MAX_LISTING_MB} |"
        f" {verdict} |"
    )


def _usage_of(command: str, config: Path) -> tuple[float, float]:
    """Return (CPU seconds, megabytes at the peak) of one run, as a process of its own."""
    # Its own peak: the one of `wait4` is at least that of this process, before `exec`.
    code = (
        "import sys, time\n"
        "from mirror.cli.main import main\n"
        f"assert main({[command, '--config', str(config)]!r}) == 0\n"
        "peak = open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]\n"
        "print(time.process_time(), peak, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    seconds, kib = done.stderr.split()
    return float(seconds), int(kib) * 1024 / 1_000_000


ROWS: Final[dict[str, Callable[[Run], Iterator[str]]]] = {
    f"{command}{' of hosted images' if is_hosted else ''}": partial(
        _measure, command, is_hosted=is_hosted
    )
    for command in BOUNDS
    for is_hosted in (False, True)
} | {"ls of many hosted tags": _measure_tags}
"""Measurements by name."""
