"""Quirks of public registries, one by one."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
from yarl import URL

from mirror.config.settings import Credentials
from mirror.observability.events import Kind
from mirror.oci.errors import ManifestUnknown, Unauthorized
from mirror.oci.reference import Digest, Repository, Tag
from mirror.upstream.outbound import TOKEN_HOSTS, Allowed, Policy, UrlSource, check_url
from tests.fakes.registry import FakeRegistry, Fault
from tests.unit.upstream.kit import DATA, REPO, helper, upstream_kit

LATEST = Tag("latest")


def moved(target: str, status: int = 307, method: str | None = None) -> Fault:
    return Fault(status=status, headers={"Location": target}, times=None, method=method)


@pytest.mark.parametrize(
    ("upstream", "endpoint", "realm"),
    [
        ("docker.io", "https://registry-1.docker.io", "https://auth.docker.io/token"),
        ("ghcr.io", "https://ghcr.io", "https://ghcr.io/token"),
        ("quay.io", "https://quay.io", "https://quay.io/v2/auth"),
        ("gcr.io", "https://gcr.io", "https://gcr.io/v2/token"),
        ("public.ecr.aws", "https://public.ecr.aws", "https://public.ecr.aws/token/"),
        ("nvcr.io", "https://nvcr.io", "https://nvcr.io/proxy_auth"),
        ("registry.gitlab.com", "https://registry.gitlab.com", "https://gitlab.com/jwt/auth"),
        ("a.azurecr.io", "https://a.azurecr.io", "https://a.azurecr.io/oauth2/token"),
    ],
)
def test_token_services_of_public_registries_are_allowed(
    upstream: str, endpoint: str, realm: str
) -> None:
    policy = Policy(URL(endpoint), TOKEN_HOSTS.get(upstream, ()))
    assert isinstance(check_url(realm, UrlSource.REALM, policy.endpoint, policy), Allowed)


async def test_docker_hub_name_without_a_namespace_gets_library() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        fake.add_manifest(b"{}", "library/nginx", "latest")
        nginx = Repository.parse("docker.io", "nginx")
        assert (await kit.registry.head_manifest(nginx, LATEST, ())).digest
        assert fake.requests[0].path == "/v2/library/nginx/manifests/latest"


async def test_ghcr_placeholder_scope_is_replaced_and_its_token_refusal_is_unauthorized() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url, name="ghcr.io") as kit:
        fake.add_manifest(b"{}", tag="latest")
        fake.token = "t"
        fake.challenge = (
            f'Bearer realm="{fake.url}/token",service="ghcr.io",scope="repository:user/image:pull"'
        )
        await kit.registry.head_manifest(REPO, LATEST, ())
        token_request = next(seen for seen in fake.requests if seen.path == "/token")
        assert token_request.query["scope"] == ["repository:library/app:pull"]
        fake.token_status = 401
        with pytest.raises(Unauthorized):
            await kit.registry.head_manifest(Repository("ghcr.io", "a/private"), LATEST, ())


async def test_public_ecr_head_of_a_blob_with_401_becomes_a_get() -> None:
    async with (
        FakeRegistry() as fake,
        FakeRegistry() as cdn,
        upstream_kit(fake.url, name="public.ecr.aws") as kit,
    ):
        digest = fake.add_blob(DATA)
        fake.token = "t"
        refusal = {"WWW-Authenticate": f'Bearer realm="{fake.url}/token",scope="aws"'}
        path = f"blobs/{digest}"
        fake.fault(path, Fault(status=401, headers=refusal, times=None, method="HEAD"))
        fake.fault(path, moved(f"{cdn.url}/signed"))
        cdn.fault("/signed", Fault(status=200, body=DATA, times=None))
        assert await kit.registry.head_blob(REPO, digest) == len(DATA)
        assert await kit.read(digest) == DATA


async def test_private_ecr_uses_basic_from_a_helper_and_get_for_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = helper(tmp_path, 'echo \'{"Username":"AWS","Secret":"s"}\'', "ecr-login")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    credentials = Credentials(helper="ecr-login")
    async with FakeRegistry() as fake, upstream_kit(fake.url, credentials=credentials) as kit:
        digest = fake.add_manifest(b"{}", tag="latest")
        fake.basic = "Basic " + base64.b64encode(b"AWS:s").decode()
        fault = Fault(drop_headers=("Docker-Content-Digest",), times=None)
        fake.fault("manifests/latest", fault)
        assert (await kit.registry.head_manifest(REPO, LATEST, ())).digest is None
        assert (await kit.registry.get_manifest(REPO, LATEST, ())).digest == digest
        await kit.registry.list_tags(REPO)
        assert fake.requests[-1].query["n"] == ["1000"], "private ECR refuses more"
        assert log.read_text().count("get") == 1, "one look-up for all requests"


async def test_artifact_registry_redirect_within_its_origin_keeps_the_token() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url, name="gcr.io") as kit:
        digest = fake.add_blob(DATA)
        target_path = "/artifacts-downloads/namespaces/x/downloads/y"
        fake.token = "t"
        fake.fault(f"blobs/{digest}", Fault(status=401, headers={
            "WWW-Authenticate": f'Bearer realm="{fake.url}/token",service="gcr.io"'
        }), moved(target_path, 302))  # fmt: skip
        fake.fault(target_path, Fault(status=200, body=DATA))
        assert await kit.read(digest) == DATA
        assert fake.requests[-1].path == target_path
        assert fake.requests[-1].headers["authorization"] == "Bearer t"


async def test_azure_gets_the_identity_token_and_its_storage_no_authorization(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as fake, FakeRegistry() as storage:
        entry = {
            "auth": base64.b64encode(b"00000000-0000-0000-0000-000000000000:").decode(),
            "identitytoken": "identity",
        }
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"auths": {f"127.0.0.1:{fake.port}": entry}}))
        credentials = Credentials(docker_config=str(config))
        async with upstream_kit(fake.url, name="a.azurecr.io", credentials=credentials) as kit:
            digest = fake.add_blob(DATA)
            fake.token, fake.token_body = "t", b'{"access_token":"t"}'
            fake.fault(f"blobs/{digest}", Fault(), moved(f"{storage.url}/x?sig=1"))
            storage.fault("/x", Fault(status=200, body=DATA))
            assert await kit.read(digest) == DATA
        [token_request] = [seen for seen in fake.requests if seen.path == "/token"]
        assert (token_request.method, b"refresh_token=identity" in token_request.body) == (
            "POST",
            True,
        )
        assert "identity" not in token_request.target
        assert "authorization" not in storage.requests[0].headers


async def test_quay_expired_signed_url_is_requested_again() -> None:
    async with FakeRegistry() as fake, FakeRegistry() as cdn, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        path = f"blobs/{digest}"
        fake.fault(
            path, *(Fault(status=302, headers={"Location": f"{cdn.url}/{n}"}) for n in "123")
        )
        cdn.fault("/1", Fault(status=200, body=DATA))
        cdn.fault("/2", Fault(status=403))  # the signed URL has expired
        cdn.fault("/3", Fault(status=200, body=DATA))
        for _ in range(2):
            assert await kit.read(digest) == DATA
        assert [seen.path for seen in cdn.requests] == ["/1", "/2", "/3"]


async def test_registry_k8s_io_redirects_of_manifests_are_followed() -> None:
    async with FakeRegistry() as fake, FakeRegistry() as regional, upstream_kit(fake.url) as kit:
        target_path = "k8s-artifacts-prod/images/pause"
        digest = regional.add_manifest(b"{}", target_path, "3.9")
        pause = Repository("registry.k8s.io", "pause")
        for name in ("3.9", "3.10", str(digest)):
            fake.fault(
                f"/v2/pause/manifests/{name}",
                moved(f"{regional.url}/v2/{target_path}/manifests/{name}"),
            )
        assert (await kit.registry.head_manifest(pause, Tag("3.9"), ())).digest == digest
        async with kit.registry.open(pause, digest, Kind.MANIFEST) as stream:
            assert b"".join([chunk async for chunk in stream]) == b"{}"
        with pytest.raises(ManifestUnknown):
            await kit.registry.head_manifest(pause, Tag("3.10"), ())
        with pytest.raises(ManifestUnknown):
            await kit.registry.get_manifest(pause, Tag("3.10"), ())


async def test_harbor_code_unknown_is_manifest_unknown_and_its_head_size_is_not_trusted() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_manifest(b"{}", tag="latest")
        fake.fault("manifests/latest", Fault(headers={"Content-Length": "777"}, method="HEAD"))
        assert (await kit.registry.head_manifest(REPO, LATEST, ())).size == 777
        async with kit.registry.open(REPO, digest, Kind.MANIFEST) as stream:
            assert stream.total == 2
        body = b'{"errors":[{"code":"UNKNOWN","message":"unknown"}]}'
        fake.fault("manifests/none", Fault(status=404, body=body))
        with pytest.raises(ManifestUnknown):
            await kit.registry.get_manifest(REPO, Tag("none"), ())


async def test_gitlab_expired_token_is_renewed_and_its_signed_url_gets_no_head() -> None:
    async with FakeRegistry() as fake, FakeRegistry() as cdn, upstream_kit(fake.url) as kit:
        one, two = fake.add_blob(DATA), fake.add_blob(DATA[1:])
        fake.token = "first"
        assert await kit.read(one) == DATA
        fake.token = "second"
        assert await kit.read(two) == DATA[1:]
        assert fake.count("GET", "/token") == 2
        fake.fault(f"blobs/{one}", moved(f"{cdn.url}/presigned"))
        cdn.fault("/presigned", Fault(status=403, times=None, method="HEAD"))
        cdn.fault("/presigned", Fault(status=200, body=DATA, times=None))
        assert await kit.registry.head_blob(REPO, one) == len(DATA)


async def test_mcr_is_anonymous_and_its_data_host_gets_the_range() -> None:
    async with FakeRegistry() as fake, FakeRegistry() as data, upstream_kit(fake.url) as kit:
        digest = fake.add_blob(DATA)
        data.add_blob(DATA)
        fake.fault(f"blobs/{digest}", moved(f"{data.url}/v2/library/app/blobs/{digest}"))
        assert await kit.read(digest, offset=1000) == DATA[1000:]
        assert len(fake.requests) == len(data.requests) == 1
        assert data.requests[0].headers["range"] == "bytes=1000-"


async def test_nvcr_user_oauthtoken_is_not_expanded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("oauthtoken", "expanded")
    credentials = Credentials(username="$oauthtoken", password="key")
    async with FakeRegistry() as fake, upstream_kit(fake.url, credentials=credentials) as kit:
        fake.token = "t"
        assert await kit.read(fake.add_blob(DATA)) == DATA
        [token_request] = [seen for seen in fake.requests if seen.path == "/token"]
        basic = base64.b64decode(token_request.headers["authorization"].removeprefix("Basic "))
        assert basic == b"$oauthtoken:key"


async def test_missing_digest_and_length_leave_the_total_unknown() -> None:
    async with FakeRegistry() as fake, upstream_kit(fake.url) as kit:
        digest = fake.add_manifest(b"{}")
        drop = ("Docker-Content-Digest", "Content-Length")
        fake.fault(f"manifests/{digest}", Fault(chunked=True, drop_headers=drop, times=None))
        async with kit.registry.open(REPO, digest, Kind.MANIFEST) as stream:
            assert stream.total is None
            assert Digest.of(b"".join([chunk async for chunk in stream])) == digest
