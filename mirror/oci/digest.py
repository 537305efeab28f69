"""Digests and their verification (OCI Image specification, descriptor.md, "Digests").

Lives here: the grammar of a digest and the running hash that checks one.
Must not know: where the bytes come from or go to.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from mirror.oci.errors import DigestInvalid, DigestMismatch

# descriptor.md, "Registered algorithms":
#   sha256:[a-f0-9]{64}    sha512:[a-f0-9]{128}
_HEX_LENGTH: Final = {"sha256": 64, "sha512": 128}
_PATTERN: Final = re.compile(r"(?P<algorithm>sha256|sha512):(?P<hex>[a-f0-9]+)", re.ASCII)

ALGORITHMS: Final = tuple(_HEX_LENGTH)


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The name of content: an algorithm and the lowercase hex of its hash."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, raw: str) -> Digest:
        """Read ``algorithm:hex``. Raises :class:`DigestInvalid`."""
        match = _PATTERN.fullmatch(raw)
        if match is None or len(match["hex"]) != _HEX_LENGTH[match["algorithm"]]:
            raise DigestInvalid("not a sha256 or sha512 digest")
        return cls(match["algorithm"], match["hex"])

    @classmethod
    def of(cls, data: bytes, algorithm: str = "sha256") -> Digest:
        """The digest of ``data``."""
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


class Verifier:
    """A running hash over content that arrives in order. Safe to use from one thread at a time."""

    def __init__(self, expected: Digest) -> None:
        self._expected = expected
        self._hash: Any = hashlib.new(expected.algorithm)
        self.position = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes. The interpreter lock is free while large batches are hashed."""
        self._hash.update(data)
        self.position += len(data)

    def update_all(self, chunks: Iterable[bytes]) -> None:
        """Take the next bytes, in several pieces."""
        for chunk in chunks:
            self.update(chunk)

    def matches(self) -> bool:
        """Whether all that was taken so far hashes to the expected digest."""
        return bool(self._hash.hexdigest() == self._expected.hex)

    def finish(self) -> None:
        """Raises :class:`DigestMismatch` unless all that was taken hashes to the digest."""
        if not self.matches():
            raise DigestMismatch(f"content of {self.position} bytes is not {self._expected}")
