"""Shared by the tests of request paths: three upstreams, and a parser for them."""

from __future__ import annotations

from mirror.oci.reference import UPSTREAM_ALIASES, Digest
from mirror.web.paths import Request, parse

UPSTREAMS = {name: name for name in ("docker.io", "ghcr.io", "reg:5000")}
DIGEST = Digest.of(b"x")


def parse_path(path: str, query: str = "", method: str = "GET") -> Request:
    """Parse a request, with docker.io as the default upstream."""
    names = {**UPSTREAM_ALIASES, **UPSTREAMS}
    return parse(method, path, query, upstreams=names, default="docker.io")
