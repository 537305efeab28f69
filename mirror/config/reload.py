"""Merge a configuration that was read again into the one that is in use. A pure function.

Lives here: the keys that need a restart. Must not know: how a changed value is put to use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydantic_core import PydanticCustomError

from mirror.config.settings import Section, Settings
from mirror.oci.errors import ConfigError

_NEEDS_RESTART: Final = (
    "listen",
    "admin",
    "hosted",
    "tls",
    "data_dir",
    "workers",
    "abandoned",
    "storage",
    "max_client_connections",
)
"""Keys whose values are in use from the start to the end of a process. (The files of ``tls`` are
read again whenever they change.)"""


@dataclass(frozen=True, slots=True)
class Merged:
    """The result of :func:`merge_settings`. Keys are dotted: ``log.level``."""

    settings: Settings
    """The new settings, with the values in use of all keys that need a restart."""
    applied: tuple[str, ...]
    """Keys whose values change."""
    kept: tuple[str, ...]
    """Keys that were changed, but need a restart."""


def merge_settings(current: Settings, new: Settings) -> Merged:
    """Return ``new`` as far as it can be applied without a restart.

    Raises ``ConfigError`` if the two do not fit together: the listeners of the one with the access
    of the other could let everybody in.
    """
    fixed = {key: getattr(current, key) for key in _NEEDS_RESTART}
    merged = new.model_copy(update=fixed)
    try:
        merged.check_reach()
    except PydanticCustomError as error:
        raise ConfigError(f"a restart is needed: {error.message()}") from None
    return Merged(merged, tuple(_changed(current, merged)), tuple(_changed(merged, new)))


def _changed(old: Settings, new: Settings) -> list[str]:
    keys = []
    for key in Settings.model_fields:
        before, after = getattr(old, key), getattr(new, key)
        if before == after:
            continue
        if isinstance(before, Section) and isinstance(after, Section):
            fields = type(before).model_fields
            keys += [f"{key}.{n}" for n in fields if getattr(before, n) != getattr(after, n)]
        elif isinstance(before, dict):
            names = {**before, **after}
            keys += [f"{key}.{n}" for n in names if before.get(n) != after.get(n)]
        else:
            keys.append(key)
    return keys
