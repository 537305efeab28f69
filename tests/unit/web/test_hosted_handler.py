"""The push listener, over real sockets: each step of the specification's conformance tests."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from mirror.hosted import manifest_memory
from mirror.hosted.manifest_memory import ManifestMemory
from mirror.observability.events import Outcome
from mirror.oci.descriptor import MANIFEST_LIMIT, OCI_INDEX, OCI_MANIFEST
from mirror.oci.links import next_link
from mirror.oci.reference import Digest
from mirror.web import hosted_handler
from mirror.web.hosted_handler import HostedHandler
from tests.server_kit import Server, running
from tests.unit.hosted.kit import (
    CONFIG,
    CONFIG_DIGEST,
    PushClient,
    Reply,
    descriptor,
    index_of,
    manifest_of,
)
from tests.unit.store.kit import random_bytes
from tests.waiting import until

DATA = random_bytes(3067, 5)
DIGEST = Digest.of(DATA)
ALGORITHMS = ("sha256", "sha512")


@asynccontextmanager
async def hosting(root: Path, **more: Any) -> AsyncIterator[tuple[Server, PushClient]]:
    async with running(root, hosted=more.pop("hosted", {}), **more) as server:
        yield server, PushClient(server)


async def test_push_with_the_path_prefix_of_the_mirror_is_refused_with_a_hint(
    tmp_path: Path,
) -> None:
    async with hosting(tmp_path, hosted={"name": "registry.example:5101"}) as (server, _):
        for prefix in ("registry.example_5101", "registry.example_5101/team"):
            client = PushClient(server, f"{prefix}/app")
            put = await client.put_manifest(manifest_of(), "v1")
            for refused in (await client.start(), put):
                (error,) = json.loads(refused.body)["errors"]
                assert (refused.status, error["code"]) == (400, "NAME_INVALID")
                assert "leave out registry.example_5101" in error["message"]
        client = PushClient(server, "team/registry.example_5101")
        assert (await client.start()).status == 202


# --- blobs: each way to push ----------------------------------------------------------------------


async def test_blob_is_pushed_by_post_alone(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        for algorithm in ALGORITHMS:
            digest = Digest.of(DATA, algorithm)
            done = await client.start(f"?digest={digest}", DATA)
            assert (done.status, done.headers["Docker-Content-Digest"]) == (201, str(digest))
            assert done.location == f"/v2/team/app/blobs/{digest}"
            assert (await client.ask("GET", done.location)).body == DATA


async def test_blob_is_pushed_by_post_and_put_which_names_the_algorithm(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        for algorithm in ALGORITHMS:
            digest = Digest.of(DATA, algorithm)
            begun = await client.start()
            assert (begun.status, begun.headers["Range"]) == (202, "0-0")
            assert begun.location.startswith("/v2/team/app/blobs/uploads/")
            assert "?" not in begun.location, "clients append their own query"
            done = await client.ask("PUT", f"{begun.location}?digest={digest}", DATA)
            assert (done.status, done.location) == (201, f"/v2/team/app/blobs/{digest}")
            assert (await client.ask("GET", done.location)).body == DATA
            assert (await client.ask("GET", begun.location)).status == 404


async def test_blob_is_streamed_without_content_range(tmp_path: Path) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(DATA), 1000):
            yield DATA[start : start + 1000]

    async with hosting(tmp_path) as (_, client):
        for algorithm, query in product(ALGORITHMS, ("", "?digest-algorithm=sha512")):
            begun = await client.start(query)
            sent = await client.ask("PATCH", begun.location, chunks())
            assert (sent.status, sent.headers["Range"]) == (202, f"0-{len(DATA) - 1}")
            digest = Digest.of(DATA, algorithm)
            done = await client.ask("PUT", f"{sent.location}?digest={digest}")
            assert done.status == 201
            assert (await client.ask("GET", done.location)).body == DATA


async def push_in_chunks(client: PushClient, digest: Digest, *, is_last_in_put: bool) -> Reply:
    """Push ``DATA`` in chunks of odd lengths."""
    begun = await client.start()
    assert "OCI-Chunk-Min-Length" not in begun.headers
    location = begun.location
    ends = [1, 1024, 2048, len(DATA)]
    for start, end in zip([0, *ends], ends, strict=False):
        method, query = "PATCH", ""
        if is_last_in_put and end == len(DATA):
            method, query = "PUT", f"?digest={digest}"
        sent = await client.ask(
            method, location + query, DATA[start:end], {"Content-Range": f"{start}-{end - 1}"}
        )
        assert sent.status == (201 if query else 202)
        location = sent.location
        if not query:
            assert sent.headers["Range"] == f"0-{end - 1}"
    if not is_last_in_put:
        sent = await client.ask("PUT", f"{location}?digest={digest}")
    return sent


async def test_blob_is_pushed_in_chunks_of_any_length(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        for algorithm, is_last_in_put in product(ALGORITHMS, (False, True)):
            digest = Digest.of(DATA, algorithm)
            done = await push_in_chunks(client, digest, is_last_in_put=is_last_in_put)
            assert done.status == 201
            assert (await client.ask("GET", done.location)).body == DATA


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_chunk_out_of_order_is_416_and_the_upload_goes_on(
    tmp_path: Path, method: str
) -> None:
    async with hosting(tmp_path) as (_, client):
        location = (await client.start()).location
        first = await client.ask("PATCH", location, DATA[:1000], {"Content-Range": "0-999"})
        for start in (0, 999, 1001, 2000):
            query = f"?digest={DIGEST}" if method == "PUT" else ""
            refused = await client.ask(
                method,
                first.location + query,
                DATA[start : start + 500],
                {"Content-Range": f"{start}-{start + 499}"},
            )
            assert (refused.status, refused.code) == (416, "BLOB_UPLOAD_INVALID")
            assert (refused.headers["Range"], refused.location) == ("0-999", location)
        told = await client.ask("GET", location)
        assert (told.status, told.headers["Range"]) == (204, "0-999")
        done = await client.ask(
            "PUT",
            f"{told.location}?digest={DIGEST}",
            DATA[1000:],
            {"Content-Range": f"1000-{len(DATA) - 1}"},
        )
        assert done.status == 201


async def test_wrong_digest_is_400_and_ends_the_upload(tmp_path: Path) -> None:
    wrong = DATA + b"oh no"
    async with hosting(tmp_path) as (server, client):
        for algorithm, way in product(ALGORITHMS, ("post", "put", "patch", "chunks")):
            digest = Digest.of(DATA, algorithm)
            if way == "post":
                refused = await client.start(f"?digest={digest}", wrong)
            else:
                location = (await client.start()).location
                body = wrong if way == "put" else None
                if way == "patch":
                    await client.ask("PATCH", location, wrong)
                if way == "chunks":
                    await client.ask("PATCH", location, wrong[:9], {"Content-Range": "0-8"})
                    body = wrong[9:]
                refused = await client.ask("PUT", f"{location}?digest={digest}", body)
                assert (await client.ask("GET", location)).status == 404
            assert (refused.status, refused.code) == (400, "DIGEST_INVALID")
            assert (await client.ask("GET", f"{client.base}/blobs/{digest}")).status == 404
            assert list(server.store.layout.uploads.iterdir()) == []


async def test_empty_and_tiny_blobs_are_pushed(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        for algorithm, data in product(ALGORITHMS, (b"", b"{}")):
            digest = await client.push(data, algorithm)
            got = await client.ask("HEAD", f"{client.base}/blobs/{digest}")
            assert (got.status, got.headers["Content-Length"]) == (200, str(len(data)))
            assert (await client.ask("GET", f"{client.base}/blobs/{digest}")).body == data


async def test_cancelled_upload_is_204_and_then_unknown(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        location = (await client.start()).location
        await client.ask("PATCH", location, DATA)
        assert (await client.ask("DELETE", location)).status == 204
        for method in ("GET", "PATCH", "DELETE"):
            gone = await client.ask(method, location)
            assert (gone.status, gone.code if method != "HEAD" else "") == (
                404,
                "BLOB_UPLOAD_UNKNOWN",
            )
        gone = await client.ask("PUT", f"{location}?digest={DIGEST}")
        assert gone.code == "BLOB_UPLOAD_UNKNOWN"


async def test_pushed_blob_is_served_by_ranges(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        path = f"{client.base}/blobs/{await client.push(DATA)}"
        for wanted, expected in (
            ("500-1499", DATA[500:1500]),
            ("500-", DATA[500:]),
            ("-500", DATA[-500:]),
            ("3000-5000", DATA[3000:]),
        ):
            got = await client.ask("GET", path, None, {"Range": f"bytes={wanted}"})
            assert (got.status, got.body) == (206, expected)
        for wanted in ("500-0", "5000-10000"):
            got = await client.ask("GET", path, None, {"Range": f"bytes={wanted}"})
            assert got.status == 416


# --- mounts ---------------------------------------------------------------------------------------


async def test_blob_is_mounted_from_a_repository_that_has_it(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (server, client):
        other = PushClient(server, "other")
        digest = await other.push(DATA)
        done = await client.start(f"?mount={digest}&from=other")
        assert (done.status, done.location) == (201, f"{client.base}/blobs/{digest}")
        assert (await other.ask("DELETE", f"{other.base}/blobs/{digest}")).status == 202
        assert (await client.ask("GET", done.location)).body == DATA


async def test_what_cannot_be_mounted_begins_an_upload(tmp_path: Path) -> None:
    """Without a source too: the answer would tell what others have."""
    async with hosting(tmp_path) as (server, client):
        missing = Digest.of(b"missing")
        digest = await PushClient(server, "other").push(DATA)
        for query in (
            f"?mount={missing}&from=other",
            *(f"?mount={digest}{source}" for source in ("", "&from=", "&from=nothing")),
            *(f"?mount={digest}&from={source}" for source in ("../x", "%2e%2e%2fother")),
        ):
            begun = await client.start(query)
            assert (begun.status, "/blobs/uploads/" in begun.location) == (202, True)
        done = await client.ask("PUT", f"{begun.location}?digest={digest}", DATA)
        assert done.status == 201


async def test_content_of_a_mirrored_repository_cannot_be_mounted(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (server, client):
        path = server.store.layout.blob(DIGEST)
        path.write_bytes(DATA)
        for source in ("library/app", "docker.io/library/app"):
            assert (await client.start(f"?mount={DIGEST}&from={source}")).status == 202
        assert (await client.ask("GET", f"{client.base}/blobs/{DIGEST}")).status == 404


# --- manifests ------------------------------------------------------------------------------------


async def test_image_is_pushed_by_tag_and_pulled_byte_for_byte(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        done = await client.push_image(DATA)
        body = manifest_of(DATA)
        digest = str(Digest.of(body))
        assert (done.status, done.location) == (201, f"{client.base}/manifests/{digest}")
        assert done.headers["Docker-Content-Digest"] == digest
        for reference in ("v1", digest):
            for method in ("HEAD", "GET"):
                got = await client.ask(method, f"{client.base}/manifests/{reference}")
                assert (got.status, got.headers["Content-Type"]) == (200, OCI_MANIFEST)
                assert got.headers["Docker-Content-Digest"] == digest
                assert got.headers["Content-Length"] == str(len(body))
                assert got.body == (body if method == "GET" else b"")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_manifest_is_pushed_by_digest_with_tags(tmp_path: Path, algorithm: str) -> None:
    async with hosting(tmp_path) as (_, client):
        await client.push(CONFIG)
        body = manifest_of()
        digest = Digest.of(body, algorithm)
        tags = [f"t{number}" for number in range(12)]
        query = "&".join(f"tag={tag}" for tag in tags)
        done = await client.put_manifest(body, f"{digest}?{query}")
        assert done.status == 201
        assert done.headers["OCI-Tag"].split(", ") == tags
        for reference in (str(digest), *tags):
            got = await client.ask("GET", f"{client.base}/manifests/{reference}")
            assert (got.body, got.headers["Docker-Content-Digest"]) == (body, str(digest))


async def test_index_and_nested_index_are_pushed(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        await client.push_image(DATA, reference="child")
        index = index_of(manifest_of(DATA))
        assert (await client.put_manifest(index, "index", OCI_INDEX)).status == 201
        entry = descriptor(index, OCI_INDEX)
        nested = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]})
        assert (await client.put_manifest(nested.encode(), "nested", OCI_INDEX)).status == 201
        assert (await client.put_manifest(index_of(), "empty", OCI_INDEX)).status == 201


async def test_largest_manifest_is_accepted_and_a_larger_one_is_413(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        await client.push(CONFIG)
        body = manifest_of(annotations={"a": ""})
        body = manifest_of(annotations={"a": "x" * (MANIFEST_LIMIT - len(body))})
        assert len(body) == MANIFEST_LIMIT
        assert (await client.put_manifest(body, "large")).status == 201
        assert (await client.ask("GET", f"{client.base}/manifests/large")).body == body
        refused = await client.put_manifest(body + b" ", "larger")
        assert (refused.status, refused.code) == (413, "SIZE_INVALID")


async def test_missing_parts_are_refused_by_name_and_a_missing_subject_is_not(
    tmp_path: Path,
) -> None:
    async with hosting(tmp_path) as (_, client):
        refused = await client.put_manifest(manifest_of(DATA), "v1")
        assert (refused.status, refused.code) == (400, "MANIFEST_BLOB_UNKNOWN")
        detail = json.loads(refused.body)["errors"][0]["detail"]
        assert str(CONFIG_DIGEST) in detail
        assert str(DIGEST) in detail
        index = await client.put_manifest(index_of(manifest_of(DATA)), "index", OCI_INDEX)
        assert index.code == "MANIFEST_BLOB_UNKNOWN"
        await client.push(CONFIG)
        subject = descriptor(b"nowhere", OCI_MANIFEST)
        accepted = await client.put_manifest(manifest_of(subject=subject), "v1")
        assert (accepted.status, accepted.headers["OCI-Subject"]) == (201, subject["digest"])


async def test_sparse_index_is_accepted_by_a_key(tmp_path: Path) -> None:
    async with hosting(tmp_path, hosted={"sparse_indexes": True}) as (_, client):
        done = await client.put_manifest(index_of(manifest_of(DATA)), "index", OCI_INDEX)
        assert done.status == 201


async def test_wrong_and_malformed_references_are_400(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        await client.push(CONFIG)
        body = manifest_of()
        refused = await client.put_manifest(body + b"  ", str(Digest.of(body)))
        assert (refused.status, refused.code) == (400, "DIGEST_INVALID")
        for reference, code in (
            ("sha256:baddigeststring", "DIGEST_INVALID"),
            (".tag", "TAG_INVALID"),
            (f"{Digest.of(body)}?tag=.x", "TAG_INVALID"),
            ("v1?tag=v2", "UNSUPPORTED"),
        ):
            refused = await client.put_manifest(body, reference)
            assert (refused.status, refused.code) == (400, code), reference
        got = await client.ask("GET", f"{client.base}/manifests/sha256:baddigeststring")
        assert got.status == 400


async def test_what_is_not_there_is_404(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        for path, code in (
            (f"manifests/{Digest.of(b'x')}", "MANIFEST_UNKNOWN"),
            ("manifests/missing", "MANIFEST_UNKNOWN"),
            (f"blobs/{Digest.of(b'x')}", "BLOB_UNKNOWN"),
            ("tags/list", "NAME_UNKNOWN"),
            ("blobs/uploads/0", "BLOB_UPLOAD_UNKNOWN"),
        ):
            got = await client.ask("GET", f"{client.base}/{path}")
            assert (got.status, got.code) == (404, code), path


# --- lists ----------------------------------------------------------------------------------------


async def test_tags_are_listed_in_pages(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        await client.push(CONFIG)
        body = manifest_of()
        tags = sorted(["b", "a", "c", "B", "1"])
        await client.put_manifest(body, f"{Digest.of(body)}?" + "&".join(f"tag={t}" for t in tags))
        path, found = f"{client.base}/tags/list", []
        page = await client.ask("GET", f"{path}?n=2")
        while True:
            document = json.loads(page.body)
            assert document["name"] == "team/app"
            found += document["tags"]
            if "Link" not in page.headers:
                break
            query = page.headers["Link"].partition("?")[2].partition(">")[0]
            page = await client.ask("GET", f"{path}?{query}")
        assert found == tags
        assert json.loads((await client.ask("GET", f"{path}?last=a")).body)["tags"] == ["b", "c"]
        none = await client.ask("GET", f"{path}?n=0")
        assert (json.loads(none.body)["tags"], "Link" in none.headers) == ([], False)


async def test_repository_without_tags_has_an_empty_list(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        await client.push(CONFIG)
        body = manifest_of()
        await client.put_manifest(body, str(Digest.of(body)))
        assert json.loads((await client.ask("GET", f"{client.base}/tags/list")).body) == {
            "name": "team/app",
            "tags": [],
        }


async def test_referrers_are_there_at_once_and_filtered(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        subject = descriptor(b"not pushed here", OCI_MANIFEST)
        path = f"{client.base}/referrers/{subject['digest']}"
        empty = await client.ask("GET", path)
        assert (empty.status, empty.headers["Content-Type"]) == (200, OCI_INDEX)
        assert json.loads(empty.body)["manifests"] == []
        await client.push(CONFIG)
        bodies = {
            "sbom": manifest_of(
                subject=subject, artifactType="application/sbom", annotations={"a": "b"}
            ),
            "config": manifest_of(subject=subject),
            "index": index_of(subject=subject, artifactType="application/list"),
        }
        for name, body in bodies.items():
            media_type = OCI_INDEX if name == "index" else OCI_MANIFEST
            done = await client.put_manifest(body, str(Digest.of(body)), media_type)
            assert done.headers["OCI-Subject"] == subject["digest"]
        entries = {
            entry["digest"]: entry
            for entry in json.loads((await client.ask("GET", path)).body)["manifests"]
        }
        assert entries == {
            str(Digest.of(bodies["sbom"])): descriptor(
                bodies["sbom"],
                OCI_MANIFEST,
                artifactType="application/sbom",
                annotations={"a": "b"},
            ),
            str(Digest.of(bodies["config"])): descriptor(
                bodies["config"], OCI_MANIFEST, artifactType="application/vnd.oci.empty.v1+json"
            ),
            str(Digest.of(bodies["index"])): descriptor(
                bodies["index"], OCI_INDEX, artifactType="application/list"
            ),
        }
        some = await client.ask("GET", f"{path}?artifactType=application/sbom")
        assert some.headers["OCI-Filters-Applied"] == "artifactType"
        assert [e["digest"] for e in json.loads(some.body)["manifests"]] == [
            str(Digest.of(bodies["sbom"]))
        ]
        deleted = f"{client.base}/manifests/{Digest.of(bodies['sbom'])}"
        assert (await client.ask("DELETE", deleted)).status == 202
        assert len(json.loads((await client.ask("GET", path)).body)["manifests"]) == 2


async def test_long_list_of_referrers_has_pages_that_clients_read(tmp_path: Path) -> None:
    """Most of them read at most 4 MiB of an index."""
    async with hosting(tmp_path) as (_, client):
        subject = descriptor(b"not pushed here", OCI_MANIFEST)
        await client.push(CONFIG)
        pushed = set()
        for number in range(5):
            notes = {"a": "\u00e9" * 700_000 + str(number)}
            body = manifest_of(subject=subject, artifactType="application/sbom", annotations=notes)
            raw = json.dumps(json.loads(body), ensure_ascii=False).encode()
            assert (await client.put_manifest(raw, str(Digest.of(raw)))).status == 201
            pushed.add(str(Digest.of(raw)))
        path = f"{client.base}/referrers/{subject['digest']}?artifactType=application/sbom"
        found, pages = set(), 0
        while path:
            page = await client.ask("GET", path)
            assert page.headers["OCI-Filters-Applied"] == "artifactType"
            assert len(page.body) <= MANIFEST_LIMIT
            found |= {entry["digest"] for entry in json.loads(page.body)["manifests"]}
            pages += 1
            link = page.headers.get("Link")
            path = (next_link(link) or "") if link else ""
        assert (found, pages) == (pushed, 3)


async def test_catalog_lists_repositories_with_a_manifest_in_pages(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (server, client):
        for name in ("b", "a/x", "c", "only-a-blob"):
            other = PushClient(server, name)
            await other.push(CONFIG)
            if name != "only-a-blob":
                await other.put_manifest(manifest_of(), "v1")
        whole = await client.ask("GET", "/v2/_catalog")
        assert json.loads(whole.body) == {"repositories": ["a/x", "b", "c"]}
        first = await client.ask("GET", "/v2/_catalog?n=2")
        assert json.loads(first.body) == {"repositories": ["a/x", "b"]}
        assert first.headers["Link"] == '<_catalog?n=2&last=b>; rel="next"'
        second = await client.ask("GET", "/v2/_catalog?n=2&last=b")
        assert json.loads(second.body) == {"repositories": ["c"]}


# --- deletion -------------------------------------------------------------------------------------


async def test_tag_manifest_and_blob_are_deleted_with_202_and_then_404(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (_, client):
        await client.push_image(DATA, reference="v1")
        digest = Digest.of(manifest_of(DATA))
        await client.put_manifest(manifest_of(DATA), "v2")
        manifests = f"{client.base}/manifests"
        assert (await client.ask("DELETE", f"{manifests}/v1")).status == 202
        assert (await client.ask("GET", f"{manifests}/v1")).status == 404
        assert (await client.ask("GET", f"{manifests}/{digest}")).status == 200
        assert (await client.ask("DELETE", f"{manifests}/{digest}")).status == 202
        for reference in ("v2", str(digest)):
            assert (await client.ask("HEAD", f"{manifests}/{reference}")).status == 404
            assert (await client.ask("DELETE", f"{manifests}/{reference}")).status == 404
        blob = f"{client.base}/blobs/{DIGEST}"
        assert (await client.ask("DELETE", blob)).status == 202
        assert (await client.ask("HEAD", blob)).status == 404
        assert (await client.ask("DELETE", blob)).status == 404


# --- the listeners --------------------------------------------------------------------------------


async def test_mirror_serves_hosted_repositories_like_an_upstream_and_takes_no_push(
    tmp_path: Path,
) -> None:
    async with hosting(tmp_path) as (server, client):
        await client.push_image(DATA)
        for path, query in (
            ("registry.example/team/app", ""),
            ("team/app", "?ns=registry.example"),
        ):
            url = f"{server.url}/v2/{path}"
            status, headers, body = await server.get(f"{url}/manifests/v1{query}")
            assert (status, body) == (200, manifest_of(DATA))
            assert headers["Docker-Content-Digest"] == str(Digest.of(body))
            assert (await server.get(f"{url}/blobs/{DIGEST}{query}"))[2] == DATA
            assert json.loads((await server.get(f"{url}/tags/list{query}"))[2])["tags"] == ["v1"]
            status, _, body = await server.get(f"{url}/referrers/{DIGEST}{query}")
            assert (status, json.loads(body)["manifests"]) == (200, [])
            status, _, _ = await server.ask("POST", f"{url}/blobs/uploads/{query}")
            assert status == 405
        url = f"{server.push_url}/v2/team/app/manifests/v1?ns=docker.io"
        status, _, refused = await server.get(url)
        assert b"serves only registry.example: pull all others from the mirror" in refused
        assert status == 404, "the push listener reaches no upstream"


async def test_push_listener_under_a_host_name_of_the_mirrors_listener(tmp_path: Path) -> None:
    async with hosting(tmp_path, hosted={"hosts": ["push.example"]}) as (server, _):
        client = PushClient(server, url=server.url)
        for host, status in (
            ("push.example", 202),
            (f"PUSH.example.:{server.port}", 202),
            ("other.example", 405),
        ):
            begun = await client.ask("POST", "/v2/app/blobs/uploads/", None, {"Host": host})
            assert begun.status == status
        done = await client.ask(
            "POST", f"/v2/app/blobs/uploads/?digest={DIGEST}", DATA, {"Host": "push.example"}
        )
        assert done.status == 201
        got = await client.ask("GET", done.location, None, {"Host": "push.example"})
        assert got.body == DATA
        assert (await client.ask("GET", done.location)).status != 200, "that is docker.io's"


async def test_push_listener_behind_a_proxy_that_removes_a_prefix(tmp_path: Path) -> None:
    more = {"trusted_proxies": ["127.0.0.1"]}
    async with hosting(tmp_path, more=more) as (_, client):
        headers = {"X-Forwarded-Prefix": "/registry", "X-Forwarded-For": "192.0.2.1"}
        begun = await client.ask("POST", f"{client.base}/blobs/uploads/", None, headers)
        assert begun.location.startswith("/registry/v2/team/app/blobs/uploads/")


# --- clients that break, stall, or are hostile ----------------------------------------------------


def has_ended(server: Server, count: int) -> bool:
    """Return whether so many ``PATCH`` requests have ended."""
    return sum(pull.method == "PATCH" for pull in server.pulls) == count


async def test_push_that_is_cut_is_taken_up_where_it_ended(tmp_path: Path) -> None:
    data = random_bytes(1_000_000, 9)
    async with hosting(tmp_path) as (server, client):
        location = (await client.start()).location
        position = 0
        _, _, port = server.push_url.rpartition(":")
        for tenth in range(1, 10):
            _, writer = await asyncio.open_connection("127.0.0.1", int(port))
            head = (
                f"PATCH {location} HTTP/1.1\r\nHost: x\r\n"
                f"Content-Range: {position}-{len(data) - 1}\r\n"
                f"Content-Length: {len(data) - position}\r\n\r\n"
            )
            writer.write(head.encode() + data[position : tenth * len(data) // 10])
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            await until(partial(has_ended, server, tenth))
            told = await client.ask("GET", location)
            reached = int(told.headers["Range"].partition("-")[2]) + 1
            assert position <= reached <= tenth * len(data) // 10 or reached == 1
            position = 0 if reached == 1 else reached
        done = await client.ask(
            "PUT",
            f"{location}?digest={Digest.of(data)}",
            data[position:],
            {"Content-Range": f"{position}-{len(data) - 1}"},
        )
        assert done.status == 201
        assert (await client.ask("GET", done.location)).body == data


async def test_second_request_for_an_upload_that_is_being_fed_is_416(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (server, client):
        location = (await client.start()).location
        may_end = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield DATA[:1000]
            await may_end.wait()
            yield DATA[1000:]

        hosted = server.running_server.mirror.hosted
        assert hosted is not None
        async with asyncio.TaskGroup() as group:
            first = group.create_task(client.ask("PATCH", location, slow()))
            await until(lambda: bool(hosted.uploads._writers))
            second = await client.ask("PATCH", location)
            assert (second.status, second.code) == (416, "BLOB_UPLOAD_INVALID")
            may_end.set()
        assert first.result().status == 202
        assert (await client.ask("PUT", f"{location}?digest={DIGEST}")).status == 201


async def test_upload_is_cancelled_while_a_request_hangs_on_it(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (server, client):
        location = (await client.start()).location
        may_end = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield DATA[:1000]
            await may_end.wait()
            yield DATA[1000:2000]

        hosted = server.running_server.mirror.hosted
        assert hosted is not None
        async with asyncio.TaskGroup() as group:
            first = group.create_task(client.ask("PATCH", location, slow()))
            await until(lambda: bool(hosted.uploads._writers))
            assert (await client.ask("DELETE", location)).status == 204
            may_end.set()
        assert (first.result().status, first.result().code) == (404, "BLOB_UPLOAD_UNKNOWN")


async def test_silent_client_is_cut_off_and_its_upload_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosted_handler, "CLIENT_SILENCE_S", 0.05)
    async with hosting(tmp_path) as (server, client):
        location = (await client.start()).location
        _, _, port = server.push_url.rpartition(":")
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.write(
            f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode() + b"abc"
        )
        assert await reader.read() == b""
        writer.close()
        told = await client.ask("GET", location)
        assert (told.status, told.headers["Range"]) == (204, "0-2")


async def test_time_that_an_upload_waits_for_the_server_is_no_silence_of_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosted_handler, "CLIENT_SILENCE_S", 0.01)
    request, record, feed = MagicMock(headers={}), MagicMock(bytes_received=0), MagicMock()
    request.content.readany = AsyncMock(side_effect=[DATA, b""])
    feed.write = lambda _: asyncio.sleep(0.03)
    await HostedHandler._receive(MagicMock(), request, record, feed)
    assert record.bytes_received == len(DATA)


async def begin_manifest(
    server: Server, sent: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Begin to push a manifest of the largest size, and send only these bytes of it."""
    _, _, port = server.push_url.rpartition(":")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(
        f"PUT /v2/team/app/manifests/v0 HTTP/1.1\r\nHost: x\r\nContent-Type: {OCI_MANIFEST}"
        f"\r\nContent-Length: {MANIFEST_LIMIT}\r\n\r\n".encode()
        + sent
    )
    return reader, writer


async def test_large_manifests_that_do_not_end_keep_only_other_large_ones_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_memory, "_WAIT_S", 0.05)
    large = manifest_of(annotations={"x": "x" * 100_000})
    async with hosting(tmp_path) as (server, client):
        await client.push(CONFIG)
        hosted = server.running_server.mirror.hosted
        assert hosted is not None
        memory = hosted.manifests.memory = ManifestMemory(MANIFEST_LIMIT)
        _, writer = await begin_manifest(server, large)
        await until(lambda: not memory._free)
        refused = await client.put_manifest(large, "v1")
        assert (refused.status, refused.code) == (429, "TOOMANYREQUESTS")
        assert int(refused.headers["Retry-After"]) > 0
        assert (await client.put_manifest(manifest_of(), "v2")).status == 201
        writer.close()
        await until(lambda: memory._free == MANIFEST_LIMIT)
        assert (await client.put_manifest(large, "v1")).status == 201
        assert memory._free == MANIFEST_LIMIT


async def test_large_manifest_that_stalls_gives_way_to_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_memory, "_HALF_LIFE_S", 0.05)
    large = manifest_of(annotations={"x": "x" * 100_000})
    async with hosting(tmp_path) as (server, client):
        await client.push(CONFIG)
        hosted = server.running_server.mirror.hosted
        assert hosted is not None
        memory = hosted.manifests.memory = ManifestMemory(MANIFEST_LIMIT)
        reader, writer = await begin_manifest(server, large)
        await until(lambda: not memory._free)
        assert (await client.put_manifest(large, "v1")).status == 201
        assert (await reader.readline()).startswith(b"HTTP/1.1 429 ")
        writer.close()


async def test_full_quota_tells_the_use_of_others_to_the_log_and_not_to_clients(
    tmp_path: Path,
) -> None:
    async with hosting(tmp_path, hosted={"max_size": "6KB"}) as (server, client):
        await client.push(DATA)
        other = PushClient(server, "other/app")
        refused = await other.start(f"?digest={Digest.of(b'x' * 2000)}", b"x" * 2000)
        assert (refused.status, refused.code) == (403, "DENIED")
        (error,) = json.loads(refused.body)["errors"]
        assert error["message"].startswith("hosted.max_size (6KB) has no room for this push.")
        assert "used" not in refused.body.decode()
        assert "5.0KiB are used (2.0KiB of them by metadata)" in (await server.records())[-1].error


async def test_broken_uploads_of_a_client_without_a_login_give_way_to_its_mount_and_manifest(
    tmp_path: Path,
) -> None:
    async with hosting(tmp_path, hosted={"max_repository_size": "500kB"}) as (server, client):
        layer = random_bytes(300_000, 1)
        digest = await PushClient(server, "base").push(layer)
        await client.push(CONFIG)

        async def break_off(size: int) -> str:
            location = (await client.start()).location
            assert (await client.ask("PATCH", location, bytes(size))).status == 202
            last_byte = time.time() - 5
            os.utime(server.store.layout.uploads / location[-32:], (last_byte, last_byte))
            return location

        left = await break_off(300_000)
        assert (await client.start(f"?mount={digest}&from=base")).status == 201
        assert (await client.ask("GET", left)).status == 404
        left = await break_off(150_000)
        body = manifest_of(layer, annotations={"a": "x" * 10_000})
        assert (await client.put_manifest(body, "v1")).status == 201
        assert (await client.ask("GET", left)).status == 404


async def test_client_that_waits_for_permission_gets_100(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (server, client):
        location = (await client.start()).location
        _, _, port = server.push_url.rpartition(":")
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.write(
            f"PUT {location}?digest={DIGEST} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            f"Content-Length: {len(DATA)}\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
        writer.write(DATA)
        assert b"HTTP/1.1 201 Created" in await reader.read()
        writer.close()


HOSTILE = [
    ("PATCH", "LOCATION", {"Content-Range": "0-9"}, 400),  # the body has another length
    ("PATCH", "LOCATION", {"Content-Range": "9-0"}, 400),
    ("PATCH", "LOCATION", {"Content-Range": "x"}, 400),
    ("PATCH", "LOCATION", {"Content-Range": f"0-{'9' * 30}"}, 400),
    ("PATCH", "LOCATION", {"Content-Range": "-1-2"}, 400),
    ("PUT", "LOCATION", {}, 400),  # without a digest
    ("PUT", "LOCATION?digest=md5:00", {}, 400),
    ("PUT", "LOCATION?digest=sha256:../../x", {}, 400),
    ("PUT", f"LOCATION?digest={DIGEST}&digest=sha256:{'0' * 64}", {}, 400),
    ("PATCH", "/v2/team/app/blobs/uploads/..%2f..%2fx", {}, 404),
    ("PATCH", "/v2/team/app/blobs/uploads/%2e%2e", {}, 404),
    ("PATCH", f"/v2/team/app/blobs/uploads/{'0' * 4000}", {}, 404),
    ("PATCH", "/v2/team/app/blobs/uploads/names.db", {}, 404),
    ("PATCH", "/v2/team/app/blobs/uploads/x/y", {}, 404),
    ("POST", "/v2/../blobs/uploads/", {}, 400),
    ("POST", "/v2/UPPER/blobs/uploads/", {}, 400),
    ("POST", "/v2/a%2fb/blobs/uploads/", {}, 400),
    ("POST", f"/v2/{'a' * 300}/blobs/uploads/", {}, 400),
    ("POST", "/v2/app/blobs/uploads/?digest-algorithm=md5", {}, 400),
    ("POST", "/v2/app/blobs/uploads/?mount=x&from=y", {}, 400),
    ("POST", "/v2/app/blobs/uploads/?" + "a=1&" * 100, {}, 400),
    ("PUT", "/v2/app/blobs/uploads/", {}, 405),
    ("POST", f"/v2/app/blobs/{DIGEST}", {}, 405),
    ("POST", "/v2/app/manifests/v1", {}, 405),
    ("PATCH", "/v2/app/manifests/v1", {}, 405),
    ("TRACE", "/v2/app/manifests/v1", {}, 405),
    ("POST", "/v2/", {}, 404),
    ("DELETE", "/v2/app/tags/list", {}, 404),
    ("PUT", "/", {}, 404),
]


async def test_hostile_requests_are_refused_and_change_nothing(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (server, client):
        location = (await client.start()).location
        root = server.store.layout.root
        for method, path, headers, status in HOSTILE:
            refused = await client.ask(method, path.replace("LOCATION", location), b"abc", headers)
            assert refused.status == status, (method, path, headers)
            assert [one.name for one in (root / "uploads").iterdir()] == [location[-32:]]
            assert [one for one in (root / "blobs").rglob("*") if one.is_file()] == []
            assert (await client.ask("GET", location)).headers["Range"] == "0-0"


async def test_announced_length_beyond_the_quota_is_denied_before_a_byte_is_taken(
    tmp_path: Path,
) -> None:
    async with hosting(tmp_path, hosted={"max_size": "1MiB"}) as (server, client):
        location = (await client.start()).location
        _, _, port = server.push_url.rpartition(":")
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.write(
            f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Length: {2**60}\r\n\r\n".encode()
        )
        assert b" 403 " in await reader.readline()
        writer.close()
        refused = await client.start(f"?digest={DIGEST}", random_bytes(2_000_000, 1))
        assert (refused.status, refused.code) == (403, "DENIED")
        assert "hosted.max_size (1MiB)" in json.loads(refused.body)["errors"][0]["message"]


async def test_push_is_recorded_with_its_bytes(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (server, client):
        await client.push_image(DATA)
        await client.ask("DELETE", f"{client.base}/manifests/v1")
        push_listener = server.running_server.push_listener
        assert push_listener is not None
        await push_listener.handler.wait_until_idle()
        puts = [pull for pull in server.pulls if pull.method == "PUT"]
        assert [pull.outcome for pull in puts] == [Outcome.PUSHED] * 3
        assert [pull.bytes_received for pull in puts] == [2, len(DATA), len(manifest_of(DATA))]
        assert {pull.repository for pull in puts} == {"team/app"}
        assert puts[1].digest == str(DIGEST)
        assert server.pulls[-1].outcome is Outcome.DELETED
        text, _ = await server.running_server.handler._render_metrics()
        total = 2 + len(DATA) + len(manifest_of(DATA))
        assert f"oci_mirror_bytes_pushed_total {total:.1f}".encode() in text
