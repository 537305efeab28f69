"""Tell a closed terminal from a request to reload: both are ``SIGHUP``.

Lives here: whether a terminal is gone. Must not know: signals, what the process does about it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

_STDOUT: Final = 1
"""Descriptor of the standard output (stdin(3)). A server in the background may still have a
terminal as its standard input: it goes on, and is told to reload."""


def watch_terminal() -> Callable[[], bool]:
    """Return a function that says whether the terminal on which the process writes was closed.

    It is False for ever if the standard output is no terminal now. ``isatty`` of a terminal that
    was closed fails (tty_ioctl(4): EIO).
    """
    is_on_terminal = os.isatty(_STDOUT)
    return lambda: is_on_terminal and not os.isatty(_STDOUT)
