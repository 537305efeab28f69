"""The checks of a node, with scripts as runtimes. Real ones: ``tests/real/test_doctor.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mirror.cli.doctor.findings import Finding, Status
from mirror.cli.doctor.node_checks import check_node
from mirror.cli.doctor.runtimes import NodeMachine
from mirror.cli.own_server import OwnServer
from mirror.threads import run_in_thread
from mirror.web.probe_image import PROBE_REPOSITORY
from tests.server_kit import running
from tests.unit.cli.doctor.kit import serve_page

GET = """
import sys, urllib.request
registry, _, rest = sys.argv[-1].partition("/")
name, _, nonce = rest.rpartition(":")
url = f"{MIRROR}/v2/{name}/manifests/{nonce}?ns={registry}"
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url).read()
"""


def install(directory: Path, body: str) -> NodeMachine:
    """Install a script as ``crictl``, whose runtime runs."""
    script = directory / "crictl"
    probe = "import sys\nif sys.argv[1] == 'version': sys.exit(0)\n"
    script.write_text(f"#!{sys.executable}\n{probe}{body}")
    script.chmod(0o755)
    return NodeMachine({"PATH": str(directory)}, str(directory / "none.toml"))


async def check(node: NodeMachine, url: str, *registries: str) -> dict[str, Finding]:
    def run() -> list[Finding]:
        return list(check_node(node, ["cri"], registries or ("docker.io",), OwnServer(url)))

    found = await run_in_thread(run)
    return {f"{one.check} {one.values()['subject']}": one for one in found}


async def test_pull_that_arrives_is_ok_and_its_image_is_removed(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as server:
        log = tmp_path / "log"
        body = (
            f"MIRROR = {server.url!r}\n"
            f"import sys; open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\n"
            f"if sys.argv[1] == 'pull':\n    exec({GET!r})\n"
        )
        found = await check(install(tmp_path, body), server.url, "docker.io", "other.io")
        assert {one.status for one in found.values()} == {Status.OK}
        pulled: list[str] = []
        removed: list[str] = []
        for line in log.read_text().splitlines():
            (pulled if line.startswith("pull ") else removed).append(line.split()[1])
        assert sorted(pulled) == sorted(removed)
        assert len({image.rpartition(":")[2] for image in pulled}) == 2
        names = {f"docker.io/{PROBE_REPOSITORY}", f"other.io/{PROBE_REPOSITORY}"}
        assert {image.rpartition(":")[0] for image in pulled} == names


async def test_pull_that_fails_has_the_last_line_of_the_runtime_and_a_remedy(
    tmp_path: Path,
) -> None:
    async with running(tmp_path / "data") as server:
        body = "import sys; sys.exit('a line\\nnot found at the registry')"
        found = await check(install(tmp_path, body), server.url)
        pull = found["pull cri docker.io"]
        assert pull.status is Status.PROBLEM
        expected = "it did not come through the mirror: not found at the registry"
        assert (pull.message, "oci-mirror clients" in pull.remedy) == (expected, True)


async def test_pull_that_arrives_and_fails_is_not_called_ignored(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as server:
        body = f"MIRROR = {server.url!r}\n{GET}\nimport sys; sys.exit('checksum is wrong')"
        pull = (await check(install(tmp_path, body), server.url))["pull cri docker.io"]
        assert pull.message == f"it reached {server.url}, but failed: checksum is wrong"


async def test_pull_that_succeeds_elsewhere_is_a_warning(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as server:
        pull = (await check(install(tmp_path, "pass"), server.url))["pull cri docker.io"]
        assert (pull.status, "has not seen it" in pull.message) == (Status.WARNING, True)


async def test_mirror_that_does_not_respond_or_is_another_server_is_a_problem(
    tmp_path: Path,
) -> None:
    found = await check(install(tmp_path, "pass"), "http://127.0.0.1:9")
    assert found["mirror http://127.0.0.1:9"].status is Status.PROBLEM
    async with serve_page() as url:
        found = await check(install(tmp_path, "pass"), url)
        assert "no oci-mirror" in found[f"mirror {url}"].message


async def test_registry_and_version_that_cannot_serve_the_probe_are_told_apart(
    tmp_path: Path,
) -> None:
    async with running(tmp_path / "data") as server:
        found = await check(install(tmp_path, "pass"), server.url, "unknown.example")
        finding = found[f"mirror {server.url} unknown.example"]
        assert "upstreams.unknown.example" in finding.remedy
    page = b"HTTP/1.1 404 Not Found\r\nServer: oci-mirror\r\nContent-Length: 2\r\n\r\n{}"
    async with serve_page(page) as url:
        found = await check(install(tmp_path, "pass"), url)
        assert "does not serve the probe image" in found[f"mirror {url} docker.io"].message
        assert "pull cri docker.io" not in found


async def test_runtime_that_is_not_installed_is_a_problem(tmp_path: Path) -> None:
    async with running(tmp_path / "data") as server:
        found = await check(NodeMachine({"PATH": os.devnull}), server.url)
        assert found["runtime this node"].status is Status.PROBLEM


def install_stopped(directory: Path, name: str, tried: Path) -> None:
    """Install a program whose daemon does not run. It notes its arguments in ``tried``."""
    script = directory / name
    script.write_text(f'#!/bin/sh\necho "$@" >> {tried}\necho "no answer at x.sock" >&2\nexit 1\n')
    script.chmod(0o755)


async def test_runtime_that_does_not_run_is_one_finding_and_is_not_asked_to_pull(
    tmp_path: Path,
) -> None:
    tried = tmp_path / "tried"
    async with running(tmp_path / "data") as server:
        node = install(tmp_path, f"MIRROR = {server.url!r}\n{GET}")
        install_stopped(tmp_path, "docker", tried)

        def run(*chosen: str) -> list[Finding]:
            mirror = OwnServer(server.url)
            return list(check_node(node, chosen, ["docker.io", "other.io"], mirror))

        found = await run_in_thread(run)
        (stopped,) = (one for one in found if one.subject == "docker")
        assert (stopped.check, stopped.status) == ("runtime", Status.WARNING)
        assert stopped.message == "it is installed, but does not run: no answer at x.sock"
        assert "systemctl start docker" in stopped.remedy
        assert tried.read_text() == "version\n"
        # Asked for by its name, or the only one: then nothing can be pulled as it should.
        (stopped,) = (one for one in await run_in_thread(run, "docker") if one.subject == "docker")
        assert stopped.status is Status.PROBLEM
        (tmp_path / "crictl").unlink()
        (stopped,) = (one for one in await run_in_thread(run) if one.subject == "docker")
        assert stopped.status is Status.PROBLEM


async def test_stopped_mirror_has_a_reason_without_a_number_of_the_system(tmp_path: Path) -> None:
    found = await check(install(tmp_path, "pass"), "http://127.0.0.1:9")
    assert found["mirror http://127.0.0.1:9"].message == "it does not respond: Connection refused"
