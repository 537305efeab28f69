"""The tree of an image."""

from __future__ import annotations

from mirror.inventory.tree import image_tree, node_row
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from tests.unit.inventory.kit import (
    DataDirectory,
    config,
    content,
    entry,
    index,
    manifest,
    only,
    text,
)

LAYER, BASE = content("layer", 300), content("base", 200)
CONFIG = config()
IMAGE, ARM = manifest(CONFIG, [BASE, LAYER]), manifest(config("arm64"), [])
INDEX = index(entry(IMAGE, "amd64"), entry(ARM, "arm64"))


def test_tree_has_each_manifest_before_its_parts(data: DataDirectory) -> None:
    data.add(CONFIG, LAYER, BASE, IMAGE, INDEX)
    data.name("app:v1", INDEX)
    data.image("other:v1", "other", BASE)
    inventory = data.read()

    nodes = list(image_tree(inventory, only(inventory, "app:v1")))

    assert [(node.depth, node.part.type, node.part.text) for node in nodes] == [
        (0, "index", text(INDEX)),
        (1, "manifest", text(IMAGE)),
        (2, "config", text(CONFIG)),
        (2, "layer", text(BASE)),
        (2, "layer", text(LAYER)),
        (1, "manifest", text(ARM)),
    ]
    assert [node.is_present for node in nodes] == [True] * 5 + [False]
    assert nodes[3].shared_with == ("docker.io/library/other:v1",)
    assert nodes[4].shared_with == ()
    assert [node.parent for node in nodes[:3]] == [None, text(INDEX), text(IMAGE)]


def test_signature_follows_the_image_and_shares_nothing_with_it(data: DataDirectory) -> None:
    body = data.image("app:v1", "one", LAYER)
    tag = f"sha256-{Digest.of(body).hex}.sig"
    data.image(f"app:{tag}", "signature", content("signature"))
    inventory = data.read()

    nodes = list(image_tree(inventory, only(inventory, "app:v1")))

    assert [(node.depth, node.part.type.value, node.name) for node in nodes if not node.depth] == [
        (0, "manifest", "docker.io/library/app:v1"),
        (0, "referrer", f"docker.io/library/app:{tag}"),
    ]
    assert all(node.shared_with == () for node in nodes)


def test_same_layer_twice_is_shown_twice(data: DataDirectory) -> None:
    body = data.image("app:v1", "one", LAYER, LAYER)
    inventory = data.read()

    nodes = list(image_tree(inventory, only(inventory, "app:v1")))

    assert [node.part.text for node in nodes] == [
        *(text(body), text(config(Id="one")), text(LAYER), text(LAYER))
    ]


def test_parts_of_a_manifest_that_is_there_twice_are_shown_once(data: DataDirectory) -> None:
    twice = index(entry(IMAGE, "amd64"), entry(IMAGE, "amd64"))
    data.add(CONFIG, LAYER, BASE, IMAGE, twice)
    data.name("app:v1", twice)
    inventory = data.read()

    nodes = list(image_tree(inventory, only(inventory, "app:v1")))

    assert [node.depth for node in nodes] == [0, 1, 2, 2, 2, 1]


def test_damaged_root_is_not_here(data: DataDirectory) -> None:
    data.image("app:v1", "one")
    path = data.layout.blob(data.find("app:v1").digest)
    path.write_bytes(b"damaged")
    (data.layout.root / "manifests.db").unlink()
    inventory = data.read()

    (node,) = image_tree(inventory, inventory.images[0])

    assert not node.is_present


def test_row_of_a_node_has_its_descriptor(data: DataDirectory) -> None:
    body = data.image("app:v1", "one")
    inventory = data.read()
    image = inventory.images[0]

    row = node_row(image, next(image_tree(inventory, image)))

    assert row == {
        "image": image.name,
        "depth": 0,
        "type": "manifest",
        "digest": text(body),
        "parent": None,
        "media_type": OCI_MANIFEST,
        "artifact_type": None,
        "platform": "linux/amd64",
        "size": len(body),
        "is_cached": True,
        "name": image.name,
        "shared_with": [],
    }
