"""``check-config --online``: ask each endpoint of a configuration once.

Lives here: the request to each endpoint, and one line for its result. Must not know: how requests
are sent and authorized.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from mirror.config.settings import Settings, Upstream
from mirror.oci.errors import Denied, MirrorError, Unauthorized
from mirror.oci.headers import media_type_of
from mirror.oci.reference import Repository
from mirror.single_flight import SingleFlight
from mirror.upstream.connections import own_addresses
from mirror.upstream.failover import FailoverClient
from mirror.upstream.outbound import as_url
from mirror.upstream.transport import Transport


@dataclass(frozen=True, slots=True)
class Result:
    """The result for one endpoint: one line of text, and whether pulls can work."""

    text: str
    is_good: bool


def ask_endpoints(settings: Settings) -> list[Result]:
    """Ask each endpoint for the version of its API, with a token if it wants one."""
    return asyncio.run(_ask_all(settings))


async def _ask_all(settings: Settings) -> list[Result]:
    upstreams = settings.upstreams.items()
    async with SingleFlight() as single_flight:
        asked = (_ask_upstream(settings, *item, single_flight) for item in upstreams)
        return [result for results in await asyncio.gather(*asked) for result in results]


async def _ask_upstream(
    settings: Settings, name: str, upstream: Upstream, single_flight: SingleFlight
) -> list[Result]:
    if upstream.pull_policy == "Never":
        return [Result(f"{name}: not asked, because of pull_policy Never", is_good=True)]
    own = own_addresses(settings.listen)
    transport = Transport(upstream, own_addresses=own)
    try:
        client = FailoverClient(
            name,
            upstream,
            transport,
            lambda event: None,
            single_flight,
            own_addresses=own,
        )
        asked = (_ask_endpoint(client, name, upstream, end) for end in upstream.endpoints)
        return list(await asyncio.gather(*asked))
    finally:
        await transport.close()


async def _ask_endpoint(
    client: FailoverClient, name: str, upstream: Upstream, endpoint: str
) -> Result:
    has_login = bool(upstream.credentials.model_fields_set)
    try:
        status, content_type = await client.ping(
            as_url(endpoint), example_repository(name, upstream)
        )
    except (Unauthorized, Denied) as error:
        return _refused(name, endpoint, error.message, has_login=has_login)
    except MirrorError as error:
        return Result(f"{name}: {endpoint}: failed: {error.message}", is_good=False)
    if status == 200 and media_type_of(content_type) != "text/html":
        login = "with the login" if has_login else "without a login"
        return Result(f"{name}: {endpoint}: good, {login}", is_good=True)
    page = ", a web page" if media_type_of(content_type) == "text/html" else ""
    reason = f"it is no registry, or does not work: /v2/ responded with {status}{page}"
    return Result(f"{name}: {endpoint}: failed: {reason}", is_good=False)


def _refused(name: str, endpoint: str, reason: str, *, has_login: bool) -> Result:
    """Return the result for an endpoint that refuses.

    Without a login it may still serve public repositories: a token is for one repository, and the
    one that was named may not exist.
    """
    if has_login:
        return Result(f"{name}: {endpoint}: failed: the login is refused: {reason}", is_good=False)
    return Result(
        f"{name}: {endpoint}: reachable, but refuses a request without a login: {reason}",
        is_good=True,
    )


def example_repository(name: str, upstream: Upstream) -> Repository:
    """Return a repository to name in the request for a token: an allowed one, if one is named."""
    named = (pattern for pattern in upstream.allow if not set(pattern) & set("*?["))
    return Repository.parse(name, next(named, "library/alpine"))
