"""``savings``: show what the cache saves, and what another disk size would change.

Lives here: the arguments and the columns. Must not know: how the numbers come about.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any, Final

from mirror.cli.arguments import Commands, add_config, add_json, load_settings
from mirror.cli.data_directory import find_layout, load_inventory
from mirror.cli.listing import print_rows, print_text
from mirror.cli.output import print_line
from mirror.cli.table_layout import Column
from mirror.oci.text import size_text, time_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mirror.config.settings import Settings
    from mirror.history.ghost import Prediction, Protected
    from mirror.history.queries import AccessTrace
    from mirror.history.sums import Saving

_PERIODS: Final = {
    "hour": 3600.0,
    "day": 86400.0,
    "week": 7 * 86400.0,
    "1h": 3600.0,
    "1d": 86400.0,
    "7d": 7 * 86400.0,
    "30d": 30 * 86400.0,
}
"""``--last`` -> seconds. The counters are kept for 30 days."""
_MAX_TABLE_ROWS: Final = 100
"""Rows of the table. Networks of clients may be tens of thousands: ``--json`` has all of them."""
_DISK_ONLY: Final = ("max_size", "recorded_hit_ratio", "is_reliable")
"""Fields of the rows of predictions."""
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
    from mirror.history.ghost import is_present_matched, is_slow_enough, predict
    from mirror.history.queries import open_history
    from mirror.history.sums import build_savings, build_total

    settings, now = load_settings(arguments), time.time()
    with open_history(find_layout(settings)) as history:
        counts = history.counts(now - _PERIODS[arguments.last], now)
        trace = history.access_trace()
    begin = time_text(min((count.start for count in counts), default=None))
    most = None if arguments.is_json else _MAX_TABLE_ROWS
    saved = [(arguments.by, one) for one in build_savings(counts, arguments.by, most)]
    saved.append(("total", build_total(counts)))
    rows: list[dict[str, Any]] = [
        {"kind": kind, "since": begin, **dict.fromkeys(_DISK_ONLY), **one.to_json()}
        for kind, one in saved
    ]
    predictions = predict(trace, settings.storage, protected=_find_protected(settings))
    predictions = [one for one in predictions if one.requests]
    is_matched = is_present_matched(predictions)
    disks = [
        _disk_row(one, is_reliable=is_matched and is_slow_enough(one) and not one.is_crowded)
        for one in predictions
    ]
    if arguments.is_json:
        print_rows((), [*rows, *disks], is_json=True)
        return 0
    columns = _columns(arguments.by)
    narrower = [one for one in columns if one.key != "bytes_sent"]
    print_rows(columns, rows, is_json=False, narrower=[narrower])
    if begin is not None:
        print_line("")
        print_text(
            f"Counted since {begin}. BILLABLE: manifests that clients got. BILLED: those that the "
            "upstreams were asked for."
        )
        for sentence in _remarks(saved):
            print_text(sentence)
    if disks:
        print_line("\nWhat another disk size (storage.max_size) would change:\n")
        print_rows(_DISK_COLUMNS, disks, is_json=False)
        print_line("")
        for sentence in explain_predictions(predictions, trace):
            print_text(sentence)
    return 0


def _remarks(saved: Sequence[tuple[str, Saving]]) -> Iterator[str]:
    """Yield sentences about rows that surprise. ``saved``: (``--by`` or ``total``, sums)."""
    if any(one.bytes_saved < 0 for _, one in saved):
        yield (
            "SAVED is negative if more was fetched than clients have got: `warm` and `prefetch` "
            "fetch what clients pull later."
        )
    if not all(one.name for _, one in saved):
        yield (
            "(other): work without a client or a repository, such as that of `warm`, and sums for "
            "which the history has no room."
        )


def _find_protected(settings: Settings) -> Protected:
    """Return the content that marks keep. Reads the inventory only if there are marks."""
    from mirror.history.ghost import Protected
    from mirror.store.marks import read_marks

    layout = find_layout(settings)
    marks = read_marks(layout)
    if not (marks.pins or marks.freezes or marks.leases):
        return Protected()
    inventory = load_inventory(settings)
    files, protected = inventory.files, inventory.protected
    return Protected.of_sizes((one, files[one][0] if one in files else 0) for one in protected)


def explain_predictions(predictions: Sequence[Prediction], trace: AccessTrace) -> Iterator[str]:
    """Yield sentences: what the predictions are drawn from, and how far they may be trusted.

    Args:
        predictions: Those of all sizes. There are requests.
        trace: The accesses that they are drawn from.
    """
    from mirror.history.ghost import is_present_matched, is_slow_enough

    first = predictions[0]
    begin = time_text(min(access.at for access in trace.accesses))
    sample = "" if trace.rate == 1 else f", for a sample of {_percent(trace.rate)} of all content"
    yield (
        f"Simulated with {first.requests:,} recorded requests (GET of content) since {begin}"
        f"{sample}. HEAD requests and lists are not among them, nor is the first request for "
        "content that was on the disk before. So the hit ratio is not that of the first table."
    )
    present = next((one for one in predictions if one.factor == 1.0), first)
    recorded = present.recorded_hit_ratio
    if recorded is not None:
        yield f"These requests had a hit ratio of {_percent(recorded)}: compare with 1x."
    if len({one.misses for one in predictions}) == 1:
        reason = "each holds all that was pulled, so a larger disk changes nothing."
        if any(one.evictions for one in predictions):
            reason = "what is evicted is not requested again, or much later."
        yield f"All sizes are equal: {reason}"
    if not is_present_matched(predictions):
        yield (
            "Do not rely on this prediction: for 1x it differs by more than 3 points from what has "
            "happened. In that time the disk size or the marks may have been others, or content "
            "was removed (rm, prune, gc)."
        )
    for is_doubtful, why in (
        (lambda one: not is_slow_enough(one), "content would be evicted within seconds of its use"),
        (lambda one: one.is_crowded, "pins, freezes and leases take all of it"),
    ):
        names = [f"{one.factor:g}x" for one in predictions if is_doubtful(one)]
        if names:
            yield f"Do not rely on the prediction for {', '.join(names)}: {why}."


def _disk_row(one: Prediction, *, is_reliable: bool) -> dict[str, Any]:
    ratio, recorded = one.hit_ratio, one.recorded_hit_ratio
    empty = ("bytes_sent", "bytes_saved", "billable", "billed", "billable_saved", "since")
    return {
        "kind": "disk",
        "name": f"{one.factor:g}x",
        "requests": one.requests,
        "hit_ratio": None if ratio is None else round(ratio, 4),
        "recorded_hit_ratio": None if recorded is None else round(recorded, 4),
        "is_reliable": is_reliable,
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
