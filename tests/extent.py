"""How much a long test tries: an even part of its points and examples, or all of them.

``make test-long`` tries a part, the same one in each run, so that it ends within minutes.
``make robustness`` tries all (``--every-point``), and counts them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count, takewhile

PART = 5
"""A long test tries one of so many points and examples. Odd: some tests alternate."""
FIRST = 3
"""So many points at the beginning are always tried."""


@dataclass(frozen=True)
class Extent:
    """What one test has to try."""

    test: str
    """Its node id. Tests of different ids begin at different points."""
    is_whole: bool
    tried: Callable[[int], None]
    """Counts the kills."""

    @property
    def stride(self) -> int:
        """One of so many is tried."""
        return 1 if self.is_whole else PART

    def of(self, examples: int) -> int:
        """Return how many of so many examples to try."""
        return -(-examples // self.stride)

    def kill_at_points(self, kill: Callable[[int], bool], *, first: int = 1, step: int = 1) -> int:
        """Kill at the n-th call, n = ``first``, ``first`` + ``step`` … until no kill fires.

        A part are the first points, then every fifth from one that the id decides, and all between
        the last of these and the end.

        Args:
            kill: Kills at the n-th call, and checks. Returns whether the kill fired.

        Returns:
            The number of kills that fired.
        """

        def until_miss(points: Iterable[int]) -> list[int]:
            return list(takewhile(lambda point: kill(first + point * step), points))

        if self.is_whole:
            fired = until_miss(count())
        else:
            fired = until_miss(range(FIRST))
            if len(fired) == FIRST:
                begin = FIRST + zlib.crc32(self.test.encode()) % PART
                fired += until_miss(count(begin, PART))
                fired += until_miss(range(fired[-1] + 1, fired[-1] + PART))
        self.tried(len(fired))
        return len(fired)
