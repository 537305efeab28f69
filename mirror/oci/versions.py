"""Versions in tags, and ranges of versions: ``v1.2.3``, ``>=1.2 <2``.

Lives here: the precedence of Semantic Versioning 2.0.0, and the grammar and rules of npm's ranges,
which also Helm's are close to. Must not know: registries, configuration.

No library is used: those that order versions have no ranges, and the one with npm's ranges is no
longer kept up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import total_ordering
from typing import Final, Self, TypeAlias

_MAX_VERSION_RANGE_CHARS: Final = 256
"""Characters of a range. A person has written it."""
_MAX_DIGITS: Final = 18
"""Digits of one number: 20261231235959 is one, and a commit in decimal digits may be longer."""

_VERSION_NUMBER: Final = rf"(?:0|[1-9][0-9]{{0,{_MAX_DIGITS - 1}}})"
# semver.org, "Backus-Naur Form Grammar": <pre-release>, <build>
_PRERELEASE_PART: Final = r"(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_SUFFIX: Final = (
    rf"(?:-(?P<prerelease>{_PRERELEASE_PART}(?:\.{_PRERELEASE_PART})*))?"
    r"(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?"
)
_WHOLE_VERSION: Final = re.compile(
    rf"[vV]?(?P<major>{_VERSION_NUMBER})(?:\.(?P<minor>{_VERSION_NUMBER})(?:\.(?P<patch>{_VERSION_NUMBER}))?)?{_SUFFIX}",
    re.ASCII,
)
_X_NUMBER: Final = rf"(?:{_VERSION_NUMBER}|[xX*])"
_COMPARATOR: Final = re.compile(
    r"(?P<operator>>=|<=|>|<|=|~>|~|\^|)\s*[vV=]?"
    rf"(?P<major>{_X_NUMBER})(?:\.(?P<minor>{_X_NUMBER})(?:\.(?P<patch>{_X_NUMBER}))?)?{_SUFFIX}"
    r"(?![^\s,])",
    re.ASCII,
)
_HYPHEN: Final = re.compile(r"\s*(?P<low>\S+)\s+-\s+(?P<high>\S+)\s*")
_BOUND_SEPARATOR: Final = re.compile(r"[\s,]*")

_Core: TypeAlias = tuple[int, int, int]


@total_ordering
@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """A version, ordered by the precedence of SemVer 2.0.0. Build metadata is dropped.

    A partial version is the one with zeros: ``1.2`` equals ``1.2.0``.
    """

    major: int
    minor: int = 0
    patch: int = 0
    prerelease: tuple[int | str, ...] = ()
    """``("rc", 1)`` of ``1.2.3-rc.1``. Empty: a release."""
    stated: int = field(default=3)
    """How many of the three numbers the text has: 2 for ``1.2``, a tag that moves."""

    @property
    def core(self) -> _Core:
        """Major, minor and patch."""
        return self.major, self.minor, self.patch

    @property
    def _precedence(self) -> tuple[object, ...]:
        # SemVer 2.0.0, item 11: numbers before words, fewer fields before more, and a release
        # after its prereleases.
        identifiers = tuple(
            (0, one, "") if isinstance(one, int) else (1, 0, one) for one in self.prerelease
        )
        return (*self.core, not self.prerelease, identifiers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and self._precedence == other._precedence

    def __lt__(self, other: Version) -> bool:
        return self._precedence < other._precedence

    def __hash__(self) -> int:
        return hash(self._precedence)

    def __str__(self) -> str:
        suffix = f"-{'.'.join(map(str, self.prerelease))}" if self.prerelease else ""
        return f"{self.major}.{self.minor}.{self.patch}{suffix}"


def parse_version(tag: str) -> Version | None:
    """Parse a tag as a version. None if it is none.

    Accepts a leading ``v``, and partial versions (``1``, ``1.2``, ``1.2-alpine``). What follows the
    first hyphen is the prerelease, by SemVer: also ``alpine``.
    """
    match = _WHOLE_VERSION.fullmatch(tag)
    if match is None:
        return None
    numbers = [int(text) for text in match.group("major", "minor", "patch") if text is not None]
    major, minor, patch = _to_core(numbers)
    prerelease = _identifiers(match["prerelease"])
    return Version(major, minor=minor, patch=patch, prerelease=prerelease, stated=len(numbers))


def _to_core(numbers: list[int]) -> _Core:
    """Return three numbers: zeros for those that are missing."""
    major, minor, patch, *_ = (*numbers, 0, 0, 0)
    return major, minor, patch


def _identifiers(text: str | None) -> tuple[int | str, ...]:
    if text is None:
        return ()
    return tuple(int(one[:4000]) if one.isdecimal() else one for one in text.split("."))


@dataclass(frozen=True, slots=True)
class _Bound:
    """One side of a range: versions from, or up to, a version."""

    is_lower: bool
    version: Version
    is_inclusive: bool
    has_prerelease: bool = False
    """Whether the text of the range names the prerelease. npm's rule looks at these only."""

    def is_satisfied_by(self, version: Version) -> bool:
        """Return whether a version is on the right side."""
        if version == self.version:
            return self.is_inclusive
        return (version > self.version) is self.is_lower


@dataclass(frozen=True, slots=True)
class VersionRange:
    """A range of versions, in npm's grammar: alternatives, each with bounds that all hold."""

    text: str
    _alternatives: tuple[tuple[_Bound, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a range, such as ``>=1.2 <2``, ``^1.4``, ``~2.1``, ``1.x``, ``1.2 - 1.4 || 3``.

        Commas between the bounds are allowed, as Helm writes them. ``*`` is every release. Raises
        ``ValueError``, with a message for whoever wrote the range.
        """
        if len(text) > _MAX_VERSION_RANGE_CHARS:
            raise ValueError(f"has more than {_MAX_VERSION_RANGE_CHARS} characters")
        return cls(text, tuple(tuple(_bounds_of(part)) for part in text.split("||")))

    def matches(self, version: Version) -> bool:
        """Return whether a version is in the range.

        A prerelease is in it only if one of the bounds names a prerelease of the same major, minor
        and patch: ``>=1.2.3-rc.1 <2`` has ``1.2.3-rc.2``, and neither ``1.3.0-rc.1`` nor, with the
        suffix of a variant, ``1.2.4-alpine``.
        """
        return any(self._is_in(bounds, version) for bounds in self._alternatives)

    def _is_in(self, bounds: tuple[_Bound, ...], version: Version) -> bool:
        if not all(bound.is_satisfied_by(version) for bound in bounds):
            return False
        return not version.prerelease or any(
            bound.has_prerelease and bound.version.core == version.core for bound in bounds
        )

    def __str__(self) -> str:
        return self.text


def newest_first(tags: Iterable[str], within: VersionRange | None = None) -> list[str]:
    """Return the tags that are versions, newest first. ``within``: only those of this range.

    Of tags that are the same version, the more exact one comes first: ``1.2.0`` before ``1.2``.
    """
    parsed = ((parse_version(tag), tag) for tag in tags)
    found = [
        (version, version.stated, tag)
        for version, tag in parsed
        if version is not None and (within is None or within.matches(version))
    ]
    return [tag for _, _, tag in sorted(found, reverse=True)]


# --- the grammar of ranges ------------------------------------------------------------------------


def _bounds_of(text: str) -> Iterator[_Bound]:
    """Parse one alternative. Empty text, as ``*``, has no bounds."""
    hyphen = _HYPHEN.fullmatch(text)
    if hyphen is not None:
        yield from _parse_comparator(f">={hyphen['low']}", text)
        yield from _parse_comparator(f"<={hyphen['high']}", text)
        return
    position = _after_separator(text, 0)
    while position < len(text):
        match = _COMPARATOR.match(text, position)
        if match is None:
            raise ValueError(f"'{text[position:].strip()}' is no version or bound, such as >=1.2")
        yield from _to_bounds(match)
        position = _after_separator(text, match.end())


def _after_separator(text: str, position: int) -> int:
    separator = _BOUND_SEPARATOR.match(text, position)
    return separator.end() if separator is not None else position


def _parse_comparator(text: str, whole: str) -> Iterator[_Bound]:
    match = _COMPARATOR.fullmatch(text)
    if match is None:
        raise ValueError(f"'{whole.strip()}' is no range, such as 1.2 - 1.4")
    return _to_bounds(match)


def _to_bounds(match: re.Match[str]) -> Iterator[_Bound]:
    """Return the bounds of one comparator, as npm expands it ("Advanced Range Syntax")."""
    numbers: list[int] = []
    for text in match.group("major", "minor", "patch"):
        if text is None or text in "xX*":
            break
        numbers.append(int(text))
    is_whole, prerelease = len(numbers) == 3, _identifiers(match["prerelease"])
    if prerelease and not is_whole:
        raise ValueError(f"'{match[0].strip()}' is no version: a prerelease needs three numbers")
    low = Version(*_to_core(numbers), prerelease=prerelease)
    is_named = bool(prerelease)

    def at_least(version: Version) -> _Bound:
        named = is_named and version is low
        return _Bound(is_lower=True, version=version, is_inclusive=True, has_prerelease=named)

    def below(core: _Core) -> _Bound:
        # "-0" comes before all other prereleases: `<2` has no 2.0.0-rc.1.
        return _Bound(is_lower=False, version=Version(*core, prerelease=(0,)), is_inclusive=False)

    match match["operator"]:
        case "" | "=" if not numbers:
            return
        case "" | "=" if is_whole:
            yield at_least(low)
            yield _Bound(is_lower=False, version=low, is_inclusive=True)
        case "" | "=":
            yield from (at_least(low), below(_next_core(numbers, len(numbers))))
        case ">=":
            yield at_least(low)
        case "<=" if is_whole:
            yield _Bound(is_lower=False, version=low, is_inclusive=True, has_prerelease=is_named)
        case "<=" if numbers:
            yield below(_next_core(numbers, len(numbers)))
        case ">" if is_whole:
            yield _Bound(is_lower=True, version=low, is_inclusive=False, has_prerelease=is_named)
        case ">" if numbers:
            yield at_least(Version(*_next_core(numbers, len(numbers))))
        case "<" if is_whole and is_named:
            yield _Bound(is_lower=False, version=low, is_inclusive=False, has_prerelease=True)
        case "<" if numbers:
            yield below(low.core)
        case ">" | "<":  # `>*` and `<*`: nothing.
            yield below((0, 0, 0))
        case "~" | "~>" if numbers:
            yield from (at_least(low), below(_next_core(numbers, min(len(numbers), 2))))
        case "^" if numbers:
            # The first number that is not zero may not change.
            leading = next((n for n, one in enumerate(numbers, 1) if one), len(numbers))
            yield from (at_least(low), below(_next_core(numbers, leading)))
        case _:
            return


def _next_core(numbers: list[int], count: int) -> _Core:
    """Return the first version after all that have the first ``count`` numbers."""
    return _to_core([*numbers[: count - 1], numbers[count - 1] + 1])
