"""The row of an image."""

from __future__ import annotations

from dataclasses import replace

from mirror.inventory.json_rows import image_row, state_words
from mirror.oci.reference import Digest
from mirror.oci.text import time_text
from mirror.store.marks import Block
from tests.unit.inventory.kit import NOW, DataDirectory, config, content, text

LAYER = content("layer", 300)


def test_row_has_sizes_in_bytes_and_times_in_utc(data: DataDirectory) -> None:
    body = data.image("app:v1", "one", LAYER)
    size = len(body) + len(config(Id="one")) + 300
    inventory = data.read()

    assert image_row(inventory, inventory.images[0]) == {
        "name": "docker.io/library/app:v1",
        "kind": "image",
        "upstream": "docker.io",
        "repository": "library/app",
        "tag": "v1",
        "digest": text(body),
        "current_digest": text(body),
        "platforms": ["linux/amd64"],
        "missing_platforms": [],
        "size": size,
        "unique": size,
        "last_used": time_text(NOW - 1000),
        "confirmed": time_text(NOW - 10),
        "state": ["complete"],
        "missing_parts": 0,
        "missing_bytes": 0,
        "absent_why": None,
        "stale_why": None,
        "blocked_why": None,
        "subject": None,
        "accept": None,
        "pushed": None,
        "pushed_by": None,
    }


def test_state_names_all_that_is_wrong(data: DataDirectory) -> None:
    data.image("app:v1", "one", LAYER, checked=1.0)
    data.remove(LAYER)
    block = Block("docker.io/library/app:v1", "CVE-1", 1.0, frozenset())
    data.mark(lambda marks: replace(marks, blocks={block.target: block}))
    inventory = data.read()
    (image,) = inventory.images

    row = image_row(inventory, image)

    assert state_words(image) == row["state"] == ["partial", "blocked"]
    assert row["blocked_why"] == "CVE-1"
    assert (row["missing_parts"], row["missing_bytes"]) == (1, 300)


def test_referrer_has_its_subject(data: DataDirectory) -> None:
    subject = Digest.of(b"subject")
    data.image(f"app:sha256-{subject.hex}.sig", "one")
    inventory = data.read()

    row = image_row(inventory, inventory.images[0])

    assert (row["kind"], row["subject"]) == ("referrer", str(subject))
