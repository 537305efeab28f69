"""The helpers of ``tests/real`` work: each client against a registry, without a mirror.

If a test of the mirror fails and these pass, the fault is in the mirror.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.real import images
from tests.real.clients import NOWHERE, Containerd, Dockerd, Podman, Skopeo
from tests.real.process import listening, wait_until
from tests.real.registry import DockerRegistry, NginxFront
from tests.real.server import ROOT
from tests.real.tokens import Certificate, TokenServer
from tests.real.wire import ask, download


def test_each_client_pulls_pushed_images_from_a_registry() -> None:
    image, index = images.image(1), images.index(2)
    with DockerRegistry() as registry:
        registry.push("library/app", image, "1")
        registry.push("library/app", index, "multi")
        assert registry.gets() == []

        with Containerd() as containerd:
            containerd.use("docker.io", registry.url)
            containerd.pull("docker.io/library/app:1")
            assert containerd.held() == image.contents()
            assert containerd.digest_of("docker.io/library/app:1") == image.digest
            assert registry.gets() == sorted(image.contents())
            containerd.forget()
            containerd.pull("docker.io/library/app:multi", all_platforms=True)
            assert containerd.held() == index.contents()

        with Dockerd(registry.url) as docker:
            docker.pull("app:1")
            assert docker.inspect("app:1")["Id"] == image.config.digest
            assert docker.layers("app:1") == list(image.diff_ids)
            docker.forget()
            docker.pull("app:multi")
            assert docker.layers("app:multi") == list(index.images[0].diff_ids)

        with Podman({"docker.io": registry.host}) as podman:
            podman.pull("docker.io/library/app:1")
            assert podman.inspect("app:1")["Digest"] == image.digest
            assert podman.layers("app:1") == list(image.diff_ids)
            podman.forget()

        with Skopeo({"docker.io": registry.host}) as skopeo:
            assert skopeo.copy("docker.io/library/app:1") == image.contents()
            assert skopeo.copy("docker.io/library/app:multi") == index.contents()
            assert skopeo.inspect_raw("docker.io/library/app:multi") == index.manifest.data


def test_clients_fail_without_a_mirror() -> None:
    """Otherwise a pull in another test could be served by another program."""
    with Containerd() as containerd:
        containerd.use("docker.io", NOWHERE)
        pulled = containerd.ctr(
            *("images", "pull", "--hosts-dir", containerd.hosts, "docker.io/library/app:1"),
            check=False,
        )
        assert pulled.returncode != 0
        assert containerd.held() == {}
    with Skopeo({"docker.io": NOWHERE.removeprefix("http://")}) as skopeo:
        assert skopeo.skopeo("inspect", "docker://docker.io/app:1", check=False).returncode != 0


def test_docker_schema_2_images_and_artifacts_are_pulled_unchanged() -> None:
    image = images.image(3, flavour="docker")
    sbom = images.artifact(4, subject=image)
    with DockerRegistry() as registry, Skopeo() as skopeo:
        registry.push("org/app", image, "1")
        registry.push("org/app", sbom, "sbom")
        assert skopeo.copy(f"{registry.host}/org/app:sbom") == sbom.contents()
        with Containerd() as containerd:
            containerd.use("docker.io", registry.url)
            containerd.fetch("docker.io/org/app:sbom")
            assert containerd.held() == sbom.contents()
        assert skopeo.copy(f"{registry.host}/org/app:1") == image.contents()
        found = ask(f"{registry.url}/v2/org/app/manifests/sbom", headers=images.ACCEPT)
        assert found.body == sbom.manifest.data
        assert b'"subject"' in found.body


def test_registry_asks_for_basic_credentials_or_tokens_or_serves_tls(tmp_path: Path) -> None:
    image = images.image(5, layers=(1000,))
    with DockerRegistry(basic=("joe", "secret")) as registry:
        registry.push("org/app", image, "1")
        url = f"{registry.url}/v2/org/app/manifests/1"
        assert ask(url).status == 401
        headers = registry.authorization("org/app") | images.ACCEPT
        assert ask(url, headers=headers).body == image.manifest.data

    with (
        TokenServer({"joe": "secret"}, anonymous=False) as tokens,
        DockerRegistry(tokens=tokens) as registry,
    ):
        registry.push("org/app", image, "1")
        url = f"{registry.url}/v2/org/app/manifests/1"
        refused = ask(url)
        assert refused.status == 401
        assert tokens.realm in refused.headers["WWW-Authenticate"]
        query = f"{tokens.realm}?service={tokens.service}&scope=repository:org/app:pull"
        assert ask(query).status == 401
        basic = base64.b64encode(b"joe:secret").decode()
        granted = ask(query, headers={"Authorization": f"Basic {basic}"})
        assert granted.status == 200
        with Skopeo() as skopeo:
            copied = skopeo.copy(f"{registry.host}/org/app:1", "--src-creds", "joe:secret")
        assert copied == image.contents()
        assert {call.account for call in tokens.calls if call.status == 200} == {"joe"}
        other = f"{registry.url}/v2/org/other/manifests/1"
        bearer = registry.authorization("org/app")
        assert ask(other, headers=bearer).status == 401

    with DockerRegistry(tls=Certificate.make(tmp_path)) as registry:
        registry.push("org/app", image, "1")
        url = f"{registry.url}/v2/org/app/manifests/1"
        assert ask(url, headers=images.ACCEPT, ca=registry.ca).body == image.manifest.data


def test_nginx_front_limits_the_rate_and_logs_requests() -> None:
    size = 4 << 20
    with DockerRegistry() as registry, NginxFront(registry.url, limit_rate=8 << 20) as front:
        digest = registry.push_large("org/big", size)
        got = download(f"{front.url}/v2/org/big/blobs/{digest}")
        assert (got.size, f"sha256:{got.sha256}") == (size, digest)
        # 4 MiB at 8 MiB/s. nginx does not limit the share of the first second.
        assert got.ended - got.begun > 0.2
        part = ask(f"{front.url}/v2/org/big/blobs/{digest}", headers={"Range": "bytes=0-9"})
        assert part.status == 206
        gets = front.blob_gets(digest, 2)
        assert [(seen.status, seen.sent, seen.range) for seen in gets] == [
            (200, size, ""),
            (206, 10, "bytes=0-9"),
        ]


def test_skopeo_reads_a_layout_on_disk(tmp_path: Path) -> None:
    index = images.index(6)
    images.write_layout(tmp_path / "layout", index, "1")
    with Skopeo() as skopeo:
        read = skopeo.skopeo("inspect", "--raw", f"oci:{tmp_path}/layout:1").stdout
    assert "sha256:" + hashlib.sha256(read).hexdigest() == index.digest


def test_killed_program_starts_again_on_its_port_and_data() -> None:
    image = images.image(7, layers=(1000,))
    registry = DockerRegistry()
    with registry:
        registry.push("org/app", image, "1")
        registry.kill()
        assert not listening(registry.port)
        registry.start()
        url = f"{registry.url}/v2/org/app/manifests/1"
        assert ask(url, headers=images.ACCEPT).body == image.manifest.data
        directory = registry.dir
    assert not directory.exists()
    assert not listening(registry.port)


def test_start_on_a_taken_port_fails() -> None:
    with DockerRegistry() as registry:
        second = DockerRegistry()
        second.port = registry.port
        with pytest.raises(pytest.fail.Exception, match="is taken"), second:
            pass


def test_program_that_ends_at_start_fails_with_its_output() -> None:
    front = NginxFront("not a url")
    with pytest.raises(pytest.fail.Exception, match="invalid"), front:
        pass
    assert not front.dir.exists()


def test_killing_a_program_kills_its_children() -> None:
    with NginxFront("http://127.0.0.1:9") as front:
        # nginx listens before it has started both of its workers.
        wait_until(lambda: len(_children(front.pid)) == 2, "two workers of nginx")
        children = _children(front.pid)
        front.kill()
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
        front.start()
        wait_until(lambda: len(_children(front.pid)) == 2, "two workers of nginx")


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_process_that_outlives_the_run_fails_it_and_is_killed(tmp_path: Path) -> None:
    leak = "import subprocess\n\ndef test_leak():\n    subprocess.run(['sh', '-c', '{}'])\n"
    for command, status in (("setsid sleep 1000 & echo $! >left", 1), ("true", 0)):
        (tmp_path / "test_leak.py").write_text(
            f"from tests import conftest\n\nconftest._END_TIMEOUT_S = 0.5\n{leak.format(command)}"
        )
        inner = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "test_leak.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert inner.returncode == status, inner.stdout.decode()
        assert (b"outlived the tests" in inner.stdout) == bool(status)
    # The remaining process was killed.
    left = Path("/proc", (tmp_path / "left").read_text().strip(), "cmdline")

    def ended() -> bool:
        try:
            return b"sleep" not in left.read_bytes()
        except OSError:
            return True

    wait_until(ended, "it runs", 5)
