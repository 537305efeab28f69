"""One finding of ``doctor``. Must not know: what is checked."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """The mirror works, but something is likely a mistake or will soon fail."""
    PROBLEM = "problem"
    """Pulls fail, or content is not stored. The command ends with exit code 1."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    check: str
    """Name of the check, such as ``disk space``."""
    subject: str
    """The file, endpoint or runtime that was checked."""
    status: Status
    message: str
    """One line: what was found."""
    remedy: str = ""
    """One line: what to do. Empty if nothing is wrong."""
    target: str = ""
    """The registry to which this finding of ``subject`` belongs. Findings that differ only in it
    have the same cause, and are printed as one. Empty: ``subject`` says all."""

    def values(self) -> dict[str, str | None]:
        """Return the row of ``--json``."""
        return {
            "check": self.check,
            "subject": " ".join(filter(None, (self.subject, self.target))),
            "status": self.status.value,
            "message": self.message,
            "remedy": self.remedy or None,
        }


@dataclass(frozen=True, slots=True)
class Checked:
    """The subject of one check. Makes its findings."""

    check: str
    subject: str
    target: str = ""

    def ok(self, message: str) -> Finding:
        """Return the finding that all is well."""
        return self._finding(Status.OK, message)

    def warning(self, message: str, remedy: str) -> Finding:
        """Return a warning."""
        return self._finding(Status.WARNING, message, remedy)

    def problem(self, message: str, remedy: str) -> Finding:
        """Return a problem."""
        return self._finding(Status.PROBLEM, message, remedy)

    def _finding(self, status: Status, message: str, remedy: str = "") -> Finding:
        return Finding(
            check=self.check,
            subject=self.subject,
            status=status,
            message=message,
            remedy=remedy,
            target=self.target,
        )
