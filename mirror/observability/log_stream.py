"""A stream of log lines that never blocks its writer: a thread writes them to a descriptor.

Lives here: the bounded queue between the event loop and the thread. Must not know: the format of a
line.

Standard output may be a pipe that nothing reads, a terminal that is stopped, or a file on a disk
that hangs. A write to it then blocks for ever. It blocks the thread only: the queue fills, and
further lines are dropped and counted.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import struct
import sys
import termios
import threading
from collections.abc import Callable
from typing import Final

_MAX_QUEUED_CHARS: Final = 2 * 1024 * 1024
"""Characters that wait for the thread: about 5,000 lines, which is one second of a busy server."""
_GATHER_S: Final = 0.01
"""Seconds in which the thread gathers lines after a write. Waking it for each line would cost more
than a response from the cache."""
_MAX_WRITE_BYTES: Final = 64 * 1024
"""Bytes in one write of the only process that writes. After each system call, the thread has to
wait for the interpreter lock, so few and large ones are faster."""
_WRITABLE_TIMEOUT_MS: Final = 1000
"""Milliseconds to wait for a descriptor that another program has set to non-blocking."""


class LogStream:
    """A text stream whose ``write`` returns at once. All methods but the thread's run on one loop.

    The thread is a daemon: a descriptor that blocks does not delay the end of the process.
    """

    def __init__(
        self,
        fd: int,
        on_dropped: Callable[[int, Exception | None], None],
        *,
        is_shared: bool = True,
    ) -> None:
        """Start the thread.

        Args:
            fd: An open descriptor, which stays open.
            on_dropped: Receives the number of lines that could not be written, and the unexpected
                error that lost them. None: the descriptor refuses them. Called in the thread. Must
                not raise.
            is_shared: Whether other processes write to it, too.
        """
        self._fd = fd
        self._pipe_bytes = 0 if is_shared else pipe_bytes(fd)
        self._on_dropped = on_dropped
        self._lock = threading.Lock()
        self._queue: list[str] = []
        self._queued_chars = 0
        self._has_work = threading.Event()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Queue whole lines. Returns their length, or 0 if they were dropped: the queue is full."""
        with self._lock:
            has_room = self._queued_chars + len(text) <= _MAX_QUEUED_CHARS
            if has_room:
                self._queue.append(text)
                self._queued_chars += len(text)
        if not has_room:
            return 0
        if not self._has_work.is_set():
            self._has_work.set()
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread writes as soon as it can."""

    def isatty(self) -> bool:
        """Return whether the descriptor is a terminal."""
        return os.isatty(self._fd)

    def close(self, timeout: float) -> None:
        """Wait until the queued lines are written, but at most ``timeout`` seconds."""
        self._is_closing.set()
        self._has_work.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        while not self._is_closing.is_set():
            self._has_work.wait()
            self._write_queued()
            self._is_closing.wait(_GATHER_S)
        self._write_queued()

    def _write_queued(self) -> None:
        with self._lock:
            self._has_work.clear()
            texts, self._queue = self._queue, []
        try:
            self._write_all("".join(texts).encode(errors="backslashreplace"))
        except Exception as error:
            # Of any kind, such as MemoryError: the next lines need the thread.
            lost = sum(text.count("\n") for text in texts)
            self._on_dropped(lost, None if isinstance(error, OSError) else error)
        finally:
            with self._lock:
                # Not before: the text that is being written occupies memory, too.
                self._queued_chars -= sum(map(len, texts))

    def _write_all(self, data: bytes) -> None:
        start = 0
        while start < len(data):
            # A pipe takes up to PIPE_BUF bytes as a whole. So the lines of several workers do not
            # mix, and a process that ends while the pipe is full has written whole lines.
            room = free_pipe_bytes(self._fd, self._pipe_bytes) if self._pipe_bytes else 0
            limit = start + min(max(select.PIPE_BUF, room), _MAX_WRITE_BYTES)
            end = data.rfind(b"\n", start, limit) + 1
            try:
                start += os.write(self._fd, data[start : end or limit])
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll(_WRITABLE_TIMEOUT_MS)


def pipe_bytes(fd: int) -> int:
    """Return the size of a pipe. What is no pipe takes a write as a whole: :data:`sys.maxsize`."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    except OSError:
        return sys.maxsize


def free_pipe_bytes(fd: int, size: int) -> int:
    """Return how many bytes a pipe takes at once, if nobody else writes to it. It may be negative.

    A pipe has pages. A write goes on in the last page only if its rest fits there. So two pages
    that follow each other have more than one page of bytes, and the first page may have been read
    in part.

    Args:
        fd: One end of it.
        size: Its :func:`pipe_bytes`.
    """
    if size == sys.maxsize:
        return size
    (unread,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return size - 2 * int(unread) - 2 * mmap.PAGESIZE
