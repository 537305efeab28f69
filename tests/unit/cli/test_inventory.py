"""What the commands that list the data directory share: errors with a remedy."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest

from mirror.cli import inventory as common
from mirror.cli.main import main
from tests.unit.cli.inventory_kit import Site

COMMANDS = (["ls"], ["du"], ["show", "app"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_missing_data_directory_is_a_failure_with_a_remedy(site: Site, command: list[str]) -> None:
    shutil.rmtree(site.data.layout.root)

    code, out, err = site.run_without_saving(*command)

    assert (code, out) == (1, "")
    assert "is no data directory of a mirror" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_damaged_index_and_marks_are_failures_with_a_remedy(site: Site, command: list[str]) -> None:
    site.data.layout.marks.write_text("damaged")
    code, out, err = site.run(*command)
    assert (code, out) == (1, "")
    assert "marks.json is damaged" in err

    site.data.layout.marks.unlink()
    database = site.data.layout.index / "named" / "cache.db"
    database.write_bytes(b"damaged" * 10_000)
    code, out, err = site.run_without_saving(*command)
    assert (code, out) == (1, "")
    assert "start the server" in err
    assert err.count("\n") == 1


def test_damaged_index_json_of_a_lost_index_is_a_failure(site: Site) -> None:
    (site.data.layout.root / "index.json").write_text("{")

    code, _, err = site.run_without_saving("ls")

    assert code == 1
    assert "start the server" in err


def test_collector_is_paused_during_a_command_only() -> None:
    with common.collector_paused():
        assert not gc.isenabled()

    assert gc.isenabled()


def test_age_of_an_unknown_time_is_a_dash() -> None:
    assert (common.ago(100.0, None), common.ago(100.0, 90.0)) == ("-", "10 s ago")


def test_relative_data_directory_that_is_elsewhere_is_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.yaml").write_text("upstreams: {docker.io: {endpoints: [http://x]}}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["ls", "--config", "m.yaml"]) == 1
    assert (
        f"{tmp_path}/data is no data directory of a mirror (data_dir ./data is relative to the "
        "working directory, and the server may have another one): start the server once"
    ) in capsys.readouterr().err
