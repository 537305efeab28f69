"""The settings of prefetch."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.config.load import load
from mirror.config.prefetch import Prefetch
from mirror.oci.errors import ConfigError

UPSTREAMS = "upstreams: {docker.io: {endpoints: [https://r.example]}}\n"


def read(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> tuple[Prefetch, ...]:
    path = tmp_path / "m.yaml"
    path.write_text(UPSTREAMS + text)
    return load(str(path), environ or {}).prefetch


def test_entries_are_read_from_the_file(tmp_path: Path) -> None:
    text = (
        "prefetch:\n"
        "- images: [nginx, 'docker.io/library/a*']\n"
        "  tags: '>=1.2 <2'\n"
        "  newest: 3\n"
        "  platforms: [linux/amd64]\n"
        "  referrers: true\n"
        "  interval: 1d\n"
        "- images: [alpine:3.20]\n"
    )
    first, second = read(tmp_path, text)
    assert first.images == ("nginx", "docker.io/library/a*")
    assert (first.tags, first.newest, first.interval) == (">=1.2 <2", 3, 86400.0)
    assert (first.platforms, first.referrers) == (("linux/amd64",), True)
    assert (second.tags, second.newest, second.interval) == (None, None, 21600.0)
    assert second.upstreams() == ("docker.io",)


def test_entries_are_read_from_a_variable_as_json(tmp_path: Path) -> None:
    environ = {"OCI_MIRROR_PREFETCH": '[{"images": ["nginx"], "newest": 2}]'}
    (entry,) = read(tmp_path, "", environ)
    assert (entry.images, entry.newest) == (("nginx",), 2)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{images: []}", "prefetch[0].images: must not be empty"),
        ("{images: [A/B]}", "prefetch[0].images[0]: 'A/B': is no image name"),
        ("{images: ['a*']}", "must begin with its registry"),
        ("{images: ['*.io/a']}", "must begin with its registry"),
        ("{images: ['docker.io/a*:v1']}", "by the key tags"),
        ("{images: ['quay.io/o/a']}", "quay.io is not one of upstreams"),
        ("{images: ['quay.io/o/*']}", "quay.io is not one of upstreams"),
        ("{images: ['a:1'], newest: 2}", "names one image already"),
        ("{images: [a], tags: '>=1 <two'}", "neither a range nor a pattern"),
        ("{images: [a], newest: 0}", "greater than or equal to 1"),
        ("{images: [a], platforms: [linux]}", "not a platform"),
        ("{images: [a], interval: 59s}", "at least 1m"),
        ("{images: [a], interval: 0}", "must"),
        ("{images: [a], tag: '1'}", "prefetch[0].tag: '1': unknown key"),
        ("{tags: '1'}", "prefetch[0].images: is missing"),
    ],
)
def test_mistake_is_one_line_that_names_the_key(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"prefetch: [{entry}]\n")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
