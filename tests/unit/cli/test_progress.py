"""Bars of a command that fetches, on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from mirror.cli import progress
from mirror.cli.progress import NoBars, TerminalBars, label_of, open_bars


class Terminal(io.StringIO):
    """A terminal without colours."""

    def isatty(self) -> bool:
        return True


def watch(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal. Not in a fixture: pytest sets it after those."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return made


def test_no_bars_without_a_terminal_or_for_another_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = watch(monkeypatch)
    with open_bars("images", 2, is_shown=False) as bars:
        assert isinstance(bars, NoBars)
        bars.move("a", "a", 1, 2)
        bars.end("a")
        bars.count()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with open_bars("images", 2, is_shown=True) as bars:
        assert isinstance(bars, NoBars)
    assert terminal.getvalue() == ""


def test_each_content_has_a_bar_with_its_bytes_while_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = watch(monkeypatch)
    with open_bars("images", 2, is_shown=True) as bars:
        assert isinstance(bars, TerminalBars)
        bars.move("a", "app:v1 sha256:12", 1024, 4096)
        bars.move("a", "app:v1 sha256:12", 2048, 4096)
        bars.move("b", "app:v1 sha256:34", 5, None)
        bars.count()
        bars.progress.refresh()
        shown = terminal.getvalue()
        bars.end("a")
        bars.end("b")
        bars.end("b")
        assert len(bars.progress.tasks) == 1
    for text in ("images", "1 of 2", "app:v1 sha256:12", "2.0/4.0 KiB", "app:v1 sha256:34"):
        assert text in shown


def test_bars_are_bounded_and_labels_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)
    monkeypatch.setattr(progress, "_MAX_BARS", 3)
    with open_bars("images", 9, is_shown=True) as bars:
        assert isinstance(bars, TerminalBars)
        for number in range(9):
            bars.move(number, f"[red]{number}\x1b", 0, 1)
        assert len(bars.progress.tasks) == 4
        bars.progress.refresh()
    assert "[red]0\\x1b" in terminal.getvalue()


def test_label_has_the_end_of_the_name_and_of_the_digest() -> None:
    label = label_of("docker.io/library/app:v1", "sha256:" + "a" * 64)
    assert label == "app:v1 sha256:aaaaaaaaaaaa"
