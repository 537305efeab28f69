"""What the mirror's own door asks before it serves a request: may the client read this?

Lives here: the question for each kind of request, and the record of what was requested. Must not
know: rules, how users are known, how a request is served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from aiohttp import web

from mirror.access.access_control import AccessControl
from mirror.observability.events import Kind, Outcome, RequestRecord
from mirror.oci.errors import MirrorError
from mirror.oci.reference import Repository
from mirror.web import paths
from mirror.web.probe_image import PROBE_REPOSITORY

_KINDS: Final = {
    paths.ManifestRequest: Kind.MANIFEST,
    paths.BlobRequest: Kind.BLOB,
    paths.TagsRequest: Kind.TAGS,
    paths.ReferrersRequest: Kind.REFERRERS,
}
"""Type of a request for a repository -> its kind in the record."""


async def check_pull(
    access: AccessControl, parsed: paths.Request, request: web.BaseRequest, pull: RequestRecord
) -> None:
    """Raise ``Denied`` if the client may not pull from the repository of a request.

    Called before anything is read: the answer does not depend on what exists. A request that is
    about no repository passes.

    Args:
        access: The rules in force.
        parsed: The request.
        request: The same, as it was sent.
        pull: Its record. Gets the user.

    Raises:
        Denied: The client may not.
        TooManyRequests: Its address has failed to log in too often.
    """
    if not isinstance(parsed, paths.RepositoryRequest):
        return
    if parsed.repository.path == PROBE_REPOSITORY:
        return
    authorization = request.headers.get("Authorization")
    try:
        identity = await access.check_pull(authorization, pull.client, parsed.repository)
    except MirrorError:
        record_request(pull, _KINDS[type(parsed)], parsed, _reference_of(parsed))
        raise
    pull.user = identity.user


async def find_visible(
    access: AccessControl, request: web.BaseRequest, pull: RequestRecord
) -> Callable[[Repository], bool] | None:
    """Return a function that says which repositories a list may name. None: all.

    Args:
        access: The rules in force.
        request: The request for a list.
        pull: Its record.
    """
    if not access.is_enforced:
        return None
    return await access.may_list(request.headers.get("Authorization"), pull.client)


def record_request(
    pull: RequestRecord, kind: Kind, parsed: paths.RepositoryRequest, reference: str
) -> None:
    """Write what a request is about into its record.

    Args:
        pull: The record.
        kind: What is requested.
        parsed: The request.
        reference: The tag or digest. Empty: it names none.
    """
    pull.kind = kind
    pull.ns = parsed.ns
    pull.upstream = parsed.repository.upstream
    pull.repository = parsed.repository.path
    pull.reference = reference
    # Until the content is found in the cache. The client may leave before that.
    pull.outcome = Outcome.MISS


def _reference_of(parsed: paths.RepositoryRequest) -> str:
    match parsed:
        case paths.ManifestRequest():
            return str(parsed.reference)
        case paths.TagsRequest():
            return ""
    return str(parsed.digest)
