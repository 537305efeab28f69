"""What the tests of request paths share: three upstreams, and how a path is read there."""

from __future__ import annotations

from mirror.oci.reference import Digest
from mirror.web.paths import Request, parse

UPSTREAMS = {"docker.io", "ghcr.io", "reg:5000"}
DIGEST = Digest.of(b"x")


def read(path: str, query: str = "", method: str = "GET") -> Request:
    """What a request is about, where docker.io is the default."""
    return parse(method, path, query, upstreams=UPSTREAMS, default="docker.io")
