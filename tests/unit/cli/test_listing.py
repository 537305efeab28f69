"""Tables: for a terminal, for other programs, and as JSON."""

from __future__ import annotations

import io
import json
import sys

import pytest

from mirror.cli import listing
from mirror.cli.table_layout import Column, short_digests
from mirror.oci.text import size_text

COLUMNS = (Column("NAME", "name"), Column("SIZE", "size", size_text, is_number=True))
ROWS = ({"name": "a", "size": 1536}, {"name": "longer", "size": None})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    listing.print_rows(COLUMNS, ROWS, is_json=False)

    assert capsys.readouterr().out == ("NAME      SIZE\na       1.5KiB\nlonger       -\n")


def test_json_has_one_object_a_line_with_the_values_of_the_row(
    capsys: pytest.CaptureFixture[str],
) -> None:
    listing.print_rows(COLUMNS, ROWS, is_json=True)

    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == list(ROWS)


def test_empty_listing_has_its_titles_and_no_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    listing.print_rows(COLUMNS, (), is_json=False)
    assert capsys.readouterr().out == "NAME  SIZE\n"
    listing.print_rows(COLUMNS, (), is_json=True)
    assert capsys.readouterr().out == ""


def test_terminal_gets_a_table_and_cells_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)

    listing.print_rows(COLUMNS, [{"name": "[red]x[/red]\x1b[2J", "size": 3}], is_json=False)

    assert "[red]x[/red]\\x1b[2J" in terminal.getvalue()
    assert "NAME" in terminal.getvalue()


def test_time_is_read_back_as_an_age() -> None:
    assert listing.since_text(1_767_323_045 + 7200)("2026-01-02T03:04:05Z") == "2 h ago"


def test_digest_is_cut_as_docker_does() -> None:
    assert short_digests(f"sha256:{'ab' * 32}") == "sha256:abababababab"
