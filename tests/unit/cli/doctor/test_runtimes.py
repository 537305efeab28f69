"""The runtimes of a node: which are found, by which commands they pull, what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mirror.cli.doctor.findings import Status
from mirror.cli.doctor.runtimes import RUNTIMES, NodeMachine, Runtime, find_runtimes

IMAGE = "docker.io/oci-mirror-check/probe:1"
V1, V2 = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"


@dataclass(frozen=True, slots=True)
class FakeNode(NodeMachine):
    """A node with these programs, whose queries have these outputs."""

    programs: frozenset[str] = frozenset()
    outputs: Mapping[str, str] = field(default_factory=dict)

    def find(self, program: str) -> str | None:
        return f"/bin/{program}" if program in self.programs else None

    def query(self, *command: str) -> str:
        return self.outputs.get(Path(command[0]).name, "")


def node(*programs: str, config: str = "/none", **outputs: str) -> FakeNode:
    return FakeNode({}, config, frozenset(programs), outputs)


def the(name: str, found: NodeMachine) -> Runtime:
    (runtime,) = find_runtimes(found, [name])
    return runtime


def test_only_installed_and_chosen_runtimes_are_found() -> None:
    assert find_runtimes(node(), []) == []
    everything = node("ctr", "containerd", "crictl", "k3s", "docker", "podman")
    assert [one.name for one in find_runtimes(everything, [])] == list(RUNTIMES)
    assert [one.name for one in find_runtimes(everything, ["podman"])] == ["podman"]


def test_commands_pull_and_remove_the_image() -> None:
    assert list(the("cri", node("crictl")).pull(IMAGE)) == ["/bin/crictl", "pull", IMAGE]
    assert list(the("k3s", node("k3s")).pull(IMAGE)) == ["/bin/k3s", "crictl", "pull", IMAGE]
    assert list(the("k3s", node("k3s")).remove(IMAGE)) == ["/bin/k3s", "crictl", "rmi", IMAGE]
    assert list(the("docker", node("docker")).pull(IMAGE)) == [
        *("/bin/docker", "pull", "--quiet", IMAGE)
    ]


def test_each_runtime_with_a_daemon_has_a_probe_and_says_how_to_start_it() -> None:
    everything = node("ctr", "containerd", "crictl", "k3s", "docker", "podman")
    for runtime in find_runtimes(everything, []):
        assert bool(runtime.probe) == bool(runtime.start) == (runtime.name != "podman")
        assert not runtime.probe or runtime.probe[-1] == "version"


def test_docker_can_mirror_docker_io_only() -> None:
    docker = the("docker", node("docker"))
    assert docker.may_mirror("docker.io")
    assert not docker.may_mirror("ghcr.io")
    assert the("podman", node("podman")).may_mirror("ghcr.io")


def test_remedy_of_docker_says_which_mirrors_the_engine_has() -> None:
    assert "daemon.json" in the("docker", node("docker", docker="null\n")).remedy("docker.io")
    other = node("docker", docker='["http://other:5100/"]\n')
    assert "http://other:5100/" in the("docker", other).remedy("docker.io")


@pytest.mark.parametrize("plugin", [V1, V2])
def test_containerd_uses_the_directory_and_the_socket_of_its_configuration(
    plugin: str, tmp_path: Path
) -> None:
    dump = (
        '[grpc]\naddress = "/run/x.sock"\n'
        f'[plugins."{plugin}".registry]\nconfig_path = "{tmp_path}"\n'
    )
    containerd = the("containerd", node("ctr", "containerd", containerd=dump))
    command = list(containerd.pull(IMAGE))
    assert command[command.index("--address") + 1] == "/run/x.sock"
    assert command[command.index("--hosts-dir") + 1] == str(tmp_path)
    (finding,) = containerd.findings
    assert finding.status is Status.OK
    assert f"there is no {tmp_path}/docker.io/hosts.toml" in containerd.remedy("docker.io")
    (tmp_path / "docker.io").mkdir()
    (tmp_path / "docker.io/hosts.toml").write_text("")
    assert f"compare {tmp_path}/docker.io/hosts.toml" in containerd.remedy("docker.io")


def test_containerd_file_is_read_if_it_prints_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[plugins."{V1}".registry]\nconfig_path = "/a:/b"\n')
    (finding,) = the("containerd", node("ctr", "containerd", config=str(file))).findings
    assert (finding.status, "2 directories" in finding.message) == (Status.WARNING, True)


def test_containerd_without_config_path_is_a_problem_unless_kubernetes_cannot_use_it() -> None:
    (finding,) = the("containerd", node("ctr", "containerd", "kubelet")).findings
    assert finding.status is Status.PROBLEM
    (finding,) = the("containerd", node("ctr", "containerd")).findings
    assert (finding.status, "no kubelet" in finding.message) == (Status.WARNING, True)
    disabled = f'disabled_plugins = ["{V1}"]\n'
    assert the("containerd", node("ctr", "containerd", containerd=disabled)).findings == ()


def test_query_that_fails_has_no_output(tmp_path: Path) -> None:
    here = NodeMachine({"PATH": "/usr/bin:/bin"})
    assert here.query("sh", "-c", "echo said") == "said\n"
    assert here.query("sh", "-c", "echo said; exit 1") == ""
    assert here.query(str(tmp_path / "none")) == ""
