"""Messages of the mirror's packages, for a command that uses them without a server.

Lives here: which of them a person sees, as lines on standard error. Must not know: the commands.
"""

from __future__ import annotations

from typing import Final

from mirror.cli.output import print_note
from mirror.observability.events import Event, LogMessage
from mirror.oci.text import printable

_SHOWN_LEVELS: Final = frozenset({"warning", "error"})
_MAX_CHARS: Final = 500
"""Characters of one message, which is one line."""


def print_warnings(event: Event) -> None:
    """Print a warning or an error. Any other event is dropped: it is for metrics, or for a log."""
    if isinstance(event, LogMessage) and event.level in _SHOWN_LEVELS:
        fields = ", ".join(f"{name}={value}" for name, value in event.fields)
        text = f"{event.level}: {event.message}{f' ({fields})' if fields else ''}"
        print_note(printable(text, _MAX_CHARS))
