"""The examples of docs/hosting.md that are no commands of ours: shells, CI jobs, a cluster.

Blocks ``sh`` run as they are, but for the ports. So do the lines of the CI jobs. The nodes of the
cluster are a containerd, with the files that ``clients`` writes. Blocks ``console`` are run by
``test_documented_commands.py``.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from mirror.cli.main import main
from tests.real import images
from tests.real.clients import Containerd, Dockerd, Skopeo
from tests.real.process import free_port, run
from tests.real.registry import DockerRegistry
from tests.real.server import ROOT, Mirror
from tests.unit.access.kit import Signer, key_set

pytestmark = pytest.mark.timeout(300)

NAME: Final = "registry.example.internal"
SECTIONS: Final = (
    *("Tag, push, pull", "Pull from the mirror", "A CI job", "A cluster that pulls from both"),
)
"""Those whose examples are run here. Access, backups and others have tests of their own."""
DOCUMENT: Final = (ROOT / "docs/hosting.md").read_text(encoding="utf-8")
TEXT: Final = "".join(
    re.findall(rf"^## (?:{'|'.join(SECTIONS)})\n(.*?)(?=^## )", DOCUMENT, re.MULTILINE | re.DOTALL)
)
PUSH_HOST, OWN = "127.0.0.1:5101", "127.0.0.1:5100"
"""The addresses in the document."""


def blocks(language: str) -> list[str]:
    """Return the blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def documents() -> list[Any]:
    """Return the YAML documents."""
    return [yaml.safe_load(text) for text in blocks("yaml")]


@dataclass
class Site:
    """A server that hosts, and its addresses in place of those of the document."""

    mirror: Mirror
    push_host: str

    def text(self, text: str) -> str:
        """Return a text of the document, with the addresses of this site."""
        return text.replace(PUSH_HOST, self.push_host).replace(OWN, self.mirror.host)


@pytest.fixture(scope="module")
def upstream() -> Iterator[DockerRegistry]:
    with DockerRegistry() as registry:
        registry.push("library/nginx", images.image(1), "1.27")
        yield registry


@pytest.fixture
def site(upstream: DockerRegistry) -> Iterator[Site]:
    push_host = f"127.0.0.1:{free_port()}"
    with Mirror({"docker.io": upstream.url}, hosted={"name": NAME, "listen": push_host}) as mirror:
        yield Site(mirror, push_host)


def jobs(*, with_login: bool) -> list[str]:
    """Return the scripts of the CI jobs that log in, or of those that do not."""
    scripts = []
    for document in documents():
        for job in (document.get("jobs") or document).values():
            if (
                not isinstance(job, dict)
                or ("id_tokens" in job or "permissions" in job) != with_login
            ):
                continue
            if "script" in job:
                scripts.append("\n".join(job["script"]))
            elif "steps" in job:
                scripts.append("\n".join(step["run"] for step in job["steps"] if "run" in step))
    return scripts


def test_shell_examples_and_ci_jobs_run(site: Site, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY data /data\n")
    (tmp_path / "data").write_bytes(images.random_bytes(10_000, 3))
    scripts = [*blocks("sh"), *jobs(with_login=False)]
    assert len(scripts) >= 5
    with Skopeo() as skopeo, Dockerd("http://127.0.0.1:9") as docker:
        policy = skopeo.dir / ".config/containers/policy.json"
        policy.parent.mkdir(parents=True)
        policy.write_text((skopeo.dir / "policy.json").read_text())
        env = {
            **skopeo.environment(),
            "DOCKER_CONFIG": str(docker.dir / "client"),
            "DOCKER_HOST": f"unix://{docker.socket}",
            "REGISTRY": site.push_host,
            "CI_COMMIT_SHORT_SHA": "0a1b2c3d",
            "GITHUB_SHA": "0a1b2c3d4e5f",
        }
        docker.docker("build", "--tag", "app:1", str(tmp_path))
        for script in scripts:
            run("bash", "-euc", f"cd {tmp_path}\n{site.text(script)}", env=env)
    tags = site.mirror.ask(f"/v2/{NAME}/team/app/tags/list").body.decode()
    assert all(tag in tags for tag in ('"1"', '"2"', '"main"', '"0a1b2c3d"', '"0a1b2c3d4e5f"'))


class TokenService(BaseHTTPRequestHandler):
    """What a job of GitHub Actions asks for its token."""

    token = ""

    def do_GET(self) -> None:
        """Answer with the token, if the request is the one of the document."""
        is_right = self.path.endswith("&audience=oci-mirror")
        is_right = is_right and self.headers["Authorization"] == "bearer request-token"
        body = json.dumps({"value": self.token}).encode()
        self.send_response(200 if is_right else 400)
        self.end_headers()
        self.wfile.write(body)


def test_ci_jobs_log_in_with_the_tokens_of_their_issuers(
    upstream: DockerRegistry, tmp_path: Path
) -> None:
    (access,) = (one["access"] for one in documents() if "access" in one)
    (who,) = (rule["who"] for rule in access["rules"])
    env: dict[str, str] = {"CI_COMMIT_SHORT_SHA": "0a1b2c3d", "GITHUB_SHA": "0a1b2c3d4e5f"}
    tokens: list[str] = []
    for issuer, user in zip(access["issuers"], who, strict=True):
        signer = Signer(issuer["issuer"])
        keys = tmp_path / f"{len(tokens)}.json"
        keys.write_bytes(key_set(signer))
        issuer.pop("ca", None)
        issuer["jwks"] = str(keys)
        claims = {"iss": issuer["issuer"], "aud": issuer["audience"], **issuer["claims"]}
        claims["sub"] = user.removeprefix(issuer["user_prefix"])
        tokens.append(signer.sign(now=time.time(), **claims))
    env["MIRROR_TOKEN"], TokenService.token = tokens
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY data /data\n")
    (tmp_path / "data").write_bytes(images.random_bytes(10_000, 3))
    push_host = f"127.0.0.1:{free_port()}"
    hosted = {"name": NAME, "listen": push_host}
    with (
        Mirror({"docker.io": upstream.url}, hosted=hosted, access=access) as mirror,
        ThreadingHTTPServer(("127.0.0.1", 0), TokenService) as service,
        Dockerd("http://127.0.0.1:9") as docker,
    ):
        threading.Thread(target=service.serve_forever, daemon=True).start()
        env |= {
            "REGISTRY": push_host,
            "DOCKER_CONFIG": str(docker.dir / "client"),
            "DOCKER_HOST": f"unix://{docker.socket}",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "request-token",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"http://127.0.0.1:{service.server_port}/?v=1",
        }
        scripts = jobs(with_login=True)
        assert len(scripts) == len(who)
        for script in scripts:
            run("bash", "-euo", "pipefail", "-c", f"cd {tmp_path}\n{script}", env=env)
            run("docker", "logout", push_host, env=env)
        service.shutdown()
        pushed = [line for line in mirror.log() if line.get("message") == "pushed"]
    assert {line["user"] for line in pushed} == set(who)
    assert {line["tag"] for line in pushed} == {"0a1b2c3d", "0a1b2c3d4e5f"}


def test_cluster_pulls_hosted_and_mirrored_images_by_one_mirror(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosted = images.image(4)
    images.push(f"http://{site.push_host}", "team/app", hosted, "1")
    config = str(site.mirror.config_file)
    main(["clients", "--config", config, "--for", "containerd", "--write", str(tmp_path)])
    capsys.readouterr()
    written = tmp_path / f"containerd/certs.d/{NAME}/hosts.toml"
    (shown,) = blocks("toml")
    assert written.read_text() == site.text(shown).partition("\n")[2]
    (pod,) = (one for one in documents() if one.get("kind") == "Pod")
    with Containerd() as containerd:
        containerd.hosts = tmp_path / "containerd/certs.d"
        for container in pod["spec"]["containers"]:
            containerd.pull(container["image"])
        held = containerd.held()
    assert hosted.digest in held
    assert images.image(1).digest in held
