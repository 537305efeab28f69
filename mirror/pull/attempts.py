"""Retry state of one source of a fetch: what its transfers have brought, and when it is given up.

Lives here: the rules after a transfer that broke, as functions of the time. Must not know: I/O,
followers, other sources.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from mirror.oci.errors import (
    AllCircuitsOpen,
    Denied,
    MirrorError,
    StorageRefused,
    Unauthorized,
    UpstreamError,
    UpstreamProtocolError,
)
from mirror.pull.requests import ContentSource

STALL_GRACE_S: Final = 15.0
"""Seconds without progress, beside ``limits.idle``, after which a source is given up. They are for
another attempt after a body that stalled. More would delay the fallback of the clients."""
_MAX_FAILED_IN_A_ROW: Final = 5
"""Transfers from one source that may break in a row without progress."""
_RANGED_ATTEMPTS: Final = 2
"""Transfers in a row that may break without progress before ``Range`` is left out: a server may
answer a ``Range`` with an error that does not mention it."""


@dataclass(slots=True)
class SourceAttempts:
    """Retry state of one source, kept across its transfer attempts.

    All times are in seconds of the event loop's clock.
    """

    source: ContentSource
    stall_limit_s: float
    """Seconds without progress after which the source is given up."""
    last_progress_at: float = 0.0
    """Time of the latest progress, or of the first request and of its response."""
    failed_in_a_row: int = 0
    highest_position: int = 0
    resumed_from: int = 0
    has_progressed: bool = False
    """Whether the latest transfer has brought at least ``MIN_PROGRESS_BYTES`` new bytes."""
    may_use_range: bool = True
    """False once the response to a ``Range`` was wrong, or a refusal (a storage may refuse ranges,
    and an upstream may pass this on): the next one is skipped to the offset."""
    is_refused: bool = False
    """Whether the upstream has refused a request without ``Range``. Then the refusal is final."""
    validator: str | None = None
    endpoint: str = ""
    avoid: list[str] = field(default_factory=list)
    """Endpoints whose transfers broke without progress, the latest one last."""
    has_responded: bool = False

    def count_failure(self, error: MirrorError) -> None:
        """Count a transfer that broke, and choose how the next one is requested."""
        if isinstance(error, AllCircuitsOpen):
            return  # No request was sent.
        self.failed_in_a_row += 1
        if not self.has_progressed:
            endpoint = error.endpoint if isinstance(error, UpstreamError) else ""
            endpoint = endpoint or self.endpoint
            self.avoid = [*(e for e in self.avoid if e != endpoint), endpoint]
        self.is_refused = isinstance(error, Denied | Unauthorized) and not self.may_use_range
        if isinstance(error, UpstreamProtocolError | StorageRefused | Denied | Unauthorized):
            self.validator = None
            self.may_use_range = False
        elif self.failed_in_a_row > _RANGED_ATTEMPTS:
            self.may_use_range = False

    def is_over(self, now: float) -> bool:
        """Return whether the source is given up."""
        return (
            not self.has_responded
            or self.is_refused
            or self.failed_in_a_row > _MAX_FAILED_IN_A_ROW
            or now - self.last_progress_at >= self.stall_limit_s
        )
