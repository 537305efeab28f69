"""The checks of each endpoint of each upstream: name, TLS, token, one ``HEAD``, rate limit.

Lives here: what is asked, and what a result means for pulls. All endpoints are asked at the same
time, and each has a time limit. Must not know: how requests are authorized, redirected and retried:
the token and the ``HEAD`` go through the same package as those of pulls.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Final

from yarl import URL

from mirror.cli.doctor.findings import Checked, Finding
from mirror.cli.online import example_repository
from mirror.config.settings import Settings, Upstream
from mirror.inventory.image_names import parse_names
from mirror.observability.events import Event, Kind, RateLimitSeen
from mirror.oci.descriptor import DEFAULT_ACCEPT
from mirror.oci.errors import Denied, MirrorError, NotFound, Unauthorized, UpstreamRateLimited
from mirror.oci.headers import media_type_of
from mirror.oci.reference import Reference, Repository, Tag
from mirror.oci.text import printable
from mirror.pull.admission import Allow, admit
from mirror.single_flight import SingleFlight
from mirror.store.image_layout import read_index_json
from mirror.store.layout import Layout
from mirror.store.saved_rows import IndexUnreadable, read_names
from mirror.threads import HangingCalls
from mirror.upstream.connections import own_addresses, tls_context
from mirror.upstream.failover import FailoverClient
from mirror.upstream.messages import AcceptedResponse, RegistryRequest
from mirror.upstream.outbound import Proxies, as_url
from mirror.upstream.transport import Transport

_CONNECT_TIMEOUT_S: Final = 5.0
"""Seconds of each step: name, connection, TLS, response to ``HEAD /v2/``."""
_ENDPOINT_TIMEOUT_S: Final = 30.0
"""Seconds for all checks of one endpoint. A name look-up alone can hang for minutes."""
_MAX_LOOKS: Final = 64
"""Endpoints that are looked at at the same time, each in a thread."""
_CERTIFICATE_WARNING_S: Final = 14 * 86400.0
"""Seconds: certificates of 90 days are renewed 30 days before their end."""
_CERTIFICATE_PROBLEM_S: Final = 2 * 86400.0
"""Seconds until the end of a certificate that nobody may have time to renew."""
_FEW_PULLS_SHARE: Final = 0.1
"""Share of the pulls of a rate limit below which a warning is given."""

_NETWORK_REMEDY: Final = (
    "check the firewall and the route; behind a proxy, set https_proxy (http_proxy for http://)"
)

Samples = Mapping[str, tuple[Repository, Reference]]
"""Name of an upstream -> an image of it that was pulled before."""


@dataclass(frozen=True, slots=True)
class EndpointReport:
    """The result for all endpoints."""

    findings: list[Finding]
    clock_offsets: list[float]
    """Our time minus that of each endpoint, in seconds."""


@dataclass(slots=True)
class _Look:
    """What a connection without any token shows."""

    addresses: list[str] = field(default_factory=list)
    certificate_ends: float | None = None
    """Unix time in seconds."""
    clock_offset: float | None = None
    failure: str = ""
    remedy: str = ""


def check_endpoints(
    settings: Settings, samples: Samples, environ: Mapping[str, str]
) -> EndpointReport:
    """Ask each endpoint. ``environ``: the variables that name the proxies."""
    return asyncio.run(_check_all(settings, samples, environ))


async def _check_all(
    settings: Settings, samples: Samples, environ: Mapping[str, str]
) -> EndpointReport:
    report = EndpointReport([], [])
    looks = HangingCalls("doctor", _MAX_LOOKS)
    async with SingleFlight() as single_flight:
        checks = [
            _check_upstream(settings, name, samples.get(name), environ, looks, single_flight)
            for name in settings.upstreams
        ]
        for one in await asyncio.gather(*checks):
            report.findings.extend(one.findings)
            report.clock_offsets.extend(one.clock_offsets)
    return report


async def _check_upstream(
    settings: Settings,
    name: str,
    sample: tuple[Repository, Reference] | None,
    environ: Mapping[str, str],
    looks: HangingCalls,
    single_flight: SingleFlight,
) -> EndpointReport:
    """Check the endpoints of one upstream.

    Args:
        settings: The configuration.
        name: The upstream.
        sample: An image of it to ask for. None: an example that may not exist.
        environ: The variables that name the proxies.
        looks: Runs what may hang.
        single_flight: Runs requests for tokens.
    """
    report, upstream = EndpointReport([], []), settings.upstreams[name]
    if upstream.pull_policy == "Never":
        finding = Checked("endpoint", name).ok("not asked, because of pull_policy Never")
        return EndpointReport([finding], [])
    limit = RateLimit()
    own = own_addresses(settings.listen)
    proxies = Proxies.from_environment(environ)
    transport = Transport(upstream, environ, own_addresses=own)
    try:
        client = FailoverClient(
            name, upstream, transport, limit.observe, single_flight, own_addresses=own
        )
        asked = sample or (example_repository(name, upstream), Tag("latest"))
        checks = [
            _check_endpoint(client, upstream, end, asked, proxies, looks, report)
            for end in upstream.endpoints
        ]
        for findings in await asyncio.gather(*checks):
            report.findings.extend(findings)
    finally:
        await transport.close()
    report.findings.extend(limit.findings(name, upstream))
    return report


async def _check_endpoint(
    client: FailoverClient,
    upstream: Upstream,
    endpoint: str,
    asked: tuple[Repository, Reference],
    proxies: Proxies,
    looks: HangingCalls,
    report: EndpointReport,
) -> list[Finding]:
    """Return the findings of one endpoint. The clock of the endpoint is added to ``report``."""
    subject = Checked("endpoint", f"{asked[0].upstream} {endpoint}")
    findings: list[Finding] = []
    try:
        async with asyncio.timeout(_ENDPOINT_TIMEOUT_S):
            url = as_url(endpoint)
            proxy = proxies.proxy_for(url)
            if proxy is None:
                look = await looks.run(
                    endpoint, partial(_look_at, url, upstream, asked[0].upstream)
                )
                if look.failure:
                    # Endpoints with the same failure are one line.
                    same = Checked(subject.check, subject="", target=subject.subject)
                    return [same.problem(look.failure, look.remedy)]
                if look.clock_offset is not None:
                    report.clock_offsets.append(look.clock_offset)
                findings.extend(_certificate_findings(subject.subject, look.certificate_ends))
                way = f"at {', '.join(look.addresses[:2])}"
            else:
                way = f"through the proxy {proxy.url.host_port_subcomponent}"
            findings.append(await _ask(client, upstream, url, asked, subject, way))
    except TimeoutError:
        findings.append(
            subject.problem(
                f"no result after {_ENDPOINT_TIMEOUT_S:.0f} s",
                "check the name servers, the network and the firewall of this machine",
            )
        )
    except MirrorError as error:
        findings.append(
            subject.problem(error.message, "correct the setting that the message names")
        )
    except OSError as error:
        findings.append(subject.problem(str(error), "check the network of this machine"))
    return findings


def read_samples(root: Path, settings: Settings) -> Samples:
    """Return an image of each upstream, as far as the index names one that is permitted.

    ``root``: the data directory. The names of a lost index are those in ``index.json``, which a
    server writes later. A file that cannot be read names none.
    """
    samples: dict[str, tuple[Repository, Reference]] = {}
    with suppress(OSError, ValueError, RecursionError):
        for repository, tag in _read_tags(Layout(root)):
            name = repository.upstream
            upstream = None if name in samples else settings.upstreams.get(name)
            if upstream is not None and isinstance(admit(repository, upstream), Allow):
                samples[name] = repository, tag
            if len(samples) == len(settings.upstreams):
                break
    return samples


def _read_tags(layout: Layout) -> Iterator[tuple[Repository, Tag]]:
    is_all = False
    with suppress(IndexUnreadable):
        rows, is_all = read_names(layout)
        yield from ((one.repository, one.tag) for one in parse_names(rows).tags)
    for named in () if is_all else read_index_json(layout):
        if named.tag is not None:
            yield named.repository, named.tag


# --- the connection -------------------------------------------------------------------------------


def _look_at(url: URL, upstream: Upstream, name: str) -> _Look:
    """Connect to an endpoint of the upstream ``name``, and send one ``HEAD /v2/``, in a thread."""
    look, host, port = _Look(), url.host or "", url.port or 443
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        look.addresses = list(dict.fromkeys(str(address[4][0]) for address in found))
    except OSError as error:
        look.failure = f"the name of its host cannot be resolved: {error.strerror}"
        look.remedy = "check /etc/resolv.conf and the name servers of this machine (in a pod: DNS)"
        return look
    connection: HTTPConnection
    is_connected = False
    try:
        if url.scheme == "https":
            client = upstream.client_certificate
            files = None if client is None else (client, upstream.client_key)
            context = tls_context(upstream.ca, files, upstream.insecure)
            connection = HTTPSConnection(host, port, timeout=_CONNECT_TIMEOUT_S, context=context)
        else:
            connection = HTTPConnection(host, port, timeout=_CONNECT_TIMEOUT_S)
        try:
            connection.connect()
            if isinstance(connection.sock, ssl.SSLSocket):
                ends = (connection.sock.getpeercert() or {}).get("notAfter")
                look.certificate_ends = ssl.cert_time_to_seconds(str(ends)) if ends else None
            connection.request("HEAD", "/v2/", headers={"User-Agent": "oci-mirror"})
            date = connection.getresponse().headers.get("Date")
            if date is not None:
                look.clock_offset = time.time() - parsedate_to_datetime(date).timestamp()
        finally:
            is_connected = connection.sock is not None
            connection.close()
    except ssl.SSLCertVerificationError as error:
        look.failure = f"its certificate is not accepted: {error.verify_message}"
        look.remedy = "set ca to the authority of the registry, or correct the clock or the name"
    except (HTTPException, ValueError) as error:
        look.failure = f"it sends no usable response: {printable(str(error), 200)}"
        look.remedy = "check that the URL is the one of a registry, and http or https"
    except ssl.SSLError as error:
        look.failure = f"{host}:{port} does not speak TLS as expected: {error.reason}"
        look.remedy = "check http or https in the URL, and a client_certificate that it may require"
    except TimeoutError:
        _set_silence(look, f"{host}:{port}", is_connected=is_connected)
    except ConnectionRefusedError:
        look.failure = f"no connection to {host}:{port}: connection refused"
        look.remedy = (
            f"nothing listens at {host}:{port}: start the registry there, or correct "
            f"upstreams.{name}.endpoints"
        )
    except OSError as error:
        where = f"the connection to {host}:{port}"
        what = f"{where} broke" if is_connected else f"{where} failed"
        look.failure = f"{what}: {error.strerror or error}"
        look.remedy = _NETWORK_REMEDY
    return look


def _set_silence(look: _Look, where: str, *, is_connected: bool) -> None:
    """State that a time limit has passed, before or after the connection was made."""
    if is_connected:
        look.failure = (
            f"{where} accepts connections, and sends nothing for {_CONNECT_TIMEOUT_S:.0f} s"
        )
        look.remedy = "look at the registry, which may hang, and check http or https in the URL"
    else:
        look.failure = f"no connection to {where} within {_CONNECT_TIMEOUT_S:.0f} s"
        look.remedy = _NETWORK_REMEDY


def _certificate_findings(subject: str, ends: float | None) -> list[Finding]:
    if ends is None:
        return []
    certificate = Checked("certificate", subject)
    left = ends - time.time()
    text = f"ends in {left / 86400:.0f} days"
    remedy = "let the operator of the registry renew it"
    if left < _CERTIFICATE_PROBLEM_S:
        return [certificate.problem(text, remedy)]
    if left < _CERTIFICATE_WARNING_S:
        return [certificate.warning(text, remedy)]
    return [certificate.ok(text)]


# --- the token and the HEAD -----------------------------------------------------------------------


async def _ask(
    client: FailoverClient,
    upstream: Upstream,
    url: URL,
    asked: tuple[Repository, Reference],
    subject: Checked,
    way: str,
) -> Finding:
    """Ask for the API and for one manifest. ``way``: how the endpoint is reached."""
    has_login = bool(upstream.credentials.model_fields_set)
    repository, reference = asked
    image = f"{repository.path}:{reference}"
    try:
        status, content_type = await client.ping(url, repository)
        if status != 200 or media_type_of(content_type) == "text/html":
            return subject.problem(
                f"it is no registry, or does not work: /v2/ responds with {status}",
                "check the URL; a registry below a path has to be named with that path",
            )
        await _head(client, url, repository, reference)
    except NotFound:
        return subject.ok(f"{way}: responds (it has no {image})")
    except (Unauthorized, Denied) as error:
        if has_login:
            return subject.problem(
                f"the login is refused: {error.message}",
                "check credentials: user, password or its file, and that it may pull this image",
            )
        return subject.ok(f"{way}: responds, and refuses {image} without a login")
    except UpstreamRateLimited as error:
        return subject.warning(
            f"it limits the rate: {error.message}", "wait, or configure credentials"
        )
    except MirrorError as error:
        return subject.problem(
            f"a HEAD of {image} failed: {error.message}",
            "look at the status page of the registry; cached images are served meanwhile",
        )
    return subject.ok(f"{way}: responds, and has {image}")


async def _head(
    client: FailoverClient, url: URL, repository: Repository, reference: Reference
) -> None:
    """Send a ``HEAD`` of a manifest to one endpoint of the upstream."""
    others = {
        one: NotFound("not asked by doctor") for one in client.endpoint_urls if one != str(url)
    }
    request = RegistryRequest(
        "HEAD",
        repository,
        f"manifests/{reference}",
        Kind.MANIFEST,
        {"Accept": ", ".join(DEFAULT_ACCEPT)},
        ruled_out=others,
    )

    async def ignore(response: AcceptedResponse) -> None:
        """Read nothing: a ``HEAD`` has no body."""

    await client.fetch(request, ignore)


class RateLimit:
    """The rate limit that the endpoints of an upstream state, if any."""

    def __init__(self) -> None:
        self._seen: RateLimitSeen | None = None

    def observe(self, event: Event) -> None:
        """Keep the lowest number of pulls that are left."""
        if isinstance(event, RateLimitSeen) and (
            self._seen is None or event.remaining < self._seen.remaining
        ):
            self._seen = event

    def findings(self, name: str, upstream: Upstream) -> list[Finding]:
        """Return the finding for the upstream ``name``. None was stated: there is none."""
        if self._seen is None:
            return []
        seen, subject = self._seen, Checked("rate limit", name)
        text = f"{seen.remaining} of {seen.limit} pulls are left (in {seen.window // 3600} h)"
        if seen.remaining > seen.limit * _FEW_PULLS_SHARE:
            return [subject.ok(text)]
        remedy = (
            "raise tag_ttl, and see oci-mirror savings for who pulls"
            if upstream.credentials.model_fields_set
            else "configure credentials: an account has a higher limit"
        )
        if seen.remaining == 0:
            return [subject.problem(f"{text}: pulls of new content fail", remedy)]
        return [subject.warning(text, remedy)]
