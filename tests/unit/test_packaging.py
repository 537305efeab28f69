"""Image, Compose file and Kubernetes manifests: they agree with each other and the settings."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from mirror import __version__
from mirror.cli.main import _parser
from mirror.config.load import load
from mirror.config.settings import Settings
from mirror.config.values import parse_duration, parse_size, split_host
from tests.real.process import need

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "config" / "kubernetes"
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PORT = split_host(Settings().listen)[1]


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name}\s+(.*)$", DOCKERFILE, re.MULTILINE)


def environment() -> dict[str, str]:
    """The variables that the image sets for the server."""
    return dict(re.findall(r"(OCI_MIRROR_\w+)=(\S+)", " ".join(instructions("ENV"))))


# --- image ----------------------------------------------------------------------------------------


def copied() -> Iterator[str]:
    """The files and directories of the checkout that the image copies."""
    for line in instructions("COPY"):
        if not line.startswith("--from"):
            yield from line.split()[:-1]


def test_files_that_the_image_copies_exist_and_all_others_are_ignored() -> None:
    rules = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line[:1] not in ("#", "")
    ]
    assert rules[0] == "*"
    kept = {rule[1:].rstrip("/") for rule in rules if rule.startswith("!")}
    assert set(copied()) == kept
    for name in kept:
        assert (ROOT / name).exists(), name
    # All else in the directory is ignored: data, secrets, history.
    dropped = [rule for rule in rules[1:] if not rule.startswith("!")]
    assert any(fnmatch("mirror/__pycache__", rule) for rule in dropped)


def test_image_runs_as_an_unprivileged_numeric_user() -> None:
    assert len(instructions("FROM")) == 2
    (user,) = instructions("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert instructions("VOLUME") == [environment()["OCI_MIRROR_DATA_DIR"]]
    assert instructions("EXPOSE") == [str(split_host(environment()["OCI_MIRROR_LISTEN"])[1])]
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert instructions("ENTRYPOINT") == ['["oci-mirror"]']


def test_configuration_of_the_image_loads() -> None:
    settings = load(str(ROOT / "config" / "mirror.yaml"), environment())
    assert settings.listen == f"0.0.0.0:{PORT}"
    assert settings.data_dir == "/data"


@pytest.mark.parametrize("name", ["CMD", "HEALTHCHECK"])
def test_commands_of_the_image_parse(name: str) -> None:
    line = re.findall(rf"^{name}.*?(\[.*\])$", DOCKERFILE, re.MULTILINE)[0]
    command = [word for word in yaml.safe_load(line) if word != "oci-mirror"]
    arguments = _parser().parse_args(command)
    assert arguments.config == "/etc/oci-mirror/mirror.yaml"
    assert f"COPY config/mirror.yaml {arguments.config}" in DOCKERFILE


# --- systemd --------------------------------------------------------------------------------------

UNIT = ROOT / "config" / "systemd" / "oci-mirror.service"


def unit_values(key: str) -> list[str]:
    """The values of a key of the unit."""
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def test_unit_starts_a_command_that_exists_and_waits_for_running_pulls() -> None:
    (start,) = unit_values("ExecStart")
    program, *arguments = start.split()
    assert _parser().parse_args(arguments).config == "/etc/oci-mirror/mirror.yaml"
    assert program == "/opt/oci-mirror/bin/oci-mirror"
    environ = dict(value.split("=", 1) for value in unit_values("Environment"))
    settings = load(str(ROOT / "config" / "mirror.yaml"), environ)
    (directory,) = unit_values("StateDirectory")
    assert settings.data_dir == f"/var/lib/{directory}"
    assert float(unit_values("TimeoutStopSec")[0]) > settings.drain_timeout
    # The README installs what the unit names.
    readme = (ROOT / "README.md").read_text()
    for name in (program, settings.data_dir, *unit_values("User"), "/etc/oci-mirror/mirror.yaml"):
        assert name in readme


def test_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/oci-mirror/bin/oci-mirror", "/bin/true"))
    program = need("systemd-analyze")
    done = subprocess.run(
        [program, "verify", "--man=no", copy], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, lines) == (0, [])


# --- compose --------------------------------------------------------------------------------------


def mounts(service: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for volume in service.get("volumes", ()):
        source, target = volume.split(":")[:2]
        yield source, target


@pytest.mark.parametrize("name", list(COMPOSE["services"]))
def test_compose_mounts_existing_files_and_declared_volumes(name: str) -> None:
    for source, target in mounts(COMPOSE["services"][name]):
        assert target.startswith("/")
        if source.startswith("."):
            assert (ROOT / source).exists(), source
        else:
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", list(COMPOSE["services"]))
def test_compose_publishes_on_loopback_only(name: str) -> None:
    ports = COMPOSE["services"][name]["ports"]
    assert ports
    assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in ports), ports


def test_compose_runs_the_image_of_this_version() -> None:
    service = COMPOSE["services"]["mirror"]
    assert service["image"] == f"oci-mirror:{__version__}"
    assert service["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    targets = dict(map(reversed, mounts(service)))  # type: ignore[arg-type]  # pairs stay pairs
    assert targets["/etc/oci-mirror/mirror.yaml"] == "./config/mirror.yaml"
    assert environment()["OCI_MIRROR_DATA_DIR"] in targets
    assert service["read_only"] is True
    assert "/tmp" in service["tmpfs"]


def test_compose_stops_the_mirror_later_than_drain_timeout() -> None:
    settings = load(str(ROOT / "config" / "mirror.yaml"), {})
    grace = parse_duration(COMPOSE["services"]["mirror"]["stop_grace_period"])
    assert settings.drain_timeout < grace


def test_prometheus_scrapes_the_mirror_of_compose_and_finds_its_rules() -> None:
    text = (ROOT / "config" / "prometheus" / "prometheus.yml").read_text()
    jobs = yaml.safe_load(text)["scrape_configs"]
    targets = [
        target for job in jobs for one in job.get("static_configs", ()) for target in one["targets"]
    ]
    assert f"mirror:{PORT}" in targets
    mounted = dict(mounts(COMPOSE["services"]["prometheus"]))
    for pattern in yaml.safe_load(text).get("rule_files", ()):
        place = Path(pattern)
        local = place.relative_to("/etc/prometheus") if place.is_absolute() else place
        assert (ROOT / "config" / "prometheus" / local).exists(), pattern
    assert mounted["./config/prometheus"] == "/etc/prometheus"


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    provisioning = ROOT / "config" / "grafana" / "provisioning"
    targets = [target for _, target in mounts(COMPOSE["services"]["grafana"])]
    providers = [
        provider
        for file in (provisioning / "dashboards").glob("*.y*ml")
        for provider in yaml.safe_load(file.read_text())["providers"]
    ]
    assert [one["options"]["path"] for one in providers] == ["/var/lib/grafana/dashboards"]
    assert "/var/lib/grafana/dashboards" in targets
    assert list((ROOT / "config" / "grafana" / "dashboards").glob("*.json"))
    sources = [
        source
        for file in (provisioning / "datasources").glob("*.y*ml")
        for source in yaml.safe_load(file.read_text())["datasources"]
    ]
    assert [one["url"] for one in sources] == ["http://prometheus:9090"]


# --- kubernetes -----------------------------------------------------------------------------------


def manifests() -> dict[str, dict[str, Any]]:
    """``Kind/name`` of each manifest to its content."""
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    found = {}
    for name in kustomization["resources"]:
        for one in yaml.safe_load_all((KUBERNETES / name).read_text()):
            found[f"{one['kind']}/{one['metadata']['name']}"] = one
    return found


OBJECTS = manifests()
POD: dict[str, Any] = OBJECTS["StatefulSet/oci-mirror"]["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]


def test_kustomization_lists_every_manifest_and_this_version() -> None:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    (generator,) = kustomization["configMapGenerator"]
    others = {path.name for path in KUBERNETES.iterdir()} - {"kustomization.yaml"}
    assert {*kustomization["resources"], *generator["files"]} == others
    assert kustomization["namespace"] == "oci-mirror"
    assert "Namespace/oci-mirror" in OBJECTS
    (image,) = kustomization["images"]
    assert (image["name"], image["newTag"]) == (CONTAINER["image"], __version__)


@pytest.fixture
def configured() -> Settings:
    """The ConfigMap's file with the container's environment."""
    file = KUBERNETES / "mirror.yaml"
    return load(str(file), {one["name"]: one["value"] for one in CONTAINER["env"]})


@pytest.mark.row("FE12-deployment-files")
def test_edited_configuration_of_kubernetes_restarts_the_pods() -> None:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    (generator,) = kustomization["configMapGenerator"]
    # A generated name has a hash of the content, unless an option disables it.
    assert not kustomization.get("generatorOptions", {}).get("disableNameSuffixHash")
    assert "options" not in generator
    volumes = {one["name"]: one for one in POD["volumes"]}
    assert volumes["config"]["configMap"]["name"] == generator["name"] == "oci-mirror"
    assert not [name for name in OBJECTS if name.startswith("ConfigMap/")]


@pytest.mark.row("FE12-deployment-files")
def test_pods_read_no_configuration_that_can_change_without_a_restart() -> None:
    """Of the objects that a pod may read, only a generated one has another name after an edit."""
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    generated = {one["name"] for one in kustomization["configMapGenerator"]}
    generated |= {one["name"] for one in kustomization.get("secretGenerator", [])}
    read = [one["configMap"]["name"] for one in POD["volumes"] if "configMap" in one]
    read += [one["secret"]["secretName"] for one in POD["volumes"] if "secret" in one]
    for source in CONTAINER.get("envFrom", []):
        read += [reference["name"] for reference in source.values()]
    for variable in CONTAINER.get("env", []):
        sources = variable.get("valueFrom", {}).values()
        read += [source["name"] for source in sources if "name" in source]
    assert set(read) <= generated
    # A file below `subPath` keeps its first content.
    assert not [one for one in CONTAINER["volumeMounts"] if "subPath" in one]


@pytest.mark.row("FE12-deployment-files")
def test_nothing_but_the_nodeport_opens_the_mirror_beyond_its_machine() -> None:
    """Each client of the mirror can pull all that its credentials allow."""
    kinds = [name.partition("/")[0] for name in OBJECTS]
    assert "Ingress" not in kinds
    types = [one["spec"].get("type", "ClusterIP") for one in OBJECTS.values() if is_service(one)]
    assert sorted(set(types)) == ["ClusterIP", "NodePort"]
    assert not POD.get("hostNetwork", False)
    assert not [port for port in CONTAINER["ports"] if "hostPort" in port]
    published = [port for one in COMPOSE["services"].values() for port in one.get("ports", [])]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)


def is_service(document: dict[str, Any]) -> bool:
    return bool(document["kind"] == "Service")


@pytest.mark.row("FE12-deployment-files")
def test_network_policy_admits_private_networks_to_the_port_of_the_mirror_only() -> None:
    spec = OBJECTS["NetworkPolicy/oci-mirror"]["spec"]
    labels = OBJECTS["StatefulSet/oci-mirror"]["spec"]["template"]["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"].items() <= labels.items()
    assert spec["policyTypes"] == ["Ingress"]
    (rule,) = spec["ingress"]
    assert [one["port"] for one in rule["ports"]] == [CONTAINER["ports"][0]["name"]]
    networks = [ip_network(one["ipBlock"]["cidr"]) for one in rule["from"]]
    assert networks
    assert not any(network.is_global for network in networks)
    text = (KUBERNETES / "service.yaml").read_text()
    assert text.index("Warning: a NodePort") < text.index("type: NodePort")


@pytest.mark.row("FE12-deployment-files")
def test_compose_starts_monitoring_beside_a_mirror_that_is_not_healthy() -> None:
    conditions = [
        condition
        for one in COMPOSE["services"].values()
        if isinstance(one.get("depends_on"), dict)
        for condition in one["depends_on"].values()
    ]
    assert "mirror" in COMPOSE["services"]
    assert not [one for one in conditions if one["condition"] == "service_healthy"]


def test_configmap_loads_with_the_shipped_upstreams(configured: Settings) -> None:
    shipped = load(str(ROOT / "config" / "mirror.yaml"), {})
    assert {name: one.endpoints for name, one in configured.upstreams.items()} == {
        name: one.endpoints for name, one in shipped.upstreams.items()
    }
    arguments = _parser().parse_args(CONTAINER["args"])
    directory, name = arguments.config.rsplit("/", 1)
    assert name == "mirror.yaml"
    assert directory in [one["mountPath"] for one in CONTAINER["volumeMounts"]]


def test_quota_is_smaller_than_the_volume(configured: Settings) -> None:
    (claim,) = OBJECTS["StatefulSet/oci-mirror"]["spec"]["volumeClaimTemplates"]
    assert configured.storage.max_size < parse_size(
        claim["spec"]["resources"]["requests"]["storage"]
    )
    volumes = {one["name"] for one in POD["volumes"]} | {claim["metadata"]["name"]}
    mounted = {one["name"]: one["mountPath"] for one in CONTAINER["volumeMounts"]}
    assert set(mounted) == volumes
    assert mounted[claim["metadata"]["name"]] == configured.data_dir


def test_drain_ends_before_the_grace_period_of_the_pod(configured: Settings) -> None:
    pause = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert configured.drain_timeout + pause < POD["terminationGracePeriodSeconds"]


def test_ports_probes_and_services_agree(configured: Settings) -> None:
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == split_host(configured.listen)[1] == PORT
    probes = {
        name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")
    }
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    services = [one["spec"] for name, one in OBJECTS.items() if name.startswith("Service/")]
    assert {one.get("type", "ClusterIP") for one in services} == {"ClusterIP", "NodePort"}
    for service in services:
        assert service["ports"][0]["targetPort"] == port["name"]
        assert service["ports"][0]["port"] == PORT
    annotations = OBJECTS["StatefulSet/oci-mirror"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(PORT)
    assert OBJECTS["StatefulSet/oci-mirror"]["spec"]["serviceName"] in (
        name.partition("/")[2] for name in OBJECTS if name.startswith("Service/")
    )


def test_selectors_match_the_labels_of_the_pods() -> None:
    labels = OBJECTS["StatefulSet/oci-mirror"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        OBJECTS["StatefulSet/oci-mirror"]["spec"]["selector"]["matchLabels"],
        OBJECTS["PodDisruptionBudget/oci-mirror"]["spec"]["selector"]["matchLabels"],
        OBJECTS["Service/oci-mirror"]["spec"]["selector"],
        OBJECTS["Service/oci-mirror-nodes"]["spec"]["selector"],
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()


def test_pod_has_no_privileges() -> None:
    user, group = map(int, instructions("USER")[0].split(":"))
    context = POD["securityContext"]
    assert context["runAsNonRoot"] is True
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (user, group, group)
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["automountServiceAccountToken"] is False
    # Service links would set OCI_MIRROR_PORT and the like.
    assert POD["enableServiceLinks"] is False
    # With several workers, metrics are shared through files.
    assert "/tmp" in [one["mountPath"] for one in CONTAINER["volumeMounts"]]
