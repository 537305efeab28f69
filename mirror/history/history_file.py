"""The tables of the history, and the file that they are in.

Lives here: SQL that creates the tables. Must not know: rows.
"""

from __future__ import annotations

from typing import Final

from mirror.store.shared_database import DatabaseForm

CREATE_TABLES: Final = """
CREATE TABLE pulls (
    id INTEGER PRIMARY KEY, is_hit INTEGER NOT NULL, at REAL NOT NULL, request_id TEXT NOT NULL,
    client TEXT NOT NULL, upstream TEXT NOT NULL, repository TEXT NOT NULL,
    reference TEXT NOT NULL, digest TEXT NOT NULL, outcome TEXT NOT NULL, record TEXT NOT NULL
);
CREATE INDEX pulls_by_repository ON pulls (repository, upstream);
CREATE INDEX pulls_by_request ON pulls (request_id);
CREATE TABLE minutes (
    id INTEGER PRIMARY KEY, start INTEGER NOT NULL, upstream TEXT NOT NULL, outcome TEXT NOT NULL,
    requests INTEGER NOT NULL, bytes_sent INTEGER NOT NULL, bytes_fetched INTEGER NOT NULL,
    billable INTEGER NOT NULL, billed INTEGER NOT NULL, UNIQUE (start, upstream, outcome)
);
CREATE TABLE counts (
    id INTEGER PRIMARY KEY, start INTEGER NOT NULL, upstream TEXT NOT NULL,
    repository TEXT NOT NULL, network TEXT NOT NULL, outcome TEXT NOT NULL,
    requests INTEGER NOT NULL, bytes_sent INTEGER NOT NULL, bytes_fetched INTEGER NOT NULL,
    billable INTEGER NOT NULL, billed INTEGER NOT NULL,
    UNIQUE (start, upstream, repository, network, outcome)
);
CREATE TABLE tags (
    id INTEGER PRIMARY KEY, upstream TEXT NOT NULL, repository TEXT NOT NULL, tag TEXT NOT NULL,
    digest TEXT NOT NULL, first_seen REAL NOT NULL, last_seen REAL NOT NULL
);
CREATE INDEX tags_by_name ON tags (upstream, repository, tag);
CREATE TABLE accesses (
    id INTEGER PRIMARY KEY, step INTEGER NOT NULL, at INTEGER NOT NULL, content INTEGER NOT NULL,
    size INTEGER NOT NULL, is_used INTEGER NOT NULL, requests INTEGER NOT NULL,
    misses INTEGER NOT NULL, UNIQUE (step, content)
);
CREATE TABLE step (
    id INTEGER PRIMARY KEY CHECK (id = 1), number INTEGER NOT NULL, minute INTEGER NOT NULL,
    bytes REAL NOT NULL
);
CREATE TABLE sampling (id INTEGER PRIMARY KEY CHECK (id = 1), threshold INTEGER NOT NULL);
"""
"""SQL that creates the tables."""
HISTORY_FORM: Final = DatabaseForm("history", CREATE_TABLES, version=2)
"""The database of the history. It is a cache."""
