"""``doctor``: the arguments, the order of the checks, and the printing.

Must not know: how anything is checked.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from mirror.cli.arguments import Commands, add_config, add_json, config_file
from mirror.cli.client_files import HUB
from mirror.cli.doctor.findings import Checked, Finding, Status
from mirror.cli.doctor.grouping import group_by_remedy, lines, remedy_line
from mirror.cli.doctor.runtimes import CONTAINERD_CONFIG, RUNTIMES, NodeMachine
from mirror.cli.exit_codes import EX_FAILED
from mirror.cli.health import own_url
from mirror.cli.output import UsageError, describe_fault, flush, print_line
from mirror.cli.own_server import OwnServer
from mirror.config.load import load_with_origins
from mirror.config.settings import Settings
from mirror.oci.errors import ConfigError
from mirror.oci.text import count_text

_COLORS: Final = {Status.OK: "32", Status.WARNING: "33", Status.PROBLEM: "31"}
"""Status -> colour on a terminal (ECMA-48, "SGR")."""


_TEXT_AT: Final = 9
"""Characters of a line before a finding: its status."""


def add_parser(commands: Commands) -> None:
    """Add ``doctor``."""
    parser = commands.add_parser(
        "doctor",
        help="find what is wrong with the mirror, or with a node that should use it",
        description="Checks the configuration, the data directory, the index, the port, the clock "
        "and each endpoint. With --node: whether the container runtimes of this machine pull "
        "through the mirror. Ends with 1 if there is a problem; warnings are not counted.",
    )
    add_config(parser)
    add_json(parser)
    parser.add_argument(
        "--node", action="store_true", help="check the container runtimes of this machine"
    )
    node = parser.add_argument_group("with --node")
    node.add_argument(
        "--runtime",
        action="append",
        choices=tuple(RUNTIMES),
        default=[],
        help="check only this runtime; may be repeated (default: all that are installed)",
    )
    node.add_argument(
        "--registry",
        action="append",
        metavar="HOST",
        default=[],
        help="check pulls from this registry; may be repeated (default: the configured upstreams, "
        f"else {HUB})",
    )
    node.add_argument(
        "--mirror",
        metavar="URL",
        help="URL at which clients reach the mirror (default: its listen address)",
    )
    node.add_argument(
        "--containerd-config",
        metavar="FILE",
        default=CONTAINERD_CONFIG,
        help="configuration file of containerd (default: %(default)s)",
    )
    parser.set_defaults(run=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Run the checks, and print each finding as soon as it is known."""
    checks = _check_node(arguments) if arguments.node else _check_mirror(arguments)
    counts: Counter[Status] = Counter()
    # A script reads each finding for itself.
    groups = ([one] for one in checks) if arguments.is_json else group_by_remedy(checks)
    for group in groups:
        counts[group[0].status] += len(group)
        if arguments.is_json:
            print_line(json.dumps(group[0].values()))
        else:
            _print_group(group)
        flush()
    if not arguments.is_json:
        problems, warnings = counts[Status.PROBLEM], counts[Status.WARNING]
        found = f"{count_text(problems, 'problem')}, {count_text(warnings, 'warning')}"
        print_line(f"{found}, {counts[Status.OK]} ok")
    return EX_FAILED if counts[Status.PROBLEM] else 0


def _print_group(group: Sequence[Finding]) -> None:
    # Imported here: it is about terminals, and --json needs none.
    from mirror.cli.listing import print_text

    status = group[0].status

    def paint(line: str) -> str:
        return f"\x1b[{_COLORS[status]}m{line[: _TEXT_AT - 1]}\x1b[0m{line[_TEXT_AT - 1 :]}"

    for line in lines(group):
        text = f"{status.value:<{_TEXT_AT - 1}} {line}"
        print_text(text, indent=_TEXT_AT, is_whole=True, paint=paint)
    remedy = remedy_line(group)
    if remedy is not None:
        print_text(f"{' ' * _TEXT_AT}remedy: {remedy}", indent=2, is_whole=True)


# --- the mirror -----------------------------------------------------------------------------------


def _check_mirror(arguments: argparse.Namespace) -> Iterator[Finding]:
    # Imported here: start-up counts, and these need aiohttp.
    from mirror.cli.doctor.endpoint_checks import check_endpoints, read_samples
    from mirror.cli.doctor.hosted_checks import check_hosted
    from mirror.cli.doctor.machine_checks import (
        check_clock,
        check_data_directory,
        check_index,
        check_marks,
        check_port,
        check_quarantine,
    )
    from mirror.store.layout import Layout
    from mirror.store.marks import read_marks

    given = [name for name in ("runtime", "registry", "mirror") if getattr(arguments, name)]
    if given:
        raise UsageError(f"--{given[0]} needs --node")
    file = config_file(arguments.config)
    subject = Checked("configuration", file or "the environment")
    try:
        settings, findings = _load(file, subject)
    except ConfigError as error:
        yield subject.problem(str(error), "correct the configuration; oci-mirror check-config")
        return
    yield from findings
    root = Path(settings.data_dir)
    offsets: list[float] = []

    def check_upstreams() -> Iterator[Finding]:
        samples = read_samples(root, settings)
        report = check_endpoints(settings, samples, os.environ)
        offsets.extend(report.clock_offsets)
        yield from _unused_as_warnings(report.findings, samples)

    marks = root / "marks.json"
    checks: tuple[tuple[Checked, Callable[[], Iterable[Finding]]], ...] = (
        (Checked("data directory", str(root)), lambda: check_data_directory(settings)),
        (Checked("index", str(root / "index")), lambda: check_index(root)),
        (
            Checked("marks", str(marks)),
            lambda: [check_marks(marks, lambda: read_marks(Layout(root)))],
        ),
        (Checked("quarantine", str(root)), lambda: check_quarantine(Layout(root))),
        (Checked("hosted", "names.db"), lambda: check_hosted(settings)),
        (Checked("port", settings.listen), lambda: [check_port(settings)]),
        (Checked("endpoint", "all"), check_upstreams),
        (Checked("clock", "this machine"), lambda: [check_clock(offsets)]),
    )
    for about, check in checks:
        yield from _guarded(about, check)


def _guarded(about: Checked, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of one check. A fault of the check itself does not end the others."""
    try:
        yield from check()
    except Exception as error:
        yield about.problem(
            f"it could not be checked: {describe_fault(error)}",
            "report this fault, with the output of oci-mirror --version",
        )


def _unused_as_warnings(findings: Iterable[Finding], used: Collection[str]) -> Iterator[Finding]:
    """Yield findings of endpoints. Those of upstreams that nobody uses are no problem.

    ``used``: upstreams with a tag in the cache. Empty: the cache is new, and all count.
    """
    for finding in findings:
        upstream = (finding.subject or finding.target).partition(" ")[0]
        if finding.status is Status.PROBLEM and used and upstream not in used:
            yield replace(
                finding,
                status=Status.WARNING,
                remedy="no tag of it is in the cache: if nobody uses it, remove it from upstreams",
            )
        else:
            yield finding


def _load(file: str | None, subject: Checked) -> tuple[Settings, list[Finding]]:
    """Read the configuration as ``check-config`` does. Raises ``ConfigError``."""
    from mirror.cli import check

    settings, origins = load_with_origins(file, os.environ)
    check.check_environment(settings, origins.prefix)
    remedy = "see the key in config/mirror.yaml"
    findings = [subject.warning(text, remedy) for text in check.warnings(settings, origins.prefix)]
    return settings, findings or [subject.ok("it is valid")]


# --- the node -------------------------------------------------------------------------------------


def _check_node(arguments: argparse.Namespace) -> Iterator[Finding]:
    from mirror.cli.doctor.node_checks import check_node

    file = config_file(arguments.config)
    # A node needs no configuration of the mirror.
    settings = load_with_origins(file, os.environ)[0] if file else Settings()
    url = arguments.mirror
    if url is None:
        url = own_url(settings.listen, has_tls=settings.tls is not None).removesuffix("/healthz")
    try:
        mirror = OwnServer(url)
    except ValueError as error:
        raise UsageError(f"--mirror '{url}': {error}") from None
    registries = arguments.registry or list(settings.upstreams) or [HUB]
    node = NodeMachine(dict(os.environ), arguments.containerd_config)
    yield from check_node(node, arguments.runtime, registries, mirror)
