"""The pages in which parsed manifests are cached."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from mirror.inventory.manifest_pages import dump_page, load_page
from mirror.inventory.manifest_parsing import parse_stored
from mirror.inventory.model import StoredManifest
from mirror.oci.descriptor import MAX_DESCRIPTOR_SIZE, OCI_MANIFEST
from mirror.store.records import MALFORMED
from tests.unit.inventory.kit import Json, config, content, descriptor, entry, index, manifest, text

CONFIG, LAYER = config(), content("layer")
IMAGE = manifest(CONFIG, [LAYER])


def with_layers(*layers: Json) -> bytes:
    return json.dumps({**json.loads(IMAGE), "layers": layers}).encode()


BODIES = [
    IMAGE,
    manifest(CONFIG, [LAYER, LAYER, content("other")]),
    index(entry(IMAGE, "amd64"), descriptor(LAYER, "")),
    manifest(CONFIG, [], subject=descriptor(IMAGE, OCI_MANIFEST), artifactType="a/b"),
    with_layers({**descriptor(LAYER, ""), "urls": ["u"]}),
    with_layers({**descriptor(LAYER, ""), "size": MAX_DESCRIPTOR_SIZE}),
    b"[]",
]


def parse(body: bytes) -> StoredManifest:
    return parse_stored(text(body), body, "")


def test_page_has_the_manifests_that_were_written_in_their_order() -> None:
    parsed = [*map(parse, BODIES), parse(IMAGE)._replace(platform="linux/amd64")]

    loaded = load_page(dump_page(parsed))

    assert [one.text for one in loaded] == [one.text for one in parsed]
    for one, other in zip(loaded, parsed, strict=True):
        assert one.parts == other.parts
        assert one._replace(columns=other.columns) == other
    assert dump_page(loaded) == dump_page(parsed)


def test_page_without_manifests_is_read() -> None:
    assert load_page(dump_page([])) == []


def test_page_of_a_machine_with_another_byte_order_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = dump_page([parse(IMAGE)])
    monkeypatch.setattr(sys, "byteorder", "other")

    with pytest.raises(MALFORMED):
        load_page(page)


def changed(change: Callable[[list[Any]], object]) -> Callable[[bytes], bytes]:
    """Change the JSON of a page."""

    def damage(page: bytes) -> bytes:
        top, rest = page.split(b"\n", 1)
        document = json.loads(top)
        change(document)
        return json.dumps(document).encode() + b"\n" + rest

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda page: b"",
        lambda page: page[:-1],
        lambda page: page[:-8],
        lambda page: page[: page.rindex(b"sha256:")],
        lambda page: page.replace(b" sha256:", b"-sha256:"),
        lambda page: page.replace(b'"layer"', b'"x"', 1),
        lambda page: page.replace(b'"manifest"', b'"blob"'),
        changed(lambda top: top.__setitem__(1, top[1] + 1)),
        changed(lambda top: top.__setitem__(2, top[2] - 1)),
        changed(lambda top: top[3].clear()),
        changed(lambda top: top[3][0].pop()),
        changed(lambda top: top[3][0][2][1].pop()),
        changed(lambda top: top[3][0][2][2].append("a/b")),
    ],
    ids=[
        *("nothing", "cut number", "fewer sizes", "no numbers", "fewer digests"),
        *("type of a part", "type", "more manifests", "fewer parts"),
        *("no facts", "fewer facts", "fewer types", "platforms"),
    ],
)
def test_damaged_page_is_refused(damage: Callable[[bytes], bytes]) -> None:
    page = dump_page([parse(IMAGE)])

    with pytest.raises(MALFORMED):
        load_page(damage(page))
