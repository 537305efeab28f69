"""The rows of the index that a tag has: one for most clients, and its variants.

Lives here: the keys of these rows, and reading them. Must not know: who needs them.

A variant is the record for clients that do not accept every media type: an upstream may send them
another manifest.
"""

from __future__ import annotations

from typing import Final

from mirror.store.names import NAMED
from mirror.store.records import TagRecord, load_tag
from mirror.store.rows import Tables

AFTER_SPACE: Final = "!"
"""The character after the space: a key with this in place of a space comes after its variants."""


def read_tag_rows(tables: Tables, name: str) -> list[tuple[str, str]]:
    """Return (key, text) of the rows of a tag, the one for most clients first.

    ``name``: the whole name, ``host/path:tag``. Empty: the tag is not known.
    """
    text = tables.read_or_none(NAMED, name)[0]
    found = [] if text is None else [(name, text)]
    after = f"{name} "
    while page := tables.read_range(NAMED, after, f"{name}{AFTER_SPACE}"):
        found += [(row.key, row.text) for row in page]
        after = page[-1].key
    return found


def read_tag(tables: Tables, name: str) -> list[TagRecord]:
    """Return the records of a tag, as :func:`read_tag_rows`. Malformed ones are passed over."""
    records = (load_tag(text) for _, text in read_tag_rows(tables, name))
    return [record for record in records if record is not None]
