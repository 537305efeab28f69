"""The commands: exit codes, one line for each failure, never a traceback."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import product
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

from mirror import __main__ as entry_point
from mirror import __version__, processes
from mirror.cli.main import _describe_listen_failure, main
from mirror.config.settings import Settings
from mirror.oci.errors import StorageUnavailable
from tests.real.process import need
from tests.unit.cli.kit import make_data_directory

ROOT = Path(__file__).parents[3]
SHIPPED = str(ROOT / "config" / "mirror.yaml")


def run(*argv: str, **more: object) -> subprocess.CompletedProcess[str]:
    """Run ``python -m mirror`` as a process of its own."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environ, **more}
    command = [sys.executable, "-m", "mirror", *argv]
    return subprocess.run(command, cwd=ROOT, text=True, check=False, timeout=60, **options)  # type: ignore[call-overload,no-any-return]  # options are all its keywords


class HealthHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering() -> Iterator[int]:
    """Another program that answers requests. Yields its port."""
    with HTTPServer(("127.0.0.1", 0), HealthHandler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "m.yaml"
    file.write_text("upstreams: {docker.io: {endpoints: ['http://127.0.0.1:9']}}\n")
    return file


def test_version_is_printed_by_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["version"], ["--version"]):
        assert main(argv) == 0
        assert capsys.readouterr().out == f"oci-mirror {__version__}\n"


def test_help_names_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    commands = ("serve", "check-config", "clients", "schema", "healthcheck", "version")
    for word in (*commands, "78 configuration"):
        assert word in said


@pytest.mark.parametrize(
    "argv",
    [[], ["serve", "--bogus"], ["check-config", "a", "b"], ["clients", "--client", "x"]],
)
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("usage: ")


@pytest.mark.parametrize("command", ["serve --config", "check-config", "clients --config"])
def test_bad_configuration_exits_with_78(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("stroage: 1\n")
    assert main([*command.split(), str(file)]) == 78
    assert capsys.readouterr().err == (
        f"oci-mirror: {file}:1: stroage: unknown key, did you mean storage?\n"
    )


@pytest.mark.row("FE7-commands-and-start-line")
@pytest.mark.parametrize("command", ["serve", "check-config", "clients", "healthcheck"])
def test_configuration_file_is_an_argument_or_an_option_of_every_command(
    command: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served: list[object] = []
    monkeypatch.setattr(processes, "run", lambda settings, _: served.append(settings) or 0)
    monkeypatch.setattr("mirror.cli.health.check_health", lambda url: None)
    results = []
    for form in ([str(config)], ["--config", str(config)], ["--config", str(config), str(config)]):
        code = main([command, *form])
        results.append((code, capsys.readouterr().out, served[-1:]))
    assert results[0][0] == 0
    assert results[0] == results[1] == results[2]
    assert main([command, str(config), "--config", "/other"]) == 2
    assert "once" in capsys.readouterr().err
    assert main([command, "/nowhere"]) == main([command, "--config", "/nowhere"]) == 78


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\nlines\x1b[31m"), 70, "internal fault at test_main.py:"),
        (PermissionError(13, "Permission denied", "/data"), 1, "/data: Permission denied"),
        (StorageUnavailable("in use"), 1, "in use"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_failure_of_serve_is_one_line_with_its_exit_code(
    error: BaseException,
    code: int,
    line: str | None,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(settings: object, load: object) -> int:
        raise error

    monkeypatch.setattr(processes, "run", fail)
    assert main(["serve", "--config", str(config)]) == code
    said = capsys.readouterr().err
    if line is None:
        assert said == ""
    else:
        assert said.startswith(f"oci-mirror: {line}")
        assert said.count("\n") == 1
        assert said[:-1].isprintable()


def test_serve_passes_its_settings_and_returns_the_code_of_the_server(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def serve(settings: Settings, load: Callable[[], Settings]) -> int:
        seen.append(settings.listen)
        assert load() == settings
        return 3

    monkeypatch.setattr(processes, "run", serve)
    monkeypatch.setenv("OCI_MIRROR_LISTEN", "127.0.0.1:1")
    assert main(["serve", "--config", str(config)]) == 3
    assert seen == ["127.0.0.1:1"]


def test_address_in_use_exits_with_1_and_one_line(config: Path, tmp_path: Path) -> None:
    with answering() as port:
        environ = {
            **os.environ,
            "OCI_MIRROR_LISTEN": f"127.0.0.1:{port}",
            "OCI_MIRROR_DATA_DIR": str(tmp_path / "data"),
        }
        done = run("serve", "--config", str(config), env=environ)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "another program listens there already" in done.stderr


def test_program_that_has_the_address_and_does_not_respond_is_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mirror.cli.own_server._STEP_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        error = processes.CannotListen("listen", address, OSError(errno.EADDRINUSE, "in use"))
        text = _describe_listen_failure(Settings(), error)
    assert text.startswith(f"listen: {address}: another program listens there already")


PRINTING = [
    ["--help"],
    ["--version"],
    ["version"],
    ["serve", "--help"],
    ["check-config", SHIPPED],
    ["clients", "--config", SHIPPED, "--client", "podman"],
    ["schema"],
]


OUTPUTS = ["/dev/full", "closed pipe", "closed"]
WAYS_TO_PRINT = [
    pytest.param(*way, marks=[pytest.mark.long] * (number % 2))
    for number, way in enumerate(product(["", "1"], PRINTING, OUTPUTS))
]
"""``PYTHONUNBUFFERED``, arguments, standard output. Every other one is enough for each run."""


@pytest.mark.row("R9-blocked-stdout")
@pytest.mark.parametrize(("unbuffered", "argv", "output"), WAYS_TO_PRINT)
def test_standard_output_that_cannot_be_written_exits_with_74(
    argv: list[str], output: str, unbuffered: str
) -> None:
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    if output == "closed":
        command = [need("sh"), "-c", 'exec "$0" "$@" >&-', sys.executable, "-m", "mirror", *argv]
        done = subprocess.run(
            command, cwd=ROOT, text=True, stderr=subprocess.PIPE, env=environ, check=False
        )
    elif output == "/dev/full":
        with Path(output).open("w") as full:
            done = run(*argv, stdout=full, env=environ)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = run(*argv, stdout=writer, env=environ)
        finally:
            os.close(writer)
    assert done.returncode == 74
    lines = [
        line
        for line in done.stderr.splitlines()
        if not line.startswith(("oci-mirror: podman:", "oci-mirror: http://127.0.0.1:5100 is"))
    ]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("oci-mirror: the output could not be written: ")


@pytest.mark.row("R9-blocked-stdout")
def test_standard_error_that_cannot_be_written_does_not_change_the_exit_code() -> None:
    with Path("/dev/full").open("w") as full:
        assert run("check-config", "/nowhere", stderr=full).returncode == 78
        assert run("version", stdout=full, stderr=full).returncode == 74


# --- healthcheck ----------------------------------------------------------------------------------


def test_healthcheck_succeeds_only_for_status_200(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Proxies of the environment are not used.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with answering() as port:
        url = f"http://127.0.0.1:{port}"
        assert main(["healthcheck", "--url", f"{url}/healthz"]) == 0
        assert main(["healthcheck", "--url", url]) == 0
        assert main(["healthcheck", "--url", f"{url}/other"]) == 1
        assert "status 503" in capsys.readouterr().err
        monkeypatch.setenv("OCI_MIRROR_LISTEN", f"0.0.0.0:{port}")
        assert main(["healthcheck"]) == 0
        assert main(["healthcheck", "--config", str(config)]) == 0
    assert main(["healthcheck"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "refused" in said


@pytest.mark.parametrize("url", ["ftp://x", "x", "http://", "http://127.0.0.1:99999/"])
def test_healthcheck_of_a_malformed_url_fails(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["healthcheck", "--url", url]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_healthcheck_with_a_malformed_listen_address_exits_with_78(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OCI_MIRROR_LISTEN", ":5100")
    assert main(["healthcheck"]) == 78
    assert "OCI_MIRROR_LISTEN" in capsys.readouterr().err


def test_interrupt_during_the_imports_is_130_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "mirror.cli.main", Interrupted("mirror.cli.main"))
    assert entry_point.main() == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("word", "hint"), [("lss", ": did you mean ls?"), ("xyz", "")])
def test_unknown_command_is_one_line_with_the_nearest_one(
    word: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    expected = f"oci-mirror: '{word}' is no command{hint} (oci-mirror --help lists all)\n"
    assert capsys.readouterr().err == expected


def test_commands_of_the_help_are_in_alphabetical_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("    ") and line[4].isalpha()]
    assert len(names) > 20
    assert names == sorted(names)


def test_wrong_usage_repeats_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", "app:v1\n\x1b[31m"]) == 2
    assert "'app:v1\\x0a\\x1b[31m' is no image name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["freeze", f"app@sha256:{'a' * 64}"],
        ["refresh", f"app@sha256:{'a' * 64}"],
        ["block", "app", "--reason", "a\nb"],
        ["block", "docker.io"],
        ["ls", "--filter", "state=zz"],
        ["in-use", "--from-kubernetes", "--api-server", "x"],
    ],
    ids=" ".join,
)
def test_values_that_can_never_be_right_are_wrong_usage(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "oci-layout").write_text("{}")
    file = tmp_path / "m.yaml"
    upstreams = "upstreams: {docker.io: {endpoints: ['http://127.0.0.1:9']}}"
    file.write_text(f"data_dir: {data}\n{upstreams}\n")
    code = main([*argv, "--config", str(file)])
    err = capsys.readouterr().err
    assert (code, "Error" in err) == (2, False), err


def test_background_error_of_a_full_output_is_one_line(config: Path, tmp_path: Path) -> None:
    make_data_directory(tmp_path / "data")
    with Path("/dev/full").open("w") as full:
        environ = {**os.environ, "OCI_MIRROR_DATA_DIR": str(tmp_path / "data")}
        result = run(
            *("warm", "--json", "nope.example/x:1", "--config", str(config)),
            stdout=full,
            env=environ,
        )
    assert (result.returncode, result.stderr) == (
        74,
        "oci-mirror: the output could not be written: No space left on device\n",
    )
