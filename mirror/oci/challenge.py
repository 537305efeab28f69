"""``WWW-Authenticate`` (RFC 9110, section 11.6.1).

Lives here: the grammar of challenges, read into frozen types. Must not know: whether a realm may
be asked (the outbound guard does), what a token is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from mirror.oci.text import TCHARS


@dataclass(frozen=True, slots=True)
class Bearer:
    """A token is wanted (Distribution, ``spec/auth/token.md``). ``realm`` is an untrusted URL."""

    realm: str
    service: str | None = None
    scope: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Basic:
    """A name and a password are wanted (RFC 7617)."""

    realm: str | None = None


@dataclass(frozen=True, slots=True)
class Other:
    """A scheme that we do not speak, or a Bearer without a realm. ``scheme`` is lower case."""

    scheme: str


Challenge: TypeAlias = Bearer | Basic | Other

LENGTH_LIMIT: Final = 8192
"""Characters of all challenges of an answer."""
COUNT_LIMIT: Final = 16
"""Challenges of an answer."""

# challenge  = auth-scheme [ 1*SP ( token68 / #auth-param ) ]
# auth-param = token BWS "=" BWS ( token / quoted-string )
# token68    = 1*( ALPHA / DIGIT / "-" / "." / "_" / "~" / "+" / "/" ) *"="
_QUOTED: Final = r'"(?P<quoted>(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*)"'
# Registries leave URLs unquoted, so a bare value is more than a token.
_BARE: Final = r"(?P<bare>[!#-+\--\[\]-~]+)"
_PARAMETER: Final = re.compile(rf"(?P<name>{TCHARS})[ \t]*=[ \t]*(?:{_QUOTED}|{_BARE})")
_SCHEME: Final = re.compile(rf"(?P<scheme>{TCHARS})(?=[ \t]*(?:,|\Z)|[ \t]+(?P<more>[^ \t,]))")
_TOKEN68: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*(?=[ \t]*(?:,|\Z))")
_SPACE: Final = re.compile(r"[ \t]*")
_SEPARATOR: Final = re.compile(r"[ \t]*(?:,[ \t]*)+|[ \t]*\Z")
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)


def parse_challenges(headers: str | Iterable[str]) -> tuple[Challenge, ...]:
    """The challenges of one or several header lines, in order. Never raises.

    A line outside the grammar, one that names a parameter twice, and what is beyond
    :data:`LENGTH_LIMIT` or :data:`COUNT_LIMIT` gives none: half a challenge is not guessed at.
    """
    challenges: list[Challenge] = []
    budget = LENGTH_LIMIT
    for line in (headers,) if isinstance(headers, str) else headers:
        budget -= len(line)
        if budget < 0:
            return ()
        challenges += _parse_line(line)
    return tuple(challenges) if len(challenges) <= COUNT_LIMIT else ()


def _parse_line(line: str) -> list[Challenge]:
    found: list[tuple[str, dict[str, str]]] = []
    position = _start(line)
    while position < len(line):
        # A parameter continues the challenge before it; only the look ahead tells it from a scheme.
        parameter = _PARAMETER.match(line, position) if found else None
        if parameter is None:
            scheme = _SCHEME.match(line, position)
            if scheme is None:
                return []
            found.append((scheme["scheme"].lower(), {}))
            position = scheme.end()
            if scheme["more"] is None:
                position = _next(line, position)
            else:
                position = _end_of(_SPACE, line, position)
                parameter = _PARAMETER.match(line, position)
                if parameter is None:
                    token68 = _TOKEN68.match(line, position)
                    position = -1 if token68 is None else _next(line, token68.end())
        if parameter is not None:
            parameters = found[-1][1]
            name = parameter["name"].lower()
            if name in parameters:
                return []
            bare = parameter["bare"]
            parameters[name] = _ESCAPE.sub(r"\1", parameter["quoted"]) if bare is None else bare
            position = _next(line, parameter.end())
        if position < 0:
            return []
    return [_challenge(scheme, parameters) for scheme, parameters in found]


def _start(line: str) -> int:
    """Past the empty elements that RFC 9110, section 5.6.1 lets a sender put first."""
    return len(line) - len(line.lstrip(" \t,"))


def _next(line: str, position: int) -> int:
    """Past the separator at ``position``; -1 where there is none."""
    match = _SEPARATOR.match(line, position)
    return -1 if match is None else match.end()


def _end_of(pattern: re.Pattern[str], line: str, position: int) -> int:
    match = pattern.match(line, position)
    return position if match is None else match.end()


def _challenge(scheme: str, parameters: dict[str, str]) -> Challenge:
    realm = parameters.get("realm")
    if scheme == "basic":
        return Basic(realm)
    if scheme == "bearer" and realm:
        return Bearer(
            realm, parameters.get("service"), parameters.get("scope"), parameters.get("error")
        )
    return Other(scheme)
