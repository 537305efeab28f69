"""Read and check a request of the admin listener, and answer it.

Lives here: the order of the checks, routing by the table of operations, and the form of responses.
Must not know: how an operation is carried out.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final, TypeAlias

from aiohttp import web

from mirror.admin import problems
from mirror.admin.admin_api import Api, Call
from mirror.admin.fields import read_json_fields, read_query_fields
from mirror.admin.json_values import JsonObject
from mirror.admin.operations import API_PREFIX, OPERATIONS, Operation
from mirror.admin.page_files import PageFile, PageFiles
from mirror.admin.problems import ApiProblem, problem_of
from mirror.admin.tokens import CallerRole, Tickets, Tokens
from mirror.config.settings import Admin
from mirror.observability.events import LogMessage, Observer
from mirror.oci.errors import MirrorError
from mirror.web.browser_guard import is_same_site, may_be_host

Methods: TypeAlias = dict[str, Operation]

MAX_BODY_BYTES: Final = 256 * 1024
"""Bytes of a body: 500 names of images of the greatest length."""
BODY_TIMEOUT_S: Final = 10.0
"""Seconds in which a body arrives."""
OPERATION_TIMEOUT_S: Final = 60.0
"""Seconds after which an operation that is no stream is given up. The largest store is read in
less."""
_ADMIN_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
"""Header fields of every response."""
_API_POLICY: Final = "default-src 'none'; frame-ancestors 'none'; sandbox"
"""Content security policy of responses that are no page."""
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


class Dispatcher:
    """Answers every request of the admin listener."""

    def __init__(
        self,
        admin: Admin,
        api: Api,
        tokens: Tokens,
        tickets: Tickets,
        page: PageFiles,
        emit: Observer,
    ) -> None:
        """Create it.

        Args:
            admin: The configuration of the listener.
            api: Carries out the operations.
            tokens: The tokens of callers.
            tickets: Those of the event streams.
            page: The files of the page.
            emit: Receives a log line for each unexpected error.
        """
        self._hosts = admin.hosts
        self._api = api
        self._tokens = tokens
        self._tickets = tickets
        self._page = page
        self._emit = emit
        self._routes: dict[str, Methods] = {}
        for operation in OPERATIONS:
            self._routes.setdefault(operation.path, {})[operation.method] = operation

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        try:
            return await self._respond(request)
        except ApiProblem as problem:
            return _problem_response(problem)
        except (ConnectionError, asyncio.CancelledError):
            raise  # The client has left.
        except (MirrorError, OSError) as error:
            return _problem_response(problem_of(error))
        except Exception as error:
            fields = (("path", request.path), ("error", repr(error)))
            self._emit(LogMessage("error", "unexpected error of the admin API", fields))
            return _problem_response(problem_of(error))

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        hosts = request.headers.getall("Host", ())
        if len(hosts) != 1 or not may_be_host(hosts[0], self._hosts):
            raise ApiProblem(403, "this Host is not ours: add it to admin.hosts if it is")
        file = self._page.find(request.path)
        is_page = file is not None and request.path == "/"
        if not is_same_site(request.headers, hosts[0], is_navigation=is_page):
            raise ApiProblem(403, "another web site has caused this request")
        if file is not None:
            return _page_response(request, file)
        if not request.path.startswith(API_PREFIX + "/"):
            raise ApiProblem(404, f"no such path: the API is below {API_PREFIX}/")
        public = self._routes.get(request.path, {}).get(request.method)
        # Before the path is looked at: who has no token learns nothing.
        is_public = public is not None and public.is_public
        role = CallerRole.READ_ONLY if is_public else self._role_of(request)
        methods, identifier = self._find(request.path)
        operation = methods.get(request.method)
        if operation is None:
            raise ApiProblem(405, "the path has no such method", Allow=", ".join(methods))
        if operation.is_change and role is not CallerRole.FULL:
            raise ApiProblem(403, "this token is read-only")
        fields = await self._fields(request, operation)
        client = request.remote or ""
        call = Call(role, client, fields, identifier)
        async with asyncio.timeout(OPERATION_TIMEOUT_S):
            result = await self._carry_out(operation, call)
        if isinstance(result, dict):
            headers = {"Content-Security-Policy": _API_POLICY, **_ADMIN_HEADERS}
            return web.Response(
                body=json.dumps(result).encode(),
                status=operation.status,
                headers={"Content-Type": operation.media_type, **headers},
            )
        return await _stream(request, operation, result)

    async def _carry_out(self, operation: Operation, call: Call) -> Any:
        if operation.name.startswith("start_"):
            return self._api.start_job(operation.name.removeprefix("start_"), call)
        return await getattr(self._api, operation.name)(call)

    def _role_of(self, request: web.BaseRequest) -> CallerRole:
        """Return the role of the caller. Raises ``ApiProblem`` (401)."""
        if request.path == f"{API_PREFIX}/events" and "Authorization" not in request.headers:
            ticket = request.rel_url.query.get("ticket", "")
            if ticket and (role := self._tickets.redeem(ticket)) is not None:
                return role
        if len(request.headers.getall("Authorization", ())) > 1:
            raise ApiProblem(400, "send one header field Authorization")
        role_of_token = self._tokens.role_of(request.headers.get("Authorization"))
        if role_of_token is None:
            raise ApiProblem(
                401,
                "a bearer token of admin.token_file or admin.read_only_token_file is needed",
                WWW_Authenticate='Bearer realm="oci-mirror admin"',
            )
        return role_of_token

    def _find(self, path: str) -> tuple[Methods, str]:
        """Return the methods of a path, and the id in it. Raises ``ApiProblem`` (404)."""
        if (methods := self._routes.get(path)) is not None:
            return methods, ""
        parts = path.split("/")
        for place in range(4, len(parts)):
            pattern = "/".join([*parts[:place], "{id}", *parts[place + 1 :]])
            if (methods := self._routes.get(pattern)) and _ID.fullmatch(parts[place]):
                return methods, parts[place]
        raise ApiProblem(404, "no such path: see openapi.json for those that there are")

    async def _fields(self, request: web.BaseRequest, operation: Operation) -> JsonObject:
        query = read_query_fields(operation.query, request.query_string)
        if operation.body is None:
            return query
        body = await _read_body(request)
        if request.content_type != "application/json":
            raise ApiProblem(415, "the body must be application/json")
        return read_json_fields(operation.body, body)


async def _read_body(request: web.BaseRequest) -> bytes:
    """Return the body. Raises ``ApiProblem`` (413, or 408 if it is too slow)."""
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise ApiProblem(413, f"the body is larger than {MAX_BODY_BYTES} bytes", Connection="close")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise ApiProblem(
                        413, f"the body is larger than {MAX_BODY_BYTES} bytes", Connection="close"
                    )
    except TimeoutError:
        raise ApiProblem(
            408, f"the body has not arrived within {BODY_TIMEOUT_S:g} s", Connection="close"
        ) from None
    return bytes(body)


def _problem_response(problem: ApiProblem) -> web.Response:
    response = web.Response(
        body=problem.body(),
        status=problem.status,
        headers={
            "Content-Type": problems.PROBLEM_TYPE,
            "Content-Security-Policy": _API_POLICY,
            **_ADMIN_HEADERS,
            **problem.headers,
        },
    )
    if problem.headers.get("Connection") == "close":
        response.force_close()
    return response


def _page_response(request: web.BaseRequest, file: PageFile) -> web.Response:
    if request.method not in ("GET", "HEAD"):
        raise ApiProblem(405, "the page can only be read", Allow="GET, HEAD")
    headers = {
        **_ADMIN_HEADERS,
        "Content-Type": file.content_type,
        "Content-Security-Policy": file.policy,
        "Cache-Control": "no-cache",
        "ETag": file.etag,
    }
    if request.headers.get("If-None-Match") == file.etag:
        return web.Response(status=304, headers=headers)
    return web.Response(body=file.body, headers=headers)


async def _stream(
    request: web.BaseRequest, operation: Operation, parts: AsyncGenerator[bytes, None]
) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={
            "Content-Type": operation.media_type,
            "Content-Security-Policy": _API_POLICY,
            "X-Accel-Buffering": "no",
            **_ADMIN_HEADERS,
        }
    )
    await response.prepare(request)
    # Closed here if the client leaves: a stream that nobody reads must not count as open.
    async with aclosing(parts):
        async for part in parts:
            await response.write(part)
    await response.write_eof()
    return response
