"""Sources of the admin API without a store: a few images, pulls and marks in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from mirror.admin.jobs import Reporter, Run
from mirror.admin.sources import ImageQuery, PullQuery, Sources
from mirror.oci.errors import InvalidRequest, NotFound
from mirror.oci.image_name import ImageName

Json = dict[str, Any]
AT = "2026-01-02T03:04:05Z"


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def image(number: int) -> Json:
    return {
        "name": f"docker.io/library/app{number:05d}:v1",
        "upstream": "docker.io",
        "repository": f"library/app{number:05d}",
        "tag": "v1",
        "digest": digest(number),
        "platforms": ["linux/amd64", "linux/arm64"],
        "size": 1_000_000 * (number % 97 + 1),
        "unique": 250_000 * (number % 89),
        "last_used": AT,
        "confirmed": AT,
        "state": ["partial"] if number % 7 == 3 else ["complete"],
        "kind": "image",
        "current_digest": digest(number),
        "missing_platforms": [],
        "missing_parts": 1 if number % 7 == 3 else 0,
        "missing_bytes": 4096 if number % 7 == 3 else 0,
        "absent_why": None,
        "stale_why": None,
        "blocked_why": None,
        "pushed": None,
        "pushed_by": None,
    }


class FakeImages:
    def __init__(self, count: int = 3) -> None:
        self.rows = [image(number) for number in range(count)]
        self.reads = 0

    async def find(self, query: ImageQuery) -> Json:
        found = [
            row
            for row in self.rows
            if query.search.lower() in row["name"]
            and (not query.state or query.state in row["state"])
        ]
        found.sort(key=lambda row: row[query.sort], reverse=query.is_descending)
        return {
            "images": found[query.offset : query.offset + query.limit],
            "matching": len(found),
            "total": len(self.rows),
            "lost": 0,
            "read": AT,
        }

    async def show(self, image: str) -> Json:
        name = str(ImageName.parse(image).with_default_tag())
        for row in self.rows:
            if row["name"] == name:
                nodes = [
                    {
                        "depth": depth,
                        "digest": digest(1000 + depth),
                        "type": kind,
                        "size": 4000 * 10**depth,
                        "platform": None,
                        "is_cached": depth < 3,
                        "media_type": None,
                        "name": None,
                        "shared_with": [f"docker.io/library/other:{n}" for n in range(depth)],
                    }
                    for depth, kind in enumerate(("index", "manifest", "config", "layer"))
                ]
                return {"image": row, "nodes": nodes}
        raise NotFound(f"{name} is not in the cache")

    async def uploads(self) -> list[Json]:
        return [
            {
                "kind": "upload",
                "id": "0" * 32,
                "repository": "registry.example/team/app",
                "user": "ci",
                "size": 40_000_000,
                "reserved": 80_000_000,
                "started": AT,
                "last_byte": AT,
                "age": 60,
                "idle": 1,
            }
        ]

    async def usage(self) -> Json:
        size = sum(row["size"] for row in self.rows)
        kinds = ("index", "manifest", "config", "layer", "referrer", "other")
        return {
            "contents": 4 * len(self.rows),
            "bytes": size,
            "quota": 2 * size,
            "rows": [
                {"type": kind, "total": 5, "active": 4, "size": size // 6, "reclaimable": size // 9}
                for kind in kinds
            ],
            "upstreams": [
                {
                    "name": "docker.io",
                    "images": len(self.rows),
                    "contents": 4 * len(self.rows),
                    "size": size,
                    "shared": size - size // 3,
                    "unique": size // 3,
                }
            ],
            "next": [
                {
                    "digest": row["digest"],
                    "size": row["size"],
                    "type": "layer",
                    "last_used": AT,
                    "images": [row["name"]],
                    "why": "least recently used",
                }
                for row in self.rows[:5]
            ],
            "hosted": {
                "repositories": 2,
                "contents": 12,
                "bytes": 3_000_000,
                "uploads": 1,
                "reserved": 80_000_000,
                "metadata": 90_000,
                "quota": 1_000_000_000,
            },
            "read": AT,
        }

    def forget_read(self) -> None:
        self.reads += 1


def pull(number: int, outcome: str = "hit", status: int = 200, error: str = "") -> Json:
    return {
        "row": number,
        "id": f"{number:016x}",
        "at": AT,
        "client": "10.0.0.7",
        "name": f"docker.io/library/app{number:05d}:v1",
        "kind": "manifest",
        "outcome": outcome,
        "status": status,
        "error": error,
        "bytes_sent": 12345 * number,
        "duration": 0.012 * number,
    }


class FakeHistory:
    def __init__(self) -> None:
        self.rows = [pull(3), pull(2, "miss"), pull(1, "denied", 403, "DENIED: not allowed")]

    async def pulls(self, query: PullQuery) -> list[Json]:
        wanted = [
            row for row in self.rows if row["outcome"] in (query.outcomes or (row["outcome"],))
        ]
        return [row for row in wanted if query.image in row["name"]][: query.limit]

    async def pull(self, request_id: str) -> Json:
        for row in self.rows:
            if row["id"] == request_id:
                return {
                    "pull": row,
                    "stages": [
                        {"name": "index", "seconds": 0.002},
                        {"name": "upstream", "seconds": 0.2},
                        {"name": "fetch", "seconds": 1.1},
                        {"name": "send", "seconds": 0.7},
                    ],
                    "explanation": [
                        "It was a miss: nothing was cached.",
                        "waited 0.2 s for a token",
                    ],
                }
        raise NotFound("no such pull")

    async def refused(self, limit: int) -> list[Json]:
        return [row for row in self.rows if row["status"] >= 400][:limit]

    async def tag_digests(self, image: str) -> list[Json]:
        ImageName.parse(image)
        return [{"digest": digest(1), "first_seen": AT, "last_seen": AT}]

    async def users(self, limit: int) -> Json:
        rows = [{"user": "ci", "last_used": AT, "last_push": None, "requests": 3}]
        return {"users": rows[:limit], "total": len(rows)}

    async def savings(self, period: str) -> Json:
        saving = {
            "name": "docker.io",
            "requests": 100,
            "hit_ratio": 0.9,
            "bytes_sent": 10_000_000_000,
            "bytes_fetched": 1_000_000_000,
            "bytes_saved": 9_000_000_000,
            "billable_saved": 40,
        }
        points = [
            {
                "at": f"2026-01-02T{hour:02d}:{minute:02d}:00Z",
                "requests": 10,
                "hits": (hour * 7 + minute) % 10,
                "hit_ratio": ((hour * 7 + minute) % 10) / 10,
                "bytes_sent": 10_000_000 * (hour + 1),
                "bytes_fetched": 1_000_000,
                "bytes_saved": 9_000_000 * (hour + 1),
            }
            for hour in range(24)
            for minute in ((0, 15, 30, 45) if period == "day" else (0,))
        ]
        return {"period": period, "totals": saving, "points": points, "upstreams": [saving]}


class FakeMarks:
    def __init__(self) -> None:
        self.pins: dict[str, Json] = {}
        self.blocks: dict[str, Json] = {}
        self.freezes: dict[str, Json] = {}

    async def list(self) -> Json:
        return {
            "pins": list(self.pins.values()),
            "freezes": list(self.freezes.values()),
            "blocks": list(self.blocks.values()),
            "leases": 0,
        }

    async def pin(self, image: str) -> Json:
        name = str(ImageName.parse(image).with_default_tag())
        self.pins[name] = {"name": name, "digest": digest(1), "since": AT}
        return {"text": f"pinned {name}", "notes": []}

    async def unpin(self, image: str) -> Json:
        name = str(ImageName.parse(image).with_default_tag())
        if self.pins.pop(name, None) is None:
            raise NotFound(f"{name} is not pinned")
        return {"text": f"unpinned {name}", "notes": []}

    async def freeze(self, image: str, digest: str | None) -> Json:
        name = str(ImageName.parse(image).with_default_tag())
        self.freezes[name] = {"name": name, "digest": digest or "", "since": AT}
        return {"text": f"froze {name}", "notes": []}

    async def unfreeze(self, image: str) -> Json:
        name = str(ImageName.parse(image).with_default_tag())
        if self.freezes.pop(name, None) is None:
            raise NotFound(f"{name} is not frozen")
        return {"text": f"unfroze {name}", "notes": []}

    async def block(self, target: str, reason: str) -> Json:
        self.blocks[target] = {"target": target, "reason": reason, "since": AT, "digests": []}
        return {"text": f"blocked {target}", "notes": []}

    async def unblock(self, target: str) -> Json:
        if self.blocks.pop(target, None) is None:
            raise NotFound(f"{target} is not blocked")
        return {"text": f"unblocked {target}", "notes": []}


class FakeOperations:
    """Jobs that end when a test says so, or at once."""

    def __init__(self) -> None:
        self.started: list[tuple[str, Mapping[str, Any]]] = []
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.failure: Exception | None = None

    def prepare(self, kind: str, arguments: Mapping[str, Any]) -> Run:
        for name in arguments.get("images", ()):
            ImageName.parse(name)
        if arguments.get("match") == "refuse":
            raise InvalidRequest("match refuses")

        async def run(report: Reporter) -> Json:
            self.started.append((kind, arguments))
            report.progress(1, 2, "images", "the first one")
            report.note("begun")
            await self.may_end.wait()
            if self.failure is not None:
                raise self.failure
            report.progress(2, 2, "images")
            return {"freed": 17}

        return run


class FakeUploads:
    """One upload, ``upload-1``."""

    def __init__(self) -> None:
        self.ids = {"upload-1"}

    async def end(self, upload_id: str) -> Json:
        if upload_id not in self.ids:
            raise NotFound("there is no such upload in progress")
        self.ids.remove(upload_id)
        return {"text": f"cancelled the upload {upload_id}", "notes": []}


def fake_sources(count: int = 3) -> Sources:
    return Sources(FakeImages(count), FakeHistory(), FakeMarks(), FakeOperations(), FakeUploads())
