"""Signatures of webhooks, as the Standard Webhooks specification has them ("Signature scheme").

Lives here: the secrets of a target and their file. Must not know: requests, the queue.

The signature is the HMAC-SHA256 of ``id.timestamp.body``. Receivers verify it with a library of
Standard Webhooks, or as ``docs/hosting.md`` shows. While a secret is replaced, the file has both,
and the header has a signature by each.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from pathlib import Path
from typing import Final

from mirror.oci.errors import ConfigError
from mirror.store.file_stamp import file_stamp

_SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - the prefix of each secret, no secret
"""Begins a secret, so that programs that look for secrets in files recognise one."""
_MIN_SECRET_BYTES: Final = 24
"""Bytes of a secret at least (Standard Webhooks, "Signature scheme")."""
_MAX_SECRET_BYTES: Final = 64
"""Bytes of a secret at most (Standard Webhooks, "Signature scheme")."""
_MAX_SECRETS: Final = 4
"""Secrets of a target at the same time: the present one, and those that it replaces."""
_MAX_SECRET_FILE_BYTES: Final = 4096
"""Bytes of a file of secrets: each is a line of at most 94 characters."""
_HOW_TO_MAKE_ONE: Final = 'make one with: echo "whsec_$(openssl rand -base64 32)"'


class Secrets:
    """The secrets of one target. All methods but :meth:`sign` block."""

    def __init__(self, origin: str, path: str) -> None:
        """Read the file. Raises ``ConfigError``. ``origin``: begins its messages."""
        self._key = origin
        self._path = os.path.abspath(path)
        self._stamp = file_stamp(self._path)
        self._secrets = self._read()

    def refresh(self) -> None:
        """Read the file again if it has changed.

        Raises ``ConfigError`` if it cannot be used. The secrets in use stay.
        """
        stamp = file_stamp(self._path)
        if stamp != self._stamp:
            self._secrets = self._read()
            self._stamp = stamp

    def sign(self, notification_id: str, timestamp: int, body: bytes) -> str:
        """Return the value of ``webhook-signature``.

        Args:
            notification_id: The value of ``webhook-id``.
            timestamp: The value of ``webhook-timestamp``: seconds since the epoch.
            body: The body as it is sent.
        """
        signed = b".".join((notification_id.encode(), str(timestamp).encode(), body))
        digests = (hmac.digest(secret, signed, hashlib.sha256) for secret in self._secrets)
        return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)

    def _read(self) -> tuple[bytes, ...]:
        try:
            with Path(self._path).open("rb") as file:
                raw = file.read(_MAX_SECRET_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"{self._key}: {self._path}: {error.strerror}") from None
        if len(raw) > _MAX_SECRET_FILE_BYTES:
            raise ConfigError(
                f"{self._key}: {self._path}: larger than {_MAX_SECRET_FILE_BYTES} bytes"
            )
        lines = [line.strip() for line in raw.decode("utf-8-sig", "replace").splitlines()]
        secrets = tuple(
            self._decode(number, line)
            for number, line in enumerate(lines, 1)
            if line and not line.startswith("#")
        )
        if not secrets:
            raise ConfigError(f"{self._key}: {self._path}: no secret: {_HOW_TO_MAKE_ONE}")
        if len(secrets) > _MAX_SECRETS:
            raise ConfigError(f"{self._key}: {self._path}: more than {_MAX_SECRETS} secrets")
        return secrets

    def _decode(self, number: int, line: str) -> bytes:
        """Return the bytes of a secret. Raises ``ConfigError`` without any part of it."""
        try:
            secret = base64.b64decode(line.removeprefix(_SECRET_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            secret = b""
        if not _MIN_SECRET_BYTES <= len(secret) <= _MAX_SECRET_BYTES:
            raise ConfigError(
                f"{self._key}: {self._path}: line {number}: not the base64 form of"
                f" {_MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES} bytes: {_HOW_TO_MAKE_ONE}"
            )
        return secret
