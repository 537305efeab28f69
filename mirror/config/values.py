"""The values of the configuration: sizes, durations, ratios, hosts, URLs, patterns.

Lives here: the grammar of each kind of value, as a pure function that reads or checks it, and the
same grammar as a JSON Schema for editors. A function raises ``ValueError``; its message never
holds the value, which may be a secret. Must not know: which key has which kind of value.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final
from urllib.parse import urlsplit

from mirror.oci.errors import NameInvalid
from mirror.oci.reference import UPSTREAM_ALIASES, Repository
from mirror.oci.text import printable

NEVER: Final = math.inf
"""The duration ``inf``."""
_MAX_SIZE_BYTES: Final = 2**63 - 1
"""Bytes; the largest signed 64-bit number, in which databases and file systems hold a size."""
_MIN_PART_BYTES: Final = 64 * 1024
"""Bytes; the overhead of a request would be larger than a smaller part."""
_MAX_PART_BYTES: Final = 8 * 1024 * 1024
"""Bytes; the parts of one blob that arrive early hold half of the memory for all blobs."""

# size: number [K|M|G|T|P|E [i]] [B]   with i: powers of 1024, without: powers of 1000
_SIZE: Final = re.compile(r"(\d{1,20}(?:\.\d{1,9})?)\s*(?:([kmgtpe])(i?))?b?", re.ASCII | re.I)
# duration: number without a unit (seconds) | 1*(number unit) | inf
_NUMBER: Final = re.compile(r"\d{1,15}(?:\.\d{1,9})?", re.ASCII)
_DURATION_PART: Final = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)(ms|s|m|h|d|w)", re.ASCII)
_DURATION: Final = re.compile(rf"(?:{_DURATION_PART.pattern})+", re.ASCII)
_BARE_HOST: Final = re.compile(r"(?:[a-z0-9-]+\.)+[a-z-]+(?::443)?(?:/.*)?", re.ASCII | re.I)
"""A host without a scheme that can only mean https: a name with a dot, and no port but 443."""
DOCKER_HUB_REGISTRY: Final = "https://registry-1.docker.io"
"""The registry of Docker Hub."""
_DOCKER_HUB_HOSTS: Final = {
    *("docker.io", "index.docker.io", "registry.hub.docker.com"),
    *("hub.docker.com", "www.docker.com", "www.docker.io"),
}
"""Hosts by which people mean Docker Hub. Its registry has another one."""
_LIKELY_MISTAKES: Final = tuple(
    (re.compile(pattern, re.ASCII), remedy)
    for pattern, remedy in (
        (r"(www\.)?docker\.com/.*", f"is a web site, no registry: write {DOCKER_HUB_REGISTRY}"),
        (r"(www\.)?github\.com/.*", "is a web site, no registry: write https://ghcr.io"),
        (
            # Its dependency proxy is a registry, though.
            r"(www\.)?gitlab\.com/(?!.*dependency_proxy/).*",
            "is a web site, no registry: write https://registry.gitlab.com",
        ),
        (r"gallery\.ecr\.aws/.*", "is a web site, no registry: write https://public.ecr.aws"),
        (r"catalog\.ngc\.nvidia\.com/.*", "is a web site, no registry: write https://nvcr.io"),
        (
            r"quay\.io/(repository|organization|user)(/.*)?",
            "is a page of a web site: write https://quay.io, or https://quay.io/ORGANIZATION",
        ),
        (
            r"[^/]+/(.*/)?(api/v(?!2(/|$))[0-9.]+|harbor/projects)(/.*)?",
            "is a page, or an API of projects: write https://HOST, or https://HOST/PROJECT",
        ),
        (
            r".*/(tags/list|(manifests|blobs)/[^/]+)",
            "is one object of a registry: write the URL of the registry, such as https://HOST",
        ),
    )
)
"""``host/path`` of URLs that are no endpoint, and what to write instead."""
_VARIABLE: Final = re.compile(r"\$\{|\$\(|\$[A-Z_]|\{\{|%[A-Z_]+%", re.ASCII)
_PATTERN: Final = re.compile(r"[a-z0-9._/*?!\[\]-]+", re.ASCII)
_UNITS: Final = {
    **{
        unit: Fraction(n)
        for unit, n in (("w", 604800), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    },
    "ms": Fraction(1, 1000),
}
"""Unit of a duration to its length in seconds."""


def parse_size(raw: object) -> int:
    """Read a size, and return bytes: ``50GiB`` (1024), ``500MB`` (1000), ``50Gi``, ``4096``.

    Raises ``ValueError``.
    """
    if isinstance(raw, int) and not isinstance(raw, bool):
        size = raw
    elif isinstance(raw, str) and (match := _SIZE.fullmatch(raw.strip())):
        number, prefix, binary = match.groups()
        power = " kmgtpe".index(prefix.lower()) if prefix else 0
        size = int(Fraction(number) * (1024 if binary else 1000) ** power)
    else:
        raise ValueError("not a size, such as 50GiB or 500MB")
    if not 0 < size <= _MAX_SIZE_BYTES:
        raise ValueError("must be a size of at least 1 byte, and less than 8EiB")
    return size


def parse_duration(raw: object) -> float:
    """Read a duration, and return seconds: ``5m``, ``1h30m``, ``250ms``, ``30``, ``0``, ``inf``.

    Raises ``ValueError``.
    """
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        seconds = float(raw)
    elif isinstance(raw, str) and raw.strip() == "inf":
        seconds = NEVER
    elif isinstance(raw, str) and _NUMBER.fullmatch(raw.strip()):
        seconds = float(raw)
    elif isinstance(raw, str) and _DURATION.fullmatch(raw.strip()):
        parts = _DURATION_PART.findall(raw)
        seconds = float(sum(Fraction(number) * _UNITS[unit] for number, unit in parts))
    else:
        raise ValueError("not a duration, such as 30s, 5m, 1d, 0 or inf")
    if not seconds >= 0:  # also refuses NaN
        raise ValueError("must not be negative")
    return seconds


def parse_age(raw: object) -> float:
    """Read a duration that decides what is removed, and return seconds. Text must have a unit.

    Who forgets the ``d`` of ``30d`` does not mean 30 seconds. Raises ``ValueError``.
    """
    if isinstance(raw, str) and _NUMBER.fullmatch(raw.strip()):
        units = ", ".join(f"{raw.strip()}{unit}" for unit in "smhd")
        raise ValueError(f"name a unit: {units}")
    return parse_duration(raw)


def parse_ratio(raw: object) -> float:
    """Read a ratio above 0 and up to 1: ``0.95`` or ``95%``. Raises ``ValueError``."""
    divisor = 1.0
    if isinstance(raw, str):
        text = raw.strip()
        if text.endswith("%"):
            text, divisor = text[:-1].strip(), 100.0
        raw = float(text) if _NUMBER.fullmatch(text) else None
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise ValueError("not a ratio, such as 0.95 or 95%")
    ratio = float(raw) / divisor
    if not 0 < ratio <= 1:
        raise ValueError("must be more than 0 and at most 1 (100%)")
    return ratio


# --- the same grammars for editors ----------------------------------------------------------------

_NUMBER_TEXT: Final = r"[0-9]{1,15}(\.[0-9]{1,9})?"
_FINITE_TEXT: Final = rf"{_NUMBER_TEXT}|({_NUMBER_TEXT}(ms|s|m|h|d|w))+"
_NUMBER_OR_STRING: Final = {"type": ["number", "string"]}
SIZE_SCHEMA: Final[dict[str, Any]] = {
    **_NUMBER_OR_STRING,
    "minimum": 1,
    "pattern": r"^\s*[0-9]{1,20}(\.[0-9]{1,9})?\s*([kKmMgGtTpPeE][iI]?)?[bB]?\s*$",
}
"""JSON Schema of a size, as :func:`parse_size` reads it."""
FINITE_DURATION_SCHEMA: Final[dict[str, Any]] = {
    **_NUMBER_OR_STRING,
    "minimum": 0,
    "pattern": rf"^\s*({_FINITE_TEXT})\s*$",
}
"""JSON Schema of a duration without ``inf``."""
DURATION_SCHEMA: Final = {**FINITE_DURATION_SCHEMA, "pattern": rf"^\s*(inf|{_FINITE_TEXT})\s*$"}
"""JSON Schema of a duration, as :func:`parse_duration` reads it."""
POSITIVE_DURATION_SCHEMA: Final[dict[str, Any]] = {
    **_NUMBER_OR_STRING,
    "pattern": FINITE_DURATION_SCHEMA["pattern"],
    "exclusiveMinimum": 0,
}
"""JSON Schema of a finite duration above 0."""
AGE_SCHEMA: Final[dict[str, Any]] = {
    "type": "string",
    "pattern": rf"^\s*({_NUMBER_TEXT}(ms|s|m|h|d|w))+\s*$",
}
"""JSON Schema of a finite duration with a unit, as :func:`parse_age` reads it."""
RATIO_SCHEMA: Final[dict[str, Any]] = {
    **_NUMBER_OR_STRING,
    "exclusiveMinimum": 0,
    "maximum": 1,
    "pattern": rf"^\s*{_NUMBER_TEXT}\s*%?\s*$",
}
"""JSON Schema of a ratio, as :func:`parse_ratio` reads it."""


# --- printing -------------------------------------------------------------------------------------


_SIZE_PREFIXES: Final = ((6, "E"), (5, "P"), (4, "T"), (3, "G"), (2, "M"), (1, "K"))
"""(power, prefix) of each unit of a size, the largest first."""


def _format_exact(number: int | float, units: Mapping[str, int]) -> str | None:
    """Return ``number`` in the first unit that divides it, or None if no unit does."""
    for unit, worth in units.items():
        if number and number % worth == 0:
            return f"{int(number) // worth}{unit}"
    return None


def format_size(size: int) -> str:
    """Return the shortest text that :func:`parse_size` reads as exactly ``size`` bytes.

    It has the unit that people use for such a number: ``50GB`` for 50,000,000,000 bytes, ``50GiB``
    for 53,687,091,200.
    """
    binary = _format_exact(size, {f"{prefix}iB": 1024**power for power, prefix in _SIZE_PREFIXES})
    decimal = _format_exact(size, {f"{prefix}B": 1000**power for power, prefix in _SIZE_PREFIXES})
    return min((text for text in (binary, decimal) if text), key=len, default=str(size))


def format_duration(seconds: float) -> str:
    """Return the shortest text that :func:`parse_duration` reads as exactly ``seconds``."""
    if seconds == NEVER:
        return "inf"
    exact = _format_exact(seconds, {"d": 86400, "h": 3600, "m": 60, "s": 1})
    return exact or (
        f"{seconds:.9f}".rstrip("0").rstrip(".") if seconds < 1e6 else f"{seconds:.0f}"
    )


def format_age(seconds: float) -> str:
    """Return the shortest text that :func:`parse_age` reads as exactly ``seconds``."""
    text = format_duration(seconds)
    return f"{text}s" if text[-1].isdigit() else text


# --- checks ---------------------------------------------------------------------------------------
# Each returns its argument, as pydantic's validators do, or raises ``ValueError``.


def check_finite(seconds: float) -> float:
    """Refuse ``inf``."""
    if seconds == NEVER:
        raise ValueError("must be finite")
    return seconds


def check_positive(seconds: float) -> float:
    """Refuse 0 and ``inf``."""
    if seconds <= 0:
        raise ValueError("must be more than 0")
    return check_finite(seconds)


def check_part(size: int) -> int:
    """Check the usual bytes of one range request."""
    if not _MIN_PART_BYTES <= size <= _MAX_PART_BYTES:
        raise ValueError("must be from 64KiB to 8MiB")
    return size


def split_host(text: str) -> tuple[str, int | None]:
    """Split ``host``, ``host:port`` or ``[::1]:port`` into the host and the port.

    The host has no brackets; the port is None if the text has none. Raises ``ValueError`` for any
    other text.
    """
    match = re.fullmatch(
        r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/?#@\s]+))(?::(\d{1,5}))?", text, re.ASCII
    )
    if match is None:
        raise ValueError("not host or host:port")
    literal, name, port = match.groups()
    if literal is not None:
        ipaddress.IPv6Address(literal)
    elif not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", name, re.ASCII):
        raise ValueError("not a host name")
    if port is not None and int(port) > 65535:
        raise ValueError("the port must be at most 65535")
    return literal or name, None if port is None else int(port)


def check_listen(text: str) -> str:
    """Check an ``address:port``. IPv6 is in brackets; with port 0 the system chooses the port."""
    try:
        port = split_host(text)[1]
    except ValueError:
        port = None
    if port is None:
        raise ValueError("must be address:port, such as 0.0.0.0:5100 or [::1]:5100")
    return text


def is_loopback_only(listen: str) -> bool:
    """Return whether only this machine can connect to an ``address:port`` that was checked."""
    host = split_host(listen)[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_loopback_host(host: str) -> bool:
    """Return whether a host name or an address without a port is that of this machine alone."""
    return is_loopback_only(f"[{host}]:0" if ":" in host else f"{host}:0")


def may_collide(listen: str, other: str) -> bool:
    """Return whether only one of two listeners, each ``address:port``, can be opened."""
    (host, port), (other_host, other_port) = split_host(listen), split_host(other)
    if port != other_port or not port:
        return False
    address, other_address = _listen_address(host), _listen_address(other_host)
    if isinstance(address, str) or isinstance(other_address, str):
        return address == other_address
    is_any = address.is_unspecified or other_address.is_unspecified
    return address == other_address or (is_any and address.version == other_address.version)


def _listen_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | str:
    try:
        return ipaddress.ip_address("127.0.0.1" if host.lower() == "localhost" else host)
    except ValueError:
        return host.lower()


def check_http_url(text: str) -> str:
    """Check an absolute http(s) URL without a query."""
    if "?" in check_webhook_url(text):
        raise ValueError("must have neither query nor fragment")
    return text


def check_webhook_url(text: str) -> str:
    """Check an absolute http(s) URL, which may have a query."""
    if "://" not in text:
        raise ValueError("must be an absolute URL that begins with https:// or http://")
    try:
        url = urlsplit(text)
        host, _ = split_host(url.netloc.rpartition("@")[2])
    except ValueError:
        raise ValueError("not a URL, such as https://registry.example") from None
    if url.scheme not in ("http", "https") or not host:
        raise ValueError("must be an absolute URL that begins with https:// or http://")
    if "@" in url.netloc:
        raise ValueError("must not have a user or password: use credentials")
    if "#" in text:
        raise ValueError("must have neither query nor fragment")
    if printable(text) != text or not text.isascii() or " " in text or "\\" in text:
        raise ValueError("must be a URL without spaces or control characters")
    return text


def normalise_endpoint(text: str) -> str:
    """Check the URL of a registry, and return its canonical form. Raises ``ValueError``.

    A path is the prefix of all repositories (``https://harbor.example/hub-proxy``). A path with
    ``/v2`` is that of the API: what comes before it belongs to the registry's own address
    (``https://example/artifactory/api/docker/hub/v2``), what comes after it is the prefix. Other
    forms that can have only one meaning are corrected.
    """
    if _BARE_HOST.fullmatch(text):
        text = f"https://{text}"
    url = urlsplit(check_http_url(text))
    host, port = split_host(url.netloc.lower())
    path = [part for part in url.path.split("/") if part]
    if host in _DOCKER_HUB_HOSTS:
        if path not in ([], ["v1"], ["v2"]):
            raise ValueError(f"is a web site, no registry: write {DOCKER_HUB_REGISTRY}")
        return DOCKER_HUB_REGISTRY
    for pattern, remedy in _LIKELY_MISTAKES:
        if pattern.fullmatch(f"{host}/{'/'.join(path)}"):
            raise ValueError(remedy)
    if path[:1] == ["v1"]:
        raise ValueError("the mirror uses version 2 of the API: leave out /v1/")
    if "v2" in path:
        base, prefix = path[: path.index("v2")], path[path.index("v2") + 1 :]
    elif path[-3:-1] == ["api", "docker"]:  # Artifactory, whose API is below its repository
        base, prefix = path, []
    else:
        base, prefix = [], path
    try:
        Repository.parse("", "/".join(prefix or ["any"]))
    except NameInvalid:
        raise ValueError(
            "its path must be a prefix of repositories, such as https://registry.example/hub-proxy"
        ) from None
    if "." in base or ".." in base:
        raise ValueError("its path must have neither . nor ..")
    # "v2" in the prefix: without /v2 before it, it would be read as the path of the API.
    api = [*base, "v2"] if base or "v2" in prefix else []
    is_default_port = port == {"https": 443, "http": 80}[url.scheme]
    netloc = url.netloc.lower().rpartition(":")[0] if is_default_port else url.netloc.lower()
    return "/".join((f"{url.scheme}://{netloc}", *api, *prefix))


def check_upstream_name(text: str) -> str:
    """Check the name of an upstream: ``host`` or ``host:port``, as in image references.

    Returns the name. Another name of the same registry becomes the usual one.
    """
    try:
        host, port = split_host(text)
    except ValueError:
        raise ValueError("must be a host or host:port, without a path") from None
    if text != text.lower():
        raise ValueError("must be in lower case")
    if "." not in host and ":" not in host and port is None and host != "localhost":
        # In an image reference, a first component without dot or port is part of the path.
        raise ValueError("the host of a reference has a dot or a port, or is localhost")
    name = usual_name(text)
    if name != "docker.io" and text in _DOCKER_HUB_HOSTS:
        raise ValueError("is in no image reference: Docker Hub is named docker.io")
    return name


def usual_name(text: str) -> str:
    """Return the usual name of an upstream: ``docker.io`` for ``index.docker.io``."""
    return UPSTREAM_ALIASES.get(text, text)


def check_alias(text: str) -> str:
    """Check a name that stands in place of an upstream's name in a path: one path component."""
    if not re.fullmatch(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*", text, re.ASCII):
        raise ValueError("must be one component of an image reference: a-z, 0-9, and . _ - inside")
    return text


def check_host(text: str) -> str:
    """Check a ``host`` or ``host:port``."""
    split_host(text)
    return text


def check_network(text: str) -> str:
    """Check an IP address, or a network such as ``10.0.0.0/8``."""
    try:
        ipaddress.ip_network(text)
    except ValueError:
        raise ValueError("must be an address or a network, such as 10.0.0.0/8") from None
    return text


def check_redirect_host(text: str) -> str:
    """Check a ``host``, ``host:port``, ``*.domain``, address or network."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        split_host(text.removeprefix("*."))
        return text.lower()
    if network.is_link_local:
        raise ValueError("the mirror never connects to link-local addresses")
    return text


def check_not_empty(text: str) -> str:
    """Refuse blank text, and a zero byte, which no path may have."""
    if not text.strip():
        raise ValueError("must not be empty")
    if "\0" in text:
        raise ValueError("must not have a zero byte")
    return text


def check_path(text: str) -> str:
    """Check the path of a file or directory: neither ``~`` nor a variable is expanded."""
    if text.startswith("~"):
        raise ValueError("~ is not expanded: write the whole path")
    return check_no_variable(check_not_empty(text))


def check_no_variable(text: str) -> str:
    """Refuse text with a variable or a template that another program should have replaced."""
    if _VARIABLE.search(text):
        raise ValueError("variables are not expanded: write the value, or set it by OCI_MIRROR_...")
    return text


def check_pattern(text: str) -> str:
    """Check a pattern of repositories for ``fnmatch``. It must be able to match one."""
    if not text.strip() or re.search(r"\s", text) or text.startswith("/"):
        raise ValueError("not a pattern of repositories, such as library/*")
    if ":" in text or "@" in text:
        raise ValueError("must name repositories, without a tag or a digest")
    if text != text.lower():
        raise ValueError("must be in lower case, as the names of repositories are")
    if not _PATTERN.fullmatch(text) or text.startswith(".*") or "/.*" in text:
        raise ValueError("is a regular expression; a pattern is shell-style, such as library/*")
    if text.endswith("/"):
        raise ValueError(f"matches no repository: write {text}*")
    return text


def check_helper(text: str) -> str:
    """Check the name of a credential helper, without ``docker-credential-``."""
    # The name becomes part of a file name, so it must not hold a slash.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text, re.ASCII):
        raise ValueError("must be the part after docker-credential-")
    return text
