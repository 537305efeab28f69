"""Both listeners with the section ``access``: who gets what, and what nobody gets to know."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from multidict import CIMultiDict

from mirror.observability.events import HostedChange, Outcome
from mirror.oci.descriptor import OCI_MANIFEST
from mirror.oci.reference import Digest, Repository
from mirror.pull.admission import Restrictions
from tests.fakes.registry import FakeRegistry
from tests.robustness.kit import send_raw, statuses
from tests.server_kit import Server, running
from tests.unit.access.kit import access_section, basic, htpasswd, rule
from tests.unit.hosted.kit import CONFIG, CONFIG_DIGEST, PushClient, Reply, descriptor, manifest_of

HOST = "registry.example"
CI, READER = basic("ci", "right"), basic("reader", "reader's")
TOKEN = "0123456789abcdef-token"
RULES = (
    rule(f"{HOST}/team/**", "ci", "pull", "push", "delete"),
    rule(f"{HOST}/team/**", ["reader", "group:dev"], "pull"),
    rule(f"{HOST}/public/**", "anonymous", "pull"),
    rule("docker.io/secret/**", "authenticated", "pull"),
    rule("docker.io/secret/**", "anonymous"),
)
LAYER = b"layer" * 100


@dataclass
class BothListeners:
    """A server with both listeners, and a user at each."""

    server: Server
    users: Path
    push: PushClient

    async def ask(
        self, method: str, path: str, user: str | None = None, data: Any = None, url: str = ""
    ) -> Reply:
        """Send a request to the push listener, or to ``url``."""
        headers = {} if user is None else {"Authorization": user}
        client = PushClient(self.server, url=url)
        return await client.ask(method, path, data, headers)

    async def pull(self, path: str, user: str | None = None) -> Reply:
        """Send a GET to the mirror's listener."""
        return await self.ask("GET", path, user, url=self.server.url)

    def reload_files(self) -> None:
        """Do what the job does in the two seconds after a change."""
        for _ in range(2):
            self.server.running_server.access.refresh()


@asynccontextmanager
async def both_listeners(
    root: Path,
    *rules: Mapping[str, Any],
    hosted: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
    endpoints: tuple[str, ...] = (),
    **keys: Any,
) -> AsyncIterator[BothListeners]:
    """Run a server. ``keys``: of the section ``access``; the rest as of ``running``."""
    users, tokens = root / "htpasswd", root / "tokens.yaml"
    users.write_text(htpasswd(ci="right", reader="reader's"))
    tokens.write_text(f"- name: robot\n  token: {TOKEN}\n  groups: [dev]\n")
    files = {"users": str(users), "tokens": str(tokens)}
    access = {**files, "rules": list(rules or RULES), **keys}
    sections = {"access": access, **(more or {})}
    async with running(root / "data", *endpoints, hosted=hosted or {}, more=sections) as server:
        yield BothListeners(server, users, PushClient(server))


async def push_image(both: BothListeners, repository: str = "team/app", user: str = CI) -> Digest:
    """Push an image. Returns the digest of its manifest."""
    for data in (CONFIG, LAYER):
        path = f"/v2/{repository}/blobs/uploads/?digest={Digest.of(data)}"
        assert (await both.ask("POST", path, user, data)).status == 201
    body = manifest_of(LAYER)
    path = f"/v2/{repository}/manifests/v1"
    put = await both.ask("PUT", path, user, body)
    assert put.status == 201, put.body
    return Digest.of(body)


# --- the challenge --------------------------------------------------------------------------------


async def test_push_listener_challenges_at_v2_and_accepts_right_credentials_only(
    tmp_path: Path,
) -> None:
    async with both_listeners(tmp_path) as both:
        absent = await both.ask("GET", "/v2/")
        assert (absent.status, absent.code) == (401, "UNAUTHORIZED")
        assert absent.headers["WWW-Authenticate"] == f'Basic realm="{HOST}"'
        for right in (CI, READER, basic("any", TOKEN), f"Bearer {TOKEN}", f"bearer  {TOKEN}"):
            assert (await both.ask("GET", "/v2/", right)).status == 200, right
        for wrong in (
            basic("ci", "wrong"),
            basic("nobody", "right"),
            basic("ci", ""),
            "Bearer right",
            "Basic !!!",
            "Basic " + "Y2k=",
            "Digest x",
            "",
        ):
            refused = await both.ask("GET", "/v2/", wrong)
            assert (refused.status, refused.code) == (401, "UNAUTHORIZED"), wrong
            assert refused.headers["WWW-Authenticate"].startswith("Basic "), wrong


async def test_push_listener_does_not_challenge_if_everybody_may_do_everything(
    tmp_path: Path,
) -> None:
    everything = rule(f"{HOST}/**", "anonymous", "pull", "push", "delete")
    async with both_listeners(tmp_path, everything) as both:
        assert (await both.ask("GET", "/v2/")).status == 200
        assert (await both.push.push_image(LAYER)).status == 201


async def test_mirrors_listener_never_challenges(tmp_path: Path) -> None:
    async with both_listeners(tmp_path) as both:
        await push_image(both)
        for path in (
            "/v2/",
            "/v2/registry.example/team/app/manifests/v1",
            "/v2/secret/x/tags/list",
        ):
            for user in (None, basic("ci", "wrong"), "Digest x"):
                reply = await both.pull(path, user)
                assert reply.status in (200, 403), path
                assert "WWW-Authenticate" not in reply.headers


# --- what each may do -----------------------------------------------------------------------------


async def test_each_user_may_do_what_the_first_fitting_rule_says(tmp_path: Path) -> None:
    async with both_listeners(tmp_path) as both:
        digest = await push_image(both)
        manifest = "/v2/team/app/manifests/v1"
        for reader in (READER, f"Bearer {TOKEN}"):
            assert (await both.ask("GET", manifest, reader)).status == 200
            for method, path in (
                ("PUT", manifest),
                ("DELETE", manifest),
                ("DELETE", f"/v2/team/app/blobs/{CONFIG_DIGEST}"),
                ("POST", "/v2/team/app/blobs/uploads/"),
                ("PATCH", f"/v2/team/app/blobs/uploads/{'0' * 32}"),
                ("POST", "/v2/public/app/blobs/uploads/"),
            ):
                denied = await both.ask(method, path, reader, b"x")
                assert (denied.status, denied.code) == (403, "DENIED"), path
                assert b"ask the operator for a rule in access.rules" in denied.body
        assert (await both.ask("GET", manifest)).status == 401
        assert (await both.ask("GET", "/v2/public/app/tags/list")).status == 404
        assert (await both.ask("DELETE", f"/v2/team/app/manifests/{digest}", CI)).status == 202


@pytest.mark.parametrize("may", ["pull", "push", "delete"])
async def test_each_request_needs_its_right(tmp_path: Path, may: str) -> None:
    upload = f"/v2/app/blobs/uploads/{'0' * 32}"
    requests = [
        ("POST", "/v2/app/blobs/uploads/", "push"),
        ("GET", upload, "push"),
        ("PATCH", upload, "push"),
        ("PUT", f"{upload}?digest={CONFIG_DIGEST}", "push"),
        ("DELETE", upload, "push"),
        ("PUT", "/v2/app/manifests/v1", "push"),
        ("DELETE", "/v2/app/manifests/v1", "delete"),
        ("DELETE", f"/v2/app/blobs/{CONFIG_DIGEST}", "delete"),
        ("GET", "/v2/app/manifests/v1", "pull"),
        ("HEAD", f"/v2/app/blobs/{CONFIG_DIGEST}", "pull"),
        ("GET", "/v2/app/tags/list", "pull"),
        ("GET", f"/v2/app/referrers/{CONFIG_DIGEST}", "pull"),
    ]
    async with both_listeners(tmp_path, rule(f"{HOST}/app", "ci", may)) as both:
        for method, path, right in requests:
            assert (await both.ask(method, path)).status == 401, path
            assert (await both.ask(method, path, READER)).status == 403, path
            is_refused = (await both.ask(method, path, CI)).status == 403
            assert is_refused is (right != may), (method, path)


async def test_answer_does_not_depend_on_what_exists(tmp_path: Path) -> None:
    hidden = rule(f"{HOST}/hidden/**", "ci", "pull", "push")
    async with both_listeners(tmp_path, hidden) as both:
        await push_image(both, "hidden/app")
        replies = []
        for repository in ("hidden/app", "hidden/none", "other"):
            for kind in ("manifests/v1", f"blobs/{CONFIG_DIGEST}", "tags/list"):
                for user in (None, READER):
                    path = f"/v2/{repository}/{kind}"
                    at_push_listener = await both.ask("GET", path, user)
                    replies.append(
                        (repository, kind, user, at_push_listener.status, at_push_listener.body)
                    )
                    path = f"/v2/{HOST}{path.removeprefix('/v2')}"
                    at_mirror = await both.pull(path, user)
                    replies.append((repository, kind, user, at_mirror.status, at_mirror.body))
        assert {(reply[2], *reply[3:]) for reply in replies if reply[0] == "hidden/app"} == {
            (reply[2], *reply[3:]) for reply in replies if reply[0] == "hidden/none"
        }
        assert {reply[3] for reply in replies} == {401, 403}


async def test_mirrors_listener_serves_hosted_repositories_to_those_who_may_pull(
    tmp_path: Path,
) -> None:
    async with both_listeners(tmp_path) as both:
        digest = await push_image(both)
        for kind in (
            "manifests/v1",
            f"manifests/{digest}",
            f"blobs/{Digest.of(LAYER)}",
            "tags/list",
            f"referrers/{digest}",
        ):
            by_path, by_ns = f"/v2/{HOST}/team/app/{kind}", f"/v2/team/app/{kind}?ns={HOST}"
            for path in (by_path, by_ns):
                # Twice each: small responses are stored for reuse.
                for _ in range(2):
                    assert (await both.pull(path, READER)).status == 200, path
                    denied = await both.pull(path)
                    assert (denied.status, denied.code) == (403, "DENIED"), path
                    head = await both.ask("HEAD", path, url=both.server.url)
                    assert (head.status, head.body) == (403, b"")
                    ranged = await both.push.ask("GET", path, None, {"Range": "bytes=0-1"})
                    assert ranged.status in (401, 404)


async def test_mirrored_repository_is_kept_from_those_who_may_not_read_it(tmp_path: Path) -> None:
    async with both_listeners(tmp_path) as both:
        denied = await both.pull("/v2/secret/app/manifests/v1")
        assert (denied.status, denied.code) == (403, "DENIED")
        # The upstream is not reachable in this test: whoever gets so far may pull.
        assert (await both.pull("/v2/secret/app/manifests/v1", READER)).status == 502
        assert (await both.pull("/v2/library/app/manifests/v1")).status == 502
        wrong = await both.pull("/v2/library/app/manifests/v1", basic("x", "of the upstream"))
        assert wrong.status == 502, "credentials for the upstream do no harm"
        (record,) = [one for one in await both.server.records() if one.user]
        assert (record.user, record.repository) == ("reader", "secret/app")
        refused = [one for one in both.server.pulls if one.outcome is Outcome.DENIED]
        assert {one.repository for one in refused} == {"secret/app"}


async def test_user_is_decided_and_recorded_as_that_user_at_both_listeners(tmp_path: Path) -> None:
    rules = [
        rule(f"{HOST}/**", "ci", "admin"),
        rule([f"{HOST}/open/**", "docker.io/open/**"], "reader"),
        rule([f"{HOST}/open/**", "docker.io/open/**"], "anonymous", "pull"),
    ]
    async with both_listeners(tmp_path, *rules, more={"catalog": True}) as both:
        await push_image(both, "open/app")
        both.server.events.clear()
        for user, hosted, mirrored in (
            (READER, 403, 403),
            (CI, 200, 502),
            (None, 200, 502),
            (basic("reader", "wrong"), 200, 502),
        ):
            path = f"/v2/{HOST}/open/app/tags/list"
            assert (await both.pull(path, user)).status == hosted, user
            assert (await both.pull("/v2/open/app/manifests/v1", user)).status == mirrored, user
            listed = json.loads((await both.pull(f"/v2/_catalog?ns={HOST}", user)).body)
            assert listed["repositories"] == ([] if hosted == 403 else ["open/app"])
        records = [(one.status, one.user) for one in await both.server.records()]
        assert records == [
            *((403, "reader"), (403, "reader"), (200, "reader")),
            *((200, "ci"), (502, "ci"), (200, "ci")),
            *[(200, ""), (502, ""), (200, "")] * 2,
        ]
        path = "/v2/open/app/tags/list"
        assert (await both.ask("GET", path, READER)).status == 403, "at the push listener, too"


async def test_wrong_credentials_where_none_are_needed_lock_nobody_out(tmp_path: Path) -> None:
    async with both_listeners(tmp_path, more={"catalog": True}) as both:
        for number in range(15):
            of_upstream = basic("of the upstream", str(number))
            for path, status in (("/v2/library/app/manifests/v1", 502), ("/v2/_catalog", 200)):
                assert (await both.pull(path, of_upstream)).status == status
        assert (await both.ask("GET", "/v2/", CI)).status == 200
        denied = await both.pull("/v2/secret/app/manifests/v1", basic("ci", "wrong"))
        assert denied.status == 403, "and not 429"


async def test_head_keeps_content_from_a_collection_only_for_clients_that_may_push(
    tmp_path: Path,
) -> None:
    path, blob = "/v2/team/app/blobs/", Digest.of(LAYER)
    rules = [*RULES[:2], rule(f"{HOST}/team/**", "anonymous", "pull")]
    async with both_listeners(tmp_path, *rules) as both:
        url = f"{path}uploads/?digest={blob}"
        assert (await both.ask("POST", url, CI, LAYER)).status == 201
        names = sqlite3.connect(tmp_path / "data" / "hosted" / "names.db", isolation_level=None)
        for user, is_marked in ((READER, False), (None, False), (CI, True)):
            names.execute("UPDATE blobs SET used_at = 1")
            assert (await both.ask("HEAD", f"{path}{blob}", user)).status == 200
            # Each write waits for those before it.
            await both.ask("POST", f"{path}uploads/?digest={Digest.of(b'x')}", CI, b"x")
            query = "SELECT used_at > 1 FROM blobs WHERE digest = ?"
            assert names.execute(query, (str(blob),)).fetchone() == (is_marked,), user
        names.close()


async def test_refused_request_of_a_user_has_the_user_in_its_record_at_both_listeners(
    tmp_path: Path,
) -> None:
    nobody = {"repositories": ["**"], "who": ["admin"], "may": ["admin"]}
    async with both_listeners(tmp_path, nobody, anonymous_pull=False) as both:
        push = await both.ask("PUT", "/v2/team/app/manifests/v1", READER, b"{}")
        wrong = await both.ask("PUT", "/v2/team/app/manifests/v1", basic("reader", "no"), b"{}")
        assert (push.status, wrong.status) == (403, 401)
        assert (await both.pull("/v2/library/app/manifests/v1", READER)).status == 403
        # The name of a failed login may be a token, so it is not recorded.
        records = [(one.status, one.user) for one in await both.server.records()]
        assert records == [(403, "reader"), (401, ""), (403, "reader")]


async def test_signature_of_a_mirrored_image_is_for_those_who_may_pull_it_and_whom_no_rule_refuses(
    tmp_path: Path,
) -> None:
    rules = [
        rule(f"{HOST}/docker.io/**", "ci", "push", "pull"),
        rule(f"{HOST}/docker.io/**", "reader", "push"),
        rule("docker.io/library/app", "anonymous", "pull"),
    ]
    async with FakeRegistry() as upstream:
        image = upstream.add_manifest(manifest_of(), "library/app", "v1")
        upstream.add_blob(CONFIG, "library/app")
        async with both_listeners(
            tmp_path, *rules, anonymous_pull=False, endpoints=(upstream.url,)
        ) as both:
            await push_image(both, "docker.io/library/app")
            body = manifest_of(LAYER, subject=descriptor(manifest_of(), OCI_MANIFEST))
            signature = Digest.of(body)
            path = f"/v2/docker.io/library/app/manifests/{signature}"
            assert (await both.ask("PUT", path, CI, body)).status == 201
            base = "/v2/docker.io/library/app"
            for user, status in ((CI, 200), (None, 200), (READER, 404)):
                for path in (f"manifests/{signature}", f"blobs/{Digest.of(LAYER)}"):
                    assert (await both.pull(f"{base}/{path}", user)).status == status, (user, path)
                listed = json.loads((await both.pull(f"{base}/referrers/{image}", user)).body)
                assert len(listed["manifests"]) == (status == 200)
                # An image that belongs to none stays where it is.
                secret = Digest.of(manifest_of(LAYER))
                assert (await both.pull(f"{base}/manifests/{secret}", user)).status == 404
            assert (await both.pull(f"/v2/{HOST}/docker.io/library/app/tags/list")).status == 403


async def test_no_fast_path_serves_what_new_rules_refuse(tmp_path: Path) -> None:
    """Small responses are stored for reuse, small blobs are kept in memory."""
    everybody = rule("docker.io/secret/**", "anonymous", "pull")
    async with FakeRegistry() as upstream:
        blob = upstream.add_blob(LAYER, "secret/app")
        body = manifest_of(LAYER)
        manifest = upstream.add_manifest(body, "secret/app", "v1")
        paths = [
            f"/v2/secret/app/blobs/{blob}",
            f"/v2/secret/app/manifests/{manifest}",
            "/v2/secret/app/manifests/v1",
            "/v2/secret/app/tags/list",
            f"/v2/secret/app/referrers/{manifest}",
        ]
        async with both_listeners(tmp_path, everybody, endpoints=(upstream.url,)) as both:
            for path in paths:
                for _ in range(3):
                    assert (await both.pull(path)).status == 200, path
            server = both.server.running_server
            access = server.mirror.settings.access
            assert access is not None
            closed = access_section(*RULES).rules
            access = access.model_copy(update={"rules": closed})
            server.apply(server.mirror.settings.model_copy(update={"access": access}))
            client = PushClient(both.server, url=both.server.url)
            for path in paths:
                for method in ("GET", "HEAD"):
                    denied = await client.ask(method, path)
                    assert denied.status == 403, path
                    assert LAYER not in denied.body
                    ranged = await client.ask(method, path, None, {"Range": "bytes=0-9"})
                    assert ranged.status == 403, path
                # Its response is not stored for others.
                assert (await both.pull(path, READER)).status == 200, path
                assert (await both.pull(path)).status == 403, path


async def test_only_what_everybody_may_pull_is_public_for_shared_caches(tmp_path: Path) -> None:
    """Otherwise a cache in front gives it to everybody (RFC 9111, sections 3.5 and 5.2.2)."""
    rules = (rule(f"{HOST}/public/**", "ci", "pull", "push"), *RULES)
    async with FakeRegistry() as upstream:
        for name in ("secret/app", "library/app"):
            upstream.add_blob(LAYER, name)
            upstream.add_manifest(manifest_of(LAYER), name, "v1")
        more = {"catalog": True}
        async with both_listeners(tmp_path, *rules, endpoints=(upstream.url,), more=more) as both:
            for name in ("team/app", "public/app"):
                await push_image(both, name)
            mirror, push = PushClient(both.server, url=both.server.url), both.push
            for client, repository, is_public in (
                (mirror, "library/app", True),
                (mirror, "secret/app", False),
                (mirror, f"{HOST}/public/app", True),
                (mirror, f"{HOST}/team/app", False),
                (push, "public/app", True),
                (push, "team/app", False),
            ):
                await _check_caching(client, repository, is_public=is_public)
            for client, path in (
                (mirror, f"/v2/_catalog?ns={HOST}"),
                (push, "/v2/_catalog"),
                (push, "/v2/"),
            ):
                for fields in ({"Authorization": CI}, {}):
                    reply = await client.ask("GET", path, None, fields)
                    assert _find_scope(reply) == {"private", "Authorization"}, path


async def _check_caching(client: PushClient, repository: str, *, is_public: bool) -> None:
    """Send each kind of request for a repository, and check which caches may store the response."""
    manifest, by_digest = Digest.of(manifest_of(LAYER)), ("blobs/", "manifests/sha256:")
    for path in (
        f"blobs/{Digest.of(LAYER)}",
        f"manifests/{manifest}",
        "manifests/v1",
        "tags/list",
        f"referrers/{manifest}",
        "manifests/absent",
    ):
        for more in ({}, {"Range": "bytes=0-3"}, {"If-None-Match": f'"{manifest}"'}):
            for user in (CI, None):
                fields = {**more, **({} if user is None else {"Authorization": user})}
                for method in ("GET", "HEAD"):
                    reply = await client.ask(method, f"/v2/{repository}/{path}", None, fields)
                    scope = _find_scope(reply)
                    if not is_public:
                        assert scope == {"private", "Authorization"}, (repository, path, fields)
                    elif reply.status in (200, 206, 304) and path.startswith(by_digest):
                        assert scope == {"public"}, (repository, path, fields)
                    else:
                        assert not scope, (repository, path, fields)


def _find_scope(reply: Reply) -> set[str]:
    """Return which caches may store a response, and whether they must tell users apart."""
    fields = f"{reply.headers.get('Cache-Control', '')}, {reply.headers.get('Vary', '')}"
    return {"public", "private", "Authorization"} & set(fields.split(", "))


async def test_what_a_rule_adds_to_a_public_image_is_private_for_shared_caches(
    tmp_path: Path,
) -> None:
    rules = (
        rule(f"{HOST}/docker.io/**", "ci", "push", "pull"),
        rule(f"{HOST}/docker.io/**", "anonymous"),
        rule("docker.io/library/app", "anonymous", "pull"),
    )
    body = manifest_of(LAYER, subject=descriptor(manifest_of(), OCI_MANIFEST))
    async with FakeRegistry() as upstream:
        image = upstream.add_manifest(manifest_of(), "library/app", "v1")
        async with both_listeners(tmp_path, *rules, endpoints=(upstream.url,)) as both:
            await push_image(both, "docker.io/library/app")
            base = "/v2/docker.io/library/app"
            put = await both.ask("PUT", f"{base}/manifests/{Digest.of(body)}", CI, body)
            assert put.status == 201
            for path in (
                f"{base}/manifests/{Digest.of(body)}",
                f"{base}/blobs/{Digest.of(LAYER)}",
                f"{base}/referrers/{image}",
                f"{base}/manifests/{Digest.of(b'absent')}",
            ):
                for method in ("GET", "HEAD"):
                    for user in (None, CI):
                        reply = await both.ask(method, path, user, url=both.server.url)
                        fields = reply.headers
                        assert fields["Cache-Control"].split(",")[0] == "private", (path, user)
                        assert fields["Vary"] == "Authorization", (path, user)
            shared = await both.pull(f"{base}/manifests/{image}", CI)
            assert shared.headers["Cache-Control"].startswith("public,")


async def test_without_the_default_rule_nothing_is_pulled_that_no_rule_fits(tmp_path: Path) -> None:
    async with both_listeners(tmp_path, *RULES, anonymous_pull=False) as both:
        assert (await both.pull("/v2/library/app/manifests/v1")).status == 403
        assert (await both.pull("/v2/library/app/manifests/v1", CI)).status == 403
        assert (await both.pull("/v2/")).status == 200


async def test_catalogs_name_only_what_the_client_may_pull(tmp_path: Path) -> None:
    async with both_listeners(
        tmp_path, rule(f"{HOST}/**", "ci", "admin"), *RULES[1:], more={"catalog": True}
    ) as both:
        for name in ("team/a", "team/b", "other/c"):
            await push_image(both, name)

        async def listed(reply: Reply) -> list[str]:
            assert reply.status == 200
            return list(json.loads(reply.body)["repositories"])

        for user, names in (
            (CI, ["other/c", "team/a", "team/b"]),
            (READER, ["team/a", "team/b"]),
            (None, []),
        ):
            assert await listed(await both.ask("GET", "/v2/_catalog", user)) == names
            assert await listed(await both.pull(f"/v2/_catalog?ns={HOST}", user)) == names
            page = await both.pull(f"/v2/_catalog?ns={HOST}&n=1", user)
            assert await listed(page) == names[:1]
            assert ("Link" in page.headers) is (len(names) > 1)
        assert await listed(await both.pull(f"/v2/_catalog?ns={HOST}", basic("x", "y"))) == []


async def test_mount_takes_only_what_the_client_may_pull(tmp_path: Path) -> None:
    async with both_listeners(
        tmp_path,
        rule(f"{HOST}/mine/**", "reader", "pull", "push"),
        rule(f"{HOST}/shared/**", "reader", "pull"),
        rule(f"{HOST}/**", "ci", "admin"),
    ) as both:
        for name in ("shared/a", "theirs/b"):
            await push_image(both, name)
        mount = f"/v2/mine/x/blobs/uploads/?mount={Digest.of(LAYER)}"
        assert (await both.ask("POST", f"{mount}&from=shared/a", READER)).status == 201
        replies = [
            await both.ask("POST", f"{mount.replace('/x/', '/y/')}{source}", READER)
            for source in ("&from=theirs/b", "&from=nothing", "", "&from=docker.io/library/app")
        ]
        assert [reply.status for reply in replies] == [202] * 4


@pytest.mark.parametrize(
    "blocks",
    [
        Restrictions(repositories={Repository(HOST, "team/app"): "blocked"}),
        Restrictions(patterns=((f"{HOST}/team/*", "blocked"),)),
        Restrictions(digests={Digest.of(LAYER): "blocked", Digest.of(manifest_of(LAYER)): "b"}),
        Restrictions(unknown_why="the marks cannot be read"),
    ],
)
async def test_block_of_hosted_content_holds_for_each_way_to_read_it(
    tmp_path: Path, blocks: Restrictions
) -> None:
    rules = [rule(f"{HOST}/**", "ci", "pull", "push")]
    async with both_listeners(tmp_path, *rules, more={"catalog": True}) as both:
        manifest = await push_image(both)
        both.server.running_server.handler._service.restrict(blocks)
        mount = f"/v2/mine/blobs/uploads/?mount={Digest.of(LAYER)}&from=team/app"
        assert (await both.ask("POST", mount, CI)).status == 202
        for path in ("manifests/v1", f"manifests/{manifest}", f"blobs/{Digest.of(LAYER)}"):
            for method in ("GET", "HEAD"):
                for prefix, url in (("/v2", ""), (f"/v2/{HOST}", both.server.url)):
                    reply = await both.ask(method, f"{prefix}/team/app/{path}", CI, url=url)
                    assert reply.status in (403, 503), (method, prefix, path)
        if blocks.digests:
            return
        for path in ("/v2/team/app/tags/list", f"/v2/team/app/referrers/{manifest}"):
            assert (await both.ask("GET", path, CI)).status in (403, 503), path
        for reply in (
            await both.ask("GET", "/v2/_catalog", CI),
            await both.pull(f"/v2/_catalog?ns={HOST}", CI),
        ):
            names = json.loads(reply.body).get("repositories", [])
            assert (reply.status, names) == ((503, []) if blocks.unknown_why else (200, []))
        # A push reads nothing: what replaces the image may come before the block is taken back.
        assert (await both.ask("PUT", "/v2/team/app/manifests/v2", CI, manifest_of())).status == 201


async def test_upload_belongs_to_its_user_and_repository(tmp_path: Path) -> None:
    both_may = rule(f"{HOST}/**", ["ci", "reader"], "pull", "push")
    async with both_listeners(tmp_path, both_may) as both:
        begun = await both.ask("POST", "/v2/team/app/blobs/uploads/", CI)
        for method in ("GET", "PATCH", "PUT", "DELETE"):
            query = f"?digest={Digest.of(LAYER)}" if method == "PUT" else ""
            refused = await both.ask(method, begun.location + query, READER, LAYER)
            assert (refused.status, refused.code) == (404, "BLOB_UPLOAD_UNKNOWN")
            moved = begun.location.replace("team/app", "team/other")
            assert (await both.ask(method, moved + query, CI, LAYER)).status == 404
        path = f"{begun.location}?digest={Digest.of(LAYER)}"
        assert (await both.ask("PUT", path, CI, LAYER)).status == 201


async def test_change_names_its_user(tmp_path: Path) -> None:
    async with both_listeners(tmp_path) as both:
        await push_image(both)
        (change,) = [one for one in both.server.events if isinstance(one, HostedChange)]
        assert (change.user, change.client, change.tag) == ("ci", "127.0.0.1", "v1")


async def test_host_name_at_the_mirrors_listener_is_a_push_listener(tmp_path: Path) -> None:
    async with both_listeners(tmp_path, hosted={"hosts": ["push.example"]}) as both:
        client = PushClient(both.server, url=both.server.url)
        at_push_listener = {"Host": "push.example"}
        assert (await client.ask("GET", "/v2/", None, at_push_listener)).status == 401
        assert (await client.ask("GET", "/v2/")).status == 200
        right = {**at_push_listener, "Authorization": CI}
        assert (await client.ask("POST", "/v2/team/app/blobs/uploads/", None, right)).status == 202
        # The query cannot lead to another registry at this listener.
        for ns in ("docker.io", HOST):
            path = f"/v2/secret/x/tags/list?ns={ns}"
            assert (await client.ask("GET", path, None, at_push_listener)).status in (401, 404)


async def test_authority_of_a_url_counts_in_place_of_host(tmp_path: Path) -> None:
    async with both_listeners(tmp_path, hosted={"hosts": ["registry.example"]}) as both:
        for authority, host, expected in (
            ("registry.example", "other", 202),
            ("other", "registry.example", 405),
        ):
            response = await send_raw(
                both.server,
                f"POST http://{authority}/v2/team/app/blobs/uploads/ HTTP/1.1\r\nHost: {host}\r\n"
                f"Authorization: {CI}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode(),
            )
            assert statuses(response) == [expected]


# --- failures -------------------------------------------------------------------------------------


async def test_name_that_fails_too_often_gets_429_and_other_users_go_on(tmp_path: Path) -> None:
    async with both_listeners(tmp_path) as both:
        assert (await both.ask("GET", "/v2/", CI)).status == 200
        wrong = [await both.ask("GET", "/v2/", basic("ci", f"guess {n}")) for n in range(12)]
        assert [reply.status for reply in wrong] == [401] * 10 + [429] * 2
        assert 1 <= int(wrong[-1].headers["Retry-After"]) <= 6
        assert wrong[-1].code == "TOOMANYREQUESTS"
        assert (await both.ask("GET", "/v2/", CI)).status == 429, "even the right password"
        assert (await both.ask("GET", "/v2/", READER)).status == 200
        assert (await both.pull("/v2/library/app/manifests/v1", basic("a", "b"))).status == 502


async def test_clients_behind_a_trusted_proxy_are_limited_one_by_one(tmp_path: Path) -> None:
    async with both_listeners(tmp_path, more={"trusted_proxies": ["127.0.0.1"]}) as both:
        for number in range(12):
            headers = {
                "X-Forwarded-For": "192.0.2.1",
                "Authorization": basic("ci", f"guess {number}"),
            }
            refused = await both.push.ask("GET", "/v2/", None, headers)
        assert refused.status == 429
        for client, status in (("192.0.2.2", 200), ("192.0.2.1", 429)):
            headers = {"X-Forwarded-For": client, "Authorization": CI}
            assert (await both.push.ask("GET", "/v2/", None, headers)).status == status


async def test_guesses_at_the_same_time_are_limited_too(tmp_path: Path) -> None:
    async with both_listeners(tmp_path) as both, asyncio.TaskGroup() as group:
        asked = [
            group.create_task(both.ask("GET", "/v2/", basic("ci", f"guess {n}"))) for n in range(40)
        ]
        statuses = [(await one).status for one in asked]
        assert statuses.count(401) <= 12
        assert set(statuses) == {401, 429}


async def test_manifest_of_a_client_that_may_not_push_is_refused_before_its_body_takes_memory(
    tmp_path: Path,
) -> None:
    async with both_listeners(tmp_path) as both:
        hosted = both.server.running_server.mirror.hosted
        assert hosted is not None
        free = hosted.manifests.memory._free
        _, _, port = both.push.url.rpartition(":")
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.write(
            b"PUT /v2/team/app/manifests/v1 HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
            b"Content-Length: 4000000\r\n\r\n" + b" " * 200_000
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 "), "and not 100"
        assert hosted.manifests.memory._free == free
        writer.close()


# --- changes of files -----------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["removed", "emptied", "deleted", "broken"])
async def test_user_who_is_removed_from_the_file_can_do_nothing_more(
    tmp_path: Path, change: str
) -> None:
    async with both_listeners(tmp_path) as both:
        assert (await both.ask("GET", "/v2/", CI)).status == 200
        match change:
            case "removed":
                both.users.write_text(htpasswd(reader="reader's"))
            case "emptied":
                both.users.write_text("")
            case "deleted":
                both.users.unlink()
            case "broken":
                both.users.write_bytes(b"ci:x\n\xff\xfe\n" + htpasswd(reader="reader's").encode())
        both.reload_files()
        assert (await both.ask("GET", "/v2/", CI)).status == 401
        is_kept = change in ("removed", "broken")
        assert (await both.ask("GET", "/v2/", READER)).status == (200 if is_kept else 401)
        both.users.write_text(htpasswd(ci="new"))
        both.reload_files()
        assert (await both.ask("GET", "/v2/", CI)).status == 401
        assert (await both.ask("GET", "/v2/", basic("ci", "new"))).status == 200


async def test_request_with_two_authorization_fields_is_refused_at_both_listeners(
    tmp_path: Path,
) -> None:
    async with both_listeners(tmp_path) as both:
        for url in (both.push.url, both.server.url):
            fields = CIMultiDict([("Authorization", CI), ("Authorization", READER)])
            reply = await PushClient(both.server, url=url).ask("GET", "/v2/", None, fields)
            assert reply.status == 400, url
