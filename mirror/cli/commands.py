"""The table of the commands that have a module of their own.

Lives here: which there are. Must not know: what they do. Each module has ``add_parser(commands)``,
which adds its parsers and sets ``run`` to a function that takes the arguments and returns the exit
code. The modules import what is slow to import inside that function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mirror.cli import (
    completion,
    du,
    explain,
    forget,
    gc,
    history,
    in_use,
    ls,
    marking,
    prune,
    refresh,
    rm,
    savings,
    show,
    verify,
    warm,
)
from mirror.cli.arguments import Commands
from mirror.cli.doctor import command as doctor

ADD_PARSERS: Final[tuple[Callable[[Commands], None], ...]] = (
    completion.add_parser,
    doctor.add_parser,
    du.add_parser,
    explain.add_parser,
    forget.add_parser,
    gc.add_parser,
    history.add_parser,
    in_use.add_parser,
    ls.add_parser,
    marking.add_parser,
    prune.add_parser,
    refresh.add_parser,
    rm.add_parser,
    savings.add_parser,
    show.add_parser,
    verify.add_parser,
    warm.add_parser,
)
"""In the order of ``oci-mirror --help``."""
