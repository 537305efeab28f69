"""The command line: ``oci-mirror`` and ``python -m mirror``.

Lives here: the commands, their arguments, and what a failure looks like: one line on standard
error, never a traceback. Must not know: how a command does its work.

Exit codes: see ``EPILOG``; 70, 74 and 78 are those of ``sysexits.h``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mirror import __version__
from mirror.cli import check, clients, health, schema
from mirror.config.load import load
from mirror.config.values import split_host
from mirror.oci.errors import ConfigError, MirrorError
from mirror.oci.text import printable

EX_FAILED: Final = 1
EX_USAGE: Final = 2
EX_SOFTWARE: Final = 70
EX_IOERR: Final = 74
EX_CONFIG: Final = 78
EX_INTERRUPTED: Final = 130
EPILOG: Final = (
    "exit codes: 0 all is well, 1 it could not be done (address taken, not healthy, a file is in "
    "the way), 2 usage, 70 a fault of ours, 74 the output could not be written, 78 configuration"
)


class _Output(Exception):
    """Standard output takes nothing: closed, or its disk is full."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Raises nothing."""
    try:
        code = _run(argv)
        _flush()
    except _Output as error:
        code = _fail(f"the output could not be written: {error}", EX_IOERR)
    except ConfigError as error:
        code = _fail(str(error), EX_CONFIG)
    except MirrorError as error:
        code = _fail(error.message, EX_FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        code = _fail(f"{where}{error.strerror or error}", EX_FAILED)
    except KeyboardInterrupt:
        code = EX_INTERRUPTED
    except Exception as error:
        code = _fail(_fault(error), EX_SOFTWARE)
    _discard_output()
    return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse: --help and --version (0), usage (2)
        return stop.code if isinstance(stop.code, int) else EX_USAGE
    code: int = arguments.run(arguments)
    return code


def _fault(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"internal fault{where}: {type(error).__name__}: {error}"


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"oci-mirror: {text}", file=sys.stderr, flush=True)


def _fail(text: str, code: int) -> int:
    _say(printable(text, 2000))
    return code


def _print(text: str) -> None:
    if sys.stdout is None:
        raise _Output("it is closed")
    try:
        sys.stdout.write(f"{text}\n")
    except OSError as error:
        raise _Output(error.strerror) from None


def _flush() -> None:
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError as error:
            raise _Output(error.strerror) from None


def _discard_output() -> None:
    """What no stream took must not be tried again, with a traceback, when the process ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


# --- commands -------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse's own printing is silent where standard output takes nothing."""

    def print_help(self, file: object = None) -> None:
        _print(self.format_help().rstrip("\n"))


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        _print(f"oci-mirror {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="oci-mirror",
        description="A pull-through mirror for container registries.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve until a signal says to stop")
    _config(serve)
    serve.set_defaults(run=_serve)

    checking = commands.add_parser(
        "check-config",
        help="say what is wrong with a configuration, or print what it comes to",
        description="Reads FILE and the environment as `serve` does, looks for the files that they "
        "name, and prints the whole configuration without secrets.",
    )
    checking.add_argument("file", metavar="FILE")
    checking.set_defaults(run=_check_config)

    configure = commands.add_parser(
        "clients",
        help="print or write the files that clients need",
        description="Without --write, prints them. Notes go to standard error.",
    )
    _config(configure)
    configure.add_argument("--mirror", metavar="URL", help="where clients reach the mirror")
    configure.add_argument("--client", choices=(*clients.CLIENTS, "all"), default="all")
    configure.add_argument(
        "--ca", metavar="FILE", help="the authority (PEM) of an https:// mirror, at its path there"
    )
    configure.add_argument(
        "--write", metavar="DIR", type=Path, help="write below DIR, which stands for /etc"
    )
    configure.set_defaults(run=_clients)

    describing = commands.add_parser(
        "schema",
        help="print the JSON Schema of the configuration",
        description="Prints the JSON Schema of the configuration file, for editors.",
    )
    describing.set_defaults(run=_schema)

    healthy = commands.add_parser("healthcheck", help="ask the server here whether it is healthy")
    _config(healthy)
    healthy.add_argument("--url", help="ask there (default: where it is configured to listen)")
    healthy.set_defaults(run=_healthcheck)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help="the configuration (default: the environment only)"
    )


def _serve(arguments: argparse.Namespace) -> int:
    settings = load(arguments.config, os.environ)
    # Secrets are read at each use, and may come later than the server.
    check.check_here(settings, secrets=False)
    # Imported late: no other command needs it, and prometheus_client reads its environment then.
    from mirror.server import run

    return run(settings)


def _check_config(arguments: argparse.Namespace) -> int:
    settings = load(arguments.file, os.environ)
    check.check_here(settings)
    for warning in check.warnings(settings):
        _say(f"warning: {warning}")
    _print(check.effective(settings).rstrip("\n"))
    return 0


def _clients(arguments: argparse.Namespace) -> int:
    settings = load(arguments.config, os.environ)
    if arguments.mirror is None and split_host(settings.listen)[0] in health.EVERYWHERE:
        return _fail(f"--mirror is needed: it listens on {settings.listen}", EX_USAGE)
    scheme = "https" if settings.tls else "http"
    own = f"{scheme}://{settings.listen}"
    url = own if arguments.mirror is None else arguments.mirror
    ca = Path(arguments.ca).absolute() if arguments.ca else None
    try:
        authority = ca.read_text(encoding="utf-8") if ca else ""
        if ca and "-----BEGIN CERTIFICATE-----" not in authority:
            raise ValueError(f"{ca} holds no certificate (PEM)")
        mirror = clients.Mirror.parse(url, str(ca) if ca else None, authority)
    except ValueError as error:
        return _fail(f"--mirror '{url}': {error}", EX_USAGE)
    chosen = clients.CLIENTS if arguments.client == "all" else (arguments.client,)
    setups = {
        client: clients.setup(client, mirror, settings.upstreams, settings.default_upstream)
        for client in chosen
    }
    files = [file for setup in setups.values() for file in setup.files]
    if arguments.write is not None:
        try:
            for path, changed in clients.write(arguments.write, files):
                _print(f"{path}{'' if changed else ' (as it was)'}")
        except FileExistsError as error:
            return _fail(str(error), EX_FAILED)
    else:
        for file in files:
            # A single file is printed bare, so that it can be piped to where it belongs.
            if len(files) > 1:
                _print(f"# /etc/{file.path}")
            _print(file.text)
    for client, setup in setups.items():
        for note in setup.notes:
            _say(f"{client}: {note}")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    _print(schema.schema_text())
    return 0


def _healthcheck(arguments: argparse.Namespace) -> int:
    url = arguments.url
    if url is None:
        settings = load(arguments.config, os.environ) if arguments.config else None
        try:
            url = health.default_url(settings, os.environ)
        except ValueError as error:
            raise ConfigError(f"OCI_MIRROR_LISTEN: {error}") from None
    why = health.ask(url)
    if why is not None:
        return _fail(f"{url}: {why}", EX_FAILED)
    _print("healthy")
    return 0


def _version(arguments: argparse.Namespace) -> int:
    _print(f"oci-mirror {__version__}")
    return 0
