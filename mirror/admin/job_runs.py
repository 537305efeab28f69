"""The work of each kind of job.

Lives here: which jobs run in this process, and which in one of their own. Must not know: how a job
is done (:mod:`mirror.operations`), the life of a job.

``warm`` and ``refresh`` run here: they wait for upstreams, their fetches are shared with clients,
and they are seen among the pulls in flight. All others look at the whole store.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from mirror.admin.jobs import Reporter, Run
from mirror.admin.json_values import JsonObject
from mirror.admin.problems import ApiProblem
from mirror.composition import Mirror
from mirror.config.settings import Settings
from mirror.oci.errors import InvalidRequest, StorageUnavailable
from mirror.oci.image_name import ImageName
from mirror.oci.platform import Platform
from mirror.oci.text import count_text
from mirror.operations.refresh import refresh
from mirror.operations.verify import Subset
from mirror.operations.warm import ContentProgress, ImageReport, WarmOptions, warm

_MAX_TOLD_BYTES: Final = 1024 * 1024
"""Bytes of a line of the process: a reason, or a result of a few numbers."""


class JobRuns:
    """:class:`mirror.admin.sources.Operations`, over the parts of this process."""

    def __init__(self, mirror: Mirror) -> None:
        """Run jobs on the data directory of ``mirror``."""
        self._mirror = mirror
        self._cleaning = asyncio.Lock()
        """Jobs that remove or verify run one after the other: each reads the whole store."""

    def prepare(self, kind: str, arguments: Mapping[str, Any]) -> Run:
        """Return the work of a job. Raises ``InvalidRequest`` for arguments that make no sense."""
        names = [*arguments.get("images", ()), *filter(None, [arguments.get("image")])]
        images = [ImageName.parse(name) for name in names]
        match kind:
            case "warm":
                options = WarmOptions(
                    platforms=frozenset(_platform(one) for one in arguments.get("platforms") or ()),
                    has_referrers=bool(arguments.get("referrers")),
                )
                return lambda report: self._warm(images, options, report)
            case "refresh":
                return lambda report: self._refresh(images[0].with_default_tag())
            case "verify" if "subset" in arguments:
                try:
                    Subset.parse(arguments["subset"])
                except ValueError as error:
                    raise InvalidRequest(f"subset is {error}") from None
        return lambda report: self._run_process(kind, arguments, report)

    async def _warm(
        self, images: list[ImageName], options: WarmOptions, report: Reporter
    ) -> JsonObject:
        progress = _WarmProgress()

        def on_report(event: ContentProgress | ImageReport) -> None:
            if isinstance(event, ImageReport):
                state = event.error or f"complete, {count_text(event.added, 'new content')}"
                report.note(f"{event.image}: {state}")
            else:
                progress.add(event)
                done, total = progress.sums()
                report.progress(done, total, "bytes", str(event.image))

        reports = await warm(self._mirror, images, options, on_report)
        failed = [one for one in reports if not one.is_complete]
        if failed and len(failed) == len(reports):
            raise ApiProblem(502, "; ".join(f"{one.image}: {one.error}" for one in failed[:3]))
        return {
            "images": len(reports),
            "failed_images": len(failed),
            "added_contents": sum(one.added for one in reports),
            "added_bytes": sum(one.added_bytes for one in reports),
        }

    async def _refresh(self, image: ImageName) -> JsonObject:
        report = await refresh(self._mirror, image)
        return {
            "digest": str(report.digest),
            "previous": None if report.previous is None else str(report.previous),
            "has_moved": report.has_moved,
        }

    async def _run_process(
        self, kind: str, arguments: Mapping[str, Any], report: Reporter
    ) -> JsonObject:
        settings = job_settings(self._mirror.settings, str(self._mirror.store.layout.root))
        document = {"settings": settings, "kind": kind, "arguments": dict(arguments)}
        async with self._cleaning:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "mirror.admin.job_process"),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    limit=_MAX_TOLD_BYTES,
                )
            except OSError as error:
                raise StorageUnavailable(f"no process can be started: {error.strerror}") from None
            try:
                return await _follow(process, json.dumps(document).encode(), report)
            finally:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


def job_settings(settings: Settings, data_dir: str) -> JsonObject:
    """Return the configuration for a process: the pipe to it is read by nobody else."""
    document = settings.model_dump(mode="json", exclude_unset=True, exclude={"admin"})
    return {**document, "data_dir": data_dir}


def _platform(text: str) -> Platform:
    try:
        return Platform.parse(text)
    except ValueError as error:
        raise InvalidRequest(f"platforms: {error}") from None


async def _follow(
    process: asyncio.subprocess.Process, document: bytes, report: Reporter
) -> JsonObject:
    """Pass on what a process tells, and return its result. Raises ``ApiProblem`` for its error."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(ConnectionError):
        process.stdin.write(document)
        await process.stdin.drain()
    process.stdin.close()
    async for line in process.stdout:
        told = json.loads(line)
        if "progress" in told:
            report.progress(*told["progress"])
        elif "note" in told:
            report.note(told["note"])
        elif "error" in told:
            raise ApiProblem(409, told["error"])
        else:
            result: JsonObject = told["result"]
            return result
    raise StorageUnavailable("the process of the job has ended without a result")


@dataclass(slots=True)
class _WarmProgress:
    """The bytes of all contents that a warm job has begun with."""

    _positions: dict[tuple[str, str], int] = field(default_factory=dict)
    _sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    _done: int = 0
    _total: int = 0

    def add(self, event: ContentProgress) -> None:
        """Take the progress of one content."""
        key = (str(event.image), str(event.digest))
        size = event.size or event.position
        self._done += event.position - self._positions.get(key, 0)
        self._total += size - self._sizes.get(key, 0)
        self._positions[key], self._sizes[key] = event.position, size

    def sums(self) -> tuple[int, int]:
        """Return (bytes that are here, bytes of all contents that are known so far)."""
        return self._done, self._total
