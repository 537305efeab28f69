"""Row HC15: requests of hostile clients to the push listener, as raw bytes.

Each example is a handful of requests, put together from parts that are right, nearly right and
hostile: names, ids of uploads (their own, of another user, invented), digests, ranges, lengths,
chunked bodies. Whatever they are: each gets a response that is no 5xx, within seconds; the quota
holds; and nothing is left that a day does not remove.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mirror.hosted import name_rows, upload_rows
from mirror.hosted.sessions import UPLOAD_TTL_S
from mirror.observability.events import LogMessage
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest
from tests.extent import Extent
from tests.robustness.kit import every_file_hashes_to_its_name
from tests.server_kit import Server, running
from tests.unit.hosted.kit import NOW, manifest_of

QUOTA: Final = 300_000
TOKENS: Final = {"ann": "token-of-ann-0123456789", "bob": "token-of-bob-0123456789"}
DATA: Final = b"some layer" * 300
DIGEST: Final = Digest.of(DATA)
LIMIT_S: Final = 20.0
"""Seconds for one response, on a busy machine. The server answers within milliseconds."""
DISCONNECT_S: Final = 0.05
"""Seconds after which a client that has not sent all disconnects."""
INCOMPLETE: Final = ("more", "no-end", "huge-size", "bad-size", "9" * 30, str(10**18), str(2**63))
"""Lengths of bodies that do not end, so that the server has to wait for more."""
BOMB: Final = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"

NAMES = st.sampled_from(
    [
        *("team/app", "team/app", "team/app", "other/app", "a", "blobs/uploads", "manifests"),
        *("../team", "team/../../x", "a//b", "/a", "a/", "A/b", "a" * 300, "", ".", "..", "a/./b"),
        *("%2e%2e/%2e%2e", "a%2fb", "a%00b", "a%", "team%20app", "é", "a\\b", "~", "-a", "a_b__c"),
    ]
)
DIGESTS = st.sampled_from(
    [
        *(str(DIGEST), str(DIGEST), str(DIGEST), str(Digest.of(DATA, "sha512"))),
        *(str(Digest.of(b"")), str(Digest.of(b"other")), f"sha512:{DIGEST.hex}"),
        *(
            f"sha256:{'A' * 64}",
            "sha256:",
            "sha256",
            ":",
            "",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
        ),
        *("sha256:../../../../etc/passwd", "sha256:%2e%2e%2f", f"{DIGEST}%00", f"{DIGEST}/..", "é"),
        f"sha256:{'0' * 4000}",
    ]
)
IDS = st.sampled_from(
    [
        *("{0}", "{0}", "{0}", "{1}", "{0}/", "{0}/..", "{0}%00", "%7b0%7d", "0" * 32, "f" * 33),
        *(
            "..",
            "../{0}",
            "../../hosted/names.db",
            "%2e%2e%2f{0}",
            ".",
            "é",
            "{0}.json",
            "x" * 5000,
        ),
    ]
)
RANGES = st.sampled_from(
    [
        *("0-2999", "0-0", "0-9", "10-19", "3000-3009", "5-1", "-1", "0-", "abc", "", "0-1,5-9"),
        *(
            "bytes 0-9/10",
            "bytes=0-9",
            "bytes */10",
            "0-99999999999999999999999",
            "00-009",
            "0 - 9",
        ),
        *("9223372036854775806-9223372036854775807", "-5--1", "0x0-0x9", "0-9\t", "\u0660-\u0669"),
    ]
)
LENGTHS = st.sampled_from(
    [
        *("right", "right", "right", "right", "none", "more", "less", "0", "-1", "+5", "1e3"),
        *("0x10", "9" * 30, str(10**18), str(2**63), "5, 5", " ", "two", "chunked", "chunked"),
        *("bad-size", "huge-size", "no-end", "extension", "trailer", "both", "twice-chunked"),
    ]
)
BODIES = st.sampled_from(
    [
        *(DATA, DATA, b"", DATA[:10], DATA[10:], DATA * 30, b"\0" * 50_000, BOMB),
        *(manifest_of(DATA), manifest_of(), b"{", b"[" * 20_000, b'{"schemaVersion":2}'),
    ]
)
QUERY_KEYS = st.sampled_from(
    ["digest", "digest", "digest", "mount", "from", "tag", "digest-algorithm", "_state", "n", "%"]
)
QUERY_VALUES = st.one_of(DIGESTS, NAMES, st.sampled_from(["sha256", "md5", "v1", "-", "%zz"]))
TARGETS = st.sampled_from(
    [
        *("/v2/{name}/blobs/uploads/", "/v2/{name}/blobs/uploads/", "/v2/{name}/blobs/uploads"),
        *("/v2/{name}/blobs/uploads/{id}",) * 5,
        *("/v2/{name}/blobs/{digest}", "/v2/{name}/manifests/{digest}", "/v2/{name}/manifests/v1"),
        *("/v2/{name}/manifests/{id}", "/v2/{name}", "/v2/{name}/blobs/uploads/{id}/{id}"),
        *("/v2/{name}/tags/list", "/v2/{name}/referrers/{digest}", "//v2/{name}/blobs/uploads/"),
        "http://127.0.0.1/v2/{name}/blobs/uploads/",
    ]
)
METHODS = st.sampled_from(
    ["POST", "POST", "PATCH", "PATCH", "PATCH", "PUT", "PUT", "GET", "HEAD", "DELETE", "PURGE"]
)


@dataclass(frozen=True)
class Request:
    """One request. ``{0}`` in ``target``: the latest upload of the user, ``{1}``: of another."""

    method: str
    target: str
    user: str
    length: str
    body: bytes
    headers: tuple[tuple[str, str], ...]

    def encode(self, uploads: dict[str, str]) -> bytes:
        """Return its bytes, given the latest upload of each user."""
        other = "bob" if self.user == "ann" else "ann"
        target = self.target.replace("{0}", uploads.get(self.user, "0" * 32))
        target = target.replace("{1}", uploads.get(other, "1" * 32))
        fields = [("Host", "registry.example"), ("Authorization", f"Bearer {TOKENS[self.user]}")]
        fields += [("Connection", "close"), *self.headers]
        framing, body = frame(self.length, self.body)
        lines = [f"{self.method} {target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (*fields, *framing)]
        return "\r\n".join([*lines, "", ""]).encode() + body


def frame(length: str, body: bytes) -> tuple[list[tuple[str, str]], bytes]:
    """Return the fields that say how long a body is, and its bytes on the wire."""
    size = str(len(body))
    chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n" if body else b""
    chunked = [("Transfer-Encoding", "chunked")]
    match length:
        case "right":
            return [("Content-Length", size)], body
        case "none":
            return [], body
        case "more":
            return [("Content-Length", str(len(body) + 1000))], body
        case "less":
            return [("Content-Length", str(len(body) // 2))], body
        case "chunked":
            return chunked, chunk + b"0\r\n\r\n"
        case "bad-size":
            return chunked, b"zz\r\n" + body + b"\r\n0\r\n\r\n"
        case "huge-size":
            return chunked, b"f" * 40 + b"\r\n" + body
        case "no-end":
            return chunked, chunk
        case "extension":
            return chunked, b"5;" + b"x=" * 5000 + b"\r\nabcde\r\n0\r\n\r\n"
        case "trailer":
            return chunked, chunk + b"0\r\nContent-Length: 5\r\n" + b"X: y\r\n" * 500 + b"\r\n"
        case "both":
            return [("Content-Length", size), *chunked], chunk + b"0\r\n\r\n"
        case "twice-chunked":
            return [*chunked, *chunked], chunk + b"0\r\n\r\n"
        case stated:
            return [("Content-Length", stated)], body


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Return a request of which most parts are right, so that others are reached."""
    name, upload_id, digest = draw(NAMES), draw(IDS), draw(DIGESTS)
    target = draw(TARGETS).replace("{name}", name).replace("{id}", upload_id)
    target = target.replace("{digest}", digest)
    query = draw(st.lists(st.tuples(QUERY_KEYS, QUERY_VALUES), max_size=3))
    if query:
        target += "?" + "&".join(f"{key}={value}" for key, value in query)
    headers: list[tuple[str, str]] = []
    if draw(st.booleans()):
        headers.append(("Content-Range", draw(RANGES)))
    if draw(st.booleans()):
        headers.append(("Content-Type", draw(st.sampled_from([OCI_MANIFEST, "x", "a/b;" * 500]))))
    if draw(st.integers(0, 9)) == 0:
        headers.append(("Expect", draw(st.sampled_from(["100-continue", "200-ok"]))))
    return Request(
        method=draw(METHODS),
        target=target.replace(" ", "%20"),
        user=draw(st.sampled_from(["ann", "ann", "bob"])),
        length=draw(LENGTHS),
        body=draw(BODIES),
        headers=tuple(headers),
    )


@dataclass
class Probe:
    """A running server, and the uploads that its clients have begun."""

    server: Server
    clock: list[float]
    uploads: dict[str, str] = field(default_factory=dict)

    async def play(self, steps: list[Request]) -> None:
        """Send requests one after another, and check each response, and the quota."""
        for step in steps:
            response = await self._send(step)
            codes = [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3}) ", response)]
            assert codes or step.length in INCOMPLETE, (step, "no response")
            assert max(codes, default=0) < 500, (step, response[:500])
            begun = re.search(rb"Location: [^\r]*/blobs/uploads/([0-9a-f]{32})\r", response)
            if begun is not None:
                self.uploads[step.user] = begun[1].decode()
        service = self.server.running_server.mirror.hosted
        assert service is not None
        usage = await service.database.read(name_rows.usage)
        on_disk = sum(path.stat().st_size for path in self.server.store.layout.uploads.iterdir())
        assert usage.bytes + on_disk <= QUOTA

    async def _send(self, step: Request) -> bytes:
        """Send a request. Returns all bytes until the server closes.

        A client that announces more than it sends disconnects after a moment, and gets no response
        then. The server still has to end the request.
        """
        port = int(self.server.push_url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        parts: list[bytes] = []

        async def read() -> None:
            while data := await reader.read(65_536):
                parts.append(data)

        with closing(writer):
            try:
                writer.write(step.encode(self.uploads))
                if step.length in INCOMPLETE:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(read(), DISCONNECT_S)
                    writer.write_eof()
                await asyncio.wait_for(read(), LIMIT_S)
            except ConnectionError:  # What is no HTTP is refused before its body is read.
                return b"".join(parts) or b"HTTP/1.1 400 reset"
        return b"".join(parts)

    async def check_end(self) -> None:
        """Check that after a day nothing is left of what was not finished."""
        layout = self.server.store.layout
        service = self.server.running_server.mirror.hosted
        assert service is not None
        self.clock[0] += 10 * UPLOAD_TTL_S
        await service.uploads.end_abandoned()
        assert await service.database.read(upload_rows.all_uploads) == []
        assert list(layout.uploads.iterdir()) == []
        names = {path.name.partition(".")[0] for path in layout.root.iterdir()}
        assert names <= KNOWN, names - KNOWN
        every_file_hashes_to_its_name(layout.root)
        errors = [e for e in self.server.events if isinstance(e, LogMessage) and e.level == "error"]
        assert errors == []


KNOWN: Final = {
    *("blobs", "ingest", "quarantine", "index", "history", "hosted", "uploads", "oci-layout"),
    *("marks", "eviction", "totals", "retention", "prefetch", "access"),
}
"""All names in a data directory, up to the dot. A path that leaves ``uploads/`` adds another."""


@asynccontextmanager
async def _probing(root: Path) -> AsyncIterator[Probe]:
    clock = [NOW]
    hosted: dict[str, Any] = {"max_size": QUOTA}
    tokens = root.parent / "tokens.yaml"
    tokens.write_text(json.dumps([{"name": name, "token": TOKENS[name]} for name in TOKENS]))
    rules = [{"repositories": ["**"], "who": ["authenticated"], "may": ["admin"]}]
    more = {"access": {"tokens": str(tokens), "rules": rules}}
    async with running(root, hosted=hosted, more=more, clock=lambda: clock[0]) as server:
        yield Probe(server, clock)


@contextmanager
def probing(root: Path) -> Iterator[Callable[[list[Request]], None]]:
    """Run a server on an event loop. Yields a function that sends requests to it, and returns."""
    with asyncio.Runner() as runner:
        context = _probing(root)
        probe = runner.run(context.__aenter__())
        try:
            yield lambda steps: runner.run(probe.play(steps))
            runner.run(probe.check_end())
        finally:
            runner.run(context.__aexit__(None, None, None))


@pytest.mark.row("HC15-hostile-pushes")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "count", [100, pytest.param(4_000, marks=pytest.mark.long(60))], ids=["some", "many"]
)
def test_hostile_pushes_get_no_5xx_and_leave_nothing(
    tmp_path: Path, count: int, extent: Extent
) -> None:
    count = extent.of(count)
    with probing(tmp_path) as play:

        @seed(13)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        @given(st.lists(requests(), min_size=1, max_size=6))
        def probe(steps: list[Request]) -> None:
            play(steps)

        probe()
    extent.tried(count)


def push(user: str, upload: str, length: str = "right", body: bytes = DATA) -> Request:
    """Return a right request to feed an upload."""
    return Request("PATCH", f"/v2/team/app/blobs/uploads/{upload}", user, length, body, ())


@pytest.mark.row("HC15-hostile-pushes")
def test_probe_reaches_uploads_and_content(tmp_path: Path) -> None:
    """The probe is worth something: right requests of it do push a blob."""
    start = Request("POST", "/v2/team/app/blobs/uploads/", "ann", "right", b"", ())
    finish = Request(
        "PUT", f"/v2/team/app/blobs/uploads/{{0}}?digest={DIGEST}", "ann", "right", b"", ()
    )
    with probing(tmp_path) as play:
        play([start, push("ann", "{0}", "chunked"), push("bob", "{1}"), finish])
        assert (tmp_path / "blobs/sha256" / DIGEST.hex).read_bytes() == DATA
