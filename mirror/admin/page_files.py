"""The files of the page.

Lives here: which there are, their types, and the policy that a browser applies to them. They are
read once, at the start. Must not know: what is in them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Final

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Content security policy of the page: only our own files, and no text ever becomes markup."""
_PAGE_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file of the page."""

    body: bytes
    content_type: str
    etag: str
    policy: str = POLICY


class PageFiles:
    """The files, by the path of their request: ``/`` and ``/page/<name>``."""

    def __init__(self) -> None:
        """Read the files, which are installed with the package."""
        self._files: dict[str, PageFile] = {}
        for entry in resources.files("mirror.admin").joinpath("page").iterdir():
            suffix = entry.name[entry.name.rfind(".") :]
            if suffix not in _PAGE_TYPES:
                continue
            body = entry.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
            path = "/" if entry.name == "index.html" else f"/page/{entry.name}"
            self._files[path] = PageFile(body, _PAGE_TYPES[suffix], etag)

    def find(self, path: str) -> PageFile | None:
        """Return the file of a path. None: there is none."""
        return self._files.get(path)
