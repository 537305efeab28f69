"""The check of hosted repositories: their names, and the room for what is pushed.

Lives here: one function, which returns findings and raises nothing for what it checks. Must not
know: upstreams, printing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from mirror.cli.doctor.findings import Checked, Finding
from mirror.cli.doctor.machine_checks import damage_of
from mirror.config.settings import Settings
from mirror.inventory.hosted_names import read_hosted_usage
from mirror.observability.hosted_events import HostedUsage
from mirror.oci.errors import MirrorError
from mirror.oci.text import size_text
from mirror.store.hosted_marker import (
    DAMAGED_NAMES_REMEDY,
    LOST_REMEDY,
    has_unfinished_restore,
)
from mirror.store.layout import Layout

_NEARLY_FULL_SHARE: Final = 0.9
"""Share of the quota from which a warning is given."""


def check_hosted(
    settings: Settings, clock: Callable[[], float] = time.monotonic
) -> Iterator[Finding]:
    """Check the names of hosted repositories, and the room for what is pushed.

    Args:
        settings: The configuration.
        clock: Returns seconds.
    """
    layout = Layout(Path(settings.data_dir))
    subject = Checked("hosted", str(layout.hosted_names))
    if not layout.hosted_names.exists():
        if layout.hosted_marker.exists():
            yield subject.problem("it was there, and is gone", LOST_REMEDY)
        elif settings.hosted is not None:
            yield subject.ok("nothing was pushed yet")
        return
    damage = damage_of(layout.hosted_names, clock)
    if damage is not None:
        yield subject.problem(f"it cannot be used: {damage}", DAMAGED_NAMES_REMEDY)
        return
    try:
        usage = read_hosted_usage(layout)
    except MirrorError as error:
        yield subject.problem(error.message, "run this command as the user of the server")
        return
    yield _check_room(subject, settings, usage)
    if has_unfinished_restore(layout):
        yield Checked("restore", str(layout.staged_names)).warning(
            "a restore was killed, and no name of it is here",
            f"run oci-mirror restore again, or delete {layout.staged_names} to do without it",
        )


def _check_room(subject: Checked, settings: Settings, usage: HostedUsage) -> Finding:
    if settings.hosted is None:
        if not usage.contents:
            return subject.ok("nothing is hosted")
        return subject.warning(
            f"{size_text(usage.bytes)} of hosted content stay, and nobody can pull them",
            "configure the section hosted again; then delete with oci-mirror rm what is not needed",
        )
    quota, used = settings.hosted.max_size, usage.total
    text = (
        f"{usage.repositories} repositories, {size_text(usage.bytes)} of {size_text(quota)}, "
        f"{size_text(usage.metadata)} of metadata, "
        f"{size_text(usage.reserved)} in {usage.uploads} uploads in progress"
    )
    if used >= quota * _NEARLY_FULL_SHARE:
        return subject.warning(
            f"{text}: pushes are refused when the quota is used up",
            "raise hosted.max_size, or delete images and run oci-mirror gc --grace 10m; "
            "oci-mirror ls --uploads lists the uploads, and oci-mirror rm --upload ID ends one "
            "(those that nobody feeds end before a push is refused)",
        )
    status = os.statvfs(settings.data_dir)
    free = status.f_bavail * status.f_frsize
    if quota - used > free:
        return subject.warning(
            f"{text}: the disk has {size_text(free)} free, and the quota permits more",
            "use a larger disk, or a smaller hosted.max_size: cached content is evicted for "
            "uploads, and hosted content never is",
        )
    return subject.ok(text)
