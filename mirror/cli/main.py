"""The command line: ``oci-mirror`` and ``python -m mirror``.

Lives here: the commands, their arguments, and their exit codes. A failure is one line on standard
error, never a traceback. Must not know: how a command does its work.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

from mirror import __version__
from mirror.cli.arguments import add_config_or_file, config_or_file
from mirror.cli.commands import add_parsers
from mirror.cli.exit_codes import (
    EX_CONFIG,
    EX_FAILED,
    EX_INTERRUPTED,
    EX_IOERR,
    EX_SOFTWARE,
    EX_USAGE,
)
from mirror.cli.output import (
    CommandFailed,
    OutputError,
    UsageError,
    describe_fault,
    discard_output,
    flush,
    print_line,
    print_note,
)
from mirror.config.load import ValueOrigins, load, load_with_origins
from mirror.config.settings import Settings
from mirror.oci.disk_failures import disk_failure_text
from mirror.oci.errors import ConfigError, InvalidRequest, MirrorError
from mirror.oci.text import printable

if TYPE_CHECKING:
    from mirror.processes import CannotListen

_EPILOG: Final = (
    "exit codes: 0 success, 1 failure (also: a problem was found), 2 wrong usage, 70 internal "
    "fault, 74 the output could not be written, 78 configuration cannot be used, 130 interrupted"
)
_MAX_MESSAGE_CHARS: Final = 2000
"""Characters of a message on standard error: one line that a terminal can show."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. ``argv``: None is ``sys.argv``. Raises nothing."""
    try:
        code = _run(argv)
        flush()
    except OutputError as error:
        code = _fail(f"the output could not be written: {error}", EX_IOERR)
    except UsageError as error:
        code = _fail(str(error), EX_USAGE)
    except CommandFailed as error:
        code = _fail(str(error), error.code)
    except ConfigError as error:
        for line in error.lines:
            code = _fail(line, EX_CONFIG)
    except InvalidRequest as error:  # A name or a digest of the arguments.
        code = _fail(error.message, EX_USAGE)
    except MirrorError as error:
        code = _fail(error.message, EX_FAILED)
    except OSError as error:
        code = _fail(disk_failure_text(error), EX_FAILED)
    except KeyboardInterrupt:
        code = EX_INTERRUPTED
    except Exception as error:
        code = _fail(describe_fault(error), EX_SOFTWARE)
    discard_output()
    return code


def _run(argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = _parser(words[0] if words else None)
    if words and not words[0].startswith("-") and words[0] not in parser.commands:
        raise UsageError(_describe_unknown(words[0], parser.commands))
    try:
        arguments = parser.parse_args(words)
    except SystemExit as stop:  # argparse: --help and --version (0), usage (2)
        return stop.code if isinstance(stop.code, int) else EX_USAGE
    code: int = arguments.run(arguments)
    return code


def _describe_unknown(word: str, commands: Collection[str]) -> str:
    import difflib  # Imported here: no other command line needs it.

    near = difflib.get_close_matches(word, commands, n=1)
    hint = f": did you mean {near[0]}?" if near else ""
    return f"'{word}' is no command{hint} (oci-mirror --help lists all)"


def _fail(text: str, code: int) -> int:
    """Print why a command failed, as one line, and return its exit code."""
    print_note(printable(text, _MAX_MESSAGE_CHARS))
    return code


# --- commands -------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose help fails if standard output cannot be written. argparse ignores that.

    Its errors have no control characters: they repeat what was given.
    """

    commands: Sequence[str] = ()
    """The commands that it knows."""

    def print_help(self, file: object = None) -> None:
        """Print the help. Raises :class:`mirror.cli.output.OutputError`."""
        print_line(self.format_help().rstrip("\n"))

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with 2."""
        super().error(printable(message, _MAX_MESSAGE_CHARS))


class _PrintVersion(argparse.Action):
    """``--version``, with the same check of standard output."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print_line(f"oci-mirror {__version__}")
        parser.exit()


def _parser(name: str | None = None) -> _Parser:
    """Return the parser. ``name``: the command to parse, if it is one. Otherwise it has all."""
    parser = _Parser(
        prog="oci-mirror",
        description="A pull-through mirror for container registries.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version")
    parser.set_defaults(whole_parser=_parser)  # For `completion`.
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="run the server",
        description="Runs the server until SIGTERM, SIGINT or SIGQUIT. SIGHUP reads the "
        "configuration again.",
    )
    add_config_or_file(serve)
    serve.set_defaults(run=_serve)

    checking = commands.add_parser(
        "check-config",
        help="validate a configuration and print the effective settings",
        description="Reads FILE and the environment as `serve` does, checks the files that "
        "they name, and prints what differs from the defaults, without secrets.",
    )
    add_config_or_file(checking)
    checking.add_argument(
        "--online",
        action="store_true",
        help="ask each endpoint once, and print the results in place of the configuration",
    )
    checking.add_argument(
        "--all", dest="is_all", action="store_true", help="print the keys with their defaults, too"
    )
    checking.set_defaults(run=_check_config)

    describing = commands.add_parser(
        "schema",
        help="print the JSON Schema of the configuration",
        description="Prints the JSON Schema of the configuration file, for editors.",
    )
    describing.set_defaults(run=_schema)

    healthy = commands.add_parser(
        "healthcheck", help="check the health of the server on this machine"
    )
    add_config_or_file(healthy)
    healthy.add_argument("--url", help="URL to request (default: the configured address)")
    healthy.set_defaults(run=_healthcheck)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    if name not in commands.choices:
        add_parsers(commands, name)
    # argparse lists them as they were added: here by module.
    commands._choices_actions.sort(key=lambda action: action.dest)
    parser.commands = sorted(commands.choices)
    return parser


def _check(settings: Settings, origins: ValueOrigins, *, has_logins: bool) -> None:
    """Check what the configuration names, and print the warnings."""
    # Imported here: its checks need aiohttp, which takes half of the start of a command.
    from mirror.cli import check

    check.check_environment(settings, origins.prefix, has_logins=has_logins)
    for warning in check.warnings(settings, origins.prefix, has_logins=has_logins):
        print_note(f"warning: {warning}")


def _serve(arguments: argparse.Namespace) -> int:
    def load_checked() -> Settings:
        settings, origins = load_with_origins(config_or_file(arguments), os.environ)
        # Secrets are read at each use, so they may be written after the server has started.
        _check(settings, origins, has_logins=False)
        return settings

    settings = load_checked()
    # Imported here: no other command needs it, and its prometheus_client reads the environment.
    from mirror import processes

    try:
        return processes.run(settings, load_checked)
    except processes.CannotListen as error:
        raise CommandFailed(_describe_listen_failure(settings, error)) from None


def _describe_listen_failure(settings: Settings, error: CannotListen) -> str:
    """Return why the server cannot listen, and what to do."""
    if not error.is_in_use:
        return str(error)
    # Imported here: its HTTP client is slow to import.
    from mirror.cli.health import own_url
    from mirror.cli.own_server import OwnServer

    program = "another program"
    with suppress(OSError, ValueError):
        url = own_url(error.address, has_tls=settings.tls is not None)
        if OwnServer(url.removesuffix("/healthz")).get("/healthz").is_ours:
            program = "an oci-mirror"
    return (
        f"{error.key}: {error.address}: {program} listens there already (ss -ltnp shows its "
        f"process): stop it, or change {error.key}"
    )


def _check_config(arguments: argparse.Namespace) -> int:
    settings, origins = load_with_origins(config_or_file(arguments), os.environ)
    _check(settings, origins, has_logins=True)
    if arguments.online:
        # Imported here: no other command connects to upstreams without a server.
        from mirror.cli.online import ask_endpoints

        results = ask_endpoints(settings)
        for result in results:
            print_line(result.text)
        return 0 if all(result.is_good for result in results) else EX_FAILED
    # Imported here, as in `_check`.
    from mirror.cli.check import effective

    if not arguments.is_all:
        print_line("# Without the keys that have their defaults. All keys: --all")
    print_line(effective(settings, has_defaults=arguments.is_all).rstrip("\n"))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    # Imported here, as in `_check`.
    from mirror.cli.schema import schema_text

    print_line(schema_text())
    return 0


def _healthcheck(arguments: argparse.Namespace) -> int:
    # Imported here: its HTTP client is slow to import.
    from mirror.cli import health

    url = arguments.url
    if url is None:
        file = config_or_file(arguments)
        settings = load(file, os.environ) if file else None
        try:
            url = health.health_url(settings, os.environ)
        except ValueError as error:
            raise ConfigError(f"OCI_MIRROR_LISTEN: {error}") from None
    reason = health.check_health(url)
    if reason is not None:
        return _fail(f"{url}: {reason}", EX_FAILED)
    print_line("healthy")
    return 0


def _version(arguments: argparse.Namespace) -> int:
    print_line(f"oci-mirror {__version__}")
    return 0
