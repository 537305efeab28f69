"""Signals, the supervisor and its workers, the standard output, the end of a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from mirror import __version__
from mirror.processes import _metrics_directory
from mirror.threads import run_in_thread
from tests.fakes.registry import FakeRegistry, Fault
from tests.real.process import need, wait_until
from tests.real.server import ROOT, Mirror
from tests.real.wire import Download
from tests.unit.store.kit import random_bytes

DATA = random_bytes(600_000, 91)
LARGE = random_bytes(24_000_000, 92)
NOWHERE = {"docker.io": "http://127.0.0.1:9"}
TAGS = "/v2/library/app/tags/list?n=0"


def messages(mirror: Mirror, text: str) -> list[dict[str, Any]]:
    """The log lines with this message."""
    return [line for line in mirror.log() if line["message"] == text]


def seconds(line: dict[str, Any]) -> float:
    """The time of a log line."""
    return datetime.fromisoformat(line["time"]).timestamp()


def begin(mirror: Mirror, path: str) -> asyncio.Future[Download]:
    """Download in a thread. Await the result for the download."""
    return asyncio.get_running_loop().run_in_executor(None, mirror.download, path)


def has_ended(pid: int) -> bool:
    """True for a zombie or no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


# --- the standard output --------------------------------------------------------------------------


@contextmanager
def unread_output(mirror: Mirror) -> Iterator[int]:
    """Run the mirror with a pipe as its standard output. Yields the other end, unread."""
    pipe = mirror.dir / "stdout"
    os.mkfifo(pipe)
    read_end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    mirror.prefix = ("/bin/sh", "-c", f'exec "$@" >{pipe}', "sh")
    try:
        with mirror:
            yield read_end
    finally:
        os.close(read_end)


@pytest.mark.row("FE1-full-stdout-pipe")
@pytest.mark.parametrize("workers", [1, 2])
def test_server_serves_and_stops_if_nobody_reads_its_output(workers: int) -> None:
    """The pipe takes 64 KiB, which is about 80 lines."""
    mirror = Mirror(NOWHERE, workers=workers)
    with unread_output(mirror) as read_end:
        path = "/v2/library/app/" + "x" * 600
        for _ in range(300):
            assert mirror.ask(path, timeout=10).status == 404
        assert mirror.ask("/healthz", timeout=5).status == 200
        children = mirror.workers()
        if children:
            # The supervisor writes nothing: it starts another worker.
            mirror.kill_worker(children[0])
            wait_until(lambda: set(mirror.workers()) - set(children) != set(), "another one", 20)
        started = time.monotonic()
        assert mirror.stop() == 0
        assert time.monotonic() - started < 5
        assert b'"message":"serving"' in os.read(read_end, 65536)


@pytest.mark.row("FE1-full-stdout-pipe")
def test_lines_that_a_full_disk_refuses_are_counted() -> None:
    mirror = Mirror(NOWHERE)
    mirror.prefix = ("/bin/sh", "-c", 'exec "$@" >/dev/full', "sh")
    with mirror:
        assert mirror.metric_reaches(1, "oci_mirror_log_lines_dropped_total")


FAILING_WRITE = """
import os

write, failed = os.write, []

def fail_once(fd, data):
    if fd == 1 and b"nothing" in data and not failed:
        failed.append(data)
        raise ValueError("planted")
    return write(fd, data)

os.write = fail_once
"""
"""A sitecustomize.py: the first write of a line about ``/nothing`` raises an unexpected error."""


@pytest.mark.row("FE1-full-stdout-pipe")
def test_log_goes_on_and_names_the_error_after_an_unexpected_one(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILING_WRITE)
    with Mirror(NOWHERE, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}) as mirror:
        assert mirror.ask("/nothing").status == 404
        text = "log lines could not be written"
        wait_until(lambda: bool(messages(mirror, text)), "the error is logged", 20)
        (line,) = messages(mirror, text)
        assert (line["level"], line["why"]) == ("error", "ValueError: planted")
        assert mirror.metric_reaches(1, "oci_mirror_log_lines_dropped_total")
        assert mirror.ask("/nothing").status == 404
        wait_until(lambda: any(one.get("status") == 404 for one in mirror.log()), "a line", 20)


@pytest.mark.row("FE1-full-stdout-pipe")
def test_server_serves_with_a_closed_stdout() -> None:
    mirror = Mirror(NOWHERE)
    mirror.prefix = ("/bin/sh", "-c", 'exec "$@" >&-', "sh")
    with mirror:
        assert mirror.ask("/v2/").status == 200
        assert mirror.ask("/nothing").status == 404
        assert mirror.stop() == 0


# --- the start line -----------------------------------------------------------------------------


@pytest.mark.row("FE7-commands-and-start-line")
def test_start_names_version_upstreams_directory_use_and_quota() -> None:
    with Mirror(NOWHERE, storage={"max_size": "50G"}) as mirror:
        wait_until(lambda: bool(messages(mirror, "storage")), "the storage is measured", 20)
        (serving,), (storage,) = messages(mirror, "serving"), messages(mirror, "storage")
        assert serving["version"] == __version__
        assert serving["listen"] == mirror.host
        assert serving["upstreams"] == "docker.io"
        assert serving["data_dir"] == str(mirror.data_dir)
        assert (storage["used"], storage["quota"], storage["contents"]) == ("0B", "50GB", 0)


# --- SIGHUP, SIGQUIT ------------------------------------------------------------------------------


def reload(mirror: Mirror, **settings: Any) -> dict[str, Any]:
    """Change the configuration file, send SIGHUP, and return the line that tells the result."""
    mirror.settings.update(settings)
    mirror.config_file.write_text(yaml.safe_dump(mirror.settings))
    return hang_up(mirror)


def has_probe(mirror: Mirror) -> bool:
    return any(line.get("kind") == "ping" for line in mirror.log())


def hang_up(mirror: Mirror) -> dict[str, Any]:
    texts = ("the configuration was read again", "the configuration was not applied")

    def results() -> list[dict[str, Any]]:
        return [line for line in mirror.log() if line["message"] in texts]

    before = len(results())
    os.kill(mirror.pid, signal.SIGHUP)
    wait_until(lambda: len(results()) > before, "the configuration is read", 20)
    return results()[before]


@pytest.mark.row("FE2-signals-and-orphans")
async def test_hangup_applies_policies_and_new_upstreams_without_cutting_a_pull() -> None:
    gate = asyncio.Event()
    async with FakeRegistry() as fake, FakeRegistry() as other:
        blob, late = fake.add_blob(DATA), other.add_blob(b"late")
        fake.fault(f"blobs/{blob}", Fault(stall_at=300_000, gate=gate))
        mirror = Mirror({"docker.io": fake.url})
        with mirror:
            ask, path = mirror.ask, f"/v2/library/app/blobs/{blob}"
            pull = begin(mirror, path)
            await fake.stalled.wait()
            upstreams = {
                "docker.io": {"endpoints": [fake.url], "deny": ["org/*"], "tag_ttl": "1s"},
                "late.io": {"endpoints": [other.url]},
            }
            line = await run_in_thread(
                lambda: reload(
                    mirror, upstreams=upstreams, log={"format": "json", "level": "debug"}
                )
            )
            assert line["changed"] == "log.level,upstreams.docker.io,upstreams.late.io"
            refused = await run_in_thread(ask, "/v2/org/app/manifests/latest")
            assert (refused.status, b"deny-list" in refused.body) == (403, True)
            added = await run_in_thread(ask, f"/v2/library/app/blobs/{late}?ns=late.io")
            assert (added.status, added.body) == (200, b"late")
            await run_in_thread(ask, "/healthz")
            await run_in_thread(wait_until, lambda: has_probe(mirror), "a line of level debug", 20)
            counted = await run_in_thread(
                lambda: mirror.metric("oci_mirror_requests_total", upstream="late.io")
            )
            assert counted == 1
            # The upstream that a running pull uses is removed.
            removed = {"late.io": upstreams["late.io"]}
            await run_in_thread(lambda: reload(mirror, upstreams=removed))
            gone = await run_in_thread(ask, "/v2/library/app/tags/list?ns=docker.io")
            assert (gone.status, b"NAME_UNKNOWN" in gone.body) == (404, True)
            gate.set()
            got = await pull
            assert f"sha256:{got.sha256}" == str(blob)


@pytest.mark.row("FE2-signals-and-orphans")
def test_hangup_names_keys_that_need_a_restart_and_keeps_them() -> None:
    with Mirror(NOWHERE) as mirror:
        line = reload(mirror, storage={"max_size": "1GiB"}, listen="127.0.0.1:1", catalog=True)
        assert line["changed"] == "catalog"
        (kept,) = messages(mirror, "changed keys need a restart")
        assert (kept["level"], kept["keys"]) == ("warning", "listen,storage.max_size")
        assert mirror.ask("/v2/_catalog").status == 200


@pytest.mark.row("FE2-signals-and-orphans")
def test_hangup_with_a_broken_file_is_one_error_and_changes_nothing() -> None:
    with Mirror(NOWHERE) as mirror:
        for broken in ("upstreams: [", "no_such_key: 1\n", ""):
            mirror.config_file.write_text(broken)
            line = hang_up(mirror)
            assert line["level"] == "error"
            assert "mirror.yaml" in line["why"]
            assert mirror.ask(TAGS).status == 200
        mirror.config_file.unlink()
        assert "No such file" in hang_up(mirror)["why"]
        assert "Traceback" not in mirror.output_text()


@pytest.mark.row("FE2-signals-and-orphans")
def test_many_hangups_at_once_are_survived() -> None:
    with Mirror(NOWHERE) as mirror:
        for _ in range(200):
            os.kill(mirror.pid, signal.SIGHUP)
        # Not by the log: of a message that is repeated so often, only the first lines are logged.
        mirror.settings["catalog"] = True
        mirror.config_file.write_text(yaml.safe_dump(mirror.settings))
        os.kill(mirror.pid, signal.SIGHUP)
        wait_until(lambda: mirror.ask("/v2/_catalog").status == 200, "the last one is obeyed", 20)
        assert mirror.ask(TAGS).status == 200


@pytest.mark.row("FE2-signals-and-orphans")
def test_hangup_reaches_workers_also_those_that_start_later() -> None:
    with Mirror(NOWHERE, workers=2) as mirror:
        before = mirror.workers()
        reload(mirror, catalog=True)
        wait_until(
            lambda: len(messages(mirror, "the configuration was read again")) == 2, "both", 20
        )
        assert mirror.workers() == before, "no worker was ended by the signal"
        for pid in before:
            mirror.kill_worker(pid)
        wait_until(lambda: len(messages(mirror, "serving")) == 4, "two new workers", 30)
        for _ in range(10):
            assert mirror.ask("/v2/_catalog").status == 200


@pytest.mark.row("FE2-signals-and-orphans")
def test_hangup_while_a_worker_starts_reaches_that_worker() -> None:
    with Mirror(NOWHERE, workers=2) as mirror:
        wait_until(lambda: len(messages(mirror, "serving")) == 2, "both serve", 20)
        before = mirror.workers()
        mirror.kill_worker(before[0])
        wait_until(lambda: bool(set(mirror.workers()) - set(before)), "it is forked", 20)
        reload(mirror, catalog=True)
        wait_until(
            lambda: len(messages(mirror, "the configuration was read again")) == 2, "both", 20
        )
        assert len(messages(mirror, "serving")) == 3
        assert len(messages(mirror, "a worker ended")) == 1


@pytest.mark.row("FE2-signals-and-orphans")
@pytest.mark.parametrize("workers", [1, 2])
def test_hangup_of_a_closed_terminal_stops_the_server_and_of_an_open_one_does_not(
    workers: int,
) -> None:
    master, slave = os.openpty()
    mirror = Mirror(NOWHERE, workers=workers)
    mirror.prefix = ("/bin/sh", "-c", f'exec "$@" >{os.ttyname(slave)}', "sh")
    with mirror:
        os.close(slave)
        os.kill(mirror.pid, signal.SIGHUP)
        shown = b""
        while shown.count(b"the configuration was read again") < workers:
            shown += os.read(master, 65536)
        assert mirror.ask(TAGS).status == 200
        os.close(master)
        # The kernel sends it to all processes of the terminal. One of them is enough.
        os.kill(mirror.pid, signal.SIGHUP)
        wait_until(lambda: has_ended(mirror.pid), "the server stops", 20)
        assert mirror.stop() == 0


@pytest.mark.row("FE2-signals-and-orphans")
def test_server_in_the_background_reloads_after_the_terminal_of_its_input_is_gone() -> None:
    master, slave = os.openpty()
    mirror = Mirror(NOWHERE)
    mirror.prefix = ("/bin/sh", "-c", f'exec "$@" <{os.ttyname(slave)}', "sh")
    with mirror:
        os.close(slave)
        os.close(master)
        # The end of the terminal is a hangup itself: it may be the one that reads the change.
        reload(mirror, catalog=True)
        wait_until(
            lambda: any(line.get("changed") == "catalog" for line in mirror.log()), "the change", 20
        )


@pytest.mark.row("FE2-signals-and-orphans")
@pytest.mark.parametrize("workers", [1, 2])
def test_stop_does_not_wait_for_a_configuration_that_cannot_be_read(workers: int) -> None:
    """A pipe without a writer hangs as a file on a network disk does."""
    with Mirror(NOWHERE, workers=workers) as mirror:
        mirror.config_file.unlink()
        os.mkfifo(mirror.config_file)
        for _ in range(3):
            os.kill(mirror.pid, signal.SIGHUP)
            time.sleep(0.1)
        assert mirror.ask("/healthz").status == 200
        started = time.monotonic()
        assert mirror.stop() == 0
        assert time.monotonic() - started < 5


@pytest.mark.row("FE2-signals-and-orphans")
def test_worker_is_started_again_once_the_system_has_room_for_it() -> None:
    mirror = Mirror(NOWHERE, workers=2)
    # The supervisor's third fork, which replaces the killed worker, is refused.
    inject = "inject=clone,clone3,fork,vfork:error=EAGAIN:when=3"
    mirror.prefix = (need("strace"), "-D", "-o", "/dev/null", "-e", "trace=process", "-e", inject)
    with mirror:
        before = mirror.workers()
        mirror.kill_worker(before[0])
        wait_until(lambda: bool(set(mirror.workers()) - set(before)), "another one", 20)
        assert before[1] in mirror.workers()
        assert mirror.ask("/healthz").status == 200
        assert mirror.stop() == 0


@pytest.mark.row("FE2-signals-and-orphans")
@pytest.mark.parametrize("workers", [1, 2])
async def test_sigquit_drains_like_sigterm(workers: int) -> None:
    gate = asyncio.Event()
    async with FakeRegistry() as fake:
        blob = fake.add_blob(DATA)
        fake.fault(f"blobs/{blob}", Fault(stall_at=300_000, gate=gate))
        with Mirror({"docker.io": fake.url}, workers=workers) as mirror:
            path = f"/v2/library/app/blobs/{blob}"
            pull = begin(mirror, path)
            await fake.stalled.wait()
            os.kill(mirror.pid, signal.SIGQUIT)
            await run_in_thread(
                wait_until, lambda: len(messages(mirror, "draining")) == workers, "it drains", 20
            )
            gate.set()
            assert f"sha256:{(await pull).sha256}" == str(blob)
            await run_in_thread(wait_until, lambda: not mirror.running, "it ends", 20)
            assert mirror.stop() == 0


# --- a supervisor that is killed ------------------------------------------------------------------


@pytest.mark.row("FE2-signals-and-orphans")
async def test_workers_end_with_a_killed_supervisor_complete_pulls_and_free_the_address() -> None:
    gate = asyncio.Event()
    async with FakeRegistry() as fake:
        blob = fake.add_blob(DATA)
        fake.fault(f"blobs/{blob}", Fault(stall_at=300_000, gate=gate))
        with Mirror({"docker.io": fake.url}, workers=2) as mirror:
            workers = mirror.workers()
            path = f"/v2/library/app/blobs/{blob}"
            pull = begin(mirror, path)
            await fake.stalled.wait()
            os.kill(mirror.pid, signal.SIGKILL)
            await run_in_thread(wait_until, lambda: can_bind(mirror.port), "it is free", 5)
            assert not all(map(has_ended, workers)), "one of them has a pull"
            gate.set()
            assert f"sha256:{(await pull).sha256}" == str(blob)
            await run_in_thread(
                wait_until, lambda: all(map(has_ended, workers)), "the workers end", 20
            )
            lines = messages(mirror, "the supervisor ended: this worker stops")
            assert [line["level"] for line in lines] == ["error", "error"]
            await run_in_thread(mirror.restart)
            assert (await run_in_thread(mirror.ask, path)).body == DATA


def can_bind(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


# --- the directory of metrics -------------------------------------------------------------------


def wait_until_replaced(mirror: Mirror, workers: list[int]) -> None:
    wait_until(lambda: len(set(mirror.workers()) - set(workers)) == 2, "two new workers", 20)


@pytest.mark.row("G8-start-on-a-full-disk")
def test_metrics_of_killed_workers_stay_and_their_files_do_not_pile_up(tmp_path: Path) -> None:
    with Mirror(NOWHERE, workers=2, env={"TMPDIR": str(tmp_path)}) as mirror:
        (directory,) = tmp_path.glob("oci-mirror-metrics-*")
        wait_until(lambda: len(messages(mirror, "serving")) == 2, "both have their files", 20)
        for _ in range(10):
            mirror.ask(TAGS)
        # A request is counted after its response was sent.
        assert mirror.metric_reaches(10, "oci_mirror_requests_total", kind="tags", outcome="hit")
        files = sorted(path.name for path in directory.iterdir())
        for _ in range(3):
            before = mirror.workers()
            for pid in before:
                mirror.kill_worker(pid)
            wait_until_replaced(mirror, before)
            wait_until(mirror.ready, "it serves", 20)
        assert mirror.metric("oci_mirror_requests_total", kind="tags", outcome="hit") == 10
        assert mirror.metric("oci_mirror_requests_in_flight") == 1, "the request for the metrics"
        wait_until(lambda: len(list(directory.iterdir())) == len(files), "the same files", 20)
        assert sorted(path.name for path in directory.iterdir()) == files


@pytest.mark.row("G8-start-on-a-full-disk")
def test_directory_of_a_killed_server_is_removed_by_the_next_one(tmp_path: Path) -> None:
    env = {"TMPDIR": str(tmp_path)}
    with (
        Mirror(NOWHERE, workers=2, env=env) as running,
        Mirror(NOWHERE, workers=2, env=env) as dead,
    ):
        dead.kill()
        of_others = tmp_path / "oci-mirror-metrics-of-others"
        of_others.mkdir()
        assert len(list(tmp_path.iterdir())) == 3
        dead.start()
        assert len(list(tmp_path.iterdir())) == 3, "that of the dead one was replaced"
        assert running.metric("oci_mirror_requests_total", kind="ping") > 0
        dead.stop()
        running.stop()
        assert list(tmp_path.iterdir()) == [of_others]


@pytest.mark.row("G8-start-on-a-full-disk")
def test_planted_links_and_pipes_in_the_temporary_directory_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "owner.lock").touch()
    planted = tmp_path / "oci-mirror-metrics-planted"
    planted.mkdir()
    (planted / "owner.lock").symlink_to(precious / "owner.lock")
    (tmp_path / "oci-mirror-metrics-link").symlink_to(precious)
    piped = tmp_path / "oci-mirror-metrics-piped"
    piped.mkdir()
    os.mkfifo(piped / "owner.lock")
    with _metrics_directory() as directory:
        assert Path(directory).parent == tmp_path
    assert (precious / "owner.lock").exists()
    assert planted.exists()


# --- the time that a stop takes -------------------------------------------------------------------


LONG_SHUTDOWN = """
import mirror.server

mirror.server._SHUTDOWN_TIMEOUT_S = 20.0
"""
"""A sitecustomize.py. A stop that waits for a handler or a connection takes 20 s more, not 1 s."""


@pytest.mark.row("G9-stop-in-time")
@pytest.mark.parametrize("workers", [1, 2])
async def test_stop_with_clients_that_do_not_read_ends_at_the_drain_timeout(
    tmp_path: Path, workers: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LONG_SHUTDOWN)
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    settings: dict[str, Any] = {"workers": workers, "drain_timeout": "1s", "env": env}
    async with FakeRegistry() as fake:
        digest, stalled = fake.add_blob(LARGE), fake.add_blob(DATA)
        fake.fault(f"blobs/{stalled}", Fault(stall_at=300_000))
        with Mirror({"docker.io": fake.url}, **settings) as mirror:
            path = f"/v2/library/app/blobs/{digest}"
            got = await run_in_thread(mirror.download, path)
            assert f"sha256:{got.sha256}" == str(digest)
            requests = [
                f"GET /v2/library/app/blobs/{wanted} HTTP/1.1\r\nHost: m\r\n\r\n"
                for wanted in [digest] * 8 + [stalled]
            ]
            writers = []
            for request in requests:
                reader, writer = await asyncio.open_connection("127.0.0.1", mirror.port)
                writer.write(request.encode())
                await reader.readexactly(1000)
                writers.append(writer)
            # None of these has a request in flight: nothing, half a header, and an idle connection.
            for sent in ("", "GET /v2/ HTTP/1.1\r\nHos", "GET /v2/ HTTP/1.1\r\nHost: m\r\n\r\n"):
                reader, writer = await asyncio.open_connection("127.0.0.1", mirror.port)
                writer.write(sent.encode())
                if sent.endswith("\n"):
                    await reader.readuntil(b"{}")
                writers.append(writer)
            os.kill(mirror.pid, signal.SIGTERM)
            await run_in_thread(wait_until, lambda: not mirror.running, "it ends", 60)
            ended = time.time()
            assert mirror.stop() == 0
            cut = [line for line in mirror.log() if "drain_timeout" in line.get("error", "")]
            assert (len(cut), {line["level"] for line in cut}) == (9, {"warning"})
            begun = min(seconds(line) for line in messages(mirror, "draining"))
            # By the clock of the process. How long its end takes depends on the machine.
            assert max(seconds(line) for line in cut) - begun < 1 + 0.9
            assert ended - begun < 1 + 5
            assert sum(line["cut"] for line in messages(mirror, "the drain timeout is over")) == 9
            for writer in writers:
                writer.transport.abort()
