"""Aside requests and the endpoint: tags of its nodes, and the pause that it has asked for."""

from __future__ import annotations

from pathlib import Path

from mirror.oci.errors import UpstreamProtocolError
from mirror.pull.aside import AsideReader
from tests.unit.pull.test_aside import DATA, TAIL, lazy_pull, range_of


async def test_range_is_requested_without_the_tag_of_the_fetch(tmp_path: Path) -> None:
    """Nodes of a storage have different tags. The digest names the content."""
    async with lazy_pull(tmp_path) as lazy:
        lazy.registry.refused_validator = UpstreamProtocolError("ignores Range")
        data, pull = await lazy.read(range_of(TAIL))
        assert (data, pull.is_unverified) == (DATA[-51:], True)
        assert lazy.ended == [("ok", 51)]


async def test_endpoint_that_has_asked_for_a_pause_gets_no_request_for_a_range(
    tmp_path: Path,
) -> None:
    async with lazy_pull(tmp_path) as lazy:
        first, _ = await lazy.open(range_of(TAIL))
        assert isinstance(first, AsideReader)
        connections = lazy.kit.content.fetches.connections
        connections.on_refused("memory", 600.0)
        second, pull = await lazy.open("bytes=-100")
        assert not isinstance(second, AsideReader)
        assert not pull.is_unverified
        for reader in (first, second):
            reader.close()
