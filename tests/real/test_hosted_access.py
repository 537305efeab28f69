"""Real clients log in: right, wrong, and not at all, at both listeners, with TLS and without."""

from __future__ import annotations

import json
import ssl
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from time import time

import pytest

from tests.real import images
from tests.real.clients import Containerd, Dockerd, Podman, Skopeo
from tests.real.process import free_port, run
from tests.real.server import Mirror
from tests.real.tokens import Certificate
from tests.unit.access.kit import AUDIENCE, ISSUER, Signer, key_set, rule

pytestmark = pytest.mark.timeout(300)

NAME = "registry.example"
TOKEN = "0123456789abcdef-token"
KEY = Signer("one")
RULES = [
    rule(f"{NAME}/team/**", ["ci", "robot", "k8s:job"], "pull", "push", "delete"),
    rule(f"{NAME}/**", "reader", "pull"),
]


@pytest.fixture
def hosting(tmp_path: Path) -> Iterator[tuple[Mirror, str]]:
    """Run a server with access. Yields it, and ``host:port`` of the push listener."""
    push_host = f"127.0.0.1:{free_port()}"
    users = tmp_path / "htpasswd"
    run("htpasswd", "-cbB", users, "ci", "right")
    run("htpasswd", "-bB", "-C", "6", users, "reader", "reader's")
    (tmp_path / "tokens.yaml").write_text(f"- {{name: robot, token: {TOKEN}}}\n")
    (tmp_path / "jwks.json").write_bytes(key_set(KEY))
    issuer = {
        "issuer": ISSUER,
        "jwks": str(tmp_path / "jwks.json"),
        "audience": AUDIENCE,
        "user_prefix": "k8s:",
    }
    access = {
        "users": str(users),
        "tokens": str(tmp_path / "tokens.yaml"),
        "issuers": [issuer],
        "rules": RULES,
    }
    hosted = {"name": NAME, "listen": push_host}
    upstreams = {"docker.io": "http://127.0.0.1:9"}
    with Mirror(upstreams, hosted=hosted, access=access) as mirror:
        yield mirror, push_host


def push(push_host: str, tmp_path: Path, seed: int, user: str = "ci:right") -> images.Image:
    """Push an image by skopeo."""
    image = images.image(seed)
    layout = images.write_layout(tmp_path / f"layout-{seed}", image)
    with Skopeo() as skopeo:
        skopeo.skopeo(
            *("copy", "--dest-tls-verify=false", "--dest-creds", user),
            *(f"oci:{layout}:latest", f"docker://{push_host}/team/app:v{seed}"),
        )
    return image


def test_skopeo_logs_in(hosting: tuple[Mirror, str], tmp_path: Path) -> None:
    mirror, push_host = hosting
    jwt = KEY.sign(now=time())
    with Skopeo() as skopeo:
        for user, password in (("ci", "right"), ("any", TOKEN), ("any", jwt)):
            login = ("login", "--tls-verify=false", "-u", user, "-p", password, push_host)
            assert b"Login Succeeded" in skopeo.skopeo(*login).stdout
            skopeo.skopeo("logout", push_host)
        wrong = ("login", "--tls-verify=false", "-u", "ci", "-p", "wrong", push_host)
        assert b"invalid username/password" in skopeo.skopeo(*wrong, check=False).stderr
        reference = f"docker://{push_host}/team/app:v1"
        absent = skopeo.skopeo("inspect", "--tls-verify=false", reference, check=False)
        assert b"log in to pull from this repository" in absent.stderr
        # Kept by a login, and sent at each request.
        skopeo.skopeo("login", "--tls-verify=false", "-u", "ci", "-p", "right", push_host)
        image = images.image(1)
        layout = images.write_layout(tmp_path, image)
        copy = ("copy", "--dest-tls-verify=false", f"oci:{layout}:latest")
        skopeo.skopeo(*copy, reference)
        assert skopeo.copy(f"{push_host}/team/app:v1") == image.contents()
        denied = skopeo.skopeo(*copy, f"docker://{push_host}/other/app:v1", check=False)
        assert b"403 (Forbidden)" in denied.stderr
        reader = ("--creds", "reader:reader's")
        inspect = ("inspect", "--tls-verify=false", *reader, reference)
        assert skopeo.skopeo(*inspect).returncode == 0
        creds = ("--dest-creds", "reader:reader's")
        assert b"denied" in skopeo.skopeo(*copy, *creds, reference, check=False).stderr
    changes = [line for line in mirror.log() if line["message"] == "pushed"]
    assert {(line["user"], line["client"]) for line in changes} == {("ci", "127.0.0.1")}


def test_podman_logs_in(hosting: tuple[Mirror, str], tmp_path: Path) -> None:
    _, push_host = hosting
    image = push(push_host, tmp_path, 2)
    reference = f"{push_host}/team/app:v2"
    with Podman() as podman:
        pull = ("pull", "--quiet", "--tls-verify=false", reference)
        assert podman.podman(*pull, check=False).returncode != 0
        login = ("login", "--tls-verify=false", "-u", "ci", "-p")
        assert podman.podman(*login, "wrong", push_host, check=False).returncode != 0
        podman.podman(*login, "right", push_host)
        podman.pull(reference, "--tls-verify=false")
        assert podman.layers(reference) == list(image.diff_ids)
        podman.podman("push", "--tls-verify=false", reference, f"docker://{push_host}/team/copy:v2")


def test_docker_logs_in(hosting: tuple[Mirror, str], tmp_path: Path) -> None:
    _, push_host = hosting
    image = push(push_host, tmp_path, 3)
    reference = f"{push_host}/team/app:v3"
    with Dockerd("http://127.0.0.1:9") as docker:
        absent = docker.docker("pull", reference, check=False)
        assert b"no basic auth credentials" in absent.stderr
        wrong = docker.docker("login", "-u", "ci", "-p", "wrong", push_host, check=False)
        assert b"401 Unauthorized" in wrong.stderr or b"unauthorized" in wrong.stderr
        assert (
            b"Login Succeeded"
            in docker.docker("login", "-u", "ci", "-p", "right", push_host).stdout
        )
        docker.pull(reference)
        assert docker.layers(reference) == list(image.diff_ids)
        docker.docker("tag", reference, f"{push_host}/team/copy:v3")
        docker.docker("push", f"{push_host}/team/copy:v3")
        docker.docker("tag", reference, f"{push_host}/other/copy:v3")
        denied = docker.docker("push", f"{push_host}/other/copy:v3", check=False)
        assert b"denied" in denied.stderr
        docker.docker("logout", push_host)


def test_containerd_sends_the_header_of_clients_to_the_mirror(
    hosting: tuple[Mirror, str], tmp_path: Path
) -> None:
    mirror, push_host = hosting
    image = push(push_host, tmp_path, 4)
    secret = tmp_path / "login"
    secret.write_text("reader:reader's\n")
    with Containerd() as containerd:
        reference = f"{NAME}/team/app:v4"
        containerd.use(NAME, mirror.url)
        refused = containerd.ctr(
            "image", "pull", "--hosts-dir", containerd.hosts, reference, check=False
        )
        assert refused.returncode != 0
        run(
            *(sys.executable, "-m", "mirror", "clients", "--for", "containerd", "--enforce"),
            *("--config", mirror.config_file, "--credentials-file", secret),
            *("--write", containerd.dir / "etc"),
        )
        written = containerd.dir / "etc/containerd/certs.d"
        containerd.ctr("image", "pull", "--hosts-dir", written, reference)
        held = containerd.held()
        assert all(held[digest] == data for digest, data in image.contents().items())
    pulls = [line for line in mirror.log() if line.get("repository") == "team/app"]
    assert {line.get("user") for line in pulls if line["status"] == 200} >= {"reader"}
    assert any(line["status"] == 403 for line in pulls)


def test_user_who_is_removed_is_refused_within_seconds(hosting: tuple[Mirror, str]) -> None:
    mirror, push_host = hosting
    users = Path(mirror.settings["access"]["users"])
    url = f"http://{push_host}/v2/"
    command = ("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-u", "ci:right", url)
    assert run(*command).stdout == b"200"
    users.write_text("")
    assert _becomes(command, b"401")


def _becomes(command: tuple[str, ...], expected: bytes) -> bool:
    deadline = time() + 10
    while time() < deadline:
        if run(*command).stdout == expected:
            return True
    return False


def test_keys_of_an_issuer_are_fetched_over_tls(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path)

    class KeySets(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(key_set(KEY))

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), KeySets)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert_file, certificate.key_file)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    push_host = f"127.0.0.1:{free_port()}"
    issuer = {
        "issuer": ISSUER,
        "jwks": f"https://127.0.0.1:{server.server_port}/keys",
        "audience": AUDIENCE,
        "ca": str(certificate.cert_file),
    }
    access = {"issuers": [issuer], "rules": RULES}
    hosted = {"name": NAME, "listen": push_host}
    try:
        with Mirror({"docker.io": "http://127.0.0.1:9"}, hosted=hosted, access=access, workers=2):
            for token, status in ((KEY.sign(now=time()), b"200"), (KEY.sign(now=0), b"401")):
                header = f"Authorization: Bearer {token}"
                command = ("curl", "-s", "-w", "%{http_code}", "-o", "/dev/null", "-H", header)
                assert run(*command, f"http://{push_host}/v2/").stdout == status
    finally:
        server.shutdown()
        server.server_close()


def test_server_says_which_file_is_wrong_and_does_not_start(tmp_path: Path) -> None:
    users = tmp_path / "htpasswd"
    users.write_text("ci:$apr1$salt$0123456789012345678901\n")
    config = tmp_path / "mirror.json"
    settings = {
        "listen": f"127.0.0.1:{free_port()}",
        "data_dir": str(tmp_path / "data"),
        "access": {"users": str(users)},
        "upstreams": {"docker.io": {"endpoints": ["http://127.0.0.1:9"]}},
    }
    config.write_text(json.dumps(settings))
    for command in ("serve", "check-config"):
        argv = ["--config", config] if command == "serve" else [config]
        ended = run(sys.executable, "-m", "mirror", command, *argv, check=False)
        assert ended.returncode == 78
        expected = (
            f"access.users: {users}: line 1: the hash is not bcrypt: make it with htpasswd -B"
        )
        assert expected in ended.stderr.decode()
