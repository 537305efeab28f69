"""The server as a process: certificate, shutdown, workers, exit codes."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.client import HTTPException
from pathlib import Path

import aiohttp
import pytest

from mirror.config.settings import Tls
from mirror.oci.reference import Digest
from mirror.threads import run_in_thread
from mirror.web.listening import Certificate
from tests.fakes.registry import FakeRegistry, Fault
from tests.real import tokens
from tests.real.process import wait_until
from tests.real.server import ROOT, Mirror
from tests.server_kit import running
from tests.unit.store.kit import random_bytes

DATA = random_bytes(600_000, 64)
DIGEST = Digest.of(DATA)
BLOB = f"/v2/library/app/blobs/{DIGEST}"
NOWHERE = {"docker.io": "http://127.0.0.1:9"}


# --- the listener's certificate -----------------------------------------------------------------


async def fetch_certificate(port: int) -> bytes | None:
    """Return the certificate that a new connection gets, in DER."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        received: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return received
    finally:
        writer.transport.abort()


def der(made: tokens.Certificate) -> bytes:
    return ssl.PEM_cert_to_DER_cert(made.cert_file.read_text())


@asynccontextmanager
async def listening(certificate: Certificate) -> AsyncIterator[int]:
    """A server that completes the TLS handshake and closes. Yields its port."""
    server = await asyncio.start_server(
        lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=certificate.context
    )
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_new_connections_get_a_changed_certificate_after_a_refresh(tmp_path: Path) -> None:
    old = tokens.Certificate.make(tmp_path)
    certificate = Certificate(Tls(certificate=str(old.cert_file), key=str(old.key_file)))
    async with listening(certificate) as port:
        first = der(old)
        certificate.refresh()
        assert await fetch_certificate(port) == first
        new = tokens.Certificate.make(tmp_path)
        assert await fetch_certificate(port) == first, "the new certificate has not been loaded yet"
        certificate.refresh()
        assert await fetch_certificate(port) == der(new) != first


async def test_pair_that_cannot_be_loaded_raises_and_the_previous_one_stays_in_use(
    tmp_path: Path,
) -> None:
    """A certificate and its key are replaced one after the other, with a refresh in between."""
    old = tokens.Certificate.make(tmp_path)
    certificate = Certificate(Tls(certificate=str(old.cert_file), key=str(old.key_file)))
    (tmp_path / "new").mkdir()
    new = tokens.Certificate.make(tmp_path / "new")
    first = der(old)
    async with listening(certificate) as port:
        old.cert_file.write_bytes(new.cert_file.read_bytes())
        with pytest.raises(ssl.SSLError):
            certificate.refresh()
        assert await fetch_certificate(port) == first
        old.key_file.unlink()
        with pytest.raises(OSError, match="No such file"):
            certificate.refresh()
        assert await fetch_certificate(port) == first
        old.key_file.write_text("no key at all")
        with pytest.raises(OSError, match=r"PEM|SSL"):
            certificate.refresh()
        assert await fetch_certificate(port) == first
        old.key_file.write_bytes(new.key_file.read_bytes())
        certificate.refresh()
        assert await fetch_certificate(port) == der(new)


async def test_running_server_loads_a_changed_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.housekeeping.CERTIFICATE_INTERVAL_S", 0.02)
    made = tokens.Certificate.make(tmp_path)
    async with running(tmp_path / "data", certificate=made) as server:
        port = int(server.url.rpartition(":")[2])
        assert await fetch_certificate(port) == der(made)
        new = tokens.Certificate.make(tmp_path)
        async with asyncio.timeout(20):
            while await fetch_certificate(port) != der(new):  # noqa: ASYNC110 - a refresh has no event to wait for
                await asyncio.sleep(0.02)


@pytest.mark.row("HC7-slow-attacks")
async def test_connection_that_begins_no_tls_handshake_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.server.KEEPALIVE_TIMEOUT_S", 0.2)
    made = tokens.Certificate.make(tmp_path)
    async with running(tmp_path / "data", certificate=made) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


# --- SIGTERM ------------------------------------------------------------------------------------


@asynccontextmanager
async def pulling(mirror: Mirror, fake: FakeRegistry) -> AsyncIterator[aiohttp.ClientResponse]:
    """A pull of a blob of which the upstream has sent the first part only."""
    fake.add_blob(DATA)
    async with aiohttp.ClientSession() as client, client.get(mirror.url + BLOB) as response:
        assert await response.content.readexactly(1000) == DATA[:1000]
        yield response


async def is_draining(mirror: Mirror) -> bool:
    """True if the server responds, and reports that it drains."""
    response = await run_in_thread(mirror.ask, "/readyz")
    return response.status == 503 and b"draining" in response.body


async def wait_until_draining(mirror: Mirror) -> None:
    async with asyncio.timeout(20):
        while not await is_draining(mirror):  # noqa: ASYNC110 - another process, without an event to wait for
            await asyncio.sleep(0.02)


@pytest.mark.row("C10-stop-among-pulls")
async def test_sigterm_refuses_new_pulls_and_completes_running_ones() -> None:
    gate = asyncio.Event()
    async with FakeRegistry() as fake:
        fake.fault(BLOB, Fault(stall_at=300_000, gate=gate))
        with Mirror({"docker.io": fake.url}) as mirror:
            async with pulling(mirror, fake) as response:
                os.kill(mirror.pid, signal.SIGTERM)
                await wait_until_draining(mirror)
                refused = await run_in_thread(mirror.ask, BLOB)
                assert (refused.status, b"UNAVAILABLE" in refused.body) == (503, True)
                assert (await run_in_thread(mirror.ask, "/healthz")).status == 200
                gate.set()
                assert await response.content.read() == DATA[1000:]
            await run_in_thread(wait_until, lambda: not mirror.running, "it ends", 20)
            assert mirror.content(str(DIGEST)).read_bytes() == DATA
            assert mirror.stop() == 0
            assert [line["message"] for line in mirror.log() if "pulls" in line] == ["draining"]


@pytest.mark.row("C10-stop-among-pulls")
async def test_pull_that_exceeds_the_drain_timeout_is_aborted_and_not_stored() -> None:
    async with FakeRegistry() as fake:
        fake.fault(BLOB, Fault(stall_at=300_000, times=None))
        with Mirror({"docker.io": fake.url}, drain_timeout="0.2s") as mirror:
            async with pulling(mirror, fake) as response:
                os.kill(mirror.pid, signal.SIGTERM)
                with pytest.raises(aiohttp.ClientError):
                    await response.content.read()
            await run_in_thread(wait_until, lambda: not mirror.running, "it ends", 20)
            assert mirror.stop() == 0
            assert not mirror.content(str(DIGEST)).exists()


@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_signal_ends_the_server_with_exit_code_0_and_leaves_no_process(
    workers: int, number: signal.Signals
) -> None:
    with Mirror(NOWHERE, workers=workers) as mirror:
        children = mirror.workers()
        assert len(children) == (workers if workers > 1 else 0)
        os.kill(mirror.pid, number)
        wait_until(lambda: not mirror.running, "it ends", 20)
        assert mirror.stop() == 0
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
        assert "Traceback" not in mirror.output_text()


# --- workers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_workers() -> Iterator[Mirror]:
    with Mirror(NOWHERE, workers=2) as mirror:
        yield mirror


def exit_codes(mirror: Mirror) -> list[int]:
    """Exit codes of the workers that were replaced."""
    return [line["code"] for line in mirror.log() if line["message"] == "a worker ended"]


def is_ready(mirror: Mirror) -> bool:
    """True if a new connection is served. Any of the workers may accept it."""
    try:
        return mirror.ask("/readyz", timeout=1).status == 200
    except (OSError, HTTPException):
        return False


def test_killed_worker_is_replaced_and_its_metrics_stay(two_workers: Mirror) -> None:
    mirror = two_workers
    for _ in range(40):
        assert mirror.ask("/v2/library/app/tags/list?n=0").status == 200
    # A request is counted after its response was sent.
    assert mirror.metric_reaches(40, "oci_mirror_requests_total", kind="tags", outcome="hit")
    before = mirror.workers()
    mirror.kill_worker(before[0])
    wait_until(lambda: len(set(mirror.workers()) - set(before)) == 1, "another worker", 20)
    assert before[1] in mirror.workers(), "the other worker is not restarted"
    wait_until(lambda: all(is_ready(mirror) for _ in range(10)), "all is served", 20)
    assert exit_codes(mirror) == [-signal.SIGKILL]
    assert mirror.metric("oci_mirror_requests_total", kind="tags", outcome="hit") == 40


@pytest.mark.row("M9-dying-worker")
def test_worker_that_fails_at_start_is_restarted_once_a_second_at_most(tmp_path: Path) -> None:
    made = tokens.Certificate.make(tmp_path)
    listener = {"certificate": str(made.cert_file), "key": str(made.key_file)}
    with Mirror(NOWHERE, workers=2, tls=listener) as mirror:
        wait_until(lambda: all(is_ready(mirror) for _ in range(20)), "both serve", 20)
        key = made.key_file.read_bytes()
        made.key_file.unlink()
        started = time.monotonic()
        mirror.kill_worker(mirror.workers()[0])
        wait_until(lambda: len(exit_codes(mirror)) >= 3, "it is tried again", 30)
        codes = exit_codes(mirror)
        # The killed worker, and then one a second at most.
        assert len(codes) <= 2 + time.monotonic() - started
        assert codes == [-signal.SIGKILL, *[70] * (len(codes) - 1)]
        assert mirror.output_text().count("worker: ") >= 2
        assert "Traceback" not in mirror.output_text()
        made.key_file.write_bytes(key)
        wait_until(lambda: all(is_ready(mirror) for _ in range(10)), "all is served", 30)


def test_second_server_on_the_port_of_workers_fails_with_one_line(two_workers: Mirror) -> None:
    """Workers share their port with ``SO_REUSEPORT``, but not with another server."""
    mirror = two_workers
    command = [sys.executable, "-m", "mirror", "serve", "--config", str(mirror.config_file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"oci-mirror: listen: {mirror.host}: an oci-mirror listens there already (ss -ltnp shows "
        "its process): stop it, or change listen\n"
    )
    assert mirror.ask("/readyz").status == 200
