"""``du``: what fills the disk."""

from __future__ import annotations

import pytest

from tests.unit.cli.inventory_kit import Site
from tests.unit.inventory.kit import content, text

SHARED, OWN, ORPHAN = content("shared", 2048), content("own", 1024), content("orphan", 512)


@pytest.fixture
def filled(site: Site) -> Site:
    site.data.image("app:v1", "one", SHARED, OWN)
    site.data.image("ghcr.io/team/tool:v1", "two", SHARED)
    site.data.add(ORPHAN, used=1000.0)
    return site


def test_table_has_each_type_and_the_quota(filled: Site) -> None:
    lines = filled.lines("du")

    assert lines[0].split() == ["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"]
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:] if line}
    assert cells["layer"] == ["2", "2", "3.0KiB", "0B"]
    assert cells["other"] == ["1", "0", "512B", "512B"]
    assert "referrer" not in cells, "it is empty"
    assert "total" in cells
    assert lines[-2].endswith("of 976.6KiB (<1%); evictions begin at 927.7KiB")


def test_history_and_index_are_shown_beside_the_quota(filled: Site) -> None:
    assert filled.lines("du")[-1].startswith("beside the quota: history 0B, index ")
    history = filled.data.layout.history
    history.mkdir()
    (history / "history.1.db").write_bytes(bytes(2048))
    assert filled.lines("du")[-1].startswith("beside the quota: history 2.0KiB, index ")


def test_json_has_a_row_for_each_type(filled: Site) -> None:
    rows = {row["type"]: row for row in filled.rows("du")}

    assert rows["layer"] == {
        "kind": "type",
        "type": "layer",
        "total": 2,
        "active": 2,
        "size": 3072,
        "reclaimable": 0,
    }
    assert rows["other"]["reclaimable"] == 512


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("upstream", ["docker.io", "ghcr.io"]),
        ("repository", ["docker.io/library/app", "ghcr.io/team/tool"]),
    ],
)
def test_groups_tell_what_they_share(filled: Site, by: str, names: list[str]) -> None:
    rows = filled.rows("du", "--by", by)

    assert [(row["kind"], row["name"]) for row in rows] == [(by, name) for name in names]
    assert [row["shared"] for row in rows] == [2048, 2048]
    assert filled.lines("du", "--by", by)[0].split()[:2] == [by.upper(), "IMAGES"]


def test_verbose_lists_what_is_evicted_next_with_its_images(filled: Site) -> None:
    evictions = [row for row in filled.rows("du", "-v") if row["kind"] == "eviction"]

    assert evictions[0]["digest"] == text(ORPHAN)
    assert (evictions[0]["images"], evictions[0]["why"]) == ([], "least recently used")
    shared = next(row for row in evictions if row["digest"] == text(SHARED))
    assert shared["images"] == ["docker.io/library/app:v1", "ghcr.io/team/tool:v1"]
    lines = filled.lines("du", "-v")
    titles, *groups = lines[lines.index("Next to be evicted:") + 1 :]
    assert titles.split()[:3] == ["IMAGES", "CONTENTS", "SIZE"]
    assert len(groups) < len(evictions)
    assert any(line.startswith("docker.io/library/app:v1, ghcr.io/team/tool:v1") for line in groups)


def test_empty_data_directory_has_nothing_to_evict(site: Site) -> None:
    assert site.lines("du", "-v")[-1] == "Nothing can be evicted."
