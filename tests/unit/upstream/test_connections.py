"""Names and TLS settings of connections, and which ones are used again."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from pathlib import Path

import pytest

from mirror.threads import TooManyHangingCalls
from mirror.upstream.connections import Resolver, tls_context
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.tokens import Certificate
from tests.unit.upstream.kit import DATA, REPO, upstream_kit
from tests.waiting import until

OTHER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"
"""Bytes after a body that are a response of their own."""


@pytest.mark.row("U5-odd-framing")
@pytest.mark.parametrize("data", [b"small", DATA, DATA * 20], ids=["small", "100 kB", "2 MB"])
@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "later"])
async def test_bytes_after_a_body_are_no_response_to_the_next_request(
    data: bytes, is_late: bool
) -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest, other = fake.add_blob(data), fake.add_blob(b"other")
        gate = asyncio.Event()
        stall_at = len(data) if is_late else None
        fake.fault(f"blobs/{digest}", Fault(extra=OTHER, stall_at=stall_at, gate=gate))
        assert await kit.read(digest) == data
        gate.set()
        await until(lambda: fake.bytes_sent == len(data + OTHER))
        await asyncio.sleep(0.05)
        assert await kit.read(other) == b"other"
        assert await kit.read(digest) == data


async def test_connection_is_used_again_after_each_kind_of_response() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest, empty = fake.add_blob(DATA), fake.add_blob(b"")
        for one in (digest, empty, empty, digest):
            await kit.read(one)
        assert await kit.registry.head_blob(REPO, digest) == len(DATA)
        await kit.read(digest, offset=1000)
        assert fake.connections == 1


async def test_resolver_returns_each_address_with_the_port() -> None:
    found = await Resolver().resolve("localhost", 443, socket.AF_INET)
    assert [(one["hostname"], one["host"], one["port"]) for one in found] == [
        ("localhost", "127.0.0.1", 443)
    ]


async def test_resolver_raises_os_error_for_an_unknown_name() -> None:
    with pytest.raises(OSError):  # noqa: PT011 - the text is the resolver's
        await Resolver().resolve("no-such-host.invalid", 443)


@pytest.mark.row("FD7-hanging-dns")
async def test_names_of_a_hostile_upstream_hang_in_a_bounded_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: gate.wait(20) and [])
    hostile, other = Resolver(), Resolver()
    asked = [
        asyncio.ensure_future(hostile.resolve(f"{number}.example", 1))  # noqa: TID251 - a test
        for number in range(100)
    ]
    await asyncio.sleep(0.05)
    assert len([one for one in threading.enumerate() if one.name == "name"]) == 16
    waiting = asyncio.ensure_future(other.resolve("0.example", 1))  # noqa: TID251 - a test
    await asyncio.sleep(0.05)
    assert hostile.is_looking_up("0.example")
    assert other.is_looking_up("0.example"), "another upstream has threads of its own"
    gate.set()
    assert await waiting == []
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert [outcome for outcome in outcomes if outcome == []] == [[]] * 16
    refused = [one for one in outcomes if isinstance(one, TooManyHangingCalls)]
    assert len(refused) == 84


@pytest.mark.row("FD8-upstream-tls")
def test_tls_settings_are_loaded_again_when_a_file_has_changed(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path)
    ca = str(certificate.cert_file)
    first = tls_context(ca, None, insecure=False)
    assert tls_context(ca, None, insecure=False) is first
    os.utime(ca, (1, 1))
    assert tls_context(ca, None, insecure=False) is not first
