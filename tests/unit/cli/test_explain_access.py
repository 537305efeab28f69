"""``explain --user``: what a user may do, and which rule says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mirror.cli.main import main
from mirror.cli.schemas import SCHEMAS
from tests.unit.cli.kit import make_data_directory

APP = "registry.example/team/app"
ACCESS = """
access:
  groups: {builders: [robot]}
  rules:
    - {repositories: [registry.example/team/secret], who: [anonymous], may: []}
    - {repositories: ["registry.example/team/**"], who: [ci, "group:builders"], may: [pull, push]}
    - {repositories: ["registry.example/**"], who: ["group:admins"], may: [admin]}
    - {repositories: ["registry.example/**"], who: [anonymous], may: [pull]}
"""

Explain = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Explain:
    make_data_directory(tmp_path / "data")

    def run(*arguments: str, access: str = ACCESS) -> tuple[int, list[dict[str, Any]], str]:
        file = tmp_path / "mirror.yaml"
        file.write_text(
            f"data_dir: {tmp_path / 'data'}\n"
            "upstreams: {docker.io: {endpoints: [http://127.0.0.1:9]}}\n"
            "hosted: {name: registry.example, listen: '127.0.0.1:0',"
            " immutable_tags: ['team/*:v*']}\n"
            f"{access}"
        )
        code = main(["explain", "--config", str(file), *arguments])
        text = capsys.readouterr().out
        main(["explain", "--config", str(file), *arguments, "--json"])
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        for row in rows:
            jsonschema.validate(row, SCHEMAS["explain"])
        return code, rows, text

    return run


def allowed(rows: list[dict[str, Any]]) -> list[tuple[str, bool, int | None]]:
    return [(row["action"], row["is_allowed"], row["rule"]) for row in rows]


@pytest.mark.parametrize(
    ("arguments", "rule", "actions"),
    [
        ((APP, "--user", "ci"), 1, {"pull", "push"}),
        ((APP, "--user", "robot"), 1, {"pull", "push"}),
        ((APP, "--user", "eve"), 3, {"pull"}),
        ((APP, "--user", "anonymous"), 3, {"pull"}),
        ((APP, "--user", "eve", "--group", "admins"), 2, {"pull", "push", "delete", "admin"}),
        (("registry.example/team/secret", "--user", "ci"), 0, set()),
    ],
)
def test_first_rule_that_fits_is_named(
    explain: Explain, arguments: tuple[str, ...], rule: int, actions: set[str]
) -> None:
    code, rows, _ = explain(*arguments)
    assert code == 0
    every = ("pull", "push", "delete", "admin")
    assert allowed(rows) == [(action, action in actions, rule) for action in every]


def test_sentence_has_the_rule_as_it_is_configured(explain: Explain) -> None:
    code, _, text = explain(APP, "--user", "ci", "--may", "push")
    fits = (
        "access.rules[1] ({repositories: [registry.example/team/**], who: [ci, group:builders],"
        " may: [pull, push]}) is the first that fits"
    )
    assert (code, text) == (0, f"ci may push to {APP}: {fits}\n")
    code, _, text = explain(APP, "--user", "ci", "--may", "delete")
    assert code == 1
    assert text == f"ci may not delete from {APP}: {fits}, and does not have delete\n"


def test_mirrored_repositories_can_be_pulled_only(explain: Explain) -> None:
    _, rows, _ = explain("nginx", "--user", "ci")
    assert allowed(rows) == [
        ("pull", True, None),
        ("push", False, None),
        ("delete", False, None),
        ("admin", False, None),
    ]
    assert [row["why"] for row in rows] == [
        "no rule fits, and access.anonymous_pull lets everybody pull mirrored images",
        *["nobody pushes to a mirrored repository, and nobody deletes from it"] * 2,
        "no rule of access.rules fits",
    ]


def test_without_access_everybody_may_do_all_that_needs_no_admin(explain: Explain) -> None:
    _, rows, _ = explain(APP, "--user", "ci", access="")
    assert [row["is_allowed"] for row in rows] == [True, True, True, False]
    assert rows[0]["why"] == "everybody may, since the configuration has no access"


def test_immutable_tag_is_told_of(explain: Explain) -> None:
    _, rows, _ = explain(f"{APP}:v1", "--user", "ci")
    assert ["is immutable" in row["why"] for row in rows] == [False, True, True, False]
    _, rows, _ = explain(f"{APP}:latest", "--user", "ci")
    assert not any("is immutable" in row["why"] for row in rows)


@pytest.mark.parametrize("arguments", [["--user", "ci"], ["--may", "push"], ["--group", "x", APP]])
def test_arguments_that_ask_nothing_are_refused(explain: Explain, arguments: list[str]) -> None:
    assert explain(*arguments)[0] == 2
