"""``completion``: each shell completes commands, options and values with the printed script."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.cli.completion import SHELLS
from mirror.cli.exit_codes import EX_USAGE
from mirror.cli.main import main
from tests.real.process import run


@pytest.fixture
def script(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Path:
    assert main(["completion", request.param]) == 0
    path = tmp_path / "_oci-mirror"
    path.write_text(capsys.readouterr().out)
    return path


def for_shell(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("script", [name], indirect=True)


@for_shell("bash")
def test_bash_completes_commands_options_values_and_files(script: Path) -> None:
    def complete(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in words)
        text = (
            f"cd {script.parent}; source {script}; COMP_WORDS=({quoted}); "
            f"COMP_CWORD={len(words) - 1}; _shtab_oci_mirror; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        return run("bash", "--norc", "-c", text).stdout.decode().split()

    assert "doctor" in complete("oci-mirror", "doc")
    assert "--runtime" in complete("oci-mirror", "doctor", "--run")
    assert complete("oci-mirror", "doctor", "--runtime", "pod") == ["podman"]
    assert complete("oci-mirror", "doctor", "--config", "_oci") == ["_oci-mirror"]
    assert complete("oci-mirror", "completion", "z") == ["zsh"]


@for_shell("fish")
def test_fish_completes_commands_options_and_values(script: Path, tmp_path: Path) -> None:
    def complete(line: str) -> list[str]:
        text = f"source {script}; complete -C '{line}'"
        env = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
        out = run("fish", "--no-config", "-c", text, env=env).stdout.decode()
        return [found.partition("\t")[0] for found in out.splitlines()]

    assert "doctor" in complete("oci-mirror doc")
    assert complete("oci-mirror doctor --run") == ["--runtime"]
    assert complete("oci-mirror doctor --runtime pod") == ["podman"]


# zsh has no command that prints completions: a terminal (zpty) presses the keys.
_ZSH = """
zmodload zsh/zpty
zpty -b shell zsh -f -i
zpty -w shell "PS1=; fpath=({directory} $fpath)"
zpty -w shell "autoload -Uz compinit; compinit -u -d {directory}/dump"
zpty -w shell "bindkey '^I' complete-word; echo is-ready"
zpty -r -m shell line '*is-ready*is-ready*'
zpty -n -w shell 'oci-mirror {words}'$'\\t'$'\\x05'$'\\x01'"echo '<"$'\\x05'">'"$'\\n'
zpty -r -m shell line '*<*>*<*>*'
print -r -- $line
"""


@for_shell("zsh")
@pytest.mark.parametrize(
    ("words", "completed"),
    [("doct", "doctor"), ("doctor --runt", "--runtime"), ("doctor --runtime podm", "podman")],
)
def test_zsh_completes_commands_options_and_values(
    script: Path, words: str, completed: str
) -> None:
    text = _ZSH.format(directory=script.parent, words=words)
    out = run("zsh", "-f", "-c", text, env={"TERM": "dumb"}, timeout=20).stdout.decode()
    assert f"{completed}" in out.rpartition("<")[2]


@pytest.mark.parametrize("shell", SHELLS)
def test_header_names_the_same_file_as_the_documents(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"# Write it to {SHELLS[shell]} and" in script
    assert "AUTOMATICALLY" not in script
    assert "Copy this" not in script
    assert script.startswith("#compdef oci-mirror\n") is (shell == "zsh")
    docs = Path(__file__).parents[3] / "docs" / "commands.md"
    assert f"oci-mirror completion {shell} > {SHELLS[shell]}\n" in docs.read_text()


def test_unknown_shell_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == EX_USAGE
    message = capsys.readouterr().err
    assert all(shell in message for shell in SHELLS)
