"""A token service in memory that records its requests, and an authenticator that uses it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from yarl import URL

from mirror.config.settings import Credentials, Upstream
from mirror.observability.events import Event
from mirror.oci.reference import Repository
from mirror.single_flight import SingleFlight
from mirror.upstream.auth import Authenticator, Negotiation, TokenResponse
from mirror.upstream.outbound import Policy
from tests.unit.upstream.kit import REPO

HUB = Policy(URL("https://registry-1.docker.io"), ("auth.docker.io",))
BEARER = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="x:y:push"'
BASIC = 'Basic realm="x"'
USER = Credentials(username="user", password="secret")
BASIC_HEADER = "Basic " + base64.b64encode(b"user:secret").decode()


class Service:
    """A token service. Each token is different, unless the test sets ``responses``."""

    def __init__(self, single_flight: SingleFlight, credentials: Credentials | None = None) -> None:
        self.calls: list[tuple[str, URL, dict[str, str], dict[str, str]]] = []
        self.responses: list[TokenResponse | Exception] = []
        """Responses to the next requests. The last one is repeated."""
        self.lifetime: Any = 300
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Event()
        self.clock = [1000.0]
        self.events: list[Event] = []
        self.auth = Authenticator(
            "docker.io",
            Upstream(
                endpoints=("https://registry-1.docker.io",),
                credentials=credentials or Credentials(),
            ),
            self.exchange,
            self.events.append,
            single_flight,
            lambda: self.clock[0],
        )

    async def exchange(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None,
    ) -> TokenResponse:
        self.calls.append((method, url, dict(headers), dict(form or {})))
        number = len(self.calls)
        self.started.set()
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.responses:
            response = self.responses[0] if len(self.responses) == 1 else self.responses.pop(0)
            if isinstance(response, Exception):
                raise response
            return response
        document = {"token": f"t{number}", "expires_in": self.lifetime}
        return TokenResponse(200, json.dumps(document).encode())

    async def challenged(
        self,
        refused: str | None = None,
        challenge: str | Sequence[str] = BEARER,
        policy: Policy = HUB,
        repository: Repository = REPO,
    ) -> str | None:
        """Return the header to send after a challenge, and accept it.

        ``refused``: the header that a request was sent with in advance, which the endpoint refused.
        """
        lines = [challenge] if isinstance(challenge, str) else challenge
        negotiation = Negotiation(self.auth, policy, repository)
        header: str | None = await negotiation.first()
        if header:
            if header != refused:
                return header
            assert await negotiation.next(401, []) == "", "the endpoint is asked without it"
        header = await negotiation.next(401, lines)
        negotiation.accept()
        return header

    async def first(self, policy: Policy = HUB, repository: Repository = REPO) -> str:
        """Return the header that a request is sent with at first. Empty: none."""
        return await Negotiation(self.auth, policy, repository).first()
