"""``WWW-Authenticate`` (RFC 9110, section 11.6.1).

Lives here: the parser of challenges and of their scopes. Must not know: whether a request to a
realm is allowed (the outbound guard decides), what a token is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from mirror.oci.text import TCHARS


@dataclass(frozen=True, slots=True)
class Bearer:
    """The server requires a token (Distribution, ``spec/auth/token.md``).

    ``realm`` is the URL of the token service, untrusted.
    """

    realm: str
    service: str | None = None
    scope: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Basic:
    """The server requires a user name and a password (RFC 7617)."""

    realm: str | None = None


@dataclass(frozen=True, slots=True)
class Other:
    """A scheme that we do not support, or Bearer without a realm. ``scheme`` is in lower case."""

    scheme: str


Challenge: TypeAlias = Bearer | Basic | Other

MAX_CHALLENGE_CHARS: Final = 8192
"""Characters of all challenges of a response; servers usually limit a header line to 8 KiB."""
MAX_CHALLENGES: Final = 16
"""Challenges of a response; registries send one or two."""

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
    """Return the challenges of one or several header lines, in order. Never raises.

    A line outside the grammar, or with a parameter twice, gives no challenge: a part of a challenge
    could be misread. Lines beyond :data:`MAX_CHALLENGE_CHARS` or :data:`MAX_CHALLENGES` make the
    result empty.
    """
    challenges: list[Challenge] = []
    budget = MAX_CHALLENGE_CHARS
    for line in (headers,) if isinstance(headers, str) else headers:
        budget -= len(line)
        if budget < 0:
            return ()
        challenges += _parse_line(line)
    return tuple(challenges) if len(challenges) <= MAX_CHALLENGES else ()


def _parse_line(line: str) -> list[Challenge]:
    pairs: list[tuple[str, dict[str, str]]] = []
    position = _skip_empty_elements(line)
    while position < len(line):
        # "name=" continues the challenge before it. A name without "=" begins the next challenge.
        parameter = _PARAMETER.match(line, position) if pairs else None
        if parameter is None:
            scheme = _SCHEME.match(line, position)
            if scheme is None:
                return []
            pairs.append((scheme["scheme"].lower(), {}))
            position = scheme.end()
            if scheme["more"] is None:
                position = _skip_separator(line, position)
            else:
                space = _SPACE.match(line, position)
                position = space.end() if space else position
                parameter = _PARAMETER.match(line, position)
                if parameter is None:
                    token68 = _TOKEN68.match(line, position)
                    position = -1 if token68 is None else _skip_separator(line, token68.end())
        if parameter is not None:
            parameters = pairs[-1][1]
            name = parameter["name"].lower()
            if name in parameters:
                return []
            bare = parameter["bare"]
            parameters[name] = _ESCAPE.sub(r"\1", parameter["quoted"]) if bare is None else bare
            position = _skip_separator(line, parameter.end())
        if position < 0:
            return []
    return [_challenge(scheme, parameters) for scheme, parameters in pairs]


def pull_scope(scope: str) -> str:
    """Return the scope of a challenge, limited to pulls. Empty if it has no pull.

    ``scope`` is a list of ``type:name:actions``, separated by spaces (Distribution,
    ``spec/auth/scope.md``). The names are untrusted.
    """
    pulls = []
    for resource_scope in scope.split():
        resource, _, actions = resource_scope.rpartition(":")
        if resource.startswith("repository:") and {"pull", "*"} & set(actions.split(",")):
            pulls.append(f"{resource}:pull")
    return " ".join(dict.fromkeys(pulls))


def _skip_empty_elements(line: str) -> int:
    """Return the position after the empty elements that a list may begin with (RFC 9110, 5.6.1)."""
    return len(line) - len(line.lstrip(" \t,"))


def _skip_separator(line: str, position: int) -> int:
    """Return the position after the separator at ``position``; -1 if there is none."""
    match = _SEPARATOR.match(line, position)
    return -1 if match is None else match.end()


def _challenge(scheme: str, parameters: dict[str, str]) -> Challenge:
    realm = parameters.get("realm")
    if scheme == "basic":
        return Basic(realm)
    if scheme == "bearer" and realm:
        get = parameters.get
        return Bearer(realm, service=get("service"), scope=get("scope"), error=get("error"))
    return Other(scheme)
