"""Reading the configuration: a YAML file, and the environment over it.

Lives here: sizes and durations as people write them, and errors of one line that name the key and
the value. Must not know: what the settings mean (``mirror/config.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from mirror.config import Settings
from mirror.oci.errors import ConfigError

_UNITS: Final = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SECONDS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def size(text: object) -> object:
    """Bytes of ``50GiB`` or ``500MB``; what is no text stays as it is."""
    match = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
        if isinstance(text, str)
        else None
    )
    if match is None or match[2].upper() not in _UNITS:
        return text
    return int(float(match[1]) * _UNITS[match[2].upper()])


def duration(text: object) -> object:
    """Seconds of ``5m``, ``1d`` or ``inf``; what is no text stays as it is."""
    if isinstance(text, str) and text.strip() in ("inf", "never"):
        return math.inf
    match = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text) if isinstance(text, str) else None
    )
    if match is None or match[2] not in _SECONDS:
        return text
    return float(match[1]) * _SECONDS[match[2]]


_SIZES: Final = {"max_size", "min_rate"}
_DURATIONS: Final = {
    "reverify",
    "connect",
    "headers",
    "idle",
    "tag_ttl",
    "negative_ttl",
    "drain_timeout",
}


def _convert(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: size(item)
            if key in _SIZES
            else duration(item)
            if key in _DURATIONS
            else _convert(item)
            for key, item in value.items()
        }
    return value


def load(path: str | None, environ: Mapping[str, str]) -> Settings:
    """The settings. Raises :class:`ConfigError`."""
    raw: Any = {}
    if path is not None:
        try:
            raw = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    try:
        return Settings.model_validate(_convert(raw))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
