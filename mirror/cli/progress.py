"""The progress of a command that fetches: a bar for each content on a terminal.

Lives here: the bars, and that they do not mix with lines. Must not know: what fetches. Bars go to
standard error, so that standard output has nothing but results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from mirror.cli.listing import is_terminal
from mirror.cli.table_layout import short_digests
from mirror.oci.text import printable, size_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_MAX_BARS: Final = 20
"""Bars at the same time: a terminal has about 24 lines. Further contents have none."""
_MAX_LABEL_CHARS: Final = 60
"""Characters in front of a bar."""
_FIRST_RATE_S: Final = 1.0
"""Seconds until a bar has a rate: what was on the disk would make an earlier one too high."""
_REFRESHES_PER_S: Final = 8
"""Drawings of the bars in a second."""


class Bars(Protocol):
    """The bars of running work."""

    def move(self, key: Hashable, label: str, position: int, size: int | None) -> None:
        """Show a bar at ``position`` of ``size`` bytes. None: the size is not known."""

    def end(self, key: Hashable) -> None:
        """Remove a bar, if there is one."""

    def count(self) -> None:
        """Count one more of the whole."""


class NoBars:
    """No bars: nobody watches."""

    def move(self, key: Hashable, label: str, position: int, size: int | None) -> None:
        """Show nothing."""

    def end(self, key: Hashable) -> None:
        """Show nothing."""

    def count(self) -> None:
        """Show nothing."""


@dataclass(slots=True)
class TerminalBars:
    """Bars by rich."""

    progress: Progress
    whole: TaskID
    """The bar of the whole."""
    _tasks: dict[Hashable, TaskID] = field(default_factory=dict)

    def move(self, key: Hashable, label: str, position: int, size: int | None) -> None:
        """Show a bar at ``position`` of ``size`` bytes. None: the size is not known."""
        task = self._tasks.get(key)
        if task is None:
            if len(self._tasks) >= _MAX_BARS:
                return
            text = printable(label, _MAX_LABEL_CHARS)
            task = self._tasks[key] = self.progress.add_task(text, total=size, is_bytes=True)
        self.progress.update(task, completed=position, total=size)

    def end(self, key: Hashable) -> None:
        """Remove a bar, if there is one."""
        task = self._tasks.pop(key, None)
        if task is not None:
            self.progress.remove_task(task)

    def count(self) -> None:
        """Count one more of the whole."""
        self.progress.advance(self.whole)


def label_of(image: str, digest: str) -> str:
    """Return what stands in front of a bar: the last part of an image's name, and a digest."""
    return f"{image.rpartition('/')[2][: _MAX_LABEL_CHARS - 24]} {short_digests(digest)}"


@contextmanager
def open_bars(title: str, total: int, *, is_shown: bool) -> Iterator[Bars]:
    """Show bars while the context is open, if a person watches standard error.

    Lines that are printed meanwhile come above the bars. At the end, the bars vanish.

    Args:
        title: What is counted in the bar of the whole, such as ``images``.
        total: How many of them there are.
        is_shown: False shows no bars: the output is for another program.
    """
    if not is_shown or sys.stderr is None or not sys.stderr.isatty():
        yield NoBars()
        return
    # Imported here: it takes longer than the rest of the start of a command.
    from rich.console import Console

    progress = _make_progress(Console(stderr=True), may_redirect=is_terminal())
    with progress:
        whole = progress.add_task(title, total=total, is_bytes=False)
        yield TerminalBars(progress, whole)


def _make_progress(console: Any, *, may_redirect: bool) -> Progress:
    """Create the display. ``may_redirect``: standard output is the same terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    from rich.table import Column
    from rich.text import Text

    def only_for_bytes(column: Any) -> Any:
        render: Callable[[Any], Any] = column.render

        def render_bytes(task: Any) -> Any:
            if task.fields["is_bytes"]:
                return render(task)
            return Text(f"{task.completed:.0f} of {task.total:.0f}")

        column.render = render_bytes
        return column

    class Speed(TransferSpeedColumn):
        """The rate of a bar of bytes."""

        def render(self, task: Any) -> Text:
            """Return the rate. Nothing for the bar of the whole, and before there is one."""
            speed = task.finished_speed or task.speed
            if not task.fields["is_bytes"] or not speed or (task.elapsed or 0.0) < _FIRST_RATE_S:
                return Text("")
            return Text(f"{size_text(int(speed))}/s", style="progress.data.speed")

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(),
        only_for_bytes(DownloadColumn(binary_units=True)),
        Speed(),
    )
    return Progress(
        *columns,
        console=console,
        transient=True,
        refresh_per_second=_REFRESHES_PER_S,
        redirect_stdout=may_redirect,
        redirect_stderr=True,
    )
