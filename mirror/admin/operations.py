"""The table of all operations of the admin API.

Lives here: method, path, fields and response of each, as one declaration. The server routes by it,
checks requests by it, and ``openapi.py`` writes the document from it. Must not know: how an
operation is carried out (``admin_api.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mirror.admin.fields import Field, FieldSchema

API_PREFIX: Final = "/admin/v1"
_MAX_NAME_CHARS: Final = 512
"""Characters of the name of an image: a repository has at most 255, a tag 128, a digest 136."""
_MAX_JOB_IMAGES: Final = 500
"""Images of one request. A longer list belongs into several jobs."""
_MAX_PAGE_ROWS: Final = 500
"""Rows of one response."""

IMAGE_TEXT: Final[FieldSchema] = {"type": "string", "minLength": 1, "maxLength": _MAX_NAME_CHARS}
_SEARCH_TEXT: Final[FieldSchema] = {"type": "string", "maxLength": _MAX_NAME_CHARS}
_LIMIT: Final[FieldSchema] = {"type": "integer", "minimum": 1, "maximum": _MAX_PAGE_ROWS}
_OFFSET: Final[FieldSchema] = {"type": "integer", "minimum": 0, "maximum": 10_000_000}
_ROW: Final[FieldSchema] = {"type": "integer", "minimum": 0, "maximum": 2**53 - 1}
_YES: Final[FieldSchema] = {"type": "boolean"}

IMAGE_SORT_KEYS: Final = ("name", "size", "unique", "last_used", "confirmed")
"""Keys of a row of images that they can be sorted by."""
STATES: Final = (
    *("complete", "partial", "absent", "stale", "hosted", "pinned", "frozen", "blocked", "leased"),
    "referrer",
)
"""States of an image that can be asked for. ``absent``: tags whose content was evicted, too.
``referrer``: signatures, SBOMs and the like."""
OUTCOMES: Final = (
    *("hit", "join", "miss", "aside", "revalidated", "stale"),
    *("negative", "denied", "rejected", "error", "pushed", "deleted"),
)
"""Outcomes of pulls that can be asked for."""
PLOT_PERIODS: Final = ("hour", "day", "month")

_IMAGE: Final = Field(
    "image", IMAGE_TEXT, "Name of the image, such as nginx or ghcr.io/o/app:v1.", is_required=True
)
_IMAGES: Final = Field(
    "images",
    {"type": "array", "items": IMAGE_TEXT, "minItems": 1, "maxItems": _MAX_JOB_IMAGES},
    "Names of images.",
    is_required=True,
)
_DRY_RUN: Final = Field("dry_run", _YES, "Change nothing, and report what would go.", default=False)
_PLATFORMS: Final = Field(
    "platforms",
    {"type": "array", "items": {"type": "string", "maxLength": 80}, "maxItems": 20},
    "Platforms such as linux/amd64. None: all.",
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation.

    ``path`` may end with ``/{id}`` or contain it once. ``body``: None if it takes no body.
    ``is_change``: a read-only token may not call it.
    """

    name: str
    """Name of the method of ``Api``, and its ``operationId``."""
    method: str
    path: str
    summary: str
    response: str
    """Name of the schema of the response."""
    query: tuple[Field, ...] = ()
    body: tuple[Field, ...] | None = None
    status: int = 200
    is_change: bool = False
    is_public: bool = False
    """Whether no token is needed."""
    media_type: str = "application/json"


def _read(name: str, path: str, response: str, summary: str, *query: Field) -> Operation:
    return Operation(name, "GET", API_PREFIX + path, summary, response, query)


def _change(name: str, path: str, response: str, summary: str, *body: Field) -> Operation:
    return Operation(
        name, "POST", API_PREFIX + path, summary, response, body=body or None, is_change=True
    )


JOBS: Final[Mapping[str, tuple[str, tuple[Field, ...]]]] = {
    "warm": (
        "Fetch images ahead.",
        (
            _IMAGES,
            _PLATFORMS,
            Field("referrers", _YES, "Also signatures and SBOMs.", default=False),
        ),
    ),
    "refresh": ("Ask the upstream now which digest a tag has.", (_IMAGE,)),
    "forget": ("Forget what is known of an image, also remembered 404 responses.", (_IMAGE,)),
    "remove": (
        "Remove images, and the content that no other image needs. Of a hosted one: its name.",
        (
            _IMAGES,
            Field("force", _YES, "Hosted images of immutable tags, too.", default=False),
            _DRY_RUN,
        ),
    ),
    "gc": ("Remove content that nothing refers to, and left-over files.", (_DRY_RUN,)),
    "prune": (
        "Remove images by age.",
        (
            Field("match", _SEARCH_TEXT, "Shell-style pattern of image names.", default="*"),
            Field(
                "older_than",
                {"type": "integer", "minimum": 0, "maximum": 10**9},
                "Seconds since the last use.",
                is_required=True,
            ),
            Field(
                "keep_last",
                {"type": "integer", "minimum": 0, "maximum": 10**6},
                "Images of each repository that stay, the newest ones.",
                default=0,
            ),
            _DRY_RUN,
        ),
    ),
    "verify": (
        "Hash content, and check that images are complete.",
        (
            Field("image", IMAGE_TEXT, "Only this image. None: all content."),
            Field(
                "subset",
                {"type": "string", "pattern": "^[1-9][0-9]{0,3}/[1-9][0-9]{0,3}$"},
                "Part of the content, such as 1/7.",
            ),
            Field("repair", _YES, "Fetch damaged and missing content again.", default=False),
        ),
    ),
}
"""Kind of a job -> (summary, fields of its body)."""

OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        "access",
        "GET",
        f"{API_PREFIX}/access",
        "Whether a token is needed. The only operation that needs none itself.",
        "Access",
        is_public=True,
    ),
    _read("session", "/session", "Session", "The role of the token, and the quota."),
    _read(
        "list_images",
        "/images",
        "Images",
        "The cached and hosted images, by pages.",
        Field("search", _SEARCH_TEXT, "Part of the name.", default=""),
        Field("state", {"type": "string", "enum": STATES}, "A state that they have."),
        Field("sort", {"type": "string", "enum": IMAGE_SORT_KEYS}, "Order.", default="name"),
        Field("order", {"type": "string", "enum": ("asc", "desc")}, "Direction.", default="asc"),
        Field("offset", _OFFSET, "Images to skip.", default=0),
        Field("limit", _LIMIT, "Images of the page.", default=50),
    ),
    _read("show_image", "/images/show", "ImageTree", "One image with all its parts.", _IMAGE),
    _read("tag_history", "/images/history", "TagHistory", "Each digest of a tag.", _IMAGE),
    _read("usage", "/usage", "Usage", "What takes up the disk, and what eviction takes next."),
    _read("list_uploads", "/uploads", "Uploads", "Uploads in progress to hosted repositories."),
    Operation(
        "cancel_upload",
        "POST",
        f"{API_PREFIX}/uploads/{{id}}/cancel",
        "End an upload of any user. A request that feeds it cannot finish it any more.",
        "Changed",
        is_change=True,
    ),
    _read(
        "list_users",
        "/users",
        "Users",
        "The users of the server, and their last use, the latest one first.",
        Field("limit", _LIMIT, "Users of the page.", default=50),
    ),
    _read("live", "/live", "Live", "Pulls in flight, upstreams and storage, of all workers."),
    _read("upstreams", "/upstreams", "Upstreams", "The health of each upstream."),
    _read(
        "list_pulls",
        "/pulls",
        "Pulls",
        "The pulls that have ended, the newest one first.",
        Field("image", _SEARCH_TEXT, "Only of this image or repository.", default=""),
        Field("client", _SEARCH_TEXT, "Only of this address or network.", default=""),
        Field("outcome", {"type": "string", "enum": OUTCOMES}, "Only with this outcome."),
        Field("before", _ROW, "Only older ones than this row."),
        Field("limit", _LIMIT, "Pulls of the page.", default=50),
    ),
    _read("show_pull", "/pulls/{id}", "Timeline", "The timeline of one pull, explained."),
    _read(
        "list_refused",
        "/refused",
        "Pulls",
        "The requests that were refused or have failed, the newest one first.",
        Field("limit", _LIMIT, "Requests of the page.", default=50),
    ),
    _read(
        "savings",
        "/savings",
        "Savings",
        "Bytes and requests saved, with points for a plot.",
        Field("period", {"type": "string", "enum": PLOT_PERIODS}, "The last …", default="day"),
    ),
    _read("list_marks", "/marks", "Marks", "Pins, freezes, blocks, and the number of leases."),
    _change("pin", "/pin", "Changed", "Keep an image through every eviction.", _IMAGE),
    _change("unpin", "/unpin", "Changed", "Let an image be evicted again.", _IMAGE),
    _change(
        "freeze",
        "/freeze",
        "Changed",
        "Serve a tag as one digest. With an earlier digest, this is a rollback.",
        _IMAGE,
        Field("digest", IMAGE_TEXT, "The digest. None: the one that the tag has."),
    ),
    _change("unfreeze", "/unfreeze", "Changed", "Let a tag follow its upstream again.", _IMAGE),
    _change(
        "block",
        "/block",
        "Changed",
        "Refuse images from now on.",
        Field("target", IMAGE_TEXT, "Image, pattern of repositories, or digest.", is_required=True),
        Field(
            "reason",
            {"type": "string", "minLength": 1, "maxLength": 300},
            "Clients are told it.",
            is_required=True,
        ),
    ),
    _change(
        "unblock",
        "/unblock",
        "Changed",
        "Serve blocked images again.",
        Field("target", IMAGE_TEXT, "As it was blocked.", is_required=True),
    ),
    _read("list_jobs", "/jobs", "Jobs", "The jobs, the newest one first."),
    *(
        Operation(
            f"start_{kind}",
            "POST",
            f"{API_PREFIX}/jobs/{kind}",
            summary,
            "Job",
            body=fields,
            status=202,
            is_change=True,
        )
        for kind, (summary, fields) in JOBS.items()
    ),
    _read("show_job", "/jobs/{id}", "Job", "One job."),
    Operation(
        "cancel_job",
        "POST",
        f"{API_PREFIX}/jobs/{{id}}/cancel",
        "End a job as soon as it can.",
        "Job",
        is_change=True,
    ),
    Operation(
        "follow_job",
        "GET",
        f"{API_PREFIX}/jobs/{{id}}/events",
        "The job after each change, one JSON object a line, until it has ended.",
        "JobEvent",
        media_type="application/x-ndjson",
    ),
    Operation(
        "issue_ticket",
        "POST",
        f"{API_PREFIX}/events/ticket",
        "A ticket to open the event stream with, valid once.",
        "Ticket",
    ),
    Operation(
        "stream_events",
        "GET",
        f"{API_PREFIX}/events",
        "Server-sent events: live (the live state), jobs and marks (something has changed).",
        "Live",
        (Field("ticket", _SEARCH_TEXT, "In place of a token, which an EventSource cannot send."),),
        media_type="text/event-stream",
    ),
    _read("openapi", "/openapi.json", "OpenApi", "This document."),
)
