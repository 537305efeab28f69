"""A token service in memory, which counts, and an authenticator that asks it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from yarl import URL

from mirror.config.settings import Credentials
from mirror.observability.events import Event
from mirror.oci.errors import MirrorError
from mirror.oci.reference import Repository
from mirror.upstream.auth import Authenticator, SentAuthorization, TokenResponse
from mirror.upstream.outbound import Policy
from tests.unit.upstream.kit import REPO

HUB = Policy(URL("https://registry-1.docker.io"), ("auth.docker.io",))
BEARER = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="x:y:push"'
BASIC = 'Basic realm="x"'
USER = Credentials(username="user", password="secret")
SHOWN = "Basic " + base64.b64encode(b"user:secret").decode()


class Service:
    """A token service: every token is another one, unless it is told what to answer."""

    def __init__(self, credentials: Credentials | None = None) -> None:
        self.calls: list[tuple[str, URL, dict[str, str], dict[str, str]]] = []
        self.answers: list[TokenResponse | MirrorError] = []
        """For the next calls; the last one stays."""
        self.lifetime: Any = 300
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun = asyncio.Event()
        self.clock = [1000.0]
        self.events: list[Event] = []
        self.auth = Authenticator(
            "docker.io",
            credentials or Credentials(),
            self.exchange,
            self.events.append,
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
        self.begun.set()
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.answers:
            answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
            if isinstance(answer, MirrorError):
                raise answer
            return answer
        document = {"token": f"t{number}", "expires_in": self.lifetime}
        return TokenResponse(200, json.dumps(document).encode())

    async def challenged(
        self,
        refused: SentAuthorization | None = None,
        challenge: str | Sequence[str] = BEARER,
        policy: Policy = HUB,
        repository: Repository = REPO,
    ) -> SentAuthorization | None:
        lines = [challenge] if isinstance(challenge, str) else challenge
        return await self.auth.challenged(lines, policy, repository, refused)

    async def header(self, *args: Any, **named: Any) -> str | None:
        """The header that answers a challenge."""
        sent = await self.challenged(*args, **named)
        return sent.header if sent is not None else None

    async def first(self, policy: Policy = HUB, repository: Repository = REPO) -> str | None:
        """The header that a request begins with."""
        sent = await self.auth.authorization(policy, repository)
        return sent.header if sent is not None else None
