"""The text of an error, for people."""

from __future__ import annotations

import sqlite3

import pytest

from mirror.oci.errors import ConfigError, error_text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (sqlite3.OperationalError("database or disk is full"), "database or disk is full"),
        (PermissionError(13, "Permission denied", "/data"), "/data: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ConfigError("admin.token_file: it is empty"), "admin.token_file: it is empty"),
        (KeyError("tag"), "KeyError: 'tag'"),
        (ValueError(), "ValueError"),
    ],
)
def test_class_is_named_only_for_errors_of_the_program_itself(error: Exception, text: str) -> None:
    assert error_text(error) == text
