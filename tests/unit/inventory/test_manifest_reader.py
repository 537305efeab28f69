"""Which manifests are read from the disk, and which from the cache."""

from __future__ import annotations

from typing import Any

import pytest

from mirror.inventory import manifest_parsing, manifest_reader
from mirror.inventory.manifest_cache import ManifestCache
from mirror.inventory.manifest_pages import load_page
from mirror.inventory.model import StoredManifest
from mirror.oci.descriptor import OCI_MANIFEST
from tests.unit.inventory.kit import DataDirectory, config, content, entry, index, manifest, text

CONFIG, LAYER = config(), content("layer")
IMAGE = manifest(CONFIG, [LAYER])
INDEX = index(entry(IMAGE, "amd64"))


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests of the manifests that were parsed."""
    found: list[str] = []
    parse = manifest_parsing.parse_stored

    def noting(digest: str, *arguments: Any) -> Any:
        found.append(digest)
        return parse(digest, *arguments)

    monkeypatch.setattr(manifest_parsing, "parse_stored", noting)
    return found


def cache_of(data: DataDirectory) -> ManifestCache:
    return ManifestCache(data.layout.root / "manifests.db")


def cached(data: DataDirectory) -> dict[str, StoredManifest]:
    """The manifests in all pages of the cache."""
    pages = map(load_page, dict(cache_of(data).load()).values())
    return {one.text: one for page in pages for one in page}


def test_manifest_is_parsed_once_for_all_runs(data: DataDirectory, parsed: list[str]) -> None:
    data.add(CONFIG, LAYER, IMAGE, INDEX)
    data.name("app:v1", INDEX)

    first, second = data.read(), data.read()

    assert parsed == [text(INDEX), text(IMAGE)]
    assert second.images[0].platforms == first.images[0].platforms == ("linux/amd64",)


def test_lost_cache_is_filled_again(data: DataDirectory, parsed: list[str]) -> None:
    data.image("app:v1", "one")
    data.read()
    (data.layout.root / "manifests.db").unlink()

    assert len(data.read().manifests) == 1
    assert len(parsed) == 2
    assert len(cached(data)) == 1


def test_damaged_page_is_parsed_again_and_others_are_not(
    data: DataDirectory, parsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_reader, "_PAGE_MANIFESTS", 1)
    one, two = data.image("app:v1", "one"), data.image("app:v2", "two")
    data.read()
    cache_of(data).try_save({0: b"["})
    parsed.clear()

    assert set(data.read().manifests) == {text(one), text(two)}
    assert parsed == [text(one)]
    assert set(data.read().manifests) == set(cached(data)) == {text(one), text(two)}
    assert parsed == [text(one)]


def test_new_manifests_fill_up_the_last_page(
    data: DataDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_reader, "_PAGE_MANIFESTS", 2)
    for tag, sizes in (("v1", [1]), ("v2", [2]), ("v3", [2, 1])):
        data.image(f"app:{tag}", tag)
        data.read()

        assert [len(load_page(page)) for page in dict(cache_of(data).load()).values()] == sizes


def test_platform_is_read_once_its_config_has_come(data: DataDirectory) -> None:
    data.add(LAYER, IMAGE)
    data.name("app:v1", IMAGE, media_type=OCI_MANIFEST)
    assert data.find("app:v1").platforms == ()

    data.add(CONFIG)

    assert data.find("app:v1").platforms == ("linux/amd64",)
    assert cached(data)[text(IMAGE)].platform == "linux/amd64"


def test_config_without_a_platform_is_read_once(
    data: DataDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = manifest(b"{}", [])
    data.add(b"{}", body)
    data.name("app:v1", body, media_type=OCI_MANIFEST)
    data.read()
    monkeypatch.setattr(
        manifest_parsing, "platform_of_config", lambda body: pytest.fail("read again")
    )

    assert data.find("app:v1").platforms == ()


def test_manifests_that_left_the_disk_leave_the_cache_once_they_are_many(
    data: DataDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = data.image("app:v1", "one"), data.image("app:v2", "two")
    data.read()
    data.remove(one)
    data.read()
    assert set(cached(data)) == {text(one), text(two)}

    monkeypatch.setattr(manifest_reader, "_MAX_UNUSED", 0)
    data.read()

    assert set(cached(data)) == {text(two)}


def test_link_in_place_of_a_manifest_is_not_followed(data: DataDirectory) -> None:
    body = data.image("app:v1", "one")
    path = data.layout.blob(data.find("app:v1").digest)
    path.rename(data.layout.root / "elsewhere")
    path.symlink_to(data.layout.root / "elsewhere")
    (data.layout.root / "manifests.db").unlink()

    assert text(body) not in data.read().manifests
