"""``warm``: its arguments, its lists, what it prints, its exit codes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest

from mirror.cli.schemas import SCHEMAS
from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry
from tests.unit.cli.kit import Run, make_data_directory, make_run
from tests.unit.operations.kit import add_index


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs ``warm`` with a configuration. It blocks."""
    make_data_directory(tmp_path / "data")
    run_command = make_run(tmp_path, capsys)
    return lambda url, *arguments: run_command(url, "warm", *arguments)


async def test_complete_image_is_one_line(run: Run) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"x" * 2048, tag="v1")
        first = await run_in_thread(run, registry.url, "app:v1")
        second = await run_in_thread(run, registry.url, "app:v1")

    assert (first.code, first.err) == (0, "")
    assert first.out.startswith("docker.io/library/app:v1  complete  sha256:")
    assert "3 contents, 2.4KiB (3 new, 2.4KiB)" in first.out
    assert "(no new)" in second.out


async def test_image_that_fails_is_one_line_on_standard_error(run: Run) -> None:
    async with FakeRegistry() as registry:
        registry.add_image(b"one", tag="v1")
        result = await run_in_thread(run, registry.url, "app:v1", "app:v2", "quay.io/o/a:1")

    assert result.code == 1
    assert len(result.out.splitlines()) == 2
    assert result.out.splitlines()[-1] == "1 complete, 2 failed"
    lines = sorted(result.err.splitlines())
    assert [line.partition(": ")[2].partition(": ")[0] for line in lines] == [
        "docker.io/library/app:v2",
        "quay.io/o/a:1",
    ]


async def test_json_has_one_object_for_each_image_that_fits_the_schema(run: Run) -> None:
    async with FakeRegistry() as registry:
        digests = add_index(registry, "linux/amd64", "linux/arm64")
        arguments = ("app:v1", "app:v2", "--platform", "linux/amd64", "--json")
        result = await run_in_thread(run, registry.url, *arguments, "--platform", "linux/s390x")

    rows = [json.loads(line) for line in result.out.splitlines()]
    for row in rows:
        jsonschema.validate(row, SCHEMAS["warm"])
    by_image = {row["image"]: row for row in rows}
    good, bad = by_image["docker.io/library/app:v1"], by_image["docker.io/library/app:v2"]
    assert (good["state"], good["digest"]) == ("complete", str(digests[""]))
    assert good["missing_platforms"] == ["linux/s390x"]
    assert (bad["state"], bad["digest"], bad["contents"]) == ("failed", None, 0)
    assert bad["error"]
    assert result.code == 1


async def test_lists_of_all_kinds_are_read_together(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list").write_text("app1:v1 # the first\n")
    (tmp_path / "k8s").mkdir()
    pod = "apiVersion: v1\nkind: Pod\nspec: {containers: [{image: 'app2:v1'}]}\n"
    (tmp_path / "k8s" / "pod.yaml").write_text(pod)
    piped = pod.replace("app2", "app3").encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(piped)))
    lists = ("--file", f"{tmp_path}/list", "--from-manifests", f"{tmp_path}/k8s")
    async with FakeRegistry() as registry:
        for number in (1, 2, 3):
            registry.add_image(b"one", repository=f"library/app{number}", tag="v1")
        result = await run_in_thread(run, registry.url, *lists, "--from-manifests", "-")

    assert (result.code, result.err) == (0, "")
    assert [name for name in ("app1", "app2", "app3") if name in result.out] == [
        *("app1", "app2", "app3"),
    ]


async def test_list_that_cannot_be_read_fails_after_the_others_are_fetched(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("a: [b\n")
    arguments = ("app:v1", "--from-manifests", f"{tmp_path}/bad.yaml", "--file", "nowhere")
    async with FakeRegistry() as registry:
        registry.add_image(b"one", tag="v1")
        result = await run_in_thread(run, registry.url, *arguments)

    assert result.code == 1
    assert "complete" in result.out
    assert sorted(result.err.splitlines()) == [
        f"oci-mirror: {tmp_path}/bad.yaml:2: not YAML: did not find expected ',' or ']'",
        "oci-mirror: nowhere: No such file or directory",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name an image"),
        (("app", "--platform", "linux"), "not a platform"),
        (("app", "--jobs", "0"), "from 1 to 64"),
        (("app", "--jobs", "65"), "from 1 to 64"),
        (("A/B",), "is no image name"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Run, arguments: tuple[str, ...], message: str) -> None:
    result = run("http://127.0.0.1:9", *arguments)

    assert result.code == 2
    assert message in result.err


def test_upstream_that_is_down_is_one_line(run: Run) -> None:
    result = run("http://127.0.0.1:9", "app:v1")

    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert "docker.io/library/app:v1: " in result.err


async def test_warm_is_explained_and_counted_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data_directory(tmp_path / "data")
    run_command = make_run(tmp_path, capsys)
    async with FakeRegistry() as registry:
        registry.add_image(b"x" * 2048, tag="v1")
        await run_in_thread(run_command, registry.url, "warm", "app:v1")
        explained = await run_in_thread(run_command, registry.url, "explain", "app:v1")
        rows = await run_in_thread(run_command, registry.url, "explain", "--json")
        by = ("--by", "network")
        savings = await run_in_thread(run_command, registry.url, "savings", *by)

    assert " `oci-mirror warm` docker.io/library/app:v1: " in explained.out
    assert {json.loads(line)["command"] for line in rows.out.splitlines()} == {"warm"}
    for line in rows.out.splitlines():
        jsonschema.validate(json.loads(line), SCHEMAS["explain"])
    assert savings.out.splitlines()[1].startswith("commands")


def test_warm_does_not_create_a_data_directory_that_no_server_uses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = make_run(tmp_path, capsys)("http://127.0.0.1:9", "warm", "app:v1")
    assert (result.code, "is no data directory of a mirror" in result.err) == (1, True)
    assert not (tmp_path / "data").exists()
