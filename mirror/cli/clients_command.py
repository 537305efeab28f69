"""``clients``: print or write the configuration files of container clients.

Lives here: the arguments, and where the files go. Must not know: what is in the files.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from mirror.cli.arguments import Commands, add_config_or_file, config_or_file
from mirror.cli.client_files import (
    HUB,
    ClientLogin,
    MirrorAddress,
    SetupOptions,
    fallback_notes,
    write_files,
)
from mirror.cli.clients import ALL, CLIENTS, client_setup
from mirror.cli.health import WILDCARD_ADDRESSES
from mirror.cli.output import CommandFailed, UsageError, print_line, print_note
from mirror.config.load import load
from mirror.config.settings import Settings, Upstream
from mirror.config.values import is_loopback_only, split_host


def add_parser(commands: Commands) -> None:
    """Add ``clients``."""
    configure = commands.add_parser(
        "clients",
        help="print or write the configuration files of container clients",
        description="Prints the files, unless --write is given. Notes go to standard error.",
    )
    add_config_or_file(configure)
    configure.add_argument(
        "--mirror",
        metavar="URL",
        help="URL at which clients reach the mirror (default: its listen address)",
    )
    configure.add_argument(
        *("--for", "--client"),
        dest="client",
        choices=(*CLIENTS, "all"),
        default="all",
        help=f"client or Kubernetes distribution (default: all, which is {', '.join(ALL)})",
    )
    configure.add_argument(
        "--enforce",
        action="store_true",
        help="leave out the fallback to the upstream: a pull that the mirror refuses fails",
    )
    configure.add_argument(
        "--ca",
        metavar="FILE",
        help="certificate authority (PEM) of an https:// mirror; clients read it at the same path",
    )
    configure.add_argument(
        "--credentials-file",
        metavar="FILE",
        type=Path,
        help="file with USER:PASSWORD or a token, which clients send to the mirror (containerd)",
    )
    configure.add_argument(
        "--write",
        metavar="DIR",
        type=Path,
        help="write the files below DIR, in place of /etc; never overwrites a file",
    )
    configure.set_defaults(run=print_clients)


_HUB_ONLY: Final = frozenset({"docker"})
"""Clients that mirror Docker Hub only."""


def _notes(
    settings: Settings, arguments: argparse.Namespace, chosen: Sequence[str], url: str
) -> Iterator[str]:
    """Yield what is to be known of the files of all ``chosen`` clients. ``url``: the mirror's."""
    if arguments.mirror is None and is_loopback_only(settings.listen):
        yield (
            f"{url} is reached from this machine only: for other machines, set listen and name the "
            "URL with --mirror"
        )
    upstreams = settings.upstreams
    if _HUB_ONLY.issuperset(chosen):
        upstreams = {name: one for name, one in upstreams.items() if name == HUB}
    if not arguments.enforce:
        yield from fallback_notes(upstreams)


def print_clients(arguments: argparse.Namespace) -> int:
    """Run ``clients``. Returns the exit code."""
    settings = load(config_or_file(arguments), os.environ)
    if arguments.mirror is None and split_host(settings.listen)[0] in WILDCARD_ADDRESSES:
        raise UsageError(f"--mirror is needed: the server listens on {settings.listen}")
    scheme = "https" if settings.tls else "http"
    own = f"{scheme}://{settings.listen}"
    url = own if arguments.mirror is None else arguments.mirror
    ca = Path(arguments.ca).absolute() if arguments.ca else None
    try:
        ca_text = ca.read_text(encoding="utf-8") if ca else ""
        if ca and "-----BEGIN CERTIFICATE-----" not in ca_text:
            raise ValueError(f"{ca} has no certificate (PEM)")
        mirror = MirrorAddress.parse(url, str(ca) if ca else None, ca_text)
    except ValueError as error:
        raise UsageError(f"--mirror '{url}': {error}") from None
    upstreams = dict(settings.upstreams)
    if settings.hosted is not None:  # Clients pull these repositories from the mirror only.
        upstreams[settings.hosted.name] = Upstream(endpoints=(mirror.url,))
    request = SetupOptions(
        mirror,
        upstreams,
        settings.default_upstream,
        is_enforced=arguments.enforce,
        hosted_name=settings.hosted.name if settings.hosted else None,
        login=_read_login(arguments.credentials_file),
    )
    chosen = ALL if arguments.client == "all" else (arguments.client,)
    setups = {client: client_setup(client, request) for client in chosen}
    files = [file for setup in setups.values() for file in setup.files]
    if arguments.write is not None:
        try:
            for path, is_new in write_files(arguments.write, files):
                print_line(f"{path}{'' if is_new else ' (unchanged)'}")
        except FileExistsError as error:
            raise CommandFailed(str(error)) from None
    else:
        for file in files:
            # A single file is printed without its path, so that it can be piped.
            if len(files) > 1:
                print_line(f"# {'/etc/' if file.is_on_node else ''}{file.path}")
            print_line(file.text)
    for note in _notes(settings, arguments, chosen, url):
        print_note(note)
    for client, setup in setups.items():
        for note in setup.notes:
            print_note(f"{client}: {note}")
    return 0


def _read_login(path: Path | None) -> ClientLogin | None:
    """Return the credentials in a file. ``path`` None: none. Raises ``UsageError``."""
    if path is None:
        return None
    try:
        return ClientLogin.parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UsageError(f"--credentials-file {path}: not UTF-8") from None
    except OSError as error:
        raise UsageError(f"--credentials-file {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--credentials-file {path}: {error}") from None
