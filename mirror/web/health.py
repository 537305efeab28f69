"""Readiness of this process, for load balancers and for people.

``/healthz`` says only that the process responds. ``/readyz`` says whether it accepts new requests:
it does not while it drains. A disk that cannot be written to does not make it unready, because
every pull is still served. The report then says "degraded".

Must not know: HTTP, the store.
"""

from __future__ import annotations

from collections.abc import Callable


class Health:
    """State behind the readiness report."""

    def __init__(self, storage_error: Callable[[], str | None]) -> None:
        """``storage_error`` returns the reason why nothing can be stored, or None."""
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
