"""The rows of docs/robustness.md: what each one is, and how the table of what was tried is written.

A test names its rows (``pytest.mark.row``) and says through the fixture ``tried`` how often it
tried; a test case that says nothing tried once. ``--robustness-table=FILE`` adds that up by row and
writes the table. A row is counted only if all its tests of a set (normal or long) ran and passed;
the other numbers stay as they were.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

WORDS: Final[Mapping[str, str]] = {
    "C1": "SIGKILL at the n-th changing call of a pull, until none fires",
    "C2": "SIGKILL at the n-th changing call of a command",
    "C3": "SIGKILL at random among 8 clients, other options at each start",
    "C4": "every state that a power cut may leave of a traced pull and eviction",
    "C5": "planted faults that C4 has to find",
    "C7": "SIGKILL of the process that fetches",
    "C8": "garbage or zeros behind an ingest",
    "C9": "content emptied, cut, one bit flipped",
    "C10": "SIGTERM among 20 pulls, SIGKILL at the limit",
    "C11": "a stale ingest of 18 GiB",
    "C12": "an index lost, cut, zeroed, replaced by a text file",
    "D1": "no space at the n-th write, once and for ever",
    "D2": "a real full disk",
    "D4": "I/O error at the n-th write, fsync, close, rename, read",
    "D5": "short writes",
    "D6": "out of descriptors",
    "D7": "another device, read-only, no permission",
    "D8": "an fsync that takes half a minute",
    "D10": "sendfile fails in the middle of an answer",
    "D11": "content cut or unlinked under readers",
    "D12": "links, FIFOs, directories, wrong case in blobs/",
    "D13": "out of inodes",
    "D14": "tmpfs, overlay, no fsync of directories",
    "U1": "a reset at a byte",
    "U2": "clean ends at multiples of 8 MiB",
    "U3": "silence, a byte now and then for ever",
    "U4": "an answer to another question than the Range that was asked",
    "U5": "odd framing: too long, chunked, no length, gzip, HTTP/1.0",
    "U6": "one bit wrong",
    "U7": "100 waiters of a fetch that fails",
    "U8": "131 first pulls of one image at once",
    "U9": "429, with every kind of Retry-After",
    "U10": "token services that fail, loop, lie; 50 waiters of one token",
    "U11": "DNS, TLS and connect faults, black holes",
    "U12": "an endpoint that comes and goes",
    "U13": "a tag that moves between HEAD and GET, a wrong digest header",
    "U15": "negative answers, and failures that are none",
    "U16": "a client that does not read",
    "L1": "the only client, or the leading one, leaves",
    "L2": "clients that ask and reset",
    "L3": "200 slow clients on one large blob",
    "L4": "forms of Range, 1,000 overlapping ones",
    "L5": "a range far ahead in growing content",
    "L6": "conditional requests",
    "L8": "Expect, a body on GET, HTTP/1.0, 100 pipelined",
    "L9": "500 clients right after a start",
    "L10": "ctr, podman, skopeo killed in mid-pull and started again",
    "L11": "open-ended ranges that hang up after their part",
    "HU1": "token realms that get no connection",
    "HU2": "token services that redirect",
    "HU3": "redirects to another origin, down, to ourselves",
    "HU4": "credentials that must not mint for another",
    "HU5": "manifests too large, endless, 100,000 deep, or no JSON",
    "HU6": "type confusion, impossible sizes",
    "HU8": "urls of descriptors",
    "HU9": "digest strings",
    "HU10": "header bombs, NUL, CR",
    "HU11": "bombs in a content encoding nobody asked for",
    "HU12": "cookies, Alt-Svc",
    "HU13": "a million tags, links to elsewhere and in circles",
    "HU14": "100,000 referrers",
    "HU15": "secrets and escapes in error bodies",
    "HC1": "smuggling probes",
    "HC2": "malformed requests",
    "HC3": "traversal, watched by strace",
    "HC4": "forms of ns=",
    "HC5": "another repository's content by digest",
    "HC6": "membership that was withdrawn",
    "HC7": "slow headers, slow reads",
    "HC8": "limits on connections",
    "HC9": "random names and digests",
    "HC10": "one client pulls twice the quota",
    "HC12": "write methods, TRACE, CONNECT, upgrades",
    "HC13": "the admin API: tokens, Host, Origin",
    "HC14": "secrets and canaries in logs, metrics, errors, files",
    "R1": "64 descriptors",
    "R3": "pools of one slow thread",
    "R5": "callbacks of the event loop above 100 ms of processor time",
    "R6": "a soak of an hour",
    "R7": "50,000 contents",
    "R8": "a blob larger than the quota, 100 pulls beyond it",
    "R9": "a stdout that takes nothing",
    "M1": "4 workers, 100 clients",
    "M2": "a leader that is stopped, then continued",
    "M4": "lock, unlink, lock again",
    "M5": "eviction while another process opens",
    "M6": "two processes publish the same",
    "M7": "two servers in one directory",
    "M9": "a worker that dies again and again",
    "M10": "a busy index, a planted pickle",
    "I4": "the time of a start",
    "I7": "what is left open afterwards",
    "K1": "a clock that is years off",
    "K2": "a clock that jumps",
    "K3": "recency in the future",
    "K4": "negative ages",
    "K5": "lifetimes of 0, -1, 10^12 seconds",
}

BOLD: Final = frozenset(
    f"{letters}{number}"
    for letters, numbers in {
        "C": (1, 3, 4, 5, 7, 8, 9, 10, 11, 12),
        "D": (1, 2, 4, 5, 6, 7, 8, 10, 11, 12),
        "U": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16),
        "L": (1, 2, 3, 4, 5, 6, 8, 9, 10, 11),
        "HU": (1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15),
        "HC": (1, 2, 3, 4, 5, 6, 7, 9, 12, 14),
        "R": (1, 3, 5, 8, 9),
        "M": (1, 2, 4, 5, 6, 7, 10),
    }.items()
    for number in numbers
)
"""Rows that the mirror does not go without."""

BEGIN: Final = "<!-- tried: begin (make robustness) -->"
END: Final = "<!-- tried: end -->"
_HEADER: Final = (
    "| row | what it is | test cases | tried by `make test` | and by `make test-long` | where |\n"
    "|---|---|--:|--:|--:|---|\n"
)
_LINE: Final = re.compile(r"\| (\w+) \|[^|]*\|[^|]*\| ([\d,]*) \| ([\d,]*) \|")
_GROUPS: Final = ("C", "D", "U", "L", "HU", "HC", "R", "M", "K", "I")


@dataclass(frozen=True, slots=True)
class Case:
    """One test case of one row. ``tried``: how often; None where it did not run, or failed."""

    row: str
    file: str
    long: bool
    tried: int | None


def rewritten(document: str, cases: Iterable[Case]) -> str:
    """``document`` with a new table between the two markers."""
    before, _, rest = document.partition(BEGIN)
    old, end, after = rest.partition(END)
    assert end, f"the markers {BEGIN} and {END} are missing"
    return f"{before}{BEGIN}\n{table(old, cases)}{END}{after}"


def table(old: str, cases: Iterable[Case]) -> str:
    """The lines of the table; numbers of what did not run as a whole are those of ``old``."""
    found = list(cases)
    known = {match[1]: (match[2], match[3]) for match in _LINE.finditer(old)}
    lines, totals = [], Counter[int]()
    for row in sorted({case.row for case in found}, key=_order):
        mine = [case for case in found if case.row == row]
        numbers = [_count(mine, long, known.get(row, ("", ""))[long]) for long in (False, True)]
        for column, number in enumerate(numbers):
            totals[column] += int(number.replace(",", "") or 0)
        files = ", ".join(f"`{name}`" for name in sorted({case.file for case in mine}))
        cells = (row, WORDS.get(row, ""), str(len(mine)), *numbers, files)
        lines.append(f"| {' | '.join(cells)} |\n")
    total = f"| all | | {len(found):,} | {totals[0]:,} | {totals[1]:,} | |\n"
    return _HEADER + "".join(lines) + total


def rows_of(document: str) -> list[str]:
    """The rows that the table in ``document`` names."""
    lines = document.partition(BEGIN)[2].partition(END)[0]
    return [match[1] for match in _LINE.finditer(lines) if match[1] != "all"]


def _count(cases: list[Case], long: bool, old: str) -> str:
    tried = [case.tried for case in cases if case.long == long]
    if any(number is None for number in tried):
        return old
    return f"{sum(number or 0 for number in tried):,}" if tried else ""


def _order(row: str) -> tuple[int, int]:
    letters = row.rstrip("0123456789")
    return _GROUPS.index(letters), int(row.removeprefix(letters))
