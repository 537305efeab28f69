"""Decide for a request what its client may pull, or see in lists.

Lives here: the question for each kind of request. Must not know: rules, how users are known, how a
request is served. The push listener decides about single requests in ``hosted_handler.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from aiohttp import web

from mirror.access.access_control import AccessControl
from mirror.access.identity import ANONYMOUS, Identity
from mirror.observability.events import RequestRecord
from mirror.oci.errors import Denied
from mirror.oci.reference import Repository
from mirror.web import paths
from mirror.web.probe_image import PROBE_REPOSITORY


async def check_request(
    access: AccessControl, parsed: paths.Request, request: web.BaseRequest, record: RequestRecord
) -> None:
    """Raise ``Denied`` if the client may not pull from the repository of a request.

    Called before anything is read: the answer does not depend on what exists. A request that is
    about no repository passes.

    Args:
        access: The rules in force.
        parsed: The request.
        request: The same, as it was sent.
        record: Its record. Gets the repository, the user, and whether the response is private.

    Raises:
        Denied: The client may not.
        TooManyRequests: Its address has failed to log in too often.
    """
    if not isinstance(parsed, paths.RepositoryRequest):
        return
    if parsed.repository.path == PROBE_REPOSITORY:
        return
    record.upstream, record.repository = parsed.repository.upstream, parsed.repository.path
    record.is_private = not access.is_public(parsed.repository)
    authorization = request.headers.get("Authorization")
    try:
        identity = await access.check_pull(authorization, record.client, parsed.repository)
    except Denied as error:
        record.user = error.user
        raise
    record.user = identity.user
    record.is_pull_refused = partial(_is_pull_refused, access, identity, record)


def _is_pull_refused(
    access: AccessControl, identity: Identity, record: RequestRecord, repository: Repository
) -> bool:
    """Return whether a rule refuses a client what another repository adds to a response.

    The response is private if everybody else may get another one, also one without the addition.
    """
    record.is_private |= access.is_pull_refused(ANONYMOUS, repository)
    return access.is_pull_refused(identity, repository)


async def find_visible(
    access: AccessControl, request: web.BaseRequest, record: RequestRecord
) -> Callable[[Repository], bool] | None:
    """Return a function that says which repositories a list may name. None: all.

    Args:
        access: The rules in force.
        request: The request for a list.
        record: Its record. Gets the user, and whether the response is private.
    """
    if not access.is_enforced:
        return None
    record.is_private = True
    authorization = request.headers.get("Authorization")
    identity, is_visible = await access.may_list(authorization, record.client)
    record.user = identity.user
    return is_visible
