"""Dashboard and alerts: each metric in them exists, and a real Prometheus accepts them."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from mirror.observability import events
from mirror.observability.metrics import MetricsObserver
from tests.real import images
from tests.real.process import Program, need, wait_until
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror
from tests.unit.observability.test_metrics import a_pull

CONFIG = Path(__file__).parents[3] / "config"
DASHBOARD = CONFIG / "grafana/dashboards/oci-mirror.json"
ALERTS = CONFIG / "prometheus/alerts.yml"


def metrics_text() -> bytes:
    """All metrics: the histograms begin with the first request."""
    metrics = MetricsObserver(["docker.io"])
    metrics.observe(events.RequestStarted(a_pull()))
    metrics.observe(events.RequestEnded(a_pull()))
    return metrics.render()[0]


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        found += [rule["expr"] for rule in group["rules"]]
    return found


def names(text: str) -> set[str]:
    return set(re.findall(r"\b(oci_mirror_[a-z0-9_]+)", text))


def test_dashboard_and_alerts_name_exposed_metrics_only() -> None:
    exposed = names(metrics_text().decode())
    recorded = set(re.findall(r"record: (\S+)", ALERTS.read_text()))
    used = {name for expression in expressions() for name in names(expression)}
    assert len(used) > 20
    assert used <= exposed
    rules = {r for e in expressions() for r in re.findall(r"oci_mirror:[a-z0-9_:]+", e)}
    assert rules <= recorded


def test_every_alert_is_documented_with_its_severity() -> None:
    text = (CONFIG.parent / "docs/metrics.md").read_text(encoding="utf-8")
    documented = re.findall(
        r"^\| `(OciMirror\w+)` \| (\w+) \|.*\]\(runbook\.md#", text, re.MULTILINE
    )
    rules = [
        (rule["alert"], rule["labels"]["severity"])
        for group in yaml.safe_load(ALERTS.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    assert sorted(documented) == sorted(rules)


@pytest.mark.row("FE9-quiet-alerts")
def test_promtool_accepts_rules_configuration_and_metrics() -> None:
    promtool = need("promtool")
    directory = CONFIG / "prometheus"
    for command in (
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
        ["check", "config", "prometheus.yml"],
    ):
        done = subprocess.run([promtool, *command], cwd=directory, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    text = metrics_text()
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus(Program):
    """Prometheus, scraping targets with our rules."""

    name = "prometheus"

    def __init__(self, targets: Iterable[str]) -> None:
        super().__init__()
        self.targets = list(targets)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> Sequence[str | Path]:
        settings = yaml.safe_load((CONFIG / "prometheus/prometheus.yml").read_text())
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        settings["rule_files"] = [str(ALERTS)]
        settings["scrape_configs"][0]["static_configs"][0]["targets"] = self.targets
        config = self.dir / "prometheus.yml"
        config.write_text(yaml.safe_dump(settings))
        return [
            need("prometheus"),
            f"--config.file={config}",
            f"--storage.tsdb.path={self.dir}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        url = f"{self.url}/api/v1/query?query={quote(expression)}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return result

    def instances(self, expression: str) -> set[str]:
        """Return the targets of which it has a value."""
        return {series["metric"]["instance"] for series in self.query(expression)}


def test_prometheus_scrapes_servers_of_one_and_two_workers_and_evaluates_every_expression() -> None:
    with ExitStack() as stack:
        registry = stack.enter_context(DockerRegistry())
        registry.push("library/app", images.image(), "1.0")
        mirrors = [
            stack.enter_context(Mirror({"docker.io": registry.url}, workers=workers))
            for workers in (1, 2)
        ]
        for mirror in mirrors:
            for _ in range(6):
                path = "/v2/library/app/manifests/1.0"
                assert mirror.ask(path, headers=images.ACCEPT).status == 200
        hosts = {mirror.host for mirror in mirrors}
        prometheus = stack.enter_context(Prometheus(hosts))
        wanted = 'sum by (instance) (oci_mirror_requests_total{kind="manifest"}) == 6'
        recorded = "oci_mirror:bytes_saved:rate5m"
        wait_until(lambda: prometheus.instances(wanted) == hosts, "all requests are counted", 20)
        wait_until(lambda: bool(prometheus.query(recorded)), "the rules are evaluated", 20)
        for expression in expressions():
            prometheus.query(expression.replace("$__rate_interval", "1m"))
        assert prometheus.instances('up{job="oci-mirror"} == 1') == hosts
