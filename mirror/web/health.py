"""Health and readiness, for probes and for people.

``/healthz`` says that the process answers. ``/readyz`` says whether it takes new work: not while it
starts or drains. Storage that cannot be written to does not make it unready, since every pull is
still served; the report says so.
"""

from __future__ import annotations

from collections.abc import Callable


class Health:
    """What the readiness report is made of."""

    def __init__(self, storage: Callable[[], str | None]) -> None:
        """``storage`` says why nothing can be stored, or None."""
        self._storage = storage
        self.draining = False

    def report(self) -> tuple[bool, dict[str, str]]:
        """Whether to send clients here, and why (not)."""
        if self.draining:
            return False, {"status": "draining"}
        why = self._storage()
        if why is not None:
            return True, {"status": "degraded", "storage": why}
        return True, {"status": "ok"}
