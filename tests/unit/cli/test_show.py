"""``show``: the parts of one image."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from mirror.store.marks import Freeze
from tests.unit.cli.inventory_kit import Site
from tests.unit.inventory.kit import config, content, entry, index, manifest, text

LAYER, BASE = content("layer", 3000), content("base", 200)
CONFIG = config()
IMAGE, ARM = manifest(CONFIG, [BASE, LAYER]), manifest(config("arm64"), [])
INDEX = index(entry(IMAGE, "amd64"), entry(ARM, "arm64"))


@pytest.fixture
def filled(site: Site) -> Site:
    site.data.add(CONFIG, BASE, IMAGE, INDEX)
    site.data.name("app:v1", INDEX, checked=site.now - 10)
    for number in range(5):
        site.data.image(f"other:v{number}", f"other {number}", BASE)
    return site


def test_tree_and_summary_are_printed(filled: Site) -> None:
    lines = filled.lines("show", "app:v1")

    assert lines[0] == "docker.io/library/app:v1"
    assert f"  digest     {text(INDEX)}" in lines
    assert "  missing    linux/arm64" in lines
    assert "  state      partial (lacks 1 part, at least 2.9KiB)" in lines
    tree = lines[lines.index("") + 1 :]
    assert [line.partition("  sha256:")[0].rstrip() for line in tree[1:]] == [
        "index",
        "  manifest linux/amd64",
        "    config",
        "    layer",
        "    layer",
        "  manifest linux/arm64",
    ]
    assert tree[4].endswith(
        "other:v0, docker.io/library/other:v1, docker.io/library/other:v2, and 2 more"
    )
    assert tree[5].split()[-2:] == ["no", "-"]


def test_json_has_a_row_for_each_content(filled: Site) -> None:
    rows = filled.rows("show", "app:v1")

    assert [(row["depth"], row["type"], row["is_cached"]) for row in rows] == [
        (0, "index", True),
        (1, "manifest", True),
        (2, "config", True),
        (2, "layer", True),
        (2, "layer", False),
        (1, "manifest", False),
    ]
    assert len(rows[3]["shared_with"]) == 5


def test_signature_is_shown_with_its_name(filled: Site) -> None:
    name = f"docker.io/library/app:sha256-{Digest.of(INDEX).hex}.sig"
    filled.data.image(name, "signature")

    assert any(
        line.startswith(f"referrer linux/amd64 {name}") for line in filled.lines("show", "app:v1")
    )


def test_image_is_found_by_its_digest_with_each_of_its_tags(filled: Site) -> None:
    filled.data.name("app:latest", INDEX)

    roots = [row["image"] for row in filled.rows("show", f"app@{text(INDEX)}") if not row["depth"]]
    assert roots == ["docker.io/library/app:latest", "docker.io/library/app:v1"]
    assert filled.lines("show", "app")[0] == "docker.io/library/app:latest"


def test_earlier_digest_of_a_tag_is_shown_with_the_one_that_is_not_here(site: Site) -> None:
    old = site.data.image("app:v1", "old")
    site.data.rows = []
    new = content("new")
    site.data.name("app:v1", new, earlier=[old], media_type=OCI_MANIFEST)

    assert f"  upstream   {text(new)} (not in the cache)" in site.lines("show", "app:v1")


def test_current_digest_of_a_frozen_tag_is_shown_as_what_it_is(site: Site) -> None:
    old = site.data.image("app:v1", "old")
    site.data.rows = []
    new = site.data.image("app:v1", "new")
    site.data.rows = []
    site.data.name("app:v1", new, earlier=[old], media_type=OCI_MANIFEST)
    freeze = Freeze("docker.io/library/app:v1", Digest.of(old), since=0.0)
    site.data.mark(lambda marks: replace(marks, freezes={freeze.name: freeze}))

    assert f"  upstream   {text(new)}" in site.lines("show", "app:v1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("app:v9", "of its repository it has docker.io/library/app:v1"),
        ("missing", "`oci-mirror warm docker.io/library/missing:latest` fetches it"),
    ],
)
def test_image_that_is_not_here_is_a_failure_with_a_remedy(
    filled: Site, name: str, message: str
) -> None:
    code, out, err = filled.run("show", name)

    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_malformed_name_is_wrong_usage(site: Site) -> None:
    assert site.run("show", "APP:v1")[0] == 2
