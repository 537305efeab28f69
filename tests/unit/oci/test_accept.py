"""``Accept``: one value for the same media ranges in any order, and the types that it takes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.accept import is_acceptable, parse_accept, variant_of
from mirror.oci.descriptor import DEFAULT_ACCEPT, DOCKER_LIST, OCI_INDEX, OCI_MANIFEST


def test_lines_and_commas_are_read_as_one_list() -> None:
    lines = [f"{OCI_INDEX}, */*", OCI_MANIFEST, f" {OCI_INDEX} ", "text/html;q=0.5"]
    assert parse_accept(lines) == (OCI_INDEX, OCI_MANIFEST, "text/html;q=0.5", "*/*")


def test_order_of_media_ranges_does_not_change_the_result() -> None:
    lines = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, "application/*", "*/*"]
    shuffled = random.Random(7).sample(lines, len(lines))
    assert shuffled != lines
    assert parse_accept(shuffled) == parse_accept(lines)


def test_missing_or_malformed_accept_becomes_the_default() -> None:
    for lines in ([], [""], ["garbage"], ["a/b\r\nHost: x"], ["a/b;x"]):
        assert parse_accept(lines) == DEFAULT_ACCEPT


def test_result_has_at_most_64_media_ranges_and_4096_characters() -> None:
    assert len(parse_accept(f"a/{n}" for n in range(1000))) == 64
    assert len(",".join(parse_accept([f"a/{'b' * 1000}{n}" for n in range(9)]))) <= 4096


@given(st.lists(st.text()))
def test_result_is_printable_ascii_and_parses_to_itself(lines: list[str]) -> None:
    found = parse_accept(lines)
    assert all(item.isascii() and item.isprintable() for item in found)
    if found != DEFAULT_ACCEPT:
        assert parse_accept(found) == found


@pytest.mark.parametrize(
    ("accept", "everything"),
    [
        ((), True),
        (("*/*",), True),
        (DEFAULT_ACCEPT, True),
        ((*DEFAULT_ACCEPT, "application/vnd.docker.distribution.manifest.v1+json"), True),
        ((OCI_MANIFEST, DOCKER_LIST), False),
        ((OCI_MANIFEST, "*/*"), False),
    ],
)
def test_variant_is_empty_for_clients_that_take_every_manifest(
    accept: tuple[str, ...], everything: bool
) -> None:
    assert (variant_of(accept) == "") is everything
    assert variant_of(accept) == variant_of(tuple(reversed(accept)))


@pytest.mark.parametrize(
    ("accept", "taken"),
    [
        ((), True),
        (("*/*",), True),
        (("application/*",), True),
        ((OCI_MANIFEST,), True),
        ((f"{OCI_MANIFEST.upper()};q=0.5",), True),
        (("text/*", OCI_INDEX), False),
    ],
)
def test_accepts_follows_types_and_wildcards_of_the_accept_header(
    accept: tuple[str, ...], taken: bool
) -> None:
    assert is_acceptable(accept, OCI_MANIFEST) is taken
