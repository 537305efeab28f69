"""Requests to token services.

Lives here: one exchange with a realm, its limits, and what its failure says about the endpoint.
Must not know: challenges, logins, the cache of tokens (:mod:`mirror.upstream.auth`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from yarl import URL

from mirror.oci.errors import FailureScope, UpstreamUnavailable
from mirror.upstream.auth import MAX_TOKEN_RESPONSE_BYTES, TokenResponse
from mirror.upstream.outbound import Policy, realm_rule
from mirror.upstream.transport import Transport, read_body, retry_after_of, token_deadline


class TokenTransport:
    """Sends the requests to the token services of one upstream."""

    def __init__(self, name: str, transport: Transport, endpoints: Collection[URL]) -> None:
        """Create the transport of one upstream: its ``name``, and the URLs of its ``endpoints``."""
        self._name = name
        self._transport = transport
        self._endpoints = endpoints

    async def send(
        self, method: str, url: URL, headers: Mapping[str, str], form: Mapping[str, str] | None
    ) -> TokenResponse:
        """Send a request to a realm that the guard has allowed. Redirects are not followed.

        It runs in a task of its own, so it has a deadline of its own, for its body as well. A
        failure does not count for the endpoint's circuit breaker: other repositories may need no
        token.

        Args:
            method: ``GET`` or ``POST``.
            url: The realm.
            headers: Request headers, beside those of the session.
            form: Fields of a form body. None: no body.
        """
        limit = self._transport.response_limit()
        exchange = self._transport.exchange(
            method,
            url,
            headers,
            Policy(url.origin(), upstream=self._name),
            may_follow_redirects=False,
            body=form,
            limit=limit,
            addresses=realm_rule(url, self._endpoints),
        )
        try:
            async with token_deadline(limit), exchange as response:
                body = await read_body(response, MAX_TOKEN_RESPONSE_BYTES)
                return TokenResponse(response.http.status, body, retry_after_of(response.http))
        except UpstreamUnavailable as error:
            if error.scope is FailureScope.ENDPOINT:
                error.scope = FailureScope.SAME_KIND
            raise
