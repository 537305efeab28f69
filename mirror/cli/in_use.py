"""``in-use``: lease what nodes use, from the pods of a cluster or from a list.

Lives here: the arguments. Must not know: what it does (:mod:`mirror.cli.in_use_command`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from mirror.cli.arguments import Commands, add_config, add_json
from mirror.cli.cleaning import duration
from mirror.cli.output import UsageError

_MAX_LEASE_S: Final = 10 * 365 * 86400.0
"""Seconds of the longest lease (ten years): what should stay for ever is pinned."""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "in-use",
        help="keep what nodes use through every eviction, for as long as a lease lasts",
        description="Leases the images of a list, in place of the earlier leases of the same "
        "source. Run it again before they end, such as every hour. Without a list, prints the "
        "leases in force.",
    )
    add_config(parser)
    add_json(parser)
    lists = parser.add_mutually_exclusive_group()
    lists.add_argument(
        "--from-kubernetes",
        action="store_true",
        help="the images of all pods of a cluster (in a pod: of its own cluster)",
    )
    lists.add_argument(
        "--file", metavar="LIST", help="images or digests, one a line (-: standard input)"
    )
    lists.add_argument("--release", action="store_true", help="end the leases of --source")
    parser.add_argument(
        "--lease", metavar="TIME", type=_lease, default=86400.0, help="how long (default: 24h)"
    )
    parser.add_argument(
        "--source",
        metavar="NAME",
        help="name of the list (default: the URL of the API server, or the path of LIST)",
    )
    parser.add_argument(
        "--api-server", metavar="URL", type=_url, help="API server, outside of its cluster"
    )
    parser.add_argument(
        "--token-file", metavar="FILE", type=Path, help="bearer token (default: the pod's own)"
    )
    parser.add_argument(
        "--ca-file", metavar="FILE", type=Path, help="certificate authority of the API server (PEM)"
    )
    parser.set_defaults(run=_run)


def _url(text: str) -> str:
    if not text.startswith(("https://", "http://")):
        raise argparse.ArgumentTypeError(f"'{text}' is no URL such as https://10.0.0.1:6443")
    return text


def _lease(text: str) -> float:
    seconds = duration(text)
    if not 0 < seconds <= _MAX_LEASE_S:
        raise argparse.ArgumentTypeError(f"'{text}': a lease lasts from 1s to ten years")
    return seconds


def _run(arguments: argparse.Namespace) -> int:
    of_cluster = (arguments.api_server, arguments.token_file, arguments.ca_file)
    if not arguments.from_kubernetes and any(one is not None for one in of_cluster):
        raise UsageError("--api-server, --token-file and --ca-file are for --from-kubernetes")
    if arguments.release and not arguments.source:
        raise UsageError("--release needs --source")
    # Imported here: all other commands would start 0.1 s later.
    from mirror.cli import in_use_command

    return in_use_command.run_in_use(arguments)
