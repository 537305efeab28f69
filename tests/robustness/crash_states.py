"""Enumerate every state that a power cut may leave, from a trace of the system calls of a program.

strace gives the calls in order. The model says which of them a file system may have kept at any
point (Pillai et al., ALICE, OSDI'14): synced data for sure, and of the rest anything between all
and nothing. A state can be made on a real disk.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.robustness.kit import strace

ROOT: Final = Path(__file__).parents[2]
CALLS: Final = "openat,pwritev,pwritev2,pwrite64,fsync,fdatasync,rename,unlink,ftruncate,write"
KEPT: Final = ("all", "synced", "zeroed", "empty")
"""What may be left of bytes that were written and not synced."""
_PATTERNS: Final = {
    "create": re.compile(r'openat\(.*?"([^"]+)", [^)]*O_CREAT[^)]*\)\s+= (\d+)'),
    "write": re.compile(r"pwritev2?\((\d+)<([^>]+)>.*?, (\d+)(?:, 0)?\)\s+= (\d+)"),
    "sync": re.compile(r"(?:fsync|fdatasync)\((\d+)<([^>]+)>\)\s+= 0"),
    "rename": re.compile(r'rename\("([^"]+)", "([^"]+)"\)\s+= 0'),
    "unlink": re.compile(r'unlink\("([^"]+)"\)\s+= 0'),
    "cut": re.compile(r"ftruncate\((\d+)<([^>]+)>, (\d+)\)\s+= 0"),
    "announce": re.compile(r'write\(1<.*"((?:published|evicting) [a-z0-9:]+)'),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One call that changes the disk, or a line that the program printed."""

    name: str
    values: tuple[str, ...]


def trace(directory: Path, *arguments: str) -> tuple[Path, list[Operation]]:
    """Run the crash driver. Returns its data directory and its operations on content, in order."""
    directory.mkdir(exist_ok=True)
    data, log = directory / "data", directory / "trace"
    command = [*strace(CALLS, log=log), "-y", "-s", "120"]
    command += [sys.executable, "-m", "tests.robustness.crash_driver", str(data), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    operations = []
    for line in _joined(log.read_text().splitlines()):
        for name, pattern in _PATTERNS.items():
            match = pattern.search(line)
            if match and (name == "announce" or "/sha256" in line):
                operations.append(Operation(name, match.groups()))
    return data, operations


def _joined(lines: list[str]) -> list[str]:
    """Join calls that another thread interrupted in the log, at the line where they ended."""
    begun: dict[str, str] = {}
    joined = []
    for line in lines:
        pid, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>"):
            begun[pid] = rest.removesuffix("<unfinished ...>").rstrip()
        elif match := re.match(r"\s*<\.\.\. \w+ resumed>(.*)", rest):
            joined.append(begun.pop(pid, "") + match[1])
        else:
            joined.append(rest)
    return joined


@dataclass(eq=False)
class File:
    """An inode: its size, the bytes that are durable for sure, and its first name."""

    origin: str
    size: int = 0
    synced: int = 0


@dataclass(frozen=True)
class State:
    """Files after a power cut: (name, origin, length, offset from which on it is zeros)."""

    files: tuple[tuple[str, str, int, int], ...]
    announced: frozenset[str]

    def make(self, data: Path, target: Path, contents: Mapping[str, bytes]) -> None:
        """Write it below ``target``. ``contents``: bytes by the last part of the first name."""
        for name, origin, length, zeros in self.files:
            path = target / Path(name).relative_to(data)
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = contents.get(Path(origin).name, b"")[:zeros]
            path.write_bytes(whole + bytes(max(0, length - len(whole))))


@dataclass
class _Disk:
    """The names in the page cache, and those that a sync has made durable."""

    durable: dict[str, File] = field(default_factory=dict)
    names: dict[str, File] = field(default_factory=dict)
    pending: list[Operation] = field(default_factory=list)
    announced: set[str] = field(default_factory=set)

    def do(self, operation: Operation) -> None:
        values = operation.values
        match operation.name:
            case "create" if values[0] not in self.names:
                self.names[values[0]] = File(values[0])
                self.pending.append(operation)
            case "write" if (file := self.names.get(values[1])) is not None:
                file.size = max(file.size, int(values[2]) + int(values[3]))
            case "cut" if (file := self.names.get(values[1])) is not None:
                file.size = int(values[2])
                file.synced = min(file.synced, file.size)
            case "sync":
                self._sync(values[1])
            case "rename" | "unlink" if values[0] in self.names:
                _apply(operation, self.names, {})
                self.pending.append(operation)
            case "announce":
                verb, digest = values[0].split()
                (self.announced.add if verb == "published" else self.announced.discard)(digest)

    def _sync(self, path: str) -> None:
        file = self.names.get(path)
        if file is not None:
            file.synced = file.size
        left = []
        for operation in self.pending:
            target = operation.values[-1 if operation.name == "rename" else 0]
            # A sync of a new file makes its name durable, too, in real file systems.
            named = file is not None and operation.name == "create" and target == path
            if named or str(Path(target).parent) == path:
                _apply(operation, self.durable, self.names)
            else:
                left.append(operation)
        self.pending = left

    def states(self) -> Iterator[State]:
        """Yield every state that a power cut may leave now."""
        count = len(self.pending)
        subsets = {tuple(range(count)), ()}
        for one in range(count):
            subsets |= {tuple(range(one)), (one,), tuple(n for n in range(count) if n != one)}
        for subset in subsets:
            names = dict(self.durable)
            for number in subset:
                _apply(self.pending[number], names, self.names)
            loose = sorted(name for name, file in names.items() if file.synced < file.size)
            for how in KEPT:
                yield self._state(names, dict.fromkeys(loose, how))
                for name in loose:
                    yield self._state(names, {name: how})

    def _state(self, names: Mapping[str, File], kept: Mapping[str, str]) -> State:
        files = []
        for name, file in sorted(names.items()):
            length, zeros = file.size, file.size
            match kept.get(name):
                case "synced":
                    length = zeros = file.synced
                case "zeroed":
                    zeros = file.synced
                case "empty":
                    length = zeros = 0
            files.append((name, file.origin, length, zeros))
        return State(tuple(files), frozenset(self.announced))


def _apply(operation: Operation, names: dict[str, File], live: Mapping[str, File]) -> None:
    """Apply an operation to ``names``. A created file is taken from ``live``."""
    first = operation.values[0]
    match operation.name:
        case "create":
            made = next((file for file in live.values() if file.origin == first), None)
            names[first] = made or File(first)
        case "rename" if first in names:
            names[operation.values[1]] = names.pop(first)
        case "unlink":
            names.pop(first, None)


def states(operations: Sequence[Operation]) -> list[State]:
    """Return every distinct state, before and after each operation."""
    disk = _Disk()
    found: dict[State, None] = {}
    for operation in operations:
        disk.do(operation)
        found |= dict.fromkeys(disk.states())
    return list(found)
