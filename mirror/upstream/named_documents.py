"""Fetch a small document of a URL that the configuration names, such as the keys of an issuer.

Lives here: one exchange for each document, through the outbound guard. Must not know: what is in
the document.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final

from yarl import URL

from mirror.config.settings import Upstream
from mirror.oci.errors import UpstreamProtocolError, UpstreamUnavailable
from mirror.upstream.connections import own_addresses
from mirror.upstream.outbound import Policy
from mirror.upstream.transport import Transport, read_body

_MAX_DOCUMENT_BYTES: Final = 1024 * 1024
"""Bytes of a document: a key set has a few thousand."""
_TIMEOUT_S: Final = 15.0
"""Seconds until a document has to be complete."""


async def fetch_named_document(url: str, ca: str | None, listen: Collection[str]) -> bytes:
    """Return the body of a URL. Redirects are not followed.

    Args:
        url: An https URL of the configuration.
        ca: PEM file of certificate authorities, beside those of the system. None: no others.
        listen: Addresses and ports of this server, which are refused.

    Raises:
        MirrorError: There was no response in time, or it was not 200.
        OSError: ``ca`` cannot be used.
    """
    target = URL(url, encoded=True)
    own = {address for one in listen for address in own_addresses(one)}
    settings = Upstream(endpoints=(str(target.origin()),), ca=ca)
    transport = Transport(settings, own_addresses=own)
    try:
        async with (
            asyncio.timeout(_TIMEOUT_S),
            transport.exchange(
                "GET",
                target,
                {"Accept": "application/json"},
                Policy(target.origin(), own_addresses=own),
                may_follow_redirects=False,
                limit=transport.response_limit(),
            ) as response,
        ):
            if response.http.status != 200:
                raise UpstreamProtocolError(f"the response is {response.http.status}")
            return await read_body(response, _MAX_DOCUMENT_BYTES)
    except TimeoutError:
        raise UpstreamUnavailable(f"no response within {_TIMEOUT_S:g} s") from None
    finally:
        await transport.close()
