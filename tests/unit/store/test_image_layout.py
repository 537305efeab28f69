"""``index.json``: its format, and reading it strictly."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.observability.events import Event, LogMessage
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store import image_layout
from mirror.store.layout import Layout
from mirror.store.records import MALFORMED, NamedManifest

REPO = Repository("docker.io", "library/app")
PORT = Repository("registry.example:5000", "app")


def named(layout: Layout, repository: Repository, tag: str | None, body: bytes) -> NamedManifest:
    """Put a manifest on disk, and name it."""
    digest = Digest.of(body)
    layout.blob(digest).parent.mkdir(parents=True, exist_ok=True)
    layout.blob(digest).write_bytes(body)
    made = Tag(tag) if tag is not None else None
    return NamedManifest(repository, made, digest, OCI_MANIFEST, len(body))


def write(layout: Layout, entries: list[NamedManifest]) -> None:
    """Write ``index.json``. Entries of one name are together."""
    draft = image_layout.Draft(layout)
    try:
        draft.add([list(group) for _, group in groupby(entries, lambda e: e.name + e.variant)])
        draft.publish()
    finally:
        draft.discard()


def read(root: Path) -> list[NamedManifest]:
    return list(image_layout.read_index_json(Layout(root)))


def document(layout: Layout) -> dict[str, Any]:
    found = json.loads((layout.root / "index.json").read_bytes())
    assert isinstance(found, dict)
    return found


def test_names_are_read_back_as_written(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    entries = [
        named(layout, REPO, "1.0", b"one"),
        named(layout, REPO, None, b"one"),
        named(layout, PORT, "1.0", b"two"),
        named(layout, PORT, None, b"three"),
    ]
    other = NamedManifest(PORT, Tag("kept"), Digest.of(b"one"), OCI_INDEX, 3)
    variant = replace(entries[0], variant=" application/vnd.oci.image.index.v1+json")
    write(layout, [*entries, other, variant])
    assert set(read(tmp_path)) == {*entries, other, variant}
    names = [
        entry["annotations"].get("org.opencontainers.image.ref.name")
        for entry in document(layout)["manifests"]
    ]
    assert names == [*(entry.name for entry in (*entries, other)), None], "no name is there twice"


def test_index_json_is_an_oci_index_with_reference_names(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    entry = named(layout, REPO, "1.0", b"one")
    write(layout, [entry])
    written = document(layout)
    assert (written["schemaVersion"], written["mediaType"]) == (2, OCI_INDEX)
    (descriptor,) = written["manifests"]
    name = descriptor.pop("annotations")["org.opencontainers.image.ref.name"]
    assert name == "docker.io/library/app:1.0"
    assert descriptor == {"mediaType": OCI_MANIFEST, "digest": str(entry.digest), "size": 3}


def test_manifest_that_is_not_on_disk_is_not_written(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    entry = named(layout, REPO, "1.0", b"one")
    gone = NamedManifest(REPO, Tag("2.0"), Digest.of(b"gone"), OCI_MANIFEST, 4)
    write(layout, [gone, entry])
    assert read(tmp_path) == [entry]


def test_tag_names_its_first_digest_that_is_on_disk(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    gone = NamedManifest(REPO, Tag("1.0"), Digest.of(b"gone"), OCI_MANIFEST, 4)
    newer, older = (named(layout, REPO, "1.0", body) for body in (b"newer", b"older"))
    write(layout, [gone, newer, older])
    assert read(tmp_path) == [newer]


def test_failed_write_leaves_the_earlier_file_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    entry = named(layout, REPO, "1.0", b"one")
    write(layout, [entry])

    def refuse(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_layout.os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write(layout, [])
    assert read(tmp_path) == [entry]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["index.json"]


GOOD: dict[str, Any] = {
    "mediaType": OCI_MANIFEST,
    "digest": str(Digest.of(b"one")),
    "size": 3,
    "annotations": {
        "org.opencontainers.image.ref.name": "docker.io/library/app:1.0",
        "org.oci-mirror.upstream": "docker.io",
    },
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": -1},
        {"size": 1e999},
        {"size": "3"},
        {"digest": "sha256:x"},
        {"digest": None},
        {"mediaType": 5},
        {"annotations": None},
        {"annotations": {}},
        {"annotations": {**GOOD["annotations"], "org.opencontainers.image.ref.name": "a/../b:1"}},
        {"annotations": {**GOOD["annotations"], "org.opencontainers.image.ref.name": 5}},
        {"annotations": {**GOOD["annotations"], "org.oci-mirror.upstream": 5}},
        {"annotations": {**GOOD["annotations"], "org.oci-mirror.variant": "a/b"}},
        {"annotations": {**GOOD["annotations"], "org.oci-mirror.variant": 5}},
    ],
    ids=str,
)
def test_malformed_entry_is_passed_over(tmp_path: Path, wrong: dict[str, Any]) -> None:
    text = json.dumps({"manifests": [{**GOOD, **wrong}, 5, GOOD, None]})
    (tmp_path / "index.json").write_text(text)
    found = read(tmp_path)
    assert found == [NamedManifest(REPO, Tag("1.0"), Digest.of(b"one"), OCI_MANIFEST, 3)]


def test_media_type_with_line_breaks_is_replaced(tmp_path: Path) -> None:
    wrong = {**GOOD, "mediaType": "a/b\r\nX-Header: x"}
    (tmp_path / "index.json").write_text(json.dumps({"manifests": [wrong]}))
    assert [n.media_type for n in read(tmp_path)] == ["application/octet-stream"]


@given(
    st.binary(max_size=40)
    | st.recursive(
        st.none() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("manifests"), inner),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode())
)
def test_malformed_file_has_no_names(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    root = tmp_path_factory.getbasetemp()
    (root / "index.json").write_bytes(raw)
    with suppress(*MALFORMED):
        assert read(root) == []


def test_missing_file_is_read_as_empty(tmp_path: Path) -> None:
    assert read(tmp_path) == []


@pytest.mark.row("G3-index-damage-while-running")
def test_whole_lines_of_a_cut_file_are_read_and_the_file_is_set_aside(tmp_path: Path) -> None:
    layout, events = Layout(tmp_path), list[Event]()
    entries = [named(layout, REPO, f"{n}.0", b"one") for n in range(10)]
    write(layout, entries)
    os.truncate(tmp_path / "index.json", 1500)
    found = list(image_layout.read_saved_names(layout, events.append))
    assert found == entries[: len(found)]
    assert 4 <= len(found) < 10
    assert [event.level for event in events if isinstance(event, LogMessage)] == ["error"]
    assert (tmp_path / "index.json.damaged").exists()


@pytest.mark.row("G4-busy-index")
@pytest.mark.parametrize("appended", [b"[" * 200_000, None], ids=["text", "8 GiB of zeros"])
def test_bytes_after_the_end_are_not_read(tmp_path: Path, appended: bytes | None) -> None:
    layout = Layout(tmp_path)
    entries = [named(layout, REPO, f"{n}.0", b"one") for n in range(10)]
    write(layout, entries)
    with (tmp_path / "index.json").open("ab") as file:
        if appended is None:
            file.truncate(2**33)
        else:
            file.write(appended)
    assert read(tmp_path) == entries


@pytest.mark.row("G4-busy-index")
def test_endless_line_is_damage_and_is_not_read_to_its_end(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    write(layout, [named(layout, REPO, "1.0", b"one")])
    text = (tmp_path / "index.json").read_text().partition("\n")[0]
    (tmp_path / "index.json").write_text(f"{text}\n")
    os.truncate(tmp_path / "index.json", 2**33)
    with pytest.raises(ValueError, match="endless line"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["[" * 200_000, "{}", '{"manifests": 5}', "log in first", ""])
def test_file_of_another_program_without_manifests_is_logged_and_set_aside(
    tmp_path: Path, text: str
) -> None:
    events: list[Event] = []
    (tmp_path / "index.json").write_text(text)
    assert list(image_layout.read_saved_names(Layout(tmp_path), events.append)) == []
    assert len(events) == 1
    assert (tmp_path / "index.json.damaged").read_text() == text
    assert list(image_layout.read_saved_names(Layout(tmp_path), events.append)) == []
    assert len(events) == 1


@pytest.mark.row("G4-busy-index")
def test_file_of_an_earlier_version_is_read_also_if_it_is_large(tmp_path: Path) -> None:
    padding = [{"annotations": {"padding": "x" * 1_000_000}}] * 70
    (tmp_path / "index.json").write_text(json.dumps({"manifests": [*padding, GOOD]}))
    assert [entry.name for entry in read(tmp_path)] == ["docker.io/library/app:1.0"]
