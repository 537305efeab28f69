"""The stream of log lines never blocks its writer (row FE1)."""

from __future__ import annotations

import fcntl
import io
import json
import os
import random
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable

import pytest

from mirror.config.settings import Log
from mirror.observability import events
from mirror.observability.library_logs import configure_logging
from mirror.observability.log_stream import LogStream, free_pipe_bytes, pipe_bytes
from mirror.observability.logs import LogObserver
from tests.real.process import wait_until

LINE = "x" * 199 + "\n"
QUEUE_LINES = 2 * 1024 * 1024 // len(LINE)
"""Lines that the queue takes up."""


class Pipe:
    """A pipe of 64 KiB. ``read_all`` reads what was written to it, until it is closed."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self.received = b""

    def read_all(self) -> threading.Thread:
        def read() -> None:
            with os.fdopen(self.read_end, "rb") as file:
                self.received = file.read()

        thread = threading.Thread(target=read)
        thread.start()
        return thread


@pytest.mark.row("FE1-full-stdout-pipe")
@pytest.mark.parametrize("is_shared", [False, True])
def test_pipe_that_nobody_reads_drops_lines_and_takes_no_time(is_shared: bool) -> None:
    pipe, lost = Pipe(), [0]
    stream = LogStream(pipe.write_end, lambda count, error: lost.append(count), is_shared=is_shared)
    started = time.monotonic()
    accepted = [stream.write(LINE) > 0 for _ in range(3 * QUEUE_LINES)]
    assert time.monotonic() - started < 30
    assert accepted.count(False) > QUEUE_LINES
    assert sum(lost) == 0, "the caller knows it"
    # When it is read again, all that was accepted arrives, in whole lines.
    reader = pipe.read_all()
    wait_until(lambda: stream.write("last\n") > 0, "there is room again", 10)
    stream.close(10)
    os.close(pipe.write_end)
    reader.join(10)
    assert pipe.received.decode() == LINE * accepted.count(True) + "last\n"


@pytest.mark.row("FE1-full-stdout-pipe")
def test_close_waits_at_most_its_timeout_for_a_pipe_that_nobody_reads() -> None:
    pipe = Pipe()
    stream = LogStream(pipe.write_end, lambda count, error: None)
    for _ in range(QUEUE_LINES // 2):
        stream.write(LINE)
    started = time.monotonic()
    stream.close(0.2)
    assert 0.15 < time.monotonic() - started < 10
    reader = pipe.read_all()
    stream.close(10)
    os.close(pipe.write_end)
    reader.join(10)


def to_a_closed_pipe() -> int:
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def to_a_full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def to_no_writer() -> int:
    return os.open("/dev/null", os.O_RDONLY)


@pytest.mark.row("FE1-full-stdout-pipe")
@pytest.mark.parametrize("opened", [to_a_closed_pipe, to_a_full_disk, to_no_writer])
def test_descriptor_that_refuses_loses_lines_and_the_thread_goes_on(
    opened: Callable[[], int],
) -> None:
    lost: list[int] = []
    fd = opened()
    stream = LogStream(fd, lambda count, error: lost.append(count))
    for number in range(1, 4):
        stream.write(LINE)
        wait_until(lambda number=number: sum(lost) == number, "the line is lost", 10)  # type: ignore[misc] # bound early
    stream.close(10)
    os.close(fd)


@pytest.mark.row("FE1-full-stdout-pipe")
@pytest.mark.parametrize("error", [MemoryError(), ValueError("odd"), RuntimeError("odd")])
def test_unexpected_error_loses_its_lines_is_reported_and_the_thread_goes_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = Pipe()
    reports: list[tuple[int, Exception | None]] = []
    really_write = os.write

    def write(fd: int, data: bytes) -> int:
        if fd == pipe.write_end and b"fail" in data:
            raise error
        return really_write(fd, data)

    monkeypatch.setattr("os.write", write)
    stream = LogStream(pipe.write_end, lambda count, error: reports.append((count, error)))
    for number in (1, 2):
        stream.write("fail\nfail\n")
        wait_until(lambda number=number: len(reports) == number, "the lines are lost", 10)  # type: ignore[misc] # bound early
    assert reports == [(2, error)] * 2
    stream.write("last\n")
    # What was lost takes up no memory any more: the queue accepts as much as before.
    assert stream.write("x" * (QUEUE_LINES - 1) * len(LINE)) > 0
    reader = pipe.read_all()
    stream.close(10)
    os.close(pipe.write_end)
    reader.join(10)
    assert pipe.received.startswith(b"last\n")


@pytest.mark.row("FE1-full-stdout-pipe")
@pytest.mark.parametrize("is_shared", [False, True])
def test_non_blocking_descriptor_loses_nothing_that_was_accepted(is_shared: bool) -> None:
    """Another program that shares the pipe may have made it so."""
    pipe, lost = Pipe(), [0]
    flags = fcntl.fcntl(pipe.write_end, fcntl.F_GETFL)
    fcntl.fcntl(pipe.write_end, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    stream = LogStream(pipe.write_end, lambda count, error: lost.append(count), is_shared=is_shared)
    for _ in range(QUEUE_LINES // 2):
        stream.write(LINE)
    reader = pipe.read_all()
    stream.close(10)
    os.close(pipe.write_end)
    reader.join(10)
    assert pipe.received.decode() == LINE * (QUEUE_LINES // 2)
    assert sum(lost) == 0


@pytest.mark.parametrize(("is_shared", "largest"), [(False, 65_536), (True, select.PIPE_BUF)])
def test_only_writer_writes_many_lines_at_once_and_one_of_several_at_most_4_kib(
    is_shared: bool, largest: int
) -> None:
    # Each write to such a socket is a message of its own.
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with reader, writer:
        stream = LogStream(writer.fileno(), lambda count, error: None, is_shared=is_shared)
        stream.write(LINE * 500)
        sizes: list[int] = []
        while sum(sizes) < 500 * len(LINE):
            sizes.append(len(reader.recv(200_000)))
        stream.close(10)
    assert largest - len(LINE) < max(sizes) <= largest


@pytest.mark.row("FE1-full-stdout-pipe")
@pytest.mark.parametrize("before", [0, 1, 30])
def test_stop_while_nobody_reads_the_pipe_ends_with_a_whole_line(before: int) -> None:
    """A process that ends meanwhile has written what is in the pipe, and no more."""
    pipe = Pipe()
    stream = LogStream(pipe.write_end, lambda count, error: None, is_shared=False)
    stream.write(LINE * before)
    wait_until(lambda: unread(pipe) == before * len(LINE), "they are in the pipe", 10)
    stream.write(LINE * 5000)
    wait_until(lambda: unread(pipe) > 50_000, "it is nearly full", 10)
    stream.close(0.05)
    assert unread(pipe) % len(LINE) == 0
    reader = pipe.read_all()
    stream.close(10)
    os.close(pipe.write_end)
    reader.join(10)
    assert pipe.received.decode() == LINE * (before + 5000)


def unread(pipe: Pipe) -> int:
    """Return the bytes that wait in a pipe."""
    (count,) = struct.unpack("i", fcntl.ioctl(pipe.write_end, termios.FIONREAD, bytes(4)))
    return int(count)


def test_pipe_takes_at_once_what_is_said_to_be_free() -> None:
    rng, pipe, tried = random.Random(3), Pipe(), 0
    fcntl.fcntl(pipe.write_end, fcntl.F_SETFL, os.O_NONBLOCK)
    for _ in range(5000):
        if rng.random() < 0.3 and unread(pipe):
            os.read(pipe.read_end, rng.choice([1, 100, 4096, 5000, 100_000]))
            continue
        free = free_pipe_bytes(pipe.write_end, pipe_bytes(pipe.write_end))
        if free > 0:
            count = min(free, rng.choice([1, 400, 2049, 4095, 4096, 4097, 9000, 100_000]))
            assert os.write(pipe.write_end, bytes(count)) == count
            tried += 1
    assert tried > 1000
    os.close(pipe.write_end)


@pytest.mark.row("FE1-full-stdout-pipe")
def test_lines_of_two_writers_of_one_pipe_are_not_mixed() -> None:
    pipe = Pipe()
    streams = [LogStream(pipe.write_end, lambda count, error: None) for _ in range(2)]
    for number in range(1000):
        for stream, letter in zip(streams, "ab", strict=True):
            stream.write(letter * (number % 700) + "\n")
    reader = pipe.read_all()
    for stream in streams:
        stream.close(10)
    os.close(pipe.write_end)
    reader.join(10)
    lines = pipe.received.decode().splitlines()
    assert len(lines) == 2000
    assert not [line for line in lines if len(set(line)) > 1]


@pytest.mark.row("FE1-full-stdout-pipe")
def test_turn_with_more_lines_than_the_queue_takes_loses_only_those_without_room() -> None:
    """Many requests may come in one turn of the loop, if it was busy before."""
    pipe, lost, turn = Pipe(), [0], list[Callable[[], None]]()
    stream = LogStream(pipe.write_end, lambda count, error: None, is_shared=False)
    lines = configure_logging(Log(format="json"), stream, turn.append, lost.append)
    observer, count = LogObserver(lines), 12_000
    for number in range(count):
        fields = (("n", number), ("text", "x" * 300))
        observer.observe(events.LogMessage("info", f"message {number}", fields))
    (flush,) = turn
    flush()
    reader = pipe.read_all()
    wait_until(lambda: stream.write("last\n") > 0, "there is room again", 10)
    stream.close(10)
    os.close(pipe.write_end)
    reader.join(10)
    numbers = [json.loads(line)["n"] for line in pipe.received.splitlines()[:-1]]
    assert numbers == list(range(len(numbers)))
    assert 4_000 < len(numbers) == count - sum(lost)


class FullStream(io.StringIO):
    """A stream that drops what is written to it while it is full."""

    is_full = False

    def write(self, text: str, /) -> int:
        """Write, or drop."""
        return 0 if self.is_full else super().write(text)


@pytest.mark.row("FE1-full-stdout-pipe")
def test_first_line_after_a_loss_says_how_many_were_lost_and_does_not_count_itself() -> None:
    stream, lost = FullStream(), [0]
    writer = configure_logging(Log(format="json"), stream, on_dropped=lost.append)
    observer = LogObserver(writer)

    def log(message: str) -> None:
        observer.observe(events.LogMessage("info", message))

    log("one")
    stream.is_full = True
    for number in range(7):
        log(f"lost {number}")
    stream.is_full = False
    log("two")
    log("three")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == [
        "one",
        "log lines were dropped",
        "two",
        "three",
    ]
    assert (lines[1]["level"], lines[1]["count"]) == ("warning", 7)
    assert sum(lost) == 7
