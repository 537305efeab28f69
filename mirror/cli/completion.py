"""``completion``: print the completion of all commands and options for a shell.

Lives here: which options name files. Must not know: the shells (shtab does), the other commands.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Final

from mirror.cli.arguments import Commands
from mirror.cli.output import print_line

SHELLS: Final = ("bash", "zsh", "fish")
"""Shells for which a completion is printed."""
_FILE_PLACEHOLDERS: Final = frozenset({"FILE", "LIST"})
"""Placeholders (``metavar``) of arguments that are files."""
_DIRECTORY_PLACEHOLDERS: Final = frozenset({"DIR", "DIRS"})
"""Placeholders of arguments that are directories."""


def add_parser(commands: Commands) -> None:
    """Add ``completion``."""
    parser = commands.add_parser(
        "completion",
        help="print the completion for bash, zsh or fish",
        description="Prints a script. bash: write it to "
        "~/.local/share/bash-completion/completions/oci-mirror. zsh: write it to a file "
        "_oci-mirror in a directory of $fpath. fish: write it to "
        "~/.config/fish/completions/oci-mirror.fish.",
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
    parser.set_defaults(run=print_completion)


def print_completion(arguments: argparse.Namespace) -> int:
    """Print the completion of ``arguments.whole_parser()``, which ``main`` sets."""
    # Imported here: no other command needs it.
    import shtab

    parser: argparse.ArgumentParser = arguments.whole_parser()
    kinds = {
        **dict.fromkeys(_FILE_PLACEHOLDERS, shtab.FILE),
        **dict.fromkeys(_DIRECTORY_PLACEHOLDERS, shtab.DIRECTORY),
    }
    for action in _actions(parser):
        kind = kinds.get(str(action.metavar))
        if kind is not None:
            action.complete = kind  # type: ignore[attr-defined]  # shtab reads it
    print_line(shtab.complete(parser, shell=arguments.shell).rstrip("\n"))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser, and of the commands below it."""
    for action in parser._actions:  # argparse has no public list
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):
                yield from _actions(child)
