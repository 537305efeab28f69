"""The questions about the store, answered by a process of their own.

Lives here: the process's start and end, and the protocol's other side. Must not know: what is
asked.

The process is started by the first question, and ended when nobody has asked for a minute.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

from mirror.admin.json_values import JsonObject
from mirror.admin.problems import ApiProblem
from mirror.admin.sources import ImageQuery, PullQuery
from mirror.config.settings import Settings

IDLE_S: Final = 60.0
"""Seconds without a question after which the process is ended: its memory is that of an inventory,
some hundred bytes for each content."""
_MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""Bytes of an answer. The largest one, a page of 500 images, has less than a megabyte."""


def reader_settings(settings: Settings, data_dir: str) -> JsonObject:
    """Return the part of the configuration that reading needs, without logins."""
    document = settings.model_dump(
        mode="json", include={"storage", "upstreams", "default_upstream"}, exclude_unset=True
    )
    for upstream in document.get("upstreams", {}).values():
        upstream.pop("credentials", None)
    if settings.hosted is not None:
        # Without its listener, which the rules of access would have to permit.
        hosted = {"name": settings.hosted.name, "max_size": settings.hosted.max_size}
        document["hosted"] = {**hosted, "listen": "127.0.0.1:0"}
    return {**document, "data_dir": data_dir}


class StoreReader:
    """Asks the process. Questions wait for each other."""

    def __init__(self, settings: Callable[[], Settings], data_dir: str) -> None:
        """Start no process yet.

        Args:
            settings: Returns the configuration in use.
            data_dir: The data directory.
        """
        self._settings = settings
        self._data_dir = data_dir
        self._process: asyncio.subprocess.Process | None = None
        self._given: JsonObject = {}
        """The configuration that the process has got."""
        self._turn = asyncio.Lock()
        self._has_to_forget = False
        self._idle: asyncio.TimerHandle | None = None

    async def ask(self, name: str, /, **given: Any) -> Any:
        """Return the answer. Raises ``ApiProblem``."""
        async with self._turn:
            try:
                if self._has_to_forget and self._process is not None:
                    self._has_to_forget = False
                    await self._exchange("forget", {})
                answer = await self._exchange(name, given)
            except BaseException:
                # The rest of an answer would be taken for that of the next question.
                await self.close()
                raise
        self._wait_for_idleness()
        if "result" not in answer:
            raise ApiProblem(answer["status"], answer["detail"])
        return answer["result"]

    def forget_read(self) -> None:
        """Read the store again at the next question."""
        self._has_to_forget = True

    async def close(self) -> None:
        """End the process."""
        if self._idle is not None:
            self._idle.cancel()
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _exchange(self, name: str, given: JsonObject) -> JsonObject:
        process = await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"ask": name, "with": given}).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
        except ConnectionError:
            line = b""
        if not line:
            await self.close()
            raise ApiProblem(503, "the process that reads the store has ended: try again")
        answer: JsonObject = json.loads(line)
        return answer

    async def _start(self) -> asyncio.subprocess.Process:
        """Return the process. It is started again if the configuration has changed."""
        given = reader_settings(self._settings(), self._data_dir)
        if self._process is not None and given != self._given:
            await self.close()
        if self._process is None:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "mirror.admin.reader_process"),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    limit=_MAX_ANSWER_BYTES,
                )
            except OSError as error:
                raise ApiProblem(503, f"no process can be started: {error.strerror}") from None
            self._given = given
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(given).encode() + b"\n")
        return self._process

    def _wait_for_idleness(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        loop = asyncio.get_running_loop()
        self._idle = loop.call_later(IDLE_S, self._end_if_idle)

    def _end_if_idle(self) -> None:
        """Let the process end: it does at the end of its standard input."""
        if self._process is not None and not self._turn.locked():
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = None


class ReadImages:
    """:class:`mirror.admin.sources.Images`, by the process."""

    def __init__(self, reader: StoreReader) -> None:
        """Ask ``reader``."""
        self._reader = reader

    async def find(self, query: ImageQuery) -> JsonObject:
        """Return a page of images."""
        result: JsonObject = await self._reader.ask("find", **asdict(query))
        return result

    async def show(self, image: str) -> JsonObject:
        """Return one image with its tree."""
        result: JsonObject = await self._reader.ask("show", image=image)
        return result

    async def usage(self) -> JsonObject:
        """Return what takes up the disk."""
        result: JsonObject = await self._reader.ask("usage")
        return result

    async def uploads(self) -> list[JsonObject]:
        """Return the uploads in progress."""
        result: list[JsonObject] = await self._reader.ask("uploads")
        return result

    def forget_read(self) -> None:
        """Read the store again at the next question."""
        self._reader.forget_read()


class ReadHistory:
    """:class:`mirror.admin.sources.History`, by the process."""

    def __init__(self, reader: StoreReader) -> None:
        """Ask ``reader``."""
        self._reader = reader

    async def pulls(self, query: PullQuery) -> list[JsonObject]:
        """Return pulls that have ended."""
        result: list[JsonObject] = await self._reader.ask("pulls", **asdict(query))
        return result

    async def pull(self, request_id: str) -> JsonObject:
        """Return one pull, explained."""
        result: JsonObject = await self._reader.ask("pull", request_id=request_id)
        return result

    async def refused(self, limit: int) -> list[JsonObject]:
        """Return requests that got no content."""
        result: list[JsonObject] = await self._reader.ask("refused", limit=limit)
        return result

    async def tag_digests(self, image: str) -> list[JsonObject]:
        """Return the digests of a tag."""
        result: list[JsonObject] = await self._reader.ask("tag_digests", image=image)
        return result

    async def users(self, limit: int) -> JsonObject:
        """Return the users of the server."""
        result: JsonObject = await self._reader.ask("users", limit=limit)
        return result

    async def savings(self, period: str) -> JsonObject:
        """Return sums and the points of a plot."""
        result: JsonObject = await self._reader.ask("savings", period=period)
        return result
