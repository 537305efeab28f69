"""``doctor``: exit codes, both forms of the output, wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from mirror.cli.doctor import command
from mirror.cli.doctor.findings import Finding, Status
from mirror.cli.exit_codes import EX_FAILED, EX_USAGE
from mirror.cli.main import main
from mirror.cli.own_server import OwnServer
from mirror.cli.schemas import SCHEMAS
from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry
from tests.server_kit import running
from tests.unit.cli.doctor.kit import serve_page


def write_config(directory: Path, listen: str, endpoint: str) -> str:
    file = directory / "m.yaml"
    file.write_text(
        f"listen: '{listen}'\ndata_dir: {directory}/data\n"
        f"upstreams: {{docker.io: {{endpoints: ['{endpoint}'], limits: {{connect: 1s}}}}}}\n"
    )
    return str(file)


async def test_healthy_mirror_has_no_problem_and_each_line_fits_the_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeRegistry() as registry, running(tmp_path / "data", registry.url) as server:
        config = write_config(tmp_path, f"127.0.0.1:{server.port}", registry.url)
        code = await run_in_thread(main, ["doctor", "--config", config, "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (code, [row for row in rows if row["status"] == "problem"]) == (0, [])
    validator = Draft202012Validator(SCHEMAS["doctor"])
    assert [error for row in rows for error in validator.iter_errors(row)] == []
    assert {row["check"] for row in rows} >= {
        *("configuration", "data directory", "disk space", "inodes", "index", "port", "marks"),
        *("endpoint", "clock"),
    }


def test_problem_ends_with_1_and_has_its_remedy_on_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    config = write_config(tmp_path, "127.0.0.1:0", "http://127.0.0.1:9")
    assert main(["doctor", "--config", config]) == EX_FAILED
    lines = capsys.readouterr().out.splitlines()
    (place,) = (n for n, line in enumerate(lines) if line.startswith("problem  endpoint: "))
    assert lines[place + 1].startswith("         remedy: ")
    assert lines[-1].startswith("1 problem, ")


def test_configuration_that_cannot_be_used_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("upstreams: {a.example: {endpoint: [x]}}\n")
    assert main(["doctor", "--config", str(file), "--json"]) == EX_FAILED
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["check"], row["status"]) == ("configuration", "problem")
    assert "endpoint" in row["message"]


def test_options_of_the_node_need_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--runtime", "podman"]) == EX_USAGE
    assert main(["doctor", "--node", "--mirror", "nowhere"]) == EX_USAGE
    assert "--mirror 'nowhere'" in capsys.readouterr().err


def test_terminal_gets_colours_and_control_characters_are_escaped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.cli.listing.is_terminal", lambda: True)
    command._print_finding(Finding("a", "b", Status.WARNING, "c\x1b[2J", "d"))
    out = capsys.readouterr().out
    assert out.startswith("\x1b[33mwarning \x1b[0m a: b: c\\x1b[2J\n")


async def test_own_server_is_told_from_another_one(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        response = await run_in_thread(OwnServer(server.url).get, "/healthz")
        assert (response.status, response.is_ours) == (200, True)
    async with serve_page() as url:
        response = await run_in_thread(OwnServer(url).get, "/healthz")
        assert (response.body, response.is_ours) == (b"hi", False)
    async with serve_page(b"SSH-2.0\r\n") as url:
        with pytest.raises(ValueError, match="SSH"):
            await run_in_thread(OwnServer(url).get, "/healthz")
