"""Say in words why an exchange failed: the host, the cause, and the key to set.

Lives here: the text of failures of connections. Must not know: how a request is sent, or repeated.

An operator reads the text, and so does the client. It names hosts, but no path and no query, since
a signed URL is a secret.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import aiohttp
from yarl import URL

from mirror.config.settings import Limits
from mirror.oci import errors
from mirror.threads import TooManyHangingCalls
from mirror.upstream.outbound import Policy, Proxy

_OS_CAUSES: Final = {
    errno.ECONNREFUSED: "connection refused",
    errno.ECONNRESET: "the connection was reset",
    errno.EPIPE: "the connection was reset",
    errno.ETIMEDOUT: "the connection timed out",
    errno.EHOSTUNREACH: "no route to its address",
    errno.ENETUNREACH: "no route to its address",
    errno.EADDRNOTAVAIL: "no free local port",
    errno.EACCES: "this machine forbids the connection",
    errno.EPERM: "this machine forbids the connection",
    errno.EMFILE: "the mirror has no free file descriptor: raise its limit of open files",
    errno.ENFILE: "this machine has no free file descriptor",
}
_TLS_CAUSES: Final = {
    "WRONG_VERSION_NUMBER": "it does not use TLS: is its URL http://?",
    "RECORD_LAYER_FAILURE": "it does not use TLS: is its URL http://?",
    "HTTP_REQUEST": "it does not use TLS: is its URL http://?",
    "UNSUPPORTED_PROTOCOL": "it offers old versions of TLS only",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it offers old versions of TLS only",
    "TLSV1_UNRECOGNIZED_NAME": "it has no certificate for this name",
    "TLSV1_ALERT_INTERNAL_ERROR": "it has no certificate for this name",
}
"""``reason`` of an ``ssl.SSLError`` -> the cause."""
_NEEDS_CERTIFICATE: Final = ("CERTIFICATE_REQUIRED", "BAD_CERTIFICATE", "HANDSHAKE_FAILURE")
"""Ends of the ``reason`` of a server that wants another client certificate than ours, or any."""
# Certificate verification results of OpenSSL (x509_vfy.h).
_NOT_YET_VALID: Final = 9
"""X509_V_ERR_CERT_NOT_YET_VALID: its time has not begun."""
_EXPIRED: Final = 10
"""X509_V_ERR_CERT_HAS_EXPIRED: the certificate has expired."""
_OTHER_NAMES: Final = (62, 64)
"""X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH: it has other names."""
_UNKNOWN_AUTHORITIES: Final = (2, 18, 19, 20, 21)
"""X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT and others: the chain has no root that we know."""
# Validity ::= SEQUENCE { notBefore Time, notAfter Time } (RFC 5280, section 4.1)
_TIME: Final = rb"(?:\x17\x0d([0-9]{12})Z|\x18\x0f([0-9]{14})Z)"
_VALIDITY: Final = re.compile(rb"\x30[\x1e\x20\x22]" + _TIME + _TIME)


@dataclass(frozen=True, slots=True)
class ResponseLimit:
    """The time limit of one response: until its headers are in, with tokens and redirects."""

    deadline: float
    """Event loop time."""
    name: str
    """Key below ``limits``, whose value was added to that of ``connect``."""
    seconds: float
    """The sum of both."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One request of an exchange that failed."""

    url: URL
    proxy: Proxy | None
    policy: Policy
    limits: Limits
    response_limit: ResponseLimit
    is_looking_up: bool = False
    """Whether the name of the host is still being looked up."""
    certificate: bytes = b""
    """The certificate that the host has sent (DER), if it has expired. Otherwise empty."""

    @property
    def host(self) -> str:
        """Scheme, host and port of the request."""
        return str(self.url.origin())


def connection_error(error: Exception, hop: Hop) -> errors.UpstreamUnavailable:
    """Return the error for a request that got no response: its class, and its scope."""
    message = describe_failure(error, hop)
    is_unreachable = hop.is_looking_up or isinstance(
        error, aiohttp.ConnectionTimeoutError | aiohttp.ClientConnectorError
    )
    # An endpoint that is connected may take long, or break the connection, for this content only.
    scope = errors.FailureScope.ENDPOINT if is_unreachable else errors.FailureScope.SAME_KIND
    is_timeout = isinstance(error, TimeoutError)
    cls = errors.UpstreamTimeout if is_timeout else errors.UpstreamUnavailable
    return cls(message, scope=scope)


def describe_failure(error: Exception, hop: Hop) -> str:
    """Return why a request got no response: ``https://registry.example: connection refused``.

    ``error``: an exception of aiohttp, ``OSError``, ``TimeoutError`` or ``ValueError``.
    """
    match error:
        case TimeoutError():
            return f"{hop.host}: {_timeout_cause(error, hop)}"
        case aiohttp.ClientHttpProxyError():
            return _proxy_cause(error.status, hop)
        case aiohttp.ClientProxyConnectionError() if hop.proxy is not None:
            return f"the proxy {hop.proxy.url}: {_connect_cause(error.os_error, hop)}"
        case aiohttp.ClientConnectorCertificateError():
            return f"{hop.host}: {_certificate_cause(error.certificate_error, hop)}"
        case aiohttp.ClientConnectorError():
            return f"{hop.host}: {_connect_cause(error.os_error, hop)}"
        case aiohttp.ServerDisconnectedError():
            return f"{hop.host}: closed the connection without a response"
        case OSError():
            # aiohttp makes its own error of one that breaks a connection.
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            return f"{hop.host}: {_connect_cause(cause, hop)}"
        case _:
            return f"{hop.host}: sent a malformed response"


def _timeout_cause(error: TimeoutError, hop: Hop) -> str:
    limits, key = hop.limits, hop.policy.key("limits")
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return f"no connection within {limits.connect:g} s ({key}.connect)"
    if isinstance(error, aiohttp.SocketTimeoutError):
        return f"sent nothing for {limits.idle:g} s ({key}.idle)"
    response = hop.response_limit
    total = f"{response.seconds:g} s ({key}.connect and {key}.{response.name})"
    if hop.is_looking_up:
        return f"no name server has found its address within {total}"
    return f"sent no response within {total}"


def _proxy_cause(status: int, hop: Hop) -> str:
    proxy = hop.proxy.url if hop.proxy is not None else ""
    if status == 407:
        variable = f"{hop.url.scheme}_proxy"
        return f"the proxy {proxy} asks for a log-in: put user and password into {variable}"
    return f"the proxy {proxy} does not connect to {hop.host}: it responded with {status}"


def _connect_cause(error: OSError, hop: Hop) -> str:
    match error:
        case TooManyHangingCalls():
            return f"its name is not looked up: {error.strerror}"
        case socket.gaierror(errno=socket.EAI_AGAIN):
            return "no name server responds, so its address is not known"
        case socket.gaierror():
            return "its name is not found in DNS"
        case ssl.SSLError():
            return _tls_cause(error, hop)
        case _:
            # Several addresses that failed in different ways have no common number.
            return _OS_CAUSES.get(error.errno or 0, "none of its addresses accepts a connection")


def _tls_cause(error: ssl.SSLError, hop: Hop) -> str:
    reason = error.reason or ""
    if reason.endswith(_NEEDS_CERTIFICATE):
        key = hop.policy.key("client_certificate")
        return f"refused the TLS connection; it may want a client certificate ({key})"
    return _TLS_CAUSES.get(reason) or f"no TLS connection: {reason.lower().replace('_', ' ')}"


def _certificate_cause(error: Exception, hop: Hop) -> str:
    code = getattr(error, "verify_code", 0)
    dates = _validity(hop.certificate)
    if code == _EXPIRED:
        return f"its certificate expired{f' on {dates[1]}' if dates else ''}"
    if code == _NOT_YET_VALID:
        start = f" before {dates[0]}" if dates else " yet"
        return f"its certificate is not valid{start}: is the clock of this machine right?"
    if code in _OTHER_NAMES:
        return f"its certificate is for another name than {hop.url.host}"
    if code in _UNKNOWN_AUTHORITIES:
        key = hop.policy.key("ca")
        return f"its certificate is signed by an authority that is not known ({key} adds one)"
    return f"its certificate is not valid: {getattr(error, 'verify_message', '') or 'malformed'}"


def has_wrong_time(error: Exception) -> bool:
    """Return whether a certificate was refused for its time, so that its dates are of interest."""
    return getattr(error, "verify_code", 0) in (_EXPIRED, _NOT_YET_VALID)


def _validity(certificate: bytes) -> tuple[str, str] | None:
    """Return the first and the last day of a certificate (DER). None if it cannot be read."""
    match = _VALIDITY.search(certificate)
    if match is None:
        return None
    first_short, first_long, last_short, last_long = match.groups()
    try:
        return _day(first_short, first_long), _day(last_short, last_long)
    except ValueError:  # Nobody has verified it, so a month may be 99.
        return None


def _day(short: bytes | None, long: bytes | None) -> str:
    """Return the day of a UTCTime or a GeneralizedTime (RFC 5280, section 4.1.2.5)."""
    text = (long or b"").decode()
    if short is not None:
        text = f"{'20' if short < b'50' else '19'}{short.decode()}"
    return datetime.strptime(text, "%Y%m%d%H%M%S").replace(tzinfo=UTC).date().isoformat()
