"""Which columns of a table fit on a terminal, and what becomes of texts that are too long."""

from __future__ import annotations

import pytest

from mirror.cli.table_layout import (
    Column,
    choose_layout,
    familiar_names,
    short_digests,
    shorten,
    wrap,
)

DIGEST = f"sha256:{'ab' * 32}"
NAME = Column("NAME", "name", min_chars=8)
SIZE = Column("SIZE", "size", is_number=True)
WHY = Column("WHY", "why", min_chars=10, is_sentence=True)
CELLS = [["docker.io/library/nginx:1.27", "a"], ["71.2MiB", "0B"], ["used 2 min ago", "-"]]


def lines(width: int) -> list[str]:
    layouts = [((NAME, SIZE, WHY), CELLS), ((NAME, SIZE), CELLS[:2])]
    return list(choose_layout(layouts, width).lines("…"))


def test_table_that_fits_is_whole() -> None:
    assert lines(80) == [
        "NAME                             SIZE  WHY",
        "docker.io/library/nginx:1.27  71.2MiB  used 2 min ago",
        "a                                  0B  -",
    ]


def test_names_are_shortened_in_the_middle_and_sentences_continue() -> None:
    assert lines(32) == [
        "NAME           SIZE  WHY",
        "doc…x:1.27  71.2MiB  used",
        "                     2 min ago",
        "a                0B  -",
    ]


def test_last_columns_are_left_out_only_if_the_others_cannot_give_more() -> None:
    assert lines(26)[0].split() == ["NAME", "SIZE"]


@pytest.mark.parametrize("width", range(17, 80))
def test_no_line_is_wider_than_the_terminal_and_no_size_is_broken(width: int) -> None:
    found = lines(width)
    assert max(map(len, found)) <= width
    assert any("71.2MiB" in line for line in found)


@pytest.mark.parametrize("width", range(20, 40))
def test_digest_of_a_name_is_left_whole(width: int) -> None:
    name = f"docker.io/library/nginx@{short_digests(DIGEST)}"
    assert shorten(name, width + 2, "…").endswith("@sha256:abababababab")


def test_texts_have_12_digits_of_each_digest() -> None:
    assert short_digests(f"part of app@{DIGEST}, {DIGEST}") == (
        "part of app@sha256:abababababab, sha256:abababababab"
    )


@pytest.mark.parametrize(
    ("name", "familiar"),
    [
        ("docker.io/library/nginx:1.27", "nginx:1.27"),
        ("docker.io/team/app:v1, docker.io/library/a:1", "team/app:v1, a:1"),
        ("ghcr.io/docker.io/app", "ghcr.io/docker.io/app"),
        ("docker.io", "docker.io"),
    ],
)
def test_names_of_docker_hub_are_as_users_write_them(name: str, familiar: str) -> None:
    assert familiar_names(name) == familiar


def test_line_is_broken_at_blanks_but_not_before_a_unit() -> None:
    assert wrap("it took 12 s to send", 10, "…") == ["it took", "12 s to", "send"]
