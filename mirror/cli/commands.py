"""The table of the commands that have a module of their own.

Lives here: which there are. Must not know: what they do. Each module has ``add_parser(commands)``,
which adds its parsers and sets ``run`` to a function that takes the arguments and returns the exit
code. Only the module of the command that runs is imported, and it imports what is slow to import
inside that function: so ``oci-mirror ls`` answers within 0.3 s.
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

from mirror.cli.arguments import Commands

MODULES: Final = {
    **dict.fromkeys(("backup", "restore"), "backup"),
    "clients": "clients_command",
    "completion": "completion",
    "doctor": "doctor.command",
    "du": "du",
    "explain": "explain",
    "forget": "forget",
    "gc": "gc",
    "history": "history",
    "in-use": "in_use",
    "ls": "ls",
    **dict.fromkeys(
        ("pin", "unpin", "block", "unblock", "freeze", "unfreeze", "rollback"), "marking"
    ),
    "prune": "prune",
    "refresh": "refresh",
    "rm": "rm",
    "savings": "savings",
    "show": "show",
    "verify": "verify",
    "warm": "warm",
}
"""Command -> its module below ``mirror.cli``, in the order of ``oci-mirror --help``."""


def add_parsers(commands: Commands, name: str | None) -> None:
    """Add the parser of a command, and those of its module. All, if ``name`` is none of them."""
    modules = [MODULES[name]] if name in MODULES else dict.fromkeys(MODULES.values())
    for module in modules:
        import_module(f"mirror.cli.{module}").add_parser(commands)
