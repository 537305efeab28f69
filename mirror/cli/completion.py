"""``completion``: print the completion of all commands and options for a shell.

Lives here: which options name files. Must not know: the shells (shtab does), the other commands.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Final

from mirror import __version__
from mirror.cli.arguments import Commands
from mirror.cli.output import print_line

SHELLS: Final = {
    "bash": "~/.local/share/bash-completion/completions/oci-mirror",
    "zsh": "~/.zfunc/_oci-mirror",
    "fish": "~/.config/fish/completions/oci-mirror.fish",
}
"""Shell -> where its completion is usually written."""
_SHTAB_HEADER: Final = re.compile(r"^# AUTOMATICALLY GENERATED .*\n(?:#.*\n)*", re.MULTILINE)
"""The header of shtab. It names other files than our documents do."""
_FILE_PLACEHOLDERS: Final = frozenset({"FILE", "LIST"})
"""Placeholders (``metavar``) of arguments that are files."""
_DIRECTORY_PLACEHOLDERS: Final = frozenset({"DIR", "DIRS"})
"""Placeholders of arguments that are directories."""


def add_parser(commands: Commands) -> None:
    """Add ``completion``."""
    parser = commands.add_parser(
        "completion",
        help="print the completion for bash, zsh or fish",
        description="Prints a script that completes commands, options, files, and values of a "
        "fixed set; names of images are not completed. Write it to "
        + ", ".join(f"{path} ({shell})" for shell, path in SHELLS.items())
        + ". zsh also needs fpath=(~/.zfunc $fpath) in ~/.zshrc.",
    )
    parser.add_argument("shell", metavar="SHELL", choices=list(SHELLS), help=", ".join(SHELLS))
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
    shell: str = arguments.shell
    header = (
        f"# Completion of oci-mirror {__version__} for {shell}, made by oci-mirror completion.\n"
        f"# Write it to {SHELLS[shell]} and start a new shell.\n"
    )
    script = shtab.complete(parser, shell=shell).rstrip("\n")
    print_line(_SHTAB_HEADER.sub(lambda match: header, script, count=1))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser, and of the commands below it."""
    for action in parser._actions:  # argparse has no public list
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):
                yield from _actions(child)
