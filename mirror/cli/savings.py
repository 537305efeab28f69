"""``savings``: show what the cache saves, and what another disk size would change.

Lives here: the arguments and the columns. Must not know: how the numbers come about.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any, Final

from mirror.cli.arguments import Commands, add_config, add_json, load_settings
from mirror.cli.data_directory import layout_of
from mirror.cli.listing import print_rows, print_text
from mirror.cli.output import print_line
from mirror.cli.table_layout import Column
from mirror.oci.text import size_text, time_text

if TYPE_CHECKING:
    from mirror.history.ghost import Prediction

_PERIODS: Final = {"hour": 3600.0, "day": 86400.0, "30d": 30 * 86400.0}
"""``--last`` -> seconds. The counters are kept for 30 days."""
_GROUPINGS: Final = ("upstream", "repository", "network")
"""Values of ``--by``."""


def add_parser(commands: Commands) -> None:
    """Add the parser of ``savings``."""
    parser = commands.add_parser(
        "savings",
        help="show what the cache saves, and what another disk size would change",
        description="Shows how many bytes and billable requests to upstreams the cache has saved, "
        "and predicts the hit ratio of other disk sizes from the accesses of the last 30 days.",
    )
    add_config(parser)
    add_json(parser)
    parser.add_argument(
        "--by", choices=_GROUPINGS, default="upstream", help="rows (default: upstream)"
    )
    parser.add_argument(
        "--last", choices=_PERIODS, default="30d", help="period until now (default: 30d)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run ``savings``. Returns the exit code."""
    from mirror.history.ghost import predict
    from mirror.history.queries import open_history
    from mirror.history.sums import build_savings, build_total

    settings, now = load_settings(arguments), time.time()
    with open_history(layout_of(settings)) as history:
        counts = history.counts(now - _PERIODS[arguments.last], now)
        trace = history.access_trace()
    begin = time_text(min((count.start for count in counts), default=None))
    saved = [(arguments.by, one) for one in build_savings(counts, arguments.by)]
    saved.append(("total", build_total(counts)))
    rows: list[dict[str, Any]] = [
        {"kind": kind, "since": begin, "max_size": None, **one.to_json()} for kind, one in saved
    ]
    disks = [_disk_row(one) for one in predict(trace, settings.storage) if one.requests]
    if arguments.is_json:
        print_rows((), [*rows, *disks], is_json=True)
        return 0
    columns = _columns(arguments.by)
    narrower = [one for one in columns if one.key != "bytes_sent"]
    print_rows(columns, rows, is_json=False, narrower=[narrower])
    if begin is not None:
        print_line("")
        print_text(
            f"Counted since {begin}. BILLABLE: manifests that clients got; BILLED: that the "
            "upstreams were asked for."
        )
    if disks:
        print_line("\nWhat another disk size (storage.max_size) would change:\n")
        print_rows(_DISK_COLUMNS, disks, is_json=False)
    return 0


def _disk_row(one: Prediction) -> dict[str, Any]:
    ratio = one.hit_ratio
    empty = ("bytes_sent", "bytes_saved", "billable", "billed", "billable_saved", "since")
    return {
        "kind": "disk",
        "name": f"{one.factor:g}x",
        "requests": one.requests,
        "hit_ratio": None if ratio is None else round(ratio, 4),
        "bytes_fetched": one.bytes_fetched,
        "max_size": one.max_size,
        **dict.fromkeys(empty),
    }


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def _signed_size(size: int) -> str:
    return size_text(size) if size >= 0 else f"-{size_text(-size)}"


def _columns(by: str) -> tuple[Column, ...]:
    return (
        Column(by.upper(), "name", lambda name: name or "(other)", min_chars=16, is_name=True),
        Column("REQUESTS", "requests", is_number=True),
        Column("HIT RATIO", "hit_ratio", _percent, is_number=True),
        Column("SENT", "bytes_sent", size_text, is_number=True),
        Column("FETCHED", "bytes_fetched", size_text, is_number=True),
        Column("SAVED", "bytes_saved", _signed_size, is_number=True),
        Column("BILLABLE", "billable", is_number=True),
        Column("BILLED", "billed", is_number=True),
    )


_DISK_COLUMNS: Final = (
    Column("SIZE", "name"),
    Column("BYTES", "max_size", size_text, is_number=True),
    Column("HIT RATIO", "hit_ratio", _percent, is_number=True),
    Column("FETCHED", "bytes_fetched", size_text, is_number=True),
)
