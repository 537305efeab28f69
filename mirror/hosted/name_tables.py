"""The schema of the database of the hosted repositories.

Lives here: its tables, the sums that triggers keep, its version. Must not know: how it is opened,
what the rows mean (``name_rows.py``).
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from sqlite3 import Connection
from typing import Final

from mirror.oci.errors import NamesDamaged

SCHEMA_VERSION: Final = 2
"""``user_version`` of a database that this version writes."""
ROW_BYTES: Final = 2048
"""Bytes of the quota that each tag, blob and manifest of a repository takes beside its content.

Its row and its entries in indexes take 0.3 to 0.6 KiB, and 2 KiB with the longest names, in pages
that are half full."""
MANIFEST_FACTOR: Final = 8
"""Bytes of the quota for each byte of a manifest: its annotations, and the rows of its parts. These
take 4, and 9 with the longest names."""

_SCHEMA: Final = """
-- orphaned_at: from when nothing needs the manifest, as far as is known (collection_rows.py).
CREATE TABLE manifests (
    repository TEXT NOT NULL, digest TEXT NOT NULL, media_type TEXT NOT NULL,
    artifact_type TEXT NOT NULL, subject TEXT NOT NULL, size INTEGER NOT NULL,
    annotations TEXT NOT NULL, pushed_at REAL NOT NULL, pushed_by TEXT NOT NULL,
    pulled_at REAL NOT NULL DEFAULT 0, orphaned_at REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (repository, digest)) WITHOUT ROWID;
CREATE INDEX orphaned_manifests ON manifests (repository, digest) WHERE orphaned_at > 0;
CREATE INDEX manifests_by_subject ON manifests (repository, subject, digest) WHERE subject <> '';
-- is_manifest: the part is listed as a manifest, not as a blob. The same bytes may be both.
CREATE TABLE parts (
    repository TEXT NOT NULL, manifest TEXT NOT NULL, digest TEXT NOT NULL,
    is_manifest INTEGER NOT NULL,
    PRIMARY KEY (repository, manifest, digest, is_manifest)) WITHOUT ROWID;
CREATE INDEX parts_by_digest ON parts (repository, digest, is_manifest);
CREATE TABLE tags (
    repository TEXT NOT NULL, tag TEXT NOT NULL, digest TEXT NOT NULL,
    pushed_at REAL NOT NULL, pushed_by TEXT NOT NULL,
    PRIMARY KEY (repository, tag)) WITHOUT ROWID;
CREATE INDEX tags_by_digest ON tags (repository, digest);
-- used_at: last push, mount or HEAD, or deletion of a manifest that listed it.
CREATE TABLE blobs (
    repository TEXT NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL, used_at REAL NOT NULL,
    PRIMARY KEY (repository, digest)) WITHOUT ROWID;
-- boot: id of the boot of the machine; owner: whose limit the upload counts for.
CREATE TABLE uploads (
    id TEXT PRIMARY KEY, repository TEXT NOT NULL, user TEXT NOT NULL, reserved INTEGER NOT NULL,
    boot TEXT NOT NULL, started_at REAL NOT NULL, owner TEXT NOT NULL) WITHOUT ROWID;
-- Each digest once; names: rows of blobs and manifests that have it.
CREATE TABLE contents (
    digest TEXT PRIMARY KEY, size INTEGER NOT NULL, names INTEGER NOT NULL) WITHOUT ROWID;
-- Digests that had rows, and whose files are not collected yet.
CREATE TABLE released (digest TEXT PRIMARY KEY) WITHOUT ROWID;
-- Sums over the rows of a repository, for its quota and for lists.
CREATE TABLE repositories (
    name TEXT PRIMARY KEY, bytes INTEGER NOT NULL, contents INTEGER NOT NULL,
    manifests INTEGER NOT NULL, metadata INTEGER NOT NULL) WITHOUT ROWID;
-- Outbox of events (change_rows.py); taken_at: when a process has taken one, to tell of it.
CREATE TABLE changes (
    id TEXT PRIMARY KEY, action TEXT NOT NULL, repository TEXT NOT NULL, digest TEXT NOT NULL,
    tag TEXT NOT NULL, media_type TEXT NOT NULL, size INTEGER NOT NULL, user TEXT NOT NULL,
    client TEXT NOT NULL, at REAL NOT NULL, taken_at REAL NOT NULL);
-- Sums over all repositories, in one row.
CREATE TABLE totals (
    one INTEGER PRIMARY KEY CHECK (one = 1), bytes INTEGER NOT NULL, contents INTEGER NOT NULL,
    metadata INTEGER NOT NULL);
INSERT INTO totals VALUES (1, 0, 0, 0);

-- Blobs that no manifest of their repository lists.
CREATE VIEW unnamed_blobs AS SELECT * FROM blobs b WHERE NOT EXISTS
    (SELECT 1 FROM parts p WHERE p.repository = b.repository AND p.digest = b.digest
        AND p.is_manifest = 0);
-- Manifests that no tag and no index names.
CREATE VIEW unnamed_manifests AS SELECT * FROM manifests m WHERE NOT EXISTS
    (SELECT 1 FROM tags t WHERE t.repository = m.repository AND t.digest = m.digest)
    AND NOT EXISTS
    (SELECT 1 FROM parts p WHERE p.repository = m.repository AND p.digest = m.digest
        AND p.is_manifest = 1);
-- Manifests to collect: orphaned, and needed by no index, no subject and no tag. The tag of a
-- subject counts only while the subject is here.
CREATE VIEW orphans AS SELECT * FROM manifests m WHERE m.orphaned_at > 0 AND NOT EXISTS
    (SELECT 1 FROM tags t WHERE t.repository = m.repository AND t.digest = m.digest
        AND (NOT (t.tag GLOB 'sha256-[0-9a-f]*' OR t.tag GLOB 'sha512-[0-9a-f]*') OR EXISTS
            (SELECT 1 FROM manifests s WHERE s.repository = m.repository
            AND s.digest >= substr(t.tag, 1, 6) || ':' || substr(t.tag, 8, 64)
            AND s.digest < substr(t.tag, 1, 6) || ':' || substr(t.tag, 8, 64) || 'g')))
    AND NOT EXISTS
    (SELECT 1 FROM parts p WHERE p.repository = m.repository AND p.digest = m.digest
        AND p.is_manifest = 1)
    AND NOT EXISTS
    (SELECT 1 FROM manifests s WHERE s.repository = m.repository AND s.digest = m.subject);
"""
"""All but the triggers."""
_TRIGGERS: Final = f"""
CREATE TRIGGER contents_added AFTER INSERT ON contents BEGIN
    UPDATE totals SET bytes = bytes + new.size, contents = contents + 1;
    DELETE FROM released WHERE digest = new.digest; END;
CREATE TRIGGER contents_removed AFTER DELETE ON contents BEGIN
    UPDATE totals SET bytes = bytes - old.size, contents = contents - 1;
    INSERT OR IGNORE INTO released VALUES (old.digest); END;
CREATE TRIGGER blobs_added AFTER INSERT ON blobs BEGIN
    INSERT INTO contents VALUES (new.digest, new.size, 1)
        ON CONFLICT (digest) DO UPDATE SET names = names + 1;
    INSERT INTO repositories VALUES (new.repository, new.size, 1, 0, {ROW_BYTES})
        ON CONFLICT (name) DO UPDATE SET bytes = bytes + new.size, contents = contents + 1,
            metadata = metadata + excluded.metadata; END;
CREATE TRIGGER blobs_removed AFTER DELETE ON blobs BEGIN
    UPDATE contents SET names = names - 1 WHERE digest = old.digest;
    DELETE FROM contents WHERE digest = old.digest AND names = 0;
    UPDATE repositories SET bytes = bytes - old.size, contents = contents - 1,
        metadata = metadata - {ROW_BYTES} WHERE name = old.repository;
    DELETE FROM repositories WHERE name = old.repository AND contents = 0; END;
CREATE TRIGGER manifests_added AFTER INSERT ON manifests BEGIN
    INSERT INTO contents VALUES (new.digest, new.size, 1)
        ON CONFLICT (digest) DO UPDATE SET names = names + 1;
    INSERT INTO repositories
        VALUES (new.repository, new.size, 1, 1, {ROW_BYTES} + {MANIFEST_FACTOR} * new.size)
        ON CONFLICT (name) DO UPDATE SET bytes = bytes + new.size, contents = contents + 1,
            manifests = manifests + 1, metadata = metadata + excluded.metadata; END;
CREATE TRIGGER manifests_removed AFTER DELETE ON manifests BEGIN
    DELETE FROM parts WHERE repository = old.repository AND manifest = old.digest;
    DELETE FROM tags WHERE repository = old.repository AND digest = old.digest;
    UPDATE contents SET names = names - 1 WHERE digest = old.digest;
    DELETE FROM contents WHERE digest = old.digest AND names = 0;
    UPDATE repositories SET bytes = bytes - old.size, contents = contents - 1,
        manifests = manifests - 1, metadata = metadata - {ROW_BYTES} - {MANIFEST_FACTOR} * old.size
        WHERE name = old.repository;
    DELETE FROM repositories WHERE name = old.repository AND contents = 0; END;
CREATE TRIGGER tags_added AFTER INSERT ON tags BEGIN
    UPDATE repositories SET metadata = metadata + {ROW_BYTES} WHERE name = new.repository; END;
CREATE TRIGGER tags_removed AFTER DELETE ON tags BEGIN
    UPDATE repositories SET metadata = metadata - {ROW_BYTES} WHERE name = old.repository; END;
CREATE TRIGGER repositories_added AFTER INSERT ON repositories BEGIN
    UPDATE totals SET metadata = metadata + new.metadata; END;
CREATE TRIGGER repositories_changed AFTER UPDATE OF metadata ON repositories BEGIN
    UPDATE totals SET metadata = metadata + new.metadata - old.metadata; END;
"""  # noqa: S608 - our own numbers
_COUNT_METADATA: Final = f"""
ALTER TABLE repositories ADD COLUMN metadata INTEGER NOT NULL DEFAULT 0;
ALTER TABLE totals ADD COLUMN metadata INTEGER NOT NULL DEFAULT 0;
UPDATE repositories SET metadata =
    {ROW_BYTES} * (contents + (SELECT count(*) FROM tags WHERE repository = name))
    + {MANIFEST_FACTOR} * (SELECT coalesce(sum(size), 0) FROM manifests WHERE repository = name);
UPDATE totals SET metadata = (SELECT coalesce(sum(metadata), 0) FROM repositories);
"""  # noqa: S608 - our own numbers
"""From version 1 to 2. It takes 0.1 s with 100,000 manifests and as many tags."""


def has_schema(connection: Connection, path: Path) -> bool:
    """Return whether a database has our tables, maybe of an earlier version. False: none yet.

    Raises ``NamesDamaged`` if they are of a later version, or of another program.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == 0 and not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        return False
    if not 1 <= version <= SCHEMA_VERSION:
        raise NamesDamaged(wrong_version(path, version))
    return True


def create_schema(connection: Connection) -> None:
    """Create our tables, in the transaction that runs."""
    _run(connection, _SCHEMA + _TRIGGERS)


def upgrade_schema(connection: Connection) -> None:
    """Make tables of an earlier version those of this one, in the transaction that runs."""
    if connection.execute("PRAGMA user_version").fetchone()[0] < SCHEMA_VERSION:
        triggers = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'")
        for (name,) in triggers.fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        _run(connection, _COUNT_METADATA + _TRIGGERS)


def metadata_bytes(rows: int, manifest_bytes: int) -> int:
    """Return the bytes of the quota that rows take, as the triggers count them.

    Args:
        rows: Tags, blobs and manifests of repositories.
        manifest_bytes: Bytes of these manifests.
    """
    return ROW_BYTES * rows + MANIFEST_FACTOR * manifest_bytes


def wrong_version(path: Path, version: int) -> str:
    """Return what to do about a database that another version of this program has written."""
    return (
        f"{path}: its version is {version}, and this program reads {SCHEMA_VERSION}: use the"
        " version of oci-mirror that wrote it, or restore a backup into an empty data directory"
    )


def _run(connection: Connection, script: str) -> None:
    """Run a script. ``executescript`` would commit before it, outside of our transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
