"""Documents of URLs that the configuration names: the keys of an issuer, over TLS."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mirror.access.key_sets import KEYS_RETRY_S, FetchedKeySet
from mirror.oci.errors import MirrorError, UpstreamUnavailable
from mirror.upstream.named_documents import fetch_named_document
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.tokens import Certificate
from tests.unit.access.kit import NOW, Signer, key_set
from tests.unit.upstream.kit import tls_server

PATH = "/openid/v1/jwks"
MAX_BYTES = 1024 * 1024


@asynccontextmanager
async def issuer(root: Path) -> AsyncIterator[tuple[FakeRegistry, str, str]]:
    """Yield a server, the URL of its keys, and the file of its authority."""
    certificate = Certificate.make(root)
    async with FakeRegistry(tls_server(certificate)) as server:
        yield server, f"{server.url}{PATH}", str(certificate.cert_file)


async def failure(url: str, ca: str | None, listen: Collection[str] = ()) -> str:
    """Return why a document cannot be had."""
    with pytest.raises(MirrorError) as caught:
        await fetch_named_document(url, ca, listen)
    return str(caught.value)


async def test_document_is_fetched_with_the_named_authority_only(tmp_path: Path) -> None:
    async with issuer(tmp_path) as (server, url, ca):
        server.fault(PATH, Fault(status=200, body=b"{}", times=None))
        assert await fetch_named_document(url, ca, ()) == b"{}"
        assert "certificate" in await failure(url, None)
        other = Certificate.make(tmp_path, "other")
        assert "certificate" in await failure(url, str(other.cert_file))
        (request,) = server.requests
        assert "Authorization" not in request.headers
    with pytest.raises(OSError, match=r"missing\.pem"):
        await fetch_named_document(url, str(tmp_path / "missing.pem"), ())


async def test_redirect_is_refused_and_not_followed(tmp_path: Path) -> None:
    async with issuer(tmp_path) as (server, url, ca):
        for status in (301, 302, 307, 308):
            server.fault(PATH, Fault(status=status, headers={"Location": f"{server.url}/other"}))
            assert str(status) in await failure(url, ca)
        assert server.count("GET", "/other") == 0


async def test_document_has_a_size_limit(tmp_path: Path) -> None:
    async with issuer(tmp_path) as (server, url, ca):
        server.fault(PATH, Fault(status=200, body=b" " * MAX_BYTES))
        assert len(await fetch_named_document(url, ca, ())) == MAX_BYTES
        for fault in (
            Fault(status=200, body=b" " * (MAX_BYTES + 1)),
            Fault(status=200, body=b" " * (MAX_BYTES + 1), chunked=True),
        ):
            server.fault(PATH, fault)
            assert await failure(url, ca)


@pytest.mark.parametrize("status", [204, 401, 404, 500, 503])
async def test_other_statuses_are_no_document(tmp_path: Path, status: int) -> None:
    async with issuer(tmp_path) as (server, url, ca):
        server.fault(PATH, Fault(status=status, body=b"{}"))
        assert str(status) in await failure(url, ca)


async def test_own_address_is_refused(tmp_path: Path) -> None:
    async with issuer(tmp_path) as (server, url, ca):
        assert await failure(url, ca, [f"127.0.0.1:{server.port}"])
        assert server.requests == []


async def test_keys_of_a_url_rotate_and_outlive_its_failure(tmp_path: Path) -> None:
    old, new = Signer("old"), Signer("new")
    async with issuer(tmp_path) as (server, url, ca):

        async def fetch(url: str, ca: str | None) -> bytes:
            return await fetch_named_document(url, ca, ())

        keys = FetchedKeySet(url, ca, fetch)
        server.fault(
            PATH,
            Fault(status=503),
            Fault(status=200, body=key_set(old)),
            Fault(status=503),
            Fault(status=200, body=key_set(new)),
        )
        names = []
        for turn in range(4):
            await keys.refresh(NOW + turn * KEYS_RETRY_S)
            names.append([key.key_id for key in keys.keys(NOW + turn * KEYS_RETRY_S)])
        assert names == [[], ["old"], ["old"], ["new"]]
    assert await keys.refresh(NOW + 4 * KEYS_RETRY_S) != "", "nobody listens there any more"
    assert [key.key_id for key in keys.keys(NOW + 4 * KEYS_RETRY_S)] == ["new"]


async def test_url_that_nobody_listens_at_is_an_error_with_its_cause(tmp_path: Path) -> None:
    async with issuer(tmp_path) as (_, url, ca):
        pass
    with pytest.raises(UpstreamUnavailable):
        await fetch_named_document(url, ca, ())
