"""Carry out the operations of the admin API.

Lives here: one method for each operation of the table (``operations.py``). Must not know: how a
request was read and checked (``dispatch.py``), how anything is done (``sources.py``).
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from mirror import __version__
from mirror.admin.event_stream import EventStreams
from mirror.admin.jobs import Jobs
from mirror.admin.json_values import JsonObject
from mirror.admin.openapi import document
from mirror.admin.operations import JOBS
from mirror.admin.sources import ImageQuery, PullQuery, Sources
from mirror.admin.tokens import TICKET_TTL_S, CallerRole, Tickets
from mirror.admin.worker_channel import WorkerStates
from mirror.config.settings import Settings
from mirror.observability.events import LogMessage, Observer

Lines: TypeAlias = AsyncGenerator[bytes, None]
"""The parts of a response that goes on."""
_SHOWN_ARGUMENT_CHARS: Final = 200
"""Characters of the arguments of a change in its log line."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was checked."""

    role: CallerRole
    client: str
    fields: JsonObject
    """The fields of the query, or of the body."""
    id: str = ""
    """The part of the path in the place of ``{id}``."""


class Api:
    """The operations. Each method takes a call, and returns the JSON of its response.

    ``follow_job`` and ``stream_events`` return an iterator of bytes instead.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        sources: Sources,
        workers: WorkerStates,
        jobs: Jobs,
        tickets: Tickets,
        streams: EventStreams,
        emit: Observer,
    ) -> None:
        """Create the API.

        Args:
            settings: Returns the configuration in use.
            sources: The functions of other packages.
            workers: The live state of all workers.
            jobs: The jobs of this process.
            tickets: Those of the event streams.
            streams: The open event streams.
            emit: Receives a log line for each change.
        """
        self._settings = settings
        self._sources = sources
        self._workers = workers
        self._jobs = jobs
        self._tickets = tickets
        self._streams = streams
        self._emit = emit

    def _log(self, call: Call, action: str) -> None:
        """Log a change, for those who ask later who has made it."""
        given = {key: value for key, value in call.fields.items() if value not in (None, False)}
        arguments = json.dumps(given)[:_SHOWN_ARGUMENT_CHARS]
        fields = (("action", action), ("client", call.client), ("arguments", arguments))
        self._emit(LogMessage("info", "admin", fields))

    # --- reading --------------------------------------------------------------------------------

    def _is_open(self) -> bool:
        admin = self._settings().admin
        return admin is not None and admin.is_open

    async def access(self, call: Call) -> JsonObject:
        return {"is_open": self._is_open()}

    async def session(self, call: Call) -> JsonObject:
        settings = self._settings()
        storage = settings.storage
        return {
            "version": __version__,
            "role": call.role.value,
            "is_open": self._is_open(),
            "upstreams": list(settings.upstreams),
            "quota": storage.max_size,
            "high_water": int(storage.max_size * storage.high_water),
            "low_water": int(storage.max_size * storage.low_water),
        }

    async def list_images(self, call: Call) -> JsonObject:
        fields = call.fields
        query = ImageQuery(
            search=fields["search"],
            state=fields["state"] or "",
            sort=fields["sort"],
            is_descending=fields["order"] == "desc",
            offset=fields["offset"],
            limit=fields["limit"],
        )
        return await self._sources.images.find(query)

    async def show_image(self, call: Call) -> JsonObject:
        return await self._sources.images.show(call.fields["image"])

    async def tag_history(self, call: Call) -> JsonObject:
        return {"digests": await self._sources.history.tag_digests(call.fields["image"])}

    async def usage(self, call: Call) -> JsonObject:
        return await self._sources.images.usage()

    async def list_uploads(self, call: Call) -> JsonObject:
        return {"uploads": await self._sources.images.uploads()}

    async def cancel_upload(self, call: Call) -> JsonObject:
        changed = await self._sources.uploads.end(call.id)
        return self._marked(replace(call, fields={"upload": call.id}), "cancel_upload", changed)

    async def list_users(self, call: Call) -> JsonObject:
        return await self._sources.history.users(call.fields["limit"])

    async def live(self, call: Call) -> JsonObject:
        return self._workers.merged()

    async def upstreams(self, call: Call) -> JsonObject:
        return {"upstreams": self._workers.merged()["upstreams"]}

    async def list_pulls(self, call: Call) -> JsonObject:
        fields = call.fields
        outcomes = (fields["outcome"],) if fields["outcome"] else ()
        query = PullQuery(
            fields["image"], fields["client"], outcomes, fields["before"], fields["limit"]
        )
        return {"pulls": await self._sources.history.pulls(query)}

    async def show_pull(self, call: Call) -> JsonObject:
        return await self._sources.history.pull(call.id)

    async def list_refused(self, call: Call) -> JsonObject:
        return {"pulls": await self._sources.history.refused(call.fields["limit"])}

    async def savings(self, call: Call) -> JsonObject:
        return await self._sources.history.savings(call.fields["period"])

    async def list_marks(self, call: Call) -> JsonObject:
        return await self._sources.marks.list()

    async def openapi(self, call: Call) -> JsonObject:
        return document()

    # --- marks ----------------------------------------------------------------------------------

    async def pin(self, call: Call) -> JsonObject:
        return self._marked(call, "pin", await self._sources.marks.pin(call.fields["image"]))

    async def unpin(self, call: Call) -> JsonObject:
        return self._marked(call, "unpin", await self._sources.marks.unpin(call.fields["image"]))

    async def freeze(self, call: Call) -> JsonObject:
        fields = call.fields
        changed = await self._sources.marks.freeze(fields["image"], fields["digest"])
        return self._marked(call, "freeze", changed)

    async def unfreeze(self, call: Call) -> JsonObject:
        changed = await self._sources.marks.unfreeze(call.fields["image"])
        return self._marked(call, "unfreeze", changed)

    async def block(self, call: Call) -> JsonObject:
        fields = call.fields
        changed = await self._sources.marks.block(fields["target"], fields["reason"])
        return self._marked(call, "block", changed)

    async def unblock(self, call: Call) -> JsonObject:
        changed = await self._sources.marks.unblock(call.fields["target"])
        return self._marked(call, "unblock", changed)

    def _marked(self, call: Call, action: str, changed: JsonObject) -> JsonObject:
        self._log(call, action)
        self._sources.images.forget_read()
        self._streams.mark_changed()
        return changed

    # --- jobs -----------------------------------------------------------------------------------

    async def list_jobs(self, call: Call) -> JsonObject:
        return {"jobs": [job.to_json() for job in self._jobs.list()]}

    async def show_job(self, call: Call) -> JsonObject:
        return self._jobs.find(call.id).to_json()

    async def cancel_job(self, call: Call) -> JsonObject:
        self._log(replace(call, fields={"job": call.id}), "cancel")
        return self._jobs.cancel(call.id).to_json()

    async def follow_job(self, call: Call) -> Lines:
        return self._job_lines(self._jobs.find(call.id).id)

    async def _job_lines(self, job_id: str) -> Lines:
        async with aclosing(self._jobs.follow(self._jobs.find(job_id))) as events:
            async for event in events:
                yield json.dumps(event).encode() + b"\n"

    def start_job(self, kind: str, call: Call) -> JsonObject:
        """Start a job of one kind."""
        assert kind in JOBS
        given = {name: value for name, value in call.fields.items() if value is not None}
        run = self._sources.operations.prepare(kind, given)
        self._log(call, kind)
        return self._jobs.start(kind, given, run).to_json()

    # --- events ---------------------------------------------------------------------------------

    async def issue_ticket(self, call: Call) -> JsonObject:
        return {"ticket": self._tickets.issue(call.role), "expires_in": TICKET_TTL_S}

    async def stream_events(self, call: Call) -> Lines:
        return self._streams.open()
