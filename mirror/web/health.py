"""Readiness of this process, for load balancers and for people.

``/healthz`` says only that the process responds. ``/readyz`` says whether the process accepts new
requests: while it drains, it does not. If nothing can be stored, the process stays ready, because
every pull is still served, and the report says "degraded".

Must not know: HTTP, the store.
"""

from __future__ import annotations

from collections.abc import Callable


class Health:
    """State behind the readiness report."""

    def __init__(self, storage_error: Callable[[], str | None]) -> None:
        """Create the state. ``storage_error``: returns why nothing can be stored, or None."""
        self._storage_error = storage_error
        self.is_draining = False

    def report(self) -> tuple[bool, dict[str, str]]:
        """Return (is ready, report). The report gives the reason if something is wrong."""
        if self.is_draining:
            return False, {"status": "draining"}
        error = self._storage_error()
        if error is not None:
            return True, {"status": "degraded", "storage": error}
        return True, {"status": "ok"}
