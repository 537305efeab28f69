"""Lines on standard output and standard error (full and closed ones: ``test_main.py``)."""

from __future__ import annotations

import sys

import pytest

from mirror.cli.exit_codes import EX_FAILED, EX_USAGE
from mirror.cli.output import CommandFailed, OutputError, flush, print_line, print_note


def test_closed_standard_output_is_an_error_and_closed_standard_error_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    with pytest.raises(OutputError, match="it is closed"):
        print_line("x")
    flush()
    print_note("x")


def test_note_names_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    print_note("warning: x")

    assert capsys.readouterr() == ("", "oci-mirror: warning: x\n")


def test_failure_has_an_exit_code() -> None:
    assert CommandFailed("x").code == EX_FAILED
    assert CommandFailed("x", EX_USAGE).code == EX_USAGE
