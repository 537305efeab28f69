"""One ingest: its fetch, its followers, wrong content, resumes and failed publishing."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from mirror.observability.events import Published
from mirror.oci.errors import DigestMismatch, UpstreamProtocolError, UpstreamUnavailable
from mirror.oci.reference import Digest
from mirror.store.ingest import Ingest
from mirror.store.ingest_lock import Role
from tests.unit.store.kit import DATA, DIGEST, bring, kit, pieces, random_bytes, read


async def test_all_followers_get_all_bytes_and_the_content_is_published(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        followers = [content.follow() for _ in range(8)]
        results = await asyncio.gather(
            bring(content), *(read(follower) for follower in followers if follower)
        )
        assert all(result == DATA for result in results[1:])
        assert parts.layout.blob(DIGEST).read_bytes() == DATA
        assert not list((tmp_path / "ingest" / "sha256").iterdir())
        assert [event for event in parts.events if isinstance(event, Published)]
        for follower in followers:
            assert follower
            follower.close()


async def test_follower_reads_bytes_before_the_rest_has_arrived(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        follower = content.follow()
        assert follower
        await content.try_lead()
        await content.declare(len(DATA))
        await content.feed(DATA[:1000])
        assert await read(follower, 0, 1000) == DATA[:1000]
        assert follower.size == len(DATA)
        await content.feed(DATA[1000:])
        await content.finish()
        assert await read(follower, 1000) == DATA[1000:]
        content.release()
        follower.close()


@pytest.mark.parametrize("size", [len(DATA), None])
async def test_wrong_content_is_never_readable_to_its_end_and_not_published(
    tmp_path: Path, size: int | None
) -> None:
    wrong = DATA[:-1] + bytes([DATA[-1] ^ 1])
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        follower = content.follow()
        assert follower
        await content.try_lead()
        await content.declare(size)
        for piece in pieces(wrong):
            await content.feed(piece)
        with pytest.raises(DigestMismatch) as caught:
            await content.finish()
        assert content.head < len(DATA)
        await content.fail(caught.value)
        with pytest.raises(DigestMismatch):
            await follower.wait(0)
        content.release()
        follower.close()
        assert not parts.layout.blob(DIGEST).exists()
        assert not parts.layout.ingest(DIGEST).exists()


@pytest.mark.parametrize("data", [b"", b"x", random_bytes(65_536), random_bytes(65_537)])
@pytest.mark.parametrize("declared", [True, False])
async def test_content_of_every_length_is_read_and_published(
    tmp_path: Path, data: bytes, declared: bool
) -> None:
    digest = Digest.of(data, "sha512")
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, digest, None)
        follower = content.follow()
        assert follower
        _, got = await asyncio.gather(
            bring(content, data, len(data) if declared else None), read(follower)
        )
        assert got == data
        assert parts.layout.blob(digest).read_bytes() == data
        follower.close()


async def test_failed_fetch_is_resumed_after_its_last_byte(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        first = Ingest(parts.ingest_context, DIGEST, None)
        await first.try_lead()
        await first.declare(len(DATA))
        await first.feed(DATA[:1_000_000])
        await first.fail(UpstreamUnavailable("gone"))
        first.release()
        second = Ingest(parts.ingest_context, DIGEST, None)
        assert await second.try_lead() is Role.LEADER
        assert second.position == 1_000_000
        follower = second.follow()
        assert follower
        _, got = await asyncio.gather(bring(second), read(follower))
        assert got == DATA
        follower.close()


@pytest.mark.row("C8-bytes-after-an-ingest")
@pytest.mark.parametrize("garbage", [b"\0" * 4096, random_bytes(4096, 9), b"\0" * 5_000_000])
async def test_garbage_appended_to_an_ingest_file_is_cut_before_a_resume(
    tmp_path: Path, garbage: bytes
) -> None:
    with kit(tmp_path) as parts:
        first = Ingest(parts.ingest_context, DIGEST, None)
        await first.try_lead()
        await first.declare(len(DATA))
        await first.feed(DATA[:1_000_000])
        await first.fail(UpstreamUnavailable("gone"))
        first.release()
        with parts.layout.ingest(DIGEST).open("ab") as file:
            file.write(garbage)
        second = Ingest(parts.ingest_context, DIGEST, None)
        await bring(second)
        assert parts.layout.blob(DIGEST).read_bytes() == DATA


async def test_more_bytes_than_the_declared_size_are_a_protocol_error(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        await content.try_lead()
        await content.declare(10)
        with pytest.raises(UpstreamProtocolError):
            await content.feed(b"x" * 11)
        content.release()


async def test_size_that_contradicts_arrived_bytes_is_a_protocol_error(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        await content.try_lead()
        await content.declare(9)
        await content.declare(10)  # no byte has arrived, so another size is accepted
        await content.feed(b"x")
        for size in (9, 11):
            with pytest.raises(UpstreamProtocolError):
                await content.declare(size)
        content.release()


@pytest.mark.row("D4-io-error-at-a-call")
@pytest.mark.parametrize("call", ["fsync", "rename", "utime"])
async def test_failed_publish_is_not_retried_and_leaves_no_file(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def broken(*arguments: object, **named: object) -> None:
        calls.append(arguments)
        raise OSError(errno.EIO, "broken")

    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        follower = content.follow()
        assert follower
        with monkeypatch.context() as patch:
            target = Path if call == "rename" else os
            patch.setattr(target, call, broken)
            _, got = await asyncio.gather(bring(content), read(follower))
        assert got == DATA
        assert len(calls) == 1, "a call that failed once must not be tried again"
        assert not parts.layout.blob(DIGEST).exists()
        assert not parts.layout.ingest(DIGEST).exists()
        follower.close()


@pytest.mark.row("L5-range-far-ahead")
async def test_follower_of_a_range_far_ahead_is_woken_once(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        ahead = content.follow(2_900_000)
        assert ahead
        waits = 0
        real = content.waiters.wait

        async def counted(start: int) -> None:
            nonlocal waits
            waits += 1
            await real(start)

        content.waiters.wait = counted  # type: ignore[method-assign] # counts the wake-ups
        _, got = await asyncio.gather(bring(content), read(ahead, 2_900_000, 2_900_100))
        assert got == DATA[2_900_000:2_900_100]
        assert waits == 1
        ahead.close()


async def test_cancelled_reader_does_not_disturb_the_others(tmp_path: Path) -> None:
    with kit(tmp_path) as parts:
        content = Ingest(parts.ingest_context, DIGEST, None)
        followers = [content.follow() for _ in range(10)]
        readers = [asyncio.ensure_future(read(f)) for f in followers if f]  # noqa: TID251 - a test
        await asyncio.sleep(0)
        for reader in readers[::3]:
            reader.cancel()
        await bring(content)
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert [r == DATA for r in results] == [i % 3 != 0 for i in range(10)]
        for follower in followers:
            assert follower
            follower.close()
