"""Names and TLS settings of connections."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from pathlib import Path

import pytest

from mirror.threads import TooManyHangingCalls
from mirror.upstream.connections import Resolver, tls_context
from tests.real.tokens import Certificate


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
