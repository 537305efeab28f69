"""The uploads to hosted repositories, ended through the API.

Lives here: whether anything is hosted, and the JSON of an answer. Must not know: how an upload ends
(:mod:`mirror.hosted.sessions`).
"""

from __future__ import annotations

from mirror.admin.json_values import JsonObject
from mirror.composition import Mirror
from mirror.oci.errors import NotFound, UploadUnknown
from mirror.oci.text import size_text


class HostedUploads:
    """:class:`mirror.admin.sources.Uploads`, of a mirror that hosts repositories, or not."""

    def __init__(self, mirror: Mirror) -> None:
        """End the uploads of ``mirror``."""
        self._mirror = mirror

    async def end(self, upload_id: str) -> JsonObject:
        """End an upload of any user. Raises ``NotFound``."""
        hosted = self._mirror.hosted
        if hosted is None:
            raise NotFound("nothing is hosted: the configuration has no hosted")
        try:
            size = await hosted.uploads.end(upload_id)
        except UploadUnknown:
            raise NotFound("there is no such upload in progress: GET /uploads lists them") from None
        return {
            "text": f"cancelled the upload {upload_id}, which had {size_text(size)}",
            "notes": [],
        }
