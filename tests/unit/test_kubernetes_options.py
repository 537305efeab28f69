"""The manifests beside ``config/kubernetes``: the DaemonSet, and the CronJob for leases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mirror import __version__
from mirror.config.load import load

CONFIG = Path(__file__).parents[2] / "config"
OPTIONS = ("kubernetes-daemonset", "kubernetes-in-use")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def objects(name: str) -> dict[str, dict[str, Any]]:
    """``Kind`` of each manifest to its content."""
    directory = CONFIG / name
    return {
        one["kind"]: one
        for file in read(directory / "kustomization.yaml")["resources"]
        for one in yaml.safe_load_all((directory / file).read_text())
    }


def main_statefulset() -> dict[str, Any]:
    found: dict[str, Any] = read(CONFIG / "kubernetes/statefulset.yaml")
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_kustomization_lists_every_file_and_this_version(name: str) -> None:
    kustomization = read(CONFIG / name / "kustomization.yaml")
    generated = [f for one in kustomization.get("configMapGenerator", []) for f in one["files"]]
    listed = {"kustomization.yaml", *kustomization["resources"], *generated}
    assert {path.name for path in (CONFIG / name).iterdir()} == listed
    main = read(CONFIG / "kubernetes/kustomization.yaml")
    assert kustomization["images"] == main["images"]
    assert kustomization["images"][0]["newTag"] == __version__
    assert kustomization["namespace"] == main["namespace"]


def test_daemonset_listens_on_loopback_only_and_its_configuration_is_valid() -> None:
    pod = objects("kubernetes-daemonset")["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    settings = load(str(CONFIG / "kubernetes-daemonset/mirror.yaml"), environment)
    assert pod["hostNetwork"]
    assert settings.listen == "127.0.0.1:5100"
    assert settings.data_dir in {one["mountPath"] for one in container["volumeMounts"]}
    assert pod["terminationGracePeriodSeconds"] > settings.drain_timeout
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {
            "host": "127.0.0.1",
            "path": "/healthz",
            "port": 5100,
        }


def test_only_the_container_that_sets_the_owner_runs_as_root() -> None:
    pod = objects("kubernetes-daemonset")["DaemonSet"]["spec"]["template"]["spec"]
    (owner,), (container,) = pod["initContainers"], pod["containers"]
    user = container["securityContext"]["runAsUser"]
    assert container["securityContext"]["runAsNonRoot"]
    assert [str(user)] == [
        owner["command"][n + 1] for n, a in enumerate(owner["command"]) if a == "-o"
    ]
    assert [one["mountPath"] for one in owner["volumeMounts"]] == ["/data"]
    for one in (owner, container):
        assert one["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_lease_job_is_the_user_of_the_server_and_uses_its_volume() -> None:
    job = objects("kubernetes-in-use")["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = job["containers"]
    server = main_statefulset()["spec"]
    pod = server["template"]["spec"]
    for key in ("runAsUser", "runAsGroup", "fsGroup"):
        assert job["securityContext"][key] == pod["securityContext"][key]
    (volume,) = (one for one in job["volumes"] if "persistentVolumeClaim" in one)
    claim = server["volumeClaimTemplates"][0]["metadata"]["name"]
    name = main_statefulset()["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == f"{claim}-{name}-0"
    (affinity,) = job["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert (
        affinity["labelSelector"]["matchLabels"]["statefulset.kubernetes.io/pod-name"]
        == f"{name}-0"
    )
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment["OCI_MIRROR_DATA_DIR"] == "/data"


def test_lease_job_may_only_list_pods() -> None:
    found = objects("kubernetes-in-use")
    assert found["ClusterRole"]["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}
    ]
    account = found["ServiceAccount"]["metadata"]["name"]
    (subject,) = found["ClusterRoleBinding"]["subjects"]
    job = found["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert job["serviceAccountName"] == subject["name"] == account
