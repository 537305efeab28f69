"""Group findings of ``doctor`` that have the same cause, so that each remedy is read once.

Lives here: which findings have the same cause, and the lines of a group. Must not know: what is
checked, the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Final

from mirror.cli.doctor.findings import Finding
from mirror.oci.text import printable

_MAX_FINDING_CHARS: Final = 2000
"""Characters of a line: what a terminal can show."""
_NAMED_TARGETS: Final = 3
"""Targets that a line names. If there is only one more, it is named, too."""


def group_by_remedy(findings: Iterable[Finding]) -> Iterator[list[Finding]]:
    """Yield lists of findings that follow each other, and have the same check and remedy."""
    for _, group in groupby(findings, key=_remedy_key):
        yield list(group)


def _remedy_key(finding: Finding) -> object:
    # A finding without a remedy is a line of its own, which is printed at once.
    alone = None if finding.remedy else finding
    return finding.check, finding.status, _without_target(finding.remedy, finding), alone


def _without_target(text: str, finding: Finding) -> str:
    return text.replace(finding.target, "…") if finding.target else text


def lines(group: Sequence[Finding]) -> Iterator[str]:
    """Yield the lines of findings that have the same remedy, without their status and the remedy.

    Findings of the same message are one line. Their targets are named before it.
    """
    by_message: dict[tuple[str, str], list[Finding]] = {}
    for finding in group:
        key = (finding.subject, _without_target(finding.message, finding))
        by_message.setdefault(key, []).append(finding)
    for same in by_message.values():
        first = same[0]
        subject = " ".join(filter(None, (first.subject, _targets_text(same))))
        yield printable(f"{first.check}: {subject}: {first.message}", _MAX_FINDING_CHARS)


def _targets_text(findings: Sequence[Finding]) -> str:
    targets = [finding.target for finding in findings if finding.target]
    if len(targets) <= _NAMED_TARGETS + 1:
        return ", ".join(targets)
    named = ", ".join(targets[:_NAMED_TARGETS])
    return f"{named} and {len(targets) - _NAMED_TARGETS} more"


def remedy_line(group: Sequence[Finding]) -> str | None:
    """Return the remedy of a group. None if nothing is wrong."""
    remedy = group[0].remedy
    return printable(remedy, _MAX_FINDING_CHARS) if remedy else None
