"""The command line: ``oci-mirror`` and ``python -m mirror``.

Exit codes: 0 all is well, 1 could not serve, 2 usage, 70 a fault of ours, 78 configuration
(``sysexits.h``). Errors are one line on standard error, never a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Final

from mirror import __version__
from mirror.config_load import load
from mirror.oci.errors import ConfigError

EX_SOFTWARE: Final = 70
EX_CONFIG: Final = 78


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EX_CONFIG
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"oci-mirror: {error}", file=sys.stderr)
        # What is still buffered for a stream that is closed must not be tried again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EX_SOFTWARE
    except Exception as error:
        print(f"oci-mirror: {type(error).__name__}: {error}", file=sys.stderr)
        return EX_SOFTWARE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="oci-mirror", description="A pull-through mirror.")
    parser.add_argument("--version", action="version", version=f"oci-mirror {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve until a signal says to stop")
    serve.add_argument("--config", metavar="FILE", help="the configuration (YAML)")
    serve.set_defaults(run=_serve)
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    from mirror.server import run

    return run(load(arguments.config, os.environ))
