"""Tell a closed terminal from a request to reload: both are ``SIGHUP``.

Lives here: whether a terminal is gone. Must not know: signals, what the process does about it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

_STANDARD_STREAMS: Final = (0, 1, 2)
"""Descriptors of the standard input, output and error (stdin(3))."""


def watch_terminal() -> Callable[[], bool]:
    """Return a function that says whether the terminal that the process has now was closed.

    It is False for ever if no standard stream is a terminal. ``isatty`` of a terminal that was
    closed fails (tty_ioctl(4): EIO).
    """
    terminals = [fd for fd in _STANDARD_STREAMS if os.isatty(fd)]
    return lambda: not all(map(os.isatty, terminals))
