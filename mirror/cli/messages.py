"""Messages of the mirror's packages, for a command that uses them without a server.

Lives here: which of them a person sees, as lines on standard error. Must not know: the commands.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from mirror.cli.output import OutputError, print_note
from mirror.observability.events import Event, LogMessage
from mirror.oci.text import printable

_SHOWN_LEVELS: Final = frozenset({"warning", "error"})
_MAX_CHARS: Final = 500
"""Characters of one message, which is one line."""


def print_fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Print an error of a background task as one line: a handler of the event loop.

    A command that waits for the task raises the error, too. What says only that the output cannot
    be written is not printed here.
    """
    error = context.get("exception")
    if not isinstance(error, OutputError):
        why = "" if error is None else f": {type(error).__name__}: {error}"
        print_note(printable(f"internal fault: {context['message']}{why}", _MAX_CHARS))


def print_warnings(event: Event) -> None:
    """Print a warning or an error. Any other event is dropped: it is for metrics, or for a log."""
    if isinstance(event, LogMessage) and event.level in _SHOWN_LEVELS:
        fields = ", ".join(f"{name}={value}" for name, value in event.fields)
        text = f"{event.level}: {event.message}{f' ({fields})' if fields else ''}"
        print_note(printable(text, _MAX_CHARS))
