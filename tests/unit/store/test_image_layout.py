"""``index.json``: its format, and reading it strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store import image_layout
from mirror.store.disk import Layout
from mirror.store.records import NamedManifest

REPO = Repository("docker.io", "library/app")
PORT = Repository("registry.example:5000", "app")


def named(layout: Layout, repository: Repository, tag: str | None, body: bytes) -> NamedManifest:
    """Put a manifest on disk, and name it."""
    digest = Digest.of(body)
    layout.blob(digest).parent.mkdir(parents=True, exist_ok=True)
    layout.blob(digest).write_bytes(body)
    made = Tag(tag) if tag is not None else None
    return NamedManifest(repository, made, digest, OCI_MANIFEST, len(body))


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
    pinned = NamedManifest(PORT, Tag("kept"), Digest.of(b"one"), OCI_INDEX, 3, is_pinned=True)
    image_layout.write_index_json(layout, [*entries, pinned])
    assert set(image_layout.read_index_json(layout)) == {*entries, pinned}


def test_index_json_is_an_oci_index_with_reference_names(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    entry = named(layout, REPO, "1.0", b"one")
    image_layout.write_index_json(layout, [entry])
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
    image_layout.write_index_json(layout, [gone, entry])
    assert image_layout.read_index_json(layout) == [entry]


def test_tag_names_its_first_digest_that_is_on_disk(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    gone = NamedManifest(REPO, Tag("1.0"), Digest.of(b"gone"), OCI_MANIFEST, 4)
    newer, older = (named(layout, REPO, "1.0", body) for body in (b"newer", b"older"))
    image_layout.write_index_json(layout, [gone, newer, older])
    assert image_layout.read_index_json(layout) == [newer]


def test_failed_write_leaves_the_earlier_file_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    entry = named(layout, REPO, "1.0", b"one")
    image_layout.write_index_json(layout, [entry])

    def refuse(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_layout.os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        image_layout.write_index_json(layout, [])
    assert image_layout.read_index_json(layout) == [entry]
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
    ],
    ids=str,
)
def test_malformed_entry_is_passed_over(tmp_path: Path, wrong: dict[str, Any]) -> None:
    text = json.dumps({"manifests": [{**GOOD, **wrong}, 5, GOOD, None]})
    (tmp_path / "index.json").write_text(text)
    found = image_layout.read_index_json(Layout(tmp_path))
    assert found == [NamedManifest(REPO, Tag("1.0"), Digest.of(b"one"), OCI_MANIFEST, 3)]


def test_media_type_with_line_breaks_is_replaced(tmp_path: Path) -> None:
    wrong = {**GOOD, "mediaType": "a/b\r\nX-Header: x"}
    (tmp_path / "index.json").write_text(json.dumps({"manifests": [wrong]}))
    assert [n.media_type for n in image_layout.read_index_json(Layout(tmp_path))] == [
        "application/octet-stream"
    ]


@given(
    st.binary(max_size=40)
    | st.recursive(
        st.none() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("manifests"), inner),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode())
)
def test_malformed_file_is_read_as_empty(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    root = tmp_path_factory.getbasetemp()
    (root / "index.json").write_bytes(raw)
    assert image_layout.read_index_json(Layout(root)) == []


def test_missing_or_too_large_file_is_read_as_empty(tmp_path: Path) -> None:
    assert image_layout.read_index_json(Layout(tmp_path)) == []
    (tmp_path / "index.json").write_text(json.dumps({"manifests": [GOOD]}))
    assert image_layout.read_index_json(Layout(tmp_path))
    with (tmp_path / "index.json").open("r+b") as file:
        file.truncate(2**33)  # a sparse file, which must not be read
    assert image_layout.read_index_json(Layout(tmp_path)) == []
    (tmp_path / "index.json").write_text("[" * 200_000)
    assert image_layout.read_index_json(Layout(tmp_path)) == []
