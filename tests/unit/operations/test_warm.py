"""Fetching images ahead: which content, what is fetched again, what fails."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from mirror.observability.events import Kind
from mirror.oci.descriptor import OCI_INDEX, OCI_MANIFEST, referrers_tag
from mirror.oci.platform import Platform
from mirror.oci.reference import Digest
from mirror.operations.warm import ContentProgress, ImageReport, WarmOptions, warm
from mirror.store import space
from tests.fakes.registry import FakeRegistry, Fault
from tests.server_kit import running
from tests.unit.operations.kit import add_index, add_referrer, image, on_disk, opened

ALL = WarmOptions()


async def warm_once(
    root: Path,
    registry: FakeRegistry,
    *names: str,
    options: WarmOptions = ALL,
    seen: list[ContentProgress | ImageReport] | None = None,
    **more: object,
) -> list[ImageReport]:
    async with opened(root, registry, more=more) as mirror:
        report = (seen if seen is not None else []).append
        return await warm(mirror, [image(name) for name in names], options, report)


async def test_all_content_of_an_image_is_on_disk_afterwards(tmp_path: Path) -> None:
    seen: list[ContentProgress | ImageReport] = []
    async with FakeRegistry() as registry:
        layer = b"x" * 3_000_000
        digest = registry.add_image(layer, b"second", tag="v1")
        (report,) = await warm_once(tmp_path, registry, "app:v1", seen=seen)
        expected = {str(digest), *(key for _, key in registry.blobs)}

    assert on_disk(tmp_path) == expected
    assert (report.digest, report.error, report.contents, report.added) == (digest, "", 4, 4)
    assert report.bytes == report.added_bytes > len(layer)
    assert seen[-1] is report
    moves = [one for one in seen if isinstance(one, ContentProgress)]
    positions = [one.position for one in moves if one.digest == Digest.of(layer)]
    assert positions == sorted(positions)
    assert positions[-1] == len(layer)
    assert {one.state for one in moves} == {"fetching", "stored"}


async def test_content_on_disk_is_not_fetched_again(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"one", b"two", tag="v1")
        await warm_once(tmp_path, registry, "app:v1")
        before = len(registry.requests)
        seen: list[ContentProgress | ImageReport] = []
        (report,) = await warm_once(tmp_path, registry, "app:v1", seen=seen)

        assert len(registry.requests) == before
    assert (report.error, report.contents, report.added, report.added_bytes) == ("", 4, 0, 0)
    assert {one.state for one in seen if isinstance(one, ContentProgress)} == {"here"}


async def test_chosen_platform_leaves_out_the_others_and_keeps_the_index(tmp_path: Path) -> None:
    options = WarmOptions(platforms=frozenset({Platform("linux", "arm64")}))
    async with FakeRegistry() as registry:
        digests = add_index(registry, "linux/amd64", "linux/arm64")
        (report,) = await warm_once(tmp_path, registry, "app:v1", options=options)

        assert report.error == ""
        assert registry.count("GET", str(digests["linux/amd64"])) == 0
        assert registry.count("GET", str(Digest.of(b"layer of linux/amd64"))) == 0
        body, _ = registry.manifests["library/app", str(digests[""])]
    assert str(digests[""]) in on_disk(tmp_path)
    stored = (tmp_path / "blobs" / "sha256" / digests[""].hex).read_bytes()
    assert stored == body
    assert str(Digest.of(b"layer of linux/arm64")) in on_disk(tmp_path)


async def test_all_platforms_share_their_layers(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        add_index(registry, "linux/amd64", "linux/arm64")
        (report,) = await warm_once(tmp_path, registry, "app:v1")

        assert registry.count("GET", str(Digest.of(b"shared layer"))) == 1
    # The index, two manifests, the shared config and layer, and two layers.
    assert (report.contents, report.added, report.error) == (7, 7, "")


async def test_missing_platform_is_named_and_fails_only_if_none_is_there(tmp_path: Path) -> None:
    amd64, s390x = Platform("linux", "amd64"), Platform("linux", "s390x")
    both = WarmOptions(platforms=frozenset({amd64, s390x}))
    only = WarmOptions(platforms=frozenset({s390x}))
    async with FakeRegistry() as registry:
        add_index(registry, "linux/amd64", "linux/arm64")
        (some,) = await warm_once(tmp_path, registry, "app:v1", options=both)
        (none,) = await warm_once(tmp_path, registry, "app:v1", options=only)

    assert (some.error, some.missing_platforms) == ("", (s390x,))
    assert none.error == "has no linux/s390x: it has linux/amd64, linux/arm64"


async def test_image_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"one", tag="v1")
        names = ("app:missing", "quay.io/o/app:v1", "app:v1", "ghcr.io/library/app:v1")
        reports = await warm_once(tmp_path, registry, *names)

    assert [report.is_complete for report in reports] == [False, False, True, True]
    assert "not one of upstreams" in reports[1].error
    assert reports[0].digest is None
    # The second upstream has the same content: it is on disk once.
    assert reports[2].added + reports[3].added == 3


async def test_layer_that_fails_is_named_and_the_others_are_stored(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"good", b"bad", tag="v1")
        bad = Digest.of(b"bad")
        del registry.blobs["library/app", str(bad)]
        (report,) = await warm_once(tmp_path, registry, "app:v1")

    assert report.error.startswith(f"blob {bad}: ")
    assert str(Digest.of(b"good")) in on_disk(tmp_path)
    assert report.contents == 3


async def test_foreign_layer_that_the_registry_lacks_is_no_failure(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        config = registry.add_blob(b"{}")
        foreign = Digest.of(b"elsewhere")
        layer = {"digest": str(foreign), "size": 9, "urls": ["https://x.example/l"]}
        parts = {"config": {"digest": str(config), "size": 2}, "layers": [layer]}
        body = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, **parts}).encode()
        registry.add_manifest(body, tag="v1")
        seen: list[ContentProgress | ImageReport] = []
        (report,) = await warm_once(tmp_path, registry, "app:v1", seen=seen)

    assert report.error == ""
    states = {one.digest: one.state for one in seen if isinstance(one, ContentProgress)}
    assert states[foreign] == "missing"


async def test_damaged_content_is_fetched_again(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"x" * 5_000_000, tag="v1")
        await warm_once(tmp_path, registry, "app:v1")
        digest = Digest.of(b"x" * 5_000_000)
        path = tmp_path / "blobs" / "sha256" / digest.hex
        path.write_bytes(b"y" + b"x" * 4_999_999)
        (report,) = await warm_once(tmp_path, registry, "app:v1")

    assert (report.error, report.added) == ("", 1)
    assert Digest.of(path.read_bytes()) == digest


async def test_stale_tag_counts_as_failed_though_its_content_is_here(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"one", tag="v1")
        times = [1000.0]
        async with opened(tmp_path, registry, clock=lambda: times[0]) as mirror:
            await warm(mirror, [image("app:v1")], ALL, lambda event: None)
            times[0] += 3600
            await registry.stop()
            (report,) = await warm(mirror, [image("app:v1")], ALL, lambda event: None)

    assert "could not be asked" in report.error
    assert report.contents == 3


async def test_content_that_does_not_fit_on_the_disk_is_a_failure(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"x" * 300_000, tag="v1")
        more = {"storage": {"max_size": "100KB"}}
        (report,) = await warm_once(tmp_path, registry, "app:v1", **more)

    assert "not on the disk" in report.error


async def test_disk_that_another_program_fills_is_not_called_a_small_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"x" * 300_000, tag="v1")
        monkeypatch.setattr(space, "free_bytes", lambda path: 10_000)
        (report,) = await warm_once(tmp_path, registry, "app:v1")

    assert "the disk is full: free space on it" in report.error
    assert "max_size" not in report.error


async def test_running_fetches_are_bounded_over_all_images(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        for number in range(4):
            layers = [f"{number} {layer}".encode() * 10_000 for layer in range(6)]
            registry.add_image(*layers, repository=f"library/app{number}", tag="v1")
        registry.max_transfers, registry.blob_rate = 2, 5_000_000
        names = [f"app{number}:v1" for number in range(4)]
        options = WarmOptions(jobs=2)
        reports = await warm_once(tmp_path, registry, *names, options=options)

        assert registry.most_transfers == 2
    assert [report.error for report in reports] == [""] * 4


async def test_cancelled_run_ends_and_the_next_one_resumes(tmp_path: Path) -> None:
    layer, stall_at = b"z" * 2_000_000, 1_000_000
    async with FakeRegistry() as registry:
        registry.add_image(layer, tag="v1")
        digest = Digest.of(layer)
        registry.fault(f"blobs/{digest}", Fault(stall_at=stall_at))
        has_bytes = asyncio.Event()

        def report_progress(event: ContentProgress | ImageReport) -> None:
            if isinstance(event, ContentProgress) and event.position == stall_at:
                has_bytes.set()

        async with opened(tmp_path, registry, more={"abandoned": "cancel"}) as mirror:
            run = asyncio.get_running_loop().create_task(
                warm(mirror, [image("app:v1")], ALL, report_progress)
            )
            await has_bytes.wait()
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
        (report,) = await warm_once(tmp_path, registry, "app:v1")

        ranges = [
            seen.headers.get("range")
            for seen in registry.requests
            if seen.method == "GET" and str(digest) in seen.path
        ]
    assert report.error == ""
    assert ranges[0] is None
    assert ranges[1] is not None
    assert str(digest) in on_disk(tmp_path)


async def test_content_that_a_server_is_fetching_is_not_fetched_a_second_time(
    tmp_path: Path,
) -> None:
    layer, gate = b"s" * 2_000_000, asyncio.Event()
    async with FakeRegistry() as registry:
        registry.add_image(layer, tag="v1")
        digest = Digest.of(layer)
        registry.fault(f"blobs/{digest}", Fault(stall_at=1_000_000, gate=gate))
        async with running(tmp_path, registry.url) as server:
            await server.get(server.manifest("v1"))
            client = asyncio.get_running_loop().create_task(server.get(server.blob(digest)))
            await registry.stalled.wait()

            def open_gate(event: ContentProgress | ImageReport) -> None:
                if isinstance(event, ContentProgress) and event.state == "fetching":
                    gate.set()

            async with opened(tmp_path, registry) as mirror:
                (report,) = await warm(mirror, [image("app:v1")], ALL, open_gate)
            status, _, body = await client

        assert registry.count("GET", str(digest)) == 1
    assert (report.error, status, body == layer) == ("", 200, True)


# --- referrers ------------------------------------------------------------------------------------


async def test_referrers_of_all_three_channels_are_fetched(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        digests = add_index(registry, "linux/amd64", "linux/arm64")
        child = digests["linux/amd64"]
        by_api = add_referrer(registry, b"by the referrers API")
        listed = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [by_api]}
        registry.referring[str(child)] = json.dumps(listed).encode()
        by_tag = add_referrer(registry, b"by the fallback tag")
        fallback = json.dumps({**listed, "manifests": [by_tag]}).encode()
        tag = referrers_tag(digests[""])
        registry.add_manifest(fallback, tag=tag, media_type=OCI_INDEX)
        for suffix in ("sig", "att", "sbom"):
            add_referrer(registry, suffix.encode(), tag=f"{tag}.{suffix}")
        options = WarmOptions(platforms=frozenset({Platform("linux", "amd64")}), has_referrers=True)
        (report,) = await warm_once(tmp_path, registry, "app:v1", options=options)

    assert (report.error, report.referrers) == ("", 5)
    texts = (b"by the referrers API", b"by the fallback tag", b"sig", b"att", b"sbom")
    assert {str(Digest.of(text)) for text in texts} <= on_disk(tmp_path)
    assert str(Digest.of(fallback)) in on_disk(tmp_path)


async def test_registry_without_referrers_api_is_asked_by_tags(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.referrers_api = False
        digest = registry.add_image(b"one", tag="v1")
        add_referrer(registry, b"signature", tag=f"{referrers_tag(digest)}.sig")
        options = WarmOptions(has_referrers=True)
        (report,) = await warm_once(tmp_path, registry, "app:v1", options=options)

    assert (report.error, report.referrers) == ("", 1)
    assert str(Digest.of(b"signature")) in on_disk(tmp_path)


async def test_without_referrers_none_is_asked_for(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"one", tag="v1")
        await warm_once(tmp_path, registry, "app:v1")

        assert registry.count("GET", "referrers") == 0
        assert registry.count("HEAD", "sha256-") == 0


async def test_referrers_that_cannot_be_asked_for_are_a_failure(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        digest = registry.add_image(b"one", tag="v1")
        registry.fault(f"referrers/{digest}", Fault(status=503, times=None))
        options = WarmOptions(has_referrers=True)
        (report,) = await warm_once(tmp_path, registry, "app:v1", options=options)

    assert report.error.startswith(f"referrers of {digest}: ")
    assert report.contents == 3


async def test_progress_has_the_kind_of_each_content(tmp_path: Path) -> None:
    seen: list[ContentProgress | ImageReport] = []
    async with FakeRegistry() as registry:
        digest = registry.add_image(b"one", tag="v1")
        await warm_once(tmp_path, registry, f"app@{digest}", seen=seen)

    kinds = {one.digest: one.kind for one in seen if isinstance(one, ContentProgress)}
    assert kinds[digest] is Kind.MANIFEST
    assert kinds[Digest.of(b"one")] is Kind.BLOB
