"""Every command's ``--json``, beside a running server that containerd, Podman and skopeo filled."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from mirror.cli.main import main
from mirror.cli.schemas import SCHEMAS
from mirror.oci.reference import Digest
from tests.real import images
from tests.real.clients import Containerd, Podman, Skopeo
from tests.real.deployment import Deployment, deploy
from tests.real.process import free_port
from tests.real.server import ROOT
from tests.real.test_documented_commands import JSON_RUNS, errors_of, expected_codes

NAME, OTHER, DAMAGED = (
    f"docker.io/{name}" for name in ("library/app:1", "org/team/app:list", "library/app:docker")
)


def fill_by_clients(deployment: Deployment) -> None:
    """Pull by containerd, by Podman, and copy by skopeo."""
    host = deployment.mirror.host
    with Containerd() as containerd:
        containerd.use("docker.io", deployment.mirror.url)
        containerd.pull(NAME)
    with Podman({"docker.io": f"{host}/docker.io"}) as podman:
        podman.pull(DAMAGED)
    with Skopeo({"docker.io": f"{host}/docker.io"}) as skopeo:
        skopeo.copy(OTHER)


def plant_garbage_and_damage(deployment: Deployment) -> None:
    """Add content of no image, and take a layer away: ``gc`` and ``verify`` have to list them."""
    data = b"no image has this"
    orphan = deployment.mirror.content(str(Digest.of(data)))
    orphan.write_bytes(data)
    old = int(time.time()) - 3 * 86400
    os.utime(orphan, (old, old))
    damaged = deployment.pushed[DAMAGED.removeprefix("docker.io/")]
    assert isinstance(damaged, images.Image)
    deployment.mirror.content(damaged.layers[0].digest).unlink()


@pytest.mark.timeout(180)
def test_json_of_every_command_fits_its_schema_after_real_clients_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = tmp_path / "images.txt"
    used.write_text(f"{NAME}\n{OTHER}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # ``verify`` starts a process that hashes.
    push_host = f"127.0.0.1:{free_port()}"
    with deploy(
        "open", hosted={"name": "registry.example.internal", "listen": push_host}
    ) as deployment:
        images.push(f"http://{push_host}", "team/app", images.image(5), "v1")
        monkeypatch.setenv("OCI_MIRROR_CONFIG", str(deployment.mirror.config_file))
        fill_by_clients(deployment)
        plant_garbage_and_damage(deployment)
        deployment.upstream.push("library/app", images.image(77), "1")
        time.sleep(1.5)  # The history is written once a second, and `prune` asks for an age.
        earlier = deployment.pushed["library/app:1"].digest
        words = {"NAME": NAME, "OTHER": OTHER, "EARLIER": earlier, "SOURCE": str(used)}
        printed: dict[str, list[dict[str, object]]] = {}
        for run in (*JSON_RUNS, f"verify {DAMAGED} --repair", "verify"):
            arguments = [words.get(word, word) for word in run.split()]
            code = main([*arguments, "--json"])
            said = capsys.readouterr()
            assert code in expected_codes(arguments), (run, code, said.err)
            assert errors_of(arguments[0], said.out) == []
            rows = [json.loads(line) for line in said.out.splitlines()]
            printed.setdefault(arguments[0], []).extend(rows)
        assert deployment.mirror.ask("/readyz").status == 200
    assert {command for command, rows in printed.items() if rows} == set(SCHEMAS)
    assert {NAME, OTHER, DAMAGED} <= {row["name"] for row in printed["ls"]}
    clients = {str(row["user_agent"]).partition("/")[0] for row in printed["explain"]}
    assert clients >= {"containerd", "skopeo"}, clients
    # Each finding names the command that repairs it, and that command does.
    findings = printed["verify"]
    assert findings
    assert all(row["command"] or row["is_repaired"] for row in findings)
    assert findings[-1]["is_repaired"]
