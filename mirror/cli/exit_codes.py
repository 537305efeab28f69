"""The exit codes of all commands. Must not know: the commands."""

from __future__ import annotations

from typing import Final

EX_FAILED: Final = 1
"""The command failed, or found a problem (address in use, not healthy, damaged content)."""
EX_USAGE: Final = 2
"""The arguments are wrong (the value that argparse uses)."""
EX_SOFTWARE: Final = 70
"""A fault in our code (``sysexits.h``)."""
EX_IOERR: Final = 74
"""Standard output could not be written (``sysexits.h``)."""
EX_CONFIG: Final = 78
"""The configuration cannot be used (``sysexits.h``)."""
EX_INTERRUPTED: Final = 130
"""Interrupted by the user; 128 plus the number of SIGINT, the value that shells use."""
