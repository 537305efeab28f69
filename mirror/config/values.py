"""What values of the configuration look like: sizes, durations, hosts, URLs, patterns.

Lives here: their grammars, as pure functions that raise ``ValueError`` with a message that does not
hold the value. Must not know: which setting has which.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final
from urllib.parse import urlsplit

from mirror.oci.text import printable

NEVER: Final = math.inf
_MOST: Final = 2**63 - 1

# size: number [K|M|G|T|P|E [i]] [B]   with i: powers of 1024, without: powers of 1000
_SIZE: Final = re.compile(r"(\d{1,20}(?:\.\d{1,9})?)\s*(?:([kmgtpe])(i?))?b?", re.ASCII | re.I)
# duration: number without a unit (seconds) | 1*(number unit) | inf
_PLAIN: Final = re.compile(r"\d{1,15}(?:\.\d{1,9})?", re.ASCII)
_PART: Final = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)(ms|s|m|h|d|w)", re.ASCII)
_PARTS: Final = re.compile(rf"(?:{_PART.pattern})+", re.ASCII)
_UNITS: Final = {
    **{
        unit: Fraction(n)
        for unit, n in (("w", 604800), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    },
    "ms": Fraction(1, 1000),
}


def parse_size(raw: object) -> int:
    """Bytes: ``50GiB`` (1024), ``500MB`` (1000), ``50Gi``, ``4096``. Raises ``ValueError``."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        size = raw
    elif isinstance(raw, str) and (found := _SIZE.fullmatch(raw.strip())):
        number, prefix, binary = found.groups()
        power = " kmgtpe".index(prefix.lower()) if prefix else 0
        size = int(Fraction(number) * (1024 if binary else 1000) ** power)
    else:
        raise ValueError("not a size, such as 50GiB or 500MB")
    if not 0 < size <= _MOST:
        raise ValueError("must be a size of at least 1 byte, and less than 8EiB")
    return size


def parse_duration(raw: object) -> float:
    """Seconds: ``5m``, ``1h30m``, ``250ms``, ``30``, ``0``, ``inf``. Raises ``ValueError``."""
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        seconds = float(raw)
    elif isinstance(raw, str) and raw.strip() == "inf":
        seconds = NEVER
    elif isinstance(raw, str) and _PLAIN.fullmatch(raw.strip()):
        seconds = float(raw)
    elif isinstance(raw, str) and _PARTS.fullmatch(raw.strip()):
        parts = _PART.findall(raw)
        seconds = float(sum(Fraction(number) * _UNITS[unit] for number, unit in parts))
    else:
        raise ValueError("not a duration, such as 30s, 5m, 1d, 0 or inf")
    if not seconds >= 0:  # also refuses NaN
        raise ValueError("must not be negative")
    return seconds


def parse_part(raw: object) -> float:
    """A part of the whole: ``0.95`` or ``95%``. Raises ``ValueError``."""
    scale = 1.0
    if isinstance(raw, str):
        text = raw.strip()
        if text.endswith("%"):
            text, scale = text[:-1].strip(), 100.0
        if not _PLAIN.fullmatch(text):
            raise ValueError("not a part of the whole, such as 0.95 or 95%")
        raw = float(text)
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise ValueError("not a part of the whole, such as 0.95 or 95%")
    part = float(raw) / scale
    if not 0 < part <= 1:
        raise ValueError("must be more than 0 and at most 1 (100%)")
    return part


def _exact(number: int | float, units: Mapping[str, int]) -> str | None:
    for unit, worth in units.items():
        if number and number % worth == 0:
            return f"{int(number) // worth}{unit}"
    return None


def format_size(size: int) -> str:
    """The shortest text that :func:`parse_size` reads as exactly ``size``."""
    binary = {f"{prefix}iB": 1024**power for power, prefix in ((4, "T"), (3, "G"), (2, "M"))}
    return _exact(size, {**binary, "KiB": 1024}) or str(size)


def format_duration(seconds: float) -> str:
    """The shortest text that :func:`parse_duration` reads as exactly ``seconds``."""
    if seconds == NEVER:
        return "inf"
    exact = _exact(seconds, {"d": 86400, "h": 3600, "m": 60, "s": 1})
    return exact or (
        f"{seconds:.9f}".rstrip("0").rstrip(".") if seconds < 1e6 else f"{seconds:.0f}"
    )


def finite(seconds: float) -> float:
    """For what must end."""
    if seconds == NEVER:
        raise ValueError("must be finite")
    return seconds


def above_zero(seconds: float) -> float:
    """For limits: finite, and more than 0."""
    if seconds <= 0:
        raise ValueError("must be more than 0")
    return finite(seconds)


def split_host(text: str) -> tuple[str, int | None]:
    """``host``, ``host:port``, ``[::1]:port`` to (host without brackets, port or None).

    Raises ``ValueError`` where it is none of these.
    """
    found = re.fullmatch(
        r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/?#@\s]+))(?::(\d{1,5}))?", text, re.ASCII
    )
    if found is None:
        raise ValueError("not host or host:port")
    literal, name, port = found.groups()
    if literal is not None:
        ipaddress.IPv6Address(literal)
    elif not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", name, re.ASCII):
        raise ValueError("not a host name")
    if port is not None and int(port) > 65535:
        raise ValueError("the port must be at most 65535")
    return literal or name, None if port is None else int(port)


def check_listen(text: str) -> str:
    """``address:port``, IPv6 in brackets; 0 lets the system choose."""
    try:
        port = split_host(text)[1]
    except ValueError:
        port = None
    if port is None:
        raise ValueError("must be address:port, such as 0.0.0.0:5100 or [::1]:5100")
    return text


def check_endpoint(text: str) -> str:
    """An absolute http(s) URL; a path prefix is allowed."""
    try:
        url = urlsplit(text)
        host, _ = split_host(url.netloc.rpartition("@")[2])
    except ValueError:
        raise ValueError("not a URL, such as https://registry.example") from None
    if url.scheme not in ("http", "https") or not host:
        raise ValueError("must be an absolute URL that begins with https:// or http://")
    if "@" in url.netloc:
        raise ValueError("must not carry a user or password: use credentials")
    if "?" in text or "#" in text:
        raise ValueError("must have neither query nor fragment")
    if printable(text) != text or not text.isascii() or " " in text or "\\" in text:
        raise ValueError("must be a URL without spaces or control characters")
    return text


def check_upstream_name(text: str) -> str:
    """``host`` or ``host:port``, as in image references."""
    try:
        host, port = split_host(text)
    except ValueError:
        raise ValueError("an upstream is named by host or host:port, as in references") from None
    if text != text.lower():
        raise ValueError("must be written in lower case")
    if "." not in host and ":" not in host and port is None and host != "localhost":
        # As in image references: what has neither is the first part of a path.
        raise ValueError("the host of a reference has a dot or a port, or is localhost")
    return text


def check_host(text: str) -> str:
    """``host`` or ``host:port``."""
    split_host(text)
    return text


def check_filled(text: str) -> str:
    """Text that is not blank."""
    if not text.strip():
        raise ValueError("must not be empty")
    if "\0" in text:
        raise ValueError("must not have a zero byte")
    return text


def check_pattern(text: str) -> str:
    """A pattern of repositories for ``fnmatch``."""
    if not text.strip() or re.search(r"\s", text) or text.startswith("/"):
        raise ValueError("not a pattern of repositories, such as library/*")
    return text


def check_helper(text: str) -> str:
    """The name of a credential helper, without ``docker-credential-``."""
    # It becomes a part of a file name.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text, re.ASCII):
        raise ValueError("must be the part after docker-credential-")
    return text
