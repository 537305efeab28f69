"""Lines on standard output and standard error.

Lives here: printing, and the exceptions with which a command ends as one line. Must not know: what
is printed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path

from mirror.cli.exit_codes import EX_FAILED


class UsageError(Exception):
    """The arguments contradict each other. The text says which."""


class OutputError(Exception):
    """Standard output cannot be written: it is closed, or its disk is full."""


class CommandFailed(Exception):
    """A command failed. The text is one line, with the remedy.

    ``code``: the exit code, of :mod:`mirror.cli.exit_codes`.
    """

    def __init__(self, message: str, code: int = EX_FAILED) -> None:
        super().__init__(message)
        self.code = code


def print_line(text: str) -> None:
    """Print a line on standard output. Raises :class:`OutputError`."""
    if sys.stdout is None:
        raise OutputError("it is closed")
    try:
        sys.stdout.write(f"{text}\n")
    except OSError as error:
        raise OutputError(error.strerror) from None


def print_note(text: str) -> None:
    """Print a line on standard error, after ``oci-mirror: ``.

    A closed or full standard error changes no exit code.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"oci-mirror: {text}", file=sys.stderr, flush=True)


def print_failure(subject: object, why: str) -> None:
    """Print why something failed, on standard error. The subject is named once."""
    name = str(subject)
    print_note(why if why.startswith(name) else f"{name}: {why}")


def flush() -> None:
    """Write what is buffered for standard output. Raises :class:`OutputError`."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError as error:
            raise OutputError(error.strerror) from None


def discard_output() -> None:
    """Drop text that a stream did not accept: Python would try again at exit, with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def describe_fault(error: Exception) -> str:
    """Return the place and the text of an exception that is a fault in our code."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"internal fault{where}: {type(error).__name__}: {error}"
