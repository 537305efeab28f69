"""``prune``: what it prints, its exit codes, and the rules of the configuration."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mirror.cli.main import main
from tests.unit.cli.cleaning_kit import LAYERS, NAME, URL, content, fill, rows
from tests.unit.cli.kit import Run, make_run
from tests.unit.hosted.kit import hosted_kit


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return make_run(tmp_path, capsys)


def test_images_that_go_are_printed_with_the_reason(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    result = run(URL, "prune", "--keep-last", "1", "--match", NAME)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].split() == ["IMAGE", "FREES", "WHY"]
    assert [line.split()[0] for line in lines[1:3]] == [f"{NAME}:1.0", f"{NAME}:1.1"]
    assert lines[1].endswith("not one of the last 1, last used 40 d ago")
    assert lines[3] == "kept 1 image: one of the last 1 of its repository"
    assert lines[4].startswith("2 images removed, ")
    assert not content(data, LAYERS[1]).exists()
    assert content(data, LAYERS[2]).exists()


def test_dry_run_removes_nothing_and_json_follows_the_schema(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    found = rows("prune", run(URL, "prune", "--older-than", "30d", "--dry-run", "--json"))
    assert {row["action"] for row in found} == {"removed"}
    assert len(found) == 4
    assert content(data, LAYERS[1]).exists()


def test_range_of_tags_limits_what_goes(run: Run, tmp_path: Path) -> None:
    data = fill(tmp_path)
    run(URL, "prune", "--older-than", "1d", "--tags", "<1.2")
    assert content(data, LAYERS[2]).exists()
    assert not content(data, LAYERS[1]).exists()


@pytest.mark.parametrize(
    "arguments", [(), ("--match", "*"), ("--keep-last", "-1"), ("--older-than", "soon")]
)
def test_unclear_request_is_wrong_usage(
    run: Run, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    fill(tmp_path)
    assert run(URL, "prune", *arguments).code == 2


def test_images_that_are_younger_than_the_age_are_kept_with_that_reason(
    run: Run, tmp_path: Path
) -> None:
    fill(tmp_path)
    out = run(URL, "prune", "--older-than", "60d").out
    assert "images: used within 60 d\n" in out


@pytest.mark.parametrize("age", ["30", "0", " 1.5"])
def test_age_without_a_unit_is_refused_and_removes_nothing(
    run: Run, tmp_path: Path, age: str
) -> None:
    """Whoever forgets the d of 30d would remove all that was not used for 30 seconds."""
    data = fill(tmp_path)
    done = run(URL, "prune", "--older-than", age)
    assert (done.code, done.out) == (2, "")
    unit = age.strip()
    assert f"{unit}: name a unit: {unit}s, {unit}m, {unit}h, {unit}d" in done.err
    assert content(data, LAYERS[0]).exists()


def test_rules_of_the_configuration_decide_without_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = fill(tmp_path)
    config = tmp_path / "rules.yaml"
    config.write_text(
        f"data_dir: {data}\nupstreams: {{docker.io: {{endpoints: ['{URL}']}}}}\n"
        f"retention:\n  - match: '{NAME}'\n    keep_last: 2\n    tags: '1.x'\n"
    )
    assert main(["prune", "--config", str(config)]) == 0
    assert "1 image removed" in capsys.readouterr().out
    assert content(data, LAYERS[1]).exists()


def test_rules_of_hosted_repositories_decide_about_their_images(run: Run, tmp_path: Path) -> None:
    fill(tmp_path)
    rule = {"match": "team/*", "keep_last": 1}
    more = {"hosted": {"name": "registry.example", "listen": "127.0.0.1:0", "retention": [rule]}}

    async def push() -> list[str]:
        async with hosted_kit(tmp_path / "data") as kit:
            for tag in ("v1", "v2"):
                await kit.push_image(tag.encode(), tag=tag, repository="team/app")
            return (await kit.service.lists.tags("team/app", None, None))[0]

    assert asyncio.run(push()) == ["v1", "v2"]
    planned = run(URL, "prune", "--dry-run", more=more)
    assert "registry.example/team/app:v1" in planned.out
    found = rows("prune", run(URL, "prune", "--json", more=more))
    assert [(row["name"], row["action"]) for row in found] == [
        ("registry.example/team/app:v2", "kept"),
        ("registry.example/team/app:v1", "removed"),
    ]
