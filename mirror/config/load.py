"""Load the configuration: a YAML file, with environment variables over it.

Lives here: the subset of YAML that a configuration may use, the name of each variable, and error
messages of one line. A message names where the value comes from, its key, and the value itself
unless it may be a secret. Must not know: what the values mean (``settings.py``).

A scalar stays text, as it is written: a password of digits stays those digits, and nothing becomes
a number of base 60. An empty scalar and ``null`` are no value. The settings read text.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias, get_origin

import yaml

from mirror.config.settings import InvalidSetting, KeyPath, Section, Settings, build, section_type
from mirror.oci.errors import ConfigError
from mirror.oci.text import printable

FILE_VARIABLE: Final = "OCI_MIRROR_CONFIG"
"""Environment variable that names the configuration file. It is no key of the configuration."""
DEFAULT_FILE: Final = "config/mirror.yaml"
"""Configuration file of a command that names none, below the working directory, if it exists."""
PREFIX: Final = "OCI_MIRROR_"
"""Begins the name of each environment variable."""
_MAX_FILE_BYTES: Final = 1 << 20
"""Bytes; a configuration of all registries that exist is far smaller."""
_MAX_YAML_VALUES: Final = 50_000
"""Values in a file. An alias counts as often as it is used, which stops a "billion laughs"."""
_MAX_YAML_DEPTH: Final = 16
"""Nested mappings and lists; the settings have at most five levels."""

_MAX_SHOWN_NAME_CHARS: Final = 200
"""Characters of a file name, key or variable in a message, which is one line."""
_MAX_SHOWN_VALUE_CHARS: Final = 120
"""Characters of a value in a message, which is one line."""

Tree: TypeAlias = dict[str, Any]
"""Plain values of a section: text, None, lists and mappings."""


def load(path: str | None, environ: Mapping[str, str]) -> Settings:
    """Load the settings of a file (None: no file), with the variables of ``environ`` over them.

    Raises :class:`ConfigError`, whose one line names the origin, the key and the value.
    """
    return load_with_origins(path, environ)[0]


def load_with_origins(
    path: str | None, environ: Mapping[str, str]
) -> tuple[Settings, ValueOrigins]:
    """Load the settings as :func:`load` does, and return the origin of each value, too."""
    origins = ValueOrigins()
    tree: Tree = {} if path is None else _read_file(path, origins)
    unknown = list(_drop_unknown_keys(tree, Settings, (), origins))
    _apply_environment(tree, environ, origins)
    unknown += _drop_unknown_keys(tree, Settings, (), origins)
    if unknown and not tree.get("upstreams"):
        raise ConfigError(unknown[0], unknown[1:])
    if not tree.get("upstreams"):
        if path is None and not origins.places:
            raise ConfigError(
                f"no configuration: there is no {DEFAULT_FILE} in {os.getcwd()}, and neither "
                f"--config FILE nor {FILE_VARIABLE} was given"
            )
        raise ConfigError(f"{path or origins.default}: upstreams: at least one is needed")
    refused = unknown
    try:
        settings = build(tree)
    except InvalidSetting as error:
        for key, reason in ((error.path, error.message), *error.others):
            shown = _format_value(key, _value_at(tree, key))
            refused.append(f"{origins.prefix(key)}{shown}{reason}")
    if refused:
        raise ConfigError(refused[0], refused[1:])
    return settings, origins


# --- the origin of a value, and its text in a message ---------------------------------------------


@dataclass(slots=True)
class ValueOrigins:
    """The origin of each value: ``mirror.yaml:12``, or the name of a variable."""

    default: str = "environment"
    places: dict[KeyPath, str] = field(default_factory=dict)

    def prefix(self, path: KeyPath) -> str:
        """Begin a message: ``mirror.yaml:12: storage.max_size: ``.

        A key that was not set has the origin of the nearest section around it.
        """
        around = (path[:end] for end in range(len(path), -1, -1))
        place = next((self.places[key] for key in around if key in self.places), self.default)
        return f"{place}: {_dotted(path)}: " if path else f"{place}: "


def _dotted(path: KeyPath) -> str:
    """Format a path for a message: ``upstreams.docker.io.endpoints[0]``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return printable("".join(parts).removeprefix("."), _MAX_SHOWN_NAME_CHARS)


_PUBLIC_CREDENTIALS: Final = {"username", "docker_config", "helper"}
"""Keys below ``credentials`` whose values are not secret."""


def _format_value(path: KeyPath, value: object) -> str:
    """Return ``'fifty': `` for a value that may be shown. Empty for a secret, mapping or list."""
    if not isinstance(value, str | int | float):
        return ""
    if "credentials" in path and path[-1] not in _PUBLIC_CREDENTIALS:
        return ""
    text = str(value)
    if "//" in text or "@" in text:
        # A URL that was refused may have a password before its host, or a token in its query.
        text = re.sub(r"(//)?[^/\s]*@", r"\1***@", text)
        text = re.sub(r"[?#].*", "?***", text, flags=re.DOTALL)
    return f"'{printable(text, _MAX_SHOWN_VALUE_CHARS)}': "


def _value_at(tree: object, path: KeyPath) -> object:
    """Return the value at ``path``, or None if the tree has none there."""
    for part in path:
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            return None
    return tree


# --- known keys -----------------------------------------------------------------------------------


def _suggestion(word: str, known: list[str]) -> str:
    """Return ``, did you mean storage?`` with the nearest known word. Empty if none is known."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f", did you mean {nearest[0]}?" if nearest else ""


def _is_mapping_of_sections(model: type[Section], key: str) -> bool:
    """Return whether the keys below are names (of upstreams), and each value is a section."""
    return get_origin(model.model_fields[key].annotation) is dict


def _drop_unknown_keys(
    tree: Tree, model: type[Section], path: KeyPath, origins: ValueOrigins
) -> Iterator[str]:
    """Delete unknown keys, and yield a message for each.

    Keys without a value are deleted, too: they have their default.
    """
    for key, value in list(tree.items()):
        here = (*path, key)
        if value is None or key not in model.model_fields:
            del tree[key]
        if key not in model.model_fields:
            near = _suggestion(key, _keys_like(key, model))
            yield f"{origins.prefix(here)}unknown key{near}"
            continue
        section = section_type(model, key)
        if not isinstance(value, dict) or section is None:
            continue
        if not _is_mapping_of_sections(model, key):
            yield from _drop_unknown_keys(value, section, here, origins)
            continue
        for name, entry in value.items():
            if isinstance(entry, dict):
                yield from _drop_unknown_keys(entry, section, (*here, name), origins)


def _keys_like(key: str, model: type[Section]) -> list[str]:
    """Return the keys that an unknown key may stand for: one of this name below, or all here."""
    sections = ((name, section_type(model, name)) for name in model.model_fields)
    below = [f"{name}.{key}" for name, one in sections if one and key in one.model_fields]
    return below or list(model.model_fields)


# --- YAML -----------------------------------------------------------------------------------------


def _read_file(path: str, origins: ValueOrigins) -> Tree:
    """Read a YAML file into plain values, and note the line of each. Raises ``ConfigError``."""
    name = printable(path, _MAX_SHOWN_NAME_CHARS)
    origins.default = name
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > _MAX_FILE_BYTES:
        raise ConfigError(f"{name}: larger than {_MAX_FILE_BYTES} bytes")
    try:
        root = yaml.compose(raw.decode("utf-8-sig"), Loader=yaml.SafeLoader)
        if root is None:
            return {}
        tree = _NodeReader(name, origins).read(root, (), 0)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}" if mark else ""
        # The parser quotes the text that it could not read. It may be part of a password.
        problem = re.sub(r"(alias|anchor|handle) .*", r"\1", error.problem or "cannot be read")
        raise ConfigError(f"{name}{where}: YAML: {printable(problem)}") from None
    except yaml.reader.ReaderError as error:
        number = raw.decode(errors="replace").count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{number}: YAML: a character that is not allowed") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}:{root.start_mark.line + 1}: must be a mapping of keys to values")
    return tree


class _NodeReader:
    """Turns the YAML nodes of one file into plain values: mappings, lists, text and None.

    Each use of an alias becomes a value of its own, so a variable changes one key only.
    """

    def __init__(self, name: str, origins: ValueOrigins) -> None:
        self._name = name
        self._origins = origins
        self._nodes = 0

    def _error(self, node: yaml.Node, reason: str) -> ConfigError:
        return ConfigError(f"{self._name}:{node.start_mark.line + 1}: {reason}")

    def read(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        """Read ``node``, the value of the key at ``path``, ``depth`` levels below the root."""
        self._nodes += 1
        if self._nodes > _MAX_YAML_VALUES:
            raise self._error(
                node, f"more than {_MAX_YAML_VALUES} values, with each use of an alias"
            )
        if depth > _MAX_YAML_DEPTH:
            raise self._error(node, "nested too deeply")
        if not node.tag.startswith("tag:yaml.org,2002:") or ":python/" in node.tag:
            raise self._error(
                node, "YAML tags are not used here (quote a value that begins with !)"
            )
        self._origins.places.setdefault(path, f"{self._name}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(n, (*path, i), depth + 1) for i, n in enumerate(node.value)]
        return None if node.tag.endswith(":null") else node.value

    def _read_mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> Tree:
        tree: Tree = {}
        merged: list[yaml.Node] = []
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag.endswith(":merge"):
                merged += (
                    value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                )
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, "a key must be plain text")
            key = key_node.value
            here = (*path, key)
            if key in lines:
                reason = f"{_dotted(here)}: set twice, first on line {lines[key]}"
                raise self._error(key_node, reason)
            lines[key] = key_node.start_mark.line + 1
            self._origins.places[here] = f"{self._name}:{lines[key]}"
            tree[key] = self.read(value_node, here, depth + 1)
        for other in merged:
            values = self.read(other, path, depth + 1)
            if not isinstance(values, dict):
                raise self._error(other, "only a mapping can be merged with <<")
            tree = {**values, **tree}
        return tree


# --- environment ----------------------------------------------------------------------------------

# Kubernetes and Docker links set these in each container, for a Service named oci-mirror.
_SERVICE_LINK: Final = re.compile(
    r"(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)"
)


def _variable_part(name: str) -> str:
    """Write the name of an upstream as in a variable: ``docker.io`` is ``DOCKER_IO``."""
    return re.sub(r"[^A-Za-z0-9]", "_", name).upper()


def _apply_environment(tree: Tree, environ: Mapping[str, str], origins: ValueOrigins) -> None:
    """Put the value of each of our variables into ``tree``."""
    variables = {name for name in environ if name.startswith(PREFIX)} - {FILE_VARIABLE}
    # A section comes before its keys. Sorted, so that the order of the environment has no effect.
    for name in sorted(variables, key=lambda name: (name.count("__"), name)):
        rest = name.removeprefix(PREFIX)
        path = _find_path(rest, tree, name)
        if path is None:
            if _SERVICE_LINK.fullmatch(rest):
                continue
            near = _suggestion(name, list(_variable_names(tree)))
            raise ConfigError(f"{printable(name, _MAX_SHOWN_NAME_CHARS)}: unknown variable{near}")
        origins.places[path] = name
        _set_value(tree, path, _parse_variable(name, environ[name], path))


def _find_path(rest: str, tree: Tree, variable: str) -> KeyPath | None:
    """Return the path of the key that a variable names. ``rest``: its name without the prefix."""
    if not rest.startswith("UPSTREAMS__"):
        return _find_key(rest, Settings)
    paths: dict[str, KeyPath] = {}
    for name, section in _upstreams(tree):
        part = f"UPSTREAMS__{_variable_part(name)}__"
        if rest.startswith(part) and (below := _find_key(rest.removeprefix(part), section)):
            paths[name] = ("upstreams", name, *below)
    if len(paths) > 1:
        raise ConfigError(f"{variable}: names more than one upstream: {', '.join(sorted(paths))}")
    return next(iter(paths.values()), None)


def _find_key(rest: str, model: type[Section]) -> KeyPath | None:
    """Return the path of a key in ``model``.

    ``STORAGE__MAX_SIZE`` is ``("storage", "max_size")``. None if there is no such key.
    """
    first, separator, more = rest.partition("__")
    key = first.lower()
    if first != first.upper() or key not in model.model_fields:
        return None
    if not separator:
        return (key,)
    section = section_type(model, key)
    below = _find_key(more, section) if section else None
    return None if below is None else (key, *below)


def _upstreams(tree: Tree) -> Iterator[tuple[str, type[Section]]]:
    """Yield the name of each upstream that is configured so far, and the type of its section."""
    section = section_type(Settings, "upstreams")
    assert section is not None
    upstreams = tree.get("upstreams")
    for name in upstreams if isinstance(upstreams, dict) else ():
        yield name, section


def _variable_names(tree: Tree) -> Iterator[str]:
    """Yield the name of each variable that would be accepted."""

    def below(model: type[Section], prefix: str) -> Iterator[str]:
        for key in model.model_fields:
            yield f"{prefix}{key.upper()}"
            section = section_type(model, key)
            if section and not _is_mapping_of_sections(model, key):
                yield from below(section, f"{prefix}{key.upper()}__")

    yield from below(Settings, PREFIX)
    for name, section in _upstreams(tree):
        yield from below(section, f"{PREFIX}UPSTREAMS__{_variable_part(name)}__")


def _parse_variable(name: str, text: str, path: KeyPath) -> Any:
    """Read a variable: a section is JSON, a list is separated by commas or JSON, all else is text.

    Returns None for an empty variable, which is no value.
    """
    model: type[Section] = Settings
    keys = path if path[0] != "upstreams" or len(path) == 1 else ("upstreams", *path[2:])
    *sections, last = map(str, keys)
    for key in sections:
        model = section_type(model, key) or model
    if get_origin(model.model_fields[last].annotation) is tuple:
        if text.lstrip().startswith("["):  # Items that are sections.
            return _parse_json(name, text, path, list)
        return [part.strip() for part in text.split(",") if part.strip()]
    if section_type(model, last) is None or not text:
        return text or None
    return _parse_json(name, text, path, dict)


def _parse_json(name: str, text: str, path: KeyPath, kind: type[dict[str, Any] | list[Any]]) -> Any:
    """Parse the JSON text of a variable. ``null`` is no value."""
    try:
        value = json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        raise ConfigError(f"{name}: {_dotted(path)}: not JSON") from None
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{name}: {_dotted(path)}: must be a JSON object")
    return value


def _set_value(tree: Tree, path: KeyPath, value: Any) -> None:
    """Set the value at ``path``. A mapping is merged into the mapping that is there."""
    *sections, last = map(str, path)
    for key in sections:
        below = tree.get(key)
        if not isinstance(below, dict):
            below = tree[key] = {}
        tree = below
    old = tree.get(last)
    tree[last] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value


def _merge(old: Tree, new: Tree) -> Tree:
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            value = _merge(before, value)
        merged[key] = value
    return merged
