"""Arguments that many commands have, and what they mean.

Lives here: ``--config``, ``--json``, image names. Must not know: the commands.
"""

from __future__ import annotations

import argparse
import os
from typing import Any, Final, TypeAlias

from mirror.cli.output import UsageError
from mirror.config.load import DEFAULT_FILE, FILE_VARIABLE, load
from mirror.config.settings import Settings
from mirror.oci.errors import DigestInvalid, InvalidRequest
from mirror.oci.image_name import ImageName

Commands: TypeAlias = "argparse._SubParsersAction[Any]"
"""The object of argparse to which a command adds its parser."""


CONFIG_HELP: Final = (
    f"configuration file (default: ${FILE_VARIABLE}, else {DEFAULT_FILE} if it exists, "
    "else only the environment)"
)
"""Help of ``--config``."""


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add ``--config FILE``. :func:`load_settings` reads it."""
    parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)


def add_config_or_file(parser: argparse.ArgumentParser) -> None:
    """Add ``FILE`` and ``--config FILE``, which mean the same. :func:`config_or_file` reads it."""
    parser.add_argument("file", metavar="FILE", nargs="?", help=CONFIG_HELP)
    # Not the same destination: without FILE, argparse would store its default over the option.
    parser.add_argument("--config", metavar="FILE", help="another way to write FILE")


def config_or_file(arguments: argparse.Namespace) -> str | None:
    """Return the name of the configuration file. None: only the environment.

    Raises :class:`mirror.cli.output.UsageError` if the arguments name two.
    """
    if None not in (arguments.file, arguments.config) and arguments.file != arguments.config:
        raise UsageError("give the configuration file once: FILE or --config FILE")
    return config_file(arguments.file if arguments.config is None else arguments.config)


def config_file(name: str | None) -> str | None:
    """Return the configuration file of a command. None: there is only the environment.

    ``name``: the file that the arguments name. None: they name none.
    """
    default = DEFAULT_FILE if os.path.exists(DEFAULT_FILE) else None
    return name or os.environ.get(FILE_VARIABLE) or default


def load_settings(arguments: argparse.Namespace) -> Settings:
    """Read the configuration of :func:`config_file`, and the environment.

    Raises :class:`mirror.oci.errors.ConfigError`.
    """
    return load(config_file(arguments.config), os.environ)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, as ``is_json``."""
    parser.add_argument(
        "--json", dest="is_json", action="store_true", help="print one JSON object a line"
    )


def image_name(text: str) -> ImageName:
    """Parse an image name: the ``type`` of an argument.

    Raises ``argparse.ArgumentTypeError``, which argparse reports as wrong usage.
    """
    try:
        return ImageName.parse(text)
    except InvalidRequest as error:
        why = error.message
        if isinstance(error, DigestInvalid):
            why += " (`oci-mirror ls --no-trunc` prints them whole)"
        raise argparse.ArgumentTypeError(f"'{text}' is no image name: {why}") from None
