"""Send one notification to its target.

Lives here: the request, its signature, and what a response means. Must not know: the queue, when a
request is repeated.

The request goes through the outbound guard, as those to upstreams do: no link-local address, none
of this mirror, certificates are verified, and a redirect is a failure ("HTTP 1.1 Web Hooks for
Event Delivery", section 2.2).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from yarl import URL

from mirror.config.settings import EventTarget, Limits, Upstream
from mirror.notifications.cloud_event import EVENT_CONTENT_TYPE
from mirror.notifications.queue import Notification
from mirror.notifications.signing import Secrets
from mirror.oci.errors import ConfigError, MirrorError
from mirror.upstream.outbound import Policy, Refused, UrlSource, check_url
from mirror.upstream.transport import Transport, retry_after_of

_TEMPORARY_STATUSES: Final = frozenset({408, 425, 429})
"""Statuses below 500 after which the same request may be accepted."""


class DeliveryResult(StrEnum):
    """The answer of a target to a notification."""

    ACCEPTED = "accepted"
    FAILED = "failed"
    """It was not reached, or has asked to try later."""
    REFUSED = "refused"
    """It has responded that it will not accept this request."""
    GONE = "gone"
    """It wants no notifications any more."""


@dataclass(frozen=True, slots=True)
class SendOutcome:
    """The outcome of one request."""

    result: DeliveryResult
    why: str
    """The failure in words. It has no path and no query: a URL of a target may be a secret."""
    retry_after: float = 0.0
    """Seconds that the target wants to have no request."""


class WebhookSender:
    """The connections to one target, and its secrets."""

    def __init__(self, target: EventTarget, own_addresses: Collection[tuple[str, int]]) -> None:
        """Read the files. Opens no connection.

        Args:
            target: The settings.
            own_addresses: (host, port) pairs at which this mirror listens.

        Raises:
            ConfigError: The file of the secrets cannot be used, or the guard refuses the URL.
            OSError: Another file cannot be used.
        """
        self.target = target
        self._url = URL(target.url, encoded=True)
        self._policy = Policy(
            self._url.origin(),
            own_addresses=own_addresses,
            upstream=target.name,
            section="events",
        )
        result = check_url(target.url, UrlSource.ENDPOINT, self._policy.endpoint, self._policy)
        if isinstance(result, Refused):
            raise ConfigError(f"events: {target.name}: url: {result.why}")
        self.secrets = Secrets(f"events: {target.name}: secret_file", target.secret_file)
        self._transport = Transport(
            Upstream(
                endpoints=(str(self._policy.endpoint),),
                ca=target.ca,
                client_certificate=target.client_certificate,
                client_key=target.client_key,
                # The time limit of `send` ends before these do.
                limits=Limits(connect=target.timeout, headers=target.timeout),
            ),
            own_addresses=own_addresses,
        )

    async def send(self, notification: Notification, now: float) -> SendOutcome:
        """Send a notification once. ``now``: seconds since the epoch. Raises nothing."""
        timestamp = int(now)
        headers = {
            "Content-Type": EVENT_CONTENT_TYPE,
            "webhook-id": notification.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": self.secrets.sign(notification.id, timestamp, notification.body),
        }
        origin, timeout = self._policy.endpoint, self.target.timeout
        try:
            async with (
                asyncio.timeout(timeout),
                self._transport.exchange(
                    "POST",
                    self._url,
                    headers,
                    self._policy,
                    may_follow_redirects=False,
                    body=notification.body,
                    limit=self._transport.response_limit(),
                ) as response,
            ):
                status = response.http.status
                retry_after = retry_after_of(response.http) or 0.0
        except TimeoutError:
            return SendOutcome(DeliveryResult.FAILED, f"{origin}: no response within {timeout:g} s")
        except MirrorError as error:
            return SendOutcome(DeliveryResult.FAILED, error.message)
        return SendOutcome(
            result_of_status(status), f"{origin}: responded with {status}", retry_after
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.close()


def result_of_status(status: int) -> DeliveryResult:
    """Return what a status means ("Delivery success and failure" of Standard Webhooks)."""
    if 200 <= status < 300:
        return DeliveryResult.ACCEPTED
    if status == 410:
        return DeliveryResult.GONE
    is_temporary = status >= 500 or status in _TEMPORARY_STATUSES
    return DeliveryResult.FAILED if is_temporary else DeliveryResult.REFUSED
