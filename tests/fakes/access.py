"""Access rules of a fake registry: tokens of different scopes, realms, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.fakes.registry import Answer, FakeRegistry, ReceivedRequest


def own_scope(repository: str) -> str:
    """Return the scope that a token for pulls from a repository usually has."""
    return f"repository:{repository}:pull"


@dataclass
class AccessRules:
    """Access rules of a fake registry: which token each repository needs, and who issues it."""

    fake: FakeRegistry
    needs: dict[str, str] = field(default_factory=dict)
    """Repository -> scope of the token that it needs. Other repositories are open."""
    refuses: dict[str, int] = field(default_factory=dict)
    """Scope -> status of the token service."""
    challenges: Callable[[str, str], list[str]] | None = None
    """(repository, ``Authorization``) -> lines of ``WWW-Authenticate``."""
    status: int = 401
    generation: int = 1
    """Number in all valid tokens. A larger one makes the earlier tokens invalid."""

    def __post_init__(self) -> None:
        self.fake.guard = self.answer

    def answer(self, seen: ReceivedRequest) -> Answer | None:
        if seen.path.startswith("/token"):
            scopes = seen.query.get("scope", [])
            status = next((self.refuses[one] for one in scopes if one in self.refuses), 200)
            body = {"token": f"{self.generation}:{' '.join(scopes)}", "expires_in": 300}
            return status, {}, json.dumps(body).encode() if status == 200 else b""
        repository = seen.path.removeprefix("/v2/").rpartition("/")[0].rpartition("/")[0]
        scope, sent = self.needs.get(repository), seen.headers.get("authorization", "")
        if scope is None or sent == f"Bearer {self.generation}:{scope}":
            return None
        challenges = [self.bearer(repository)]
        if self.challenges is not None:
            challenges = self.challenges(repository, sent)
        status = self.status if sent else 401
        return status, {"WWW-Authenticate": ", ".join(challenges)}, b""

    def bearer(self, repository: str, realm: str = "/token", actions: str = "pull") -> str:
        scope = f"repository:{repository}:{actions}"
        return f'Bearer realm="{self.fake.url}{realm}",service="fake",scope="{scope}"'
