"""The rows of docs/robustness.md, and the table of how often each was tried.

A test names its rows by id and slug: ``pytest.mark.row("U12-flapping-endpoint")``. The fixture
``tried`` adds to its number of tries. A test case without a call of it counts as one try.
``--robustness-table=FILE`` adds the tries up by row and writes the table. A number is written only
if all tests of the row in that set (normal or long) ran and passed. Otherwise it stays as it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Row:
    """One row. ``slug``: its name beside the id, as in ``U12-flapping-endpoint``."""

    slug: str
    description: str


ROWS: Final[Mapping[str, Row]] = {
    "C1": Row(
        "sigkill-at-a-call",
        "SIGKILL at the n-th changing call of a pull, n = 1, 2, 3 … until none fires",
    ),
    "C2": Row("sigkill-of-a-command", "SIGKILL at the n-th changing call of a command"),
    "C3": Row(
        "random-sigkills",
        "SIGKILL at random moments among 8 clients, with other options at each start",
    ),
    "C4": Row(
        "power-cut-states", "every state that a power cut may leave of a traced pull and eviction"
    ),
    "C5": Row("planted-faults", "faults planted in the store, which C4 has to find"),
    "C7": Row("sigkill-of-the-fetcher", "SIGKILL of the process that fetches"),
    "C8": Row("bytes-after-an-ingest", "garbage or zeros after the verified bytes of an ingest"),
    "C9": Row("damaged-content", "content that was emptied, cut, or has one flipped bit"),
    "C10": Row("stop-among-pulls", "SIGTERM among 20 pulls, SIGKILL at the time limit"),
    "C11": Row("stale-sparse-ingest", "a stale ingest of 18 GiB"),
    "C12": Row("damaged-index", "an index that is lost, cut, zeroed, or replaced by a text file"),
    "C13": Row("sigkill-of-a-push", "SIGKILL at the n-th changing call of a push"),
    "C14": Row(
        "push-beside-a-collection",
        "pushes of overlapping images beside collections of hosted content without a pause",
    ),
    "C15": Row(
        "sigkill-of-hosted-upkeep",
        "SIGKILL at the n-th changing call of a deletion, retention, collection, backup, restore",
    ),
    "C16": Row(
        "sigkill-of-a-delivery", "SIGKILL at random moments while events are queued and sent"
    ),
    "D1": Row("no-space-at-a-write", "no space at the n-th write, once and from then on"),
    "D2": Row("full-disk", "a disk that is really full"),
    "D4": Row("io-error-at-a-call", "I/O error at the n-th write, fsync, close, rename, read"),
    "D5": Row("short-writes", "writes that write less than they were given"),
    "D6": Row("no-descriptors", "no free file descriptors"),
    "D7": Row("unwritable-directories", "another device, a read-only file system, no permission"),
    "D8": Row("slow-fsync", "an fsync that takes half a minute"),
    "D10": Row("failing-sendfile", "sendfile fails in the middle of a response"),
    "D11": Row("content-cut-under-readers", "content that is cut or unlinked while it is read"),
    "D12": Row("odd-files", "links, FIFOs, directories and names of wrong case in blobs/"),
    "D13": Row("no-inodes", "no free inodes"),
    "D14": Row("other-file-systems", "tmpfs, overlay, no fsync of directories"),
    "U1": Row("reset-at-a-byte", "the upstream resets the connection at a byte"),
    "U2": Row("clean-end-too-early", "the upstream ends cleanly, too early, at multiples of 8 MiB"),
    "U3": Row("silent-upstream", "silence, or single bytes for ever"),
    "U4": Row("wrong-range", "a response for another range than the requested one"),
    "U5": Row(
        "odd-framing", "bodies that are too long, chunked, without a length, gzip, or HTTP/1.0"
    ),
    "U6": Row("wrong-bit", "one wrong bit"),
    "U7": Row("waiters-of-a-failing-fetch", "100 clients that wait for a fetch that fails"),
    "U8": Row("first-pulls-at-once", "131 first pulls of one image at the same time"),
    "U9": Row("rate-limits", "429, with every form of Retry-After"),
    "U10": Row(
        "failing-token-services",
        "token services that fail, loop or lie; 50 clients that wait for one token",
    ),
    "U11": Row("connect-faults", "faults of DNS, TLS and connecting; packets that are dropped"),
    "U12": Row("flapping-endpoint", "an endpoint that fails and recovers again and again"),
    "U13": Row("moving-tag", "a tag that moves between HEAD and GET; a wrong digest header"),
    "U15": Row("negative-answers", "404 and other refusals, and failures that are not refusals"),
    "U16": Row("client-that-does-not-read", "a client that does not read its response"),
    "L1": Row("client-that-leaves", "the only client, or the first one, leaves"),
    "L2": Row("clients-that-reset", "clients that send a request and reset the connection"),
    "L3": Row("slow-clients", "200 slow clients of one large blob"),
    "L4": Row("ranges", "forms of Range; 1,000 overlapping ranges"),
    "L5": Row("range-far-ahead", "a range far ahead in content that is being fetched"),
    "L6": Row("conditional-requests", "conditional requests"),
    "L8": Row("odd-requests", "Expect, a body on GET, HTTP/1.0, 100 pipelined requests"),
    "L9": Row("rush-after-a-start", "500 clients right after a start"),
    "L10": Row("killed-clients", "ctr, podman and skopeo killed in mid-pull and started again"),
    "L11": Row("open-ended-ranges", "open-ended ranges of clients that hang up after their part"),
    "L12": Row("lazy-pull", "the requests of stargz, SOCI and overlaybd for cold layers"),
    "HU1": Row("token-realms", "token realms to which no connection may be made"),
    "HU2": Row("redirecting-token-service", "token services that redirect"),
    "HU3": Row("redirects", "redirects to another origin, to plain HTTP, to the mirror itself"),
    "HU4": Row(
        "credentials-of-another", "credentials that must not get tokens for another repository"
    ),
    "HU5": Row(
        "huge-manifests", "manifests that are too large, endless, 100,000 levels deep, or no JSON"
    ),
    "HU6": Row("wrong-types", "wrong media types, impossible sizes"),
    "HU8": Row("descriptor-urls", "urls in descriptors"),
    "HU9": Row("digest-strings", "malformed digest strings"),
    "HU10": Row("header-bombs", "header bombs, NUL and CR in headers"),
    "HU11": Row("compression-bombs", "compression bombs in an encoding that was not asked for"),
    "HU12": Row("cookies", "cookies, Alt-Svc"),
    "HU13": Row("endless-lists", "a million tags; links to other hosts and in circles"),
    "HU14": Row("many-referrers", "100,000 referrers"),
    "HU15": Row("hostile-error-bodies", "secrets and escape sequences in error bodies"),
    "HC1": Row("smuggling", "request smuggling probes"),
    "HC2": Row("malformed-requests", "malformed requests"),
    "HC3": Row("traversal", "path traversal, checked with strace"),
    "HC4": Row("namespaces", "forms of ns="),
    "HC5": Row("content-of-another-repository", "content of another repository, by its digest"),
    "HC6": Row("withdrawn-access", "access that was withdrawn"),
    "HC7": Row("slow-attacks", "slow headers, slow reads"),
    "HC8": Row("connection-limits", "limits on connections"),
    "HC9": Row("random-names", "random names and digests"),
    "HC10": Row("twice-the-quota", "one client that pulls twice the quota"),
    "HC12": Row("other-methods", "write methods, TRACE, CONNECT, upgrades"),
    "HC13": Row("admin-api", "the admin API: tokens, Host, Origin"),
    "HC14": Row("secrets-in-output", "secrets and canaries in logs, metrics, errors and files"),
    "HC15": Row("hostile-pushes", "hostile requests to the push listener"),
    "R1": Row("few-descriptors", "64 file descriptors"),
    "R3": Row("slow-pools", "thread pools of one slow thread"),
    "R5": Row(
        "slow-callbacks", "callbacks of the event loop of more than 100 ms of processor time"
    ),
    "R6": Row(
        "soak",
        "pulls while the upstream fails, the clock jumps, the disk fills, workers are killed",
    ),
    "R7": Row("many-contents", "50,000 contents"),
    "R8": Row("beyond-the-quota", "a blob larger than the quota; 100 pulls beyond it"),
    "R9": Row("blocked-stdout", "a stdout that accepts nothing"),
    "M1": Row("many-workers", "4 workers, 100 clients"),
    "M2": Row("stopped-leader", "a leader that is stopped, then continued"),
    "M4": Row("relocking", "lock, unlink, lock again"),
    "M5": Row("eviction-while-opening", "eviction while another process opens the content"),
    "M6": Row("publish-twice", "two processes publish the same content"),
    "M7": Row("shared-directory", "two servers in one directory"),
    "M9": Row("dying-worker", "a worker that dies again and again"),
    "M10": Row("hostile-index", "a busy index, a planted pickle"),
    "FA1": Row(
        "refused-token-beside-open-repository",
        "a token service that refuses one repository, and an open repository of the same registry",
    ),
    "FA2": Row(
        "changed-challenge-for-dead-token",
        "a dropped token whose 401 names another realm than a request without a token",
    ),
    "FA3": Row(
        "challenge-of-another-scope", "a challenge whose scope is not the repository in the path"
    ),
    "FA4": Row(
        "docker-config-by-organization",
        "a Docker config.json with logins for several organizations of one host",
    ),
    "FA5": Row(
        "credentials-of-the-first-host",
        "endpoints on other hosts than the one that the credentials are for",
    ),
    "FA6": Row(
        "causes-of-missing-credentials",
        "missing, failing and wrong credentials, each with its own message",
    ),
    "FA7": Row("several-challenges", "several challenges, one of which must not be followed"),
    "FB1": Row("refused-head", "an upstream that refuses HEAD of a tag, and answers GET"),
    "FB2": Row("wrong-lengths", "wrong lengths in a HEAD, in a chunked GET, in a descriptor"),
    "FB3": Row(
        "buildkit-cache-index",
        "an index whose children are blobs, such as BuildKit's registry cache",
    ),
    "FB4": Row(
        "content-types-of-static-registries", "manifests with a generic content type, or none"
    ),
    "FB5": Row("odd-manifests", "manifests that the mirror cannot parse in full"),
    "FB6": Row("login-page", "a log-in page in place of a manifest"),
    "FB7": Row(
        "tag-moved-to-odd-manifest", "a tag that moves to a manifest that the mirror cannot parse"
    ),
    "FB8": Row("schema-1", "signed manifests of schema 1"),
    "FB9": Row(
        "wrong-content-range-then-whole",
        "a wrong Content-Range, and a correct response without Range",
    ),
    "FB10": Row("stalling-twice", "a body that stalls at every attempt"),
    "FB11": Row("late-first-byte", "a blob whose headers come after 40 s, beside other requests"),
    "FB12": Row("foreign-layers", "foreign layers that the upstream does not have"),
    "FC1": Row("page-order", "pages of tags in any order, or with opaque cursors"),
    "FC2": Row("absolute-links", "an absolute Link with another host or scheme"),
    "FC3": Row("links-behind-a-prefix", "a reverse proxy that adds a path prefix"),
    "FD1": Row(
        "second-endpoint-has-it",
        "a first endpoint that answers 404, 401 or 403 for what the second one has",
    ),
    "FD2": Row("limits-of-one-project", "a 429 for one repository or one kind of request"),
    "FD3": Row("forms-of-endpoints", "the forms of endpoints and upstream names that people write"),
    "FD4": Row("endpoint-with-a-path", "an endpoint below a path"),
    "FD5": Row("private-redirect-targets", "redirects to allowed private addresses"),
    "FD6": Row("address-of-each-connection", "private addresses, decided for each connection"),
    "FD7": Row("hanging-dns", "upstreams whose names do not resolve for a long time"),
    "FD8": Row("upstream-tls", "client certificates and unverified TLS for one upstream"),
    "FE1": Row("full-stdout-pipe", "a standard output that nobody reads"),
    "FE2": Row("signals-and-orphans", "SIGHUP, SIGQUIT, and a supervisor that is killed"),
    "FE3": Row("memory-of-cold-blobs", "40 uncached blobs at once on a slow disk"),
    "FE4": Row("severity-of-failures", "log levels of failed pulls and malformed requests"),
    "FE5": Row(
        "messages-with-a-cause", "messages of upstream failures: endpoint, cause, key to set"
    ),
    "FE6": Row("one-line-per-request", "log lines on a terminal"),
    "FE7": Row(
        "commands-and-start-line", "forms of the command line, sizes, the line at the start"
    ),
    "FE8": Row("suspicious-configuration", "configuration values that look like mistakes"),
    "FE9": Row("quiet-alerts", "alerts in the cases in which they must be quiet"),
    "FE10": Row("load-balancer-probes", "probes of load balancers"),
    "FE11": Row("trusted-proxies", "client addresses behind proxies"),
    "FE12": Row("deployment-files", "Kustomize and Compose"),
    "FF1": Row("alias-without-a-colon", "Podman and skopeo with an upstream host:port"),
    "FF2": Row("transfer-service", "containerd's transfer service and its config_path"),
    "FF3": Row("enforced-mirror", "client files with and without a fallback to the upstream"),
    "FF4": Row("ipv6-hosts-toml", "containerd 1.6 and IPv6 literals"),
    "FF5": Row("client-files", "the configuration files of other clients"),
    "FF6": Row("upstream-by-host-name", "snapshotters that send no ns"),
    "G1": Row("cost-of-a-miss", "cold pulls and hits beside few and many contents"),
    "G2": Row("long-eviction", "fetches and hits beside a long eviction"),
    "G3": Row("index-damage-while-running", "damage of the index while the mirror runs"),
    "G4": Row("busy-index", "long transactions and large flushes of the index"),
    "G5": Row("repeated-verification", "verification results that must not be lost or repeated"),
    "G6": Row("state-of-another-process", "locks and states of ingests of other processes"),
    "G7": Row("memory-budget", "one memory budget for all fetches of a process"),
    "G8": Row("start-on-a-full-disk", "a disk with 0 bytes free, also at a start"),
    "G9": Row("stop-in-time", "the time that a stop takes"),
    "G10": Row("range-of-aged-content", "a range of content whose verification is old"),
    "I4": Row("start-time", "the time that a start takes"),
    "I7": Row("left-open", "what is left open afterwards"),
    "K1": Row("wrong-clock", "a clock that is years off"),
    "K2": Row("jumping-clock", "a clock that jumps"),
    "K3": Row("future-recency", "recency in the future"),
    "K4": Row("negative-ages", "negative ages"),
    "K5": Row("odd-lifetimes", "lifetimes of 0, -1, 10^12 seconds"),
}
"""Id to row. SECURITY.md names rows by their id alone."""

REQUIRED: Final = frozenset(
    f"{letters}{number}"
    for letters, numbers in {
        "C": (1, 3, 4, 5, 7, 8, 9, 10, 11, 12),
        "D": (1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 13),
        "U": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16),
        "L": (1, 2, 3, 4, 5, 6, 8, 9, 10, 11),
        "HU": (1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15),
        "HC": (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 14),
        "R": (1, 3, 5, 6, 8, 9),
        "M": (1, 2, 4, 5, 6, 7, 10),
        "FA": range(1, 8),
        "FB": range(1, 13),
        "FC": range(1, 4),
        "FD": range(1, 9),
        "FE": range(1, 13),
        "FF": range(1, 7),
        "G": range(1, 11),
    }.items()
    for number in numbers
)
"""Ids of the rows that must have a test and a number."""

BEGIN: Final = "<!-- tried: begin (make robustness) -->"
END: Final = "<!-- tried: end -->"
_HEADER: Final = (
    "| row | what is tried | test cases | tries in `make test` | in the long tests | where |\n"
    "|---|---|--:|--:|--:|---|\n"
)
_LINE: Final = re.compile(r"\| (\w+)(-[\w-]+)? \|[^|]*\|[^|]*\| ([\d,]*) \| ([\d,]*) \|")
_GROUPS: Final = (
    *("C", "D", "U", "L", "HU", "HC", "R", "M", "K", "I"),
    *("FA", "FB", "FC", "FD", "FE", "FF", "G"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One test case of one row."""

    row: str
    """Id of the row."""
    file: str
    long: bool
    tried: int | None
    """Number of tries. None if the case did not run, or failed."""


def row_name(row: str) -> str:
    """Return id and slug of a row, as tests name it. Raises ``KeyError`` for an unknown id."""
    return f"{row}-{ROWS[row].slug}"


def row_id(name: str) -> str:
    """Return the id in a name. Raises ``ValueError`` for an unknown id or another slug."""
    row = name.partition("-")[0]
    if row not in ROWS or name != row_name(row):
        known = row_name(row) if row in ROWS else "no such row"
        raise ValueError(f"pytest.mark.row({name!r}): {known} (tests/robustness/table.py)")
    return row


def rewrite_document(document: str, cases: Iterable[Case]) -> str:
    """Return ``document`` with a new table between the two markers."""
    before, _, rest = document.partition(BEGIN)
    old, end, after = rest.partition(END)
    assert end, f"the markers {BEGIN} and {END} are missing"
    return f"{before}{BEGIN}\n{format_table(old, cases)}{END}{after}"


def format_table(old: str, cases: Iterable[Case]) -> str:
    """Return the lines of the table. Numbers of sets that did not all run are from ``old``."""
    found = list(cases)
    known = {match[1]: (match[3], match[4]) for match in _LINE.finditer(old)}
    lines, totals = [], Counter[int]()
    for row in sorted({case.row for case in found}, key=_order):
        own = [case for case in found if case.row == row]
        numbers = [_count(own, long, known.get(row, ("", ""))[long]) for long in (False, True)]
        for column, number in enumerate(numbers):
            totals[column] += int(number.replace(",", "") or 0)
        files = ", ".join(f"`{name}`" for name in sorted({case.file for case in own}))
        cells = (row_name(row), ROWS[row].description, str(len(own)), *numbers, files)
        lines.append(f"| {' | '.join(cells)} |\n")
    total = f"| all | | {len(found):,} | {totals[0]:,} | {totals[1]:,} | |\n"
    return _HEADER + "".join(lines) + total


def row_names(document: str) -> list[str]:
    """Return the names of the rows in the table of ``document``."""
    lines = document.partition(BEGIN)[2].partition(END)[0]
    return [match[1] + (match[2] or "") for match in _LINE.finditer(lines) if match[1] != "all"]


def _count(cases: list[Case], long: bool, old: str) -> str:
    tried = [case.tried for case in cases if case.long == long]
    if any(number is None for number in tried):
        return old
    return f"{sum(number or 0 for number in tried):,}" if tried else ""


def _order(row: str) -> tuple[int, int]:
    letters = row.rstrip("0123456789")
    return _GROUPS.index(letters), int(row.removeprefix(letters))
