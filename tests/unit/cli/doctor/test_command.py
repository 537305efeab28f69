"""``doctor``: exit codes, both forms of the output, wrong usage."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
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
from tests.waiting import until


def write_config(directory: Path, listen: str, endpoint: str, others: str = "") -> str:
    file = directory / "m.yaml"
    hub = f"docker.io: {{endpoints: ['{endpoint}'], limits: {{connect: 1s}}}}"
    file.write_text(
        f"listen: '{listen}'\ndata_dir: {directory}/data\nupstreams: {{{others}{hub}}}\n"
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
    command._print_group([Finding("a", "b", Status.WARNING, "c\x1b[2J", "d")])
    out = capsys.readouterr().out
    assert out.startswith("\x1b[33mwarning \x1b[0m a: b: c\\x1b[2J\n")


def test_finding_is_broken_at_blanks_to_fit_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.cli.listing.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    command._print_group([Finding("port", "one", Status.OK, "word " * 9, "more " * 9)])
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("\x1b[32mok      \x1b[0m port: one: word")
    assert max(map(len, others)) <= 40
    assert {line[:9] for line in others} == {" " * 9}


def test_fault_of_one_check_is_a_finding_and_the_other_checks_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(root: Path) -> None:
        raise ValueError(f"a fault with {root.name}")

    monkeypatch.setattr("mirror.cli.doctor.machine_checks.check_index", fail)
    config = write_config(tmp_path, "127.0.0.1:0", "http://127.0.0.1:9")
    assert main(["doctor", "--config", config, "--json"]) == EX_FAILED
    rows = {row["check"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["index"]["status"] == "problem"
    assert "internal fault at test_command.py:" in rows["index"]["message"]
    assert {"marks", "port", "endpoint", "clock"} <= set(rows)


def test_relative_data_directory_can_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "data" / "index"
    index.mkdir(parents=True)
    with closing(sqlite3.connect(index / "a.db")) as connection:
        connection.execute("CREATE TABLE t (c)")
    config = Path(write_config(tmp_path, "127.0.0.1:0", "http://127.0.0.1:9"))
    config.write_text(config.read_text().replace(str(tmp_path), "."))
    monkeypatch.chdir(tmp_path)
    main(["doctor", "--config", str(config), "--json"])
    rows = {row["check"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["index"]["message"] == "1 databases open, and are not damaged"


def finding(target: str, message: str, remedy: str, status: Status = Status.PROBLEM) -> Finding:
    return Finding("pull", "podman", status, message, remedy, target)


def test_findings_of_one_cause_are_one_line_and_equal_remedies_are_printed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = [f"{letter}.example" for letter in "abcdef"]
    found = [
        *(finding(host, f"no {host}/probe here", f"write the file of {host}") for host in hosts),
        finding("z.example", "timed out", "write the file of z.example"),
        finding("y.example", "timed out", "another remedy"),
        Finding("clock", "this machine", Status.OK, "right"),
    ]
    monkeypatch.setattr(command, "_check_node", lambda arguments: iter(found))
    assert main(["doctor", "--node"]) == EX_FAILED
    assert capsys.readouterr().out.splitlines() == [
        "problem  pull: podman a.example, b.example, c.example and 3 more: no a.example/probe here",
        "problem  pull: podman z.example: timed out",
        "         remedy: write the file of a.example",
        "problem  pull: podman y.example: timed out",
        "         remedy: another remedy",
        "ok       clock: this machine: right",
        "8 problems, 0 warnings, 1 ok",
    ]
    assert main(["doctor", "--node", "--json"]) == EX_FAILED
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["subject"] for row in rows][:2] == ["podman a.example", "podman b.example"]


async def test_upstream_without_a_tag_in_the_cache_is_a_warning_if_another_one_has_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(tag="1")
        async with running(tmp_path / "data", registry.url) as server:
            unused = "a.example: {endpoints: ['http://127.0.0.1:9']}"
            listen = f"127.0.0.1:{server.port}"
            config = write_config(tmp_path, listen, registry.url, f"{unused}, ")
            argv = ["doctor", "--json", "--config", config]
            assert await run_in_thread(main, argv) == EX_FAILED  # Nothing was pulled yet.
            assert (await server.get(server.manifest("1")))[0] == 200
            # A stop right now would write index.json before the content is on the disk.
            await until(lambda: list(tmp_path.glob("data/blobs/sha256/*")) != [])
        capsys.readouterr()
        assert await run_in_thread(main, argv) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (found,) = (row for row in rows if row["subject"].startswith("a.example "))
    assert found["status"] == "warning"
    assert found["message"] == "no connection to 127.0.0.1:9: connection refused"
    assert "remove it from upstreams" in found["remedy"]


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
