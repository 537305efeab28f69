"""The table of the commands that have a module of their own.

Lives here: which there are. Must not know: what they do. Each module has ``add_parser(commands)``,
which adds its parsers and sets ``run`` to a function that takes the arguments and returns the exit
code. The modules import what is slow to import inside that function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mirror.cli import explain, history, in_use, marking, savings
from mirror.cli.arguments import Commands

ADD_PARSERS: Final[tuple[Callable[[Commands], None], ...]] = (
    marking.add_parser,
    in_use.add_parser,
    explain.add_parser,
    history.add_parser,
    savings.add_parser,
)
"""In the order of ``oci-mirror --help``."""
