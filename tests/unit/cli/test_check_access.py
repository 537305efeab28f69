"""``check-config`` of a server with users and rules: all errors with their lines, and warnings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bcrypt
import pytest

from mirror import processes
from mirror.access.access_tokens import TOKENS_REMEDY
from mirror.cli.main import main

Check = Callable[[str], tuple[int, list[str]]]
HUB = """\
upstreams:
  docker.io:
    endpoints: [https://r.example]
hosted: {name: registry.example, listen: 127.0.0.1:5101}
access:
  users: users.htpasswd
  tokens: tokens.yaml
  groups: {dev: [ann]}
  rules:
"""
RULE = """    - {{repositories: ["{0}"], who: [{1}], may: [{2}]}}\n"""


@pytest.fixture
def check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Check:
    """Run ``check-config`` on a file in the working directory. Returns the code and the errors."""
    monkeypatch.chdir(tmp_path)
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    (tmp_path / "users.htpasswd").write_text(f"ann:{hashed}\n")
    (tmp_path / "tokens.yaml").write_text(
        f"- {{name: ci, token: {'t' * 20}, groups: [builders]}}\n"
    )

    def call(text: str) -> tuple[int, list[str]]:
        (tmp_path / "m.yaml").write_text(text)
        code = main(["check-config", "m.yaml"])
        lines = capsys.readouterr().err.splitlines()
        return code, [line.removeprefix("oci-mirror: ") for line in lines]

    return call


def test_rules_for_users_and_registries_that_exist_give_no_warning(check: Check) -> None:
    rules = [
        RULE.format("registry.example/team/**", "ci, ann, group:dev, group:builders", "pull, push"),
        RULE.format("docker.io/**", "authenticated", "pull"),
        RULE.format("*.example/**", "anonymous", "pull"),
        RULE.format("**", "anonymous", ""),
    ]
    assert check(HUB + "".join(rules)) == (0, [])


@pytest.mark.parametrize(
    ("pattern", "who", "may", "warning"),
    [
        ("**", "bob", "admin", "who[0]: 'bob': nobody can log in with this name"),
        ("**", "anne", "admin", "did you mean ann?"),
        ("**", "group:none", "admin", "who[0]: 'group:none': no user has this group"),
        ("**", "group:builder", "admin", "did you mean builders?"),
        ("registry.exmaple/**", "ci", "admin", "repositories[0]: 'registry.exmaple/**' matches"),
        ("registry.exmaple/**", "ci", "admin", "did you mean registry.example?"),
        ("*.other/**", "ci", "admin", "*.other is neither one of upstreams nor hosted.name"),
        ("**", "ci", "push", "may: push without pull"),
        ("**", "ci", "pull", "access: no rule has push, so nobody can push"),
    ],
)
def test_rule_that_fits_nobody_or_nothing_gives_a_warning_with_line_and_key(
    check: Check, pattern: str, who: str, may: str, warning: str
) -> None:
    code, lines = check(HUB + RULE.format(pattern, who, may))
    assert code == 0
    assert [warning in line and line.startswith("warning: m.yaml:") for line in lines] == [True]


def test_names_of_an_issuer_are_not_known_and_give_no_warning(check: Check) -> None:
    (Path("keys.json")).write_text(
        '{"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "%s"}]}' % ("A" * 43)
    )
    issuer = (
        "  issuers: [{issuer: https://a.example, jwks: keys.json, audience: a,"
        " user_prefix: 'k8s:', groups_claim: groups, groups_prefix: 'k8s:'}]\n"
    )
    text = HUB.replace("  rules:\n", f"{issuer}  rules:\n")
    assert check(text + RULE.format("**", "'k8s:x', 'group:k8s:y'", "admin")) == (0, [])
    _, lines = check(text + RULE.format("**", "x, 'group:y'", "admin"))
    assert len(lines) == 2


def test_user_of_a_rule_without_any_file_gives_a_warning(check: Check) -> None:
    text = "".join(line for line in HUB.splitlines(keepends=True) if "tokens:" not in line)
    text = text.replace("  users: users.htpasswd\n", "").replace("  groups: {dev: [ann]}\n", "")
    code, lines = check(text + RULE.format("**", "ci", "admin"))
    assert (code, len(lines)) == (0, 1)
    assert "nobody can log in" in lines[0]


def test_pattern_of_an_event_target_is_checked_too(check: Check, tmp_path: Path) -> None:
    (tmp_path / "s").write_text("whsec_" + "QUJD" * 8)
    target = (
        "events: [{name: a, url: 'https://a.example', secret_file: s, repositories: ['r.io/**']}]\n"
    )
    code, lines = check(HUB + RULE.format("**", "ci", "admin") + target)
    assert (code, len(lines)) == (0, 1)
    assert "events[0].repositories[0]: 'r.io/**' matches nothing" in lines[0]


def test_all_errors_of_files_are_printed_with_line_key_and_whole_path(
    check: Check, tmp_path: Path
) -> None:
    (tmp_path / "users.htpasswd").write_text("ann\nbob:x\n")
    (tmp_path / "tokens.yaml").unlink()
    code, lines = check(HUB + RULE.format("**", "ci", "admin"))
    assert code == 78
    users, tokens = f"m.yaml:6: access.users: {tmp_path}/users.htpasswd", f"{tmp_path}/tokens.yaml"
    assert lines == [
        f"{users}: line 1: needs NAME:HASH: make it with htpasswd -B",
        f"{users}: line 2: the hash is not bcrypt: make it with htpasswd -B",
        f"m.yaml:7: access.tokens: {tokens}: No such file or directory: {TOKENS_REMEDY}",
    ]


def test_all_wrong_values_are_printed(check: Check) -> None:
    code, lines = check(HUB.replace("rules:", "ruels: []") + "workers: x\nlisten: y\n")
    assert code == 78
    assert [line.split(": ")[1] for line in lines] == ["access.ruels", "listen", "workers"]


def test_serve_prints_the_warnings_before_it_starts(
    check: Check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("m.yaml").write_text(HUB + RULE.format("**", "bob", "admin"))
    monkeypatch.setattr(processes, "run", lambda settings, _: 0)
    assert main(["serve", "m.yaml"]) == 0
    assert "'bob': nobody can log in with this name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rules", "by"),
    [
        ([("registry.example/team/s/**", ""), ("registry.example/**", "pull")], "access.rules[1]"),
        ([("docker.io/team/**", "")], "access.anonymous_pull"),
        ([("registry.example/team/**", "")], ""),
        ([("registry.example/team/**", ""), ("registry.example/**", "")], ""),
        ([("registry.example/**", ""), ("**", "pull")], ""),
        ([("registry.example/team/**", "pull"), ("registry.example/**", "pull, push")], ""),
        ([('docker.io/team/**", "docker.io/team', "")], ""),
    ],
)
def test_refusal_of_all_below_a_repository_that_is_permitted_itself_gives_a_warning(
    check: Check, rules: list[tuple[str, str]], by: str
) -> None:
    text = "".join(RULE.format(pattern, "anonymous", may) for pattern, may in rules)
    code, lines = check(HUB + text)
    found = [line for line in lines if "itself" in line]
    assert code == 0, lines
    assert len(found) == bool(by), lines
    assert by in "".join(found)
