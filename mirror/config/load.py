"""Reading the configuration: a YAML file, and the environment over it.

Lives here: YAML as this configuration uses it, the names of the variables, and errors of one line
that name where a value comes from, its key and itself (secrets never). Must not know: what the
values mean (``settings.py``).

Scalars stay the text that they are, but for an empty one or ``null``: a password of digits is what
was written, and nothing turns into a number of base 60. The settings read text.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias, get_args, get_origin

import yaml

from mirror.config.settings import Frozen, Invalid, Settings, build
from mirror.oci.errors import ConfigError
from mirror.oci.text import printable

PREFIX: Final = "OCI_MIRROR_"
_FILE_LIMIT: Final = 1 << 20
_NODE_LIMIT: Final = 50_000
"""Values in a file, aliases counted as often as they are used: no billion laughs."""
_DEPTH_LIMIT: Final = 16

Path_: TypeAlias = tuple[str | int, ...]
Tree: TypeAlias = dict[str, Any]


def load(path: str | None, environ: Mapping[str, str]) -> Settings:
    """The settings of a file (if any), with the environment's over them.

    Raises :class:`ConfigError`, whose one line names the source, the key and the value.
    """
    source = Source()
    tree: Tree = {} if path is None else _read_file(path, source)
    _check_keys(tree, Settings, (), source)
    _apply_environment(tree, environ, source)
    _check_keys(tree, Settings, (), source)
    if not tree.get("upstreams"):
        where = path or "environment (no --config FILE was given)"
        raise ConfigError(f"{where}: upstreams: there must be at least one")
    try:
        return build(tree)
    except Invalid as error:
        more = f" (and {error.more} more)" if error.more else ""
        shown = _shown(error.path, _at(tree, error.path))
        raise ConfigError(f"{source.line(error.path)}{shown}{error.message}{more}") from None


# --- where a value comes from, and how it is shown ------------------------------------------------


@dataclass(slots=True)
class Source:
    """Where each key was set: ``mirror.yaml:12`` or the name of a variable."""

    default: str = "environment"
    places: dict[Path_, str] = field(default_factory=dict)

    def line(self, path: Path_) -> str:
        """``mirror.yaml:12: storage.max_size: ``, by the nearest key above that is known."""
        above = (path[:end] for end in range(len(path), -1, -1))
        place = next((self.places[key] for key in above if key in self.places), self.default)
        return f"{place}: {dotted(path)}: " if path else f"{place}: "


def dotted(path: Path_) -> str:
    """``upstreams.docker.io.endpoints[0]``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return printable("".join(parts).removeprefix("."), 200)


_SHOWN_OF_CREDENTIALS: Final = {"username", "docker_config", "helper"}


def _shown(path: Path_, value: object) -> str:
    """``'fifty': `` for a value that may be shown, nothing for a secret or a structure."""
    if not isinstance(value, str | int | float):
        return ""
    if "credentials" in path and path[-1] not in _SHOWN_OF_CREDENTIALS:
        return ""
    text = str(value)
    if "//" in text or "@" in text:
        # A URL that was refused may carry a password before its host, or a token in its query.
        text = re.sub(r"(//)?[^/\s]*@", r"\1***@", text)
        text = re.sub(r"[?#].*", "?***", text, flags=re.DOTALL)
    return f"'{printable(text, 120)}': "


def _at(tree: object, path: Path_) -> object:
    for part in path:
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            return None
    return tree


# --- the keys there are ---------------------------------------------------------------------------


def _section(annotation: Any) -> type[Frozen] | None:
    """The settings type of a key that is a section, ``Tls | None`` included."""
    options = get_args(annotation) or (annotation,)
    found = (one for one in options if isinstance(one, type) and issubclass(one, Frozen))
    return next(found, None)


def _kind(model: type[Frozen], key: str) -> Any:
    return model.model_fields[key].annotation


def _nearest(word: str, known: Iterator[str] | list[str]) -> str:
    best = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return f", did you mean {best[0]}?" if best else ""


def _check_keys(tree: Tree, model: type[Frozen], path: Path_, source: Source) -> None:
    """Unknown keys are errors; a key without a value is one that is not there."""
    for key, value in list(tree.items()):
        here = (*path, key)
        if key not in model.model_fields:
            near = _nearest(key, list(model.model_fields))
            raise ConfigError(f"{source.line(here)}unknown key{near}")
        if value is None:
            del tree[key]
        kind = _kind(model, key)
        if isinstance(value, dict) and (section := _section(kind)):
            if get_origin(kind) is dict:
                for name, entry in value.items():
                    if isinstance(entry, dict):
                        _check_keys(entry, section, (*here, name), source)
            else:
                _check_keys(value, section, here, source)


# --- YAML -----------------------------------------------------------------------------------------


def _read_file(path: str, source: Source) -> Tree:
    name = printable(path, 200)
    source.default = name
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_FILE_LIMIT + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > _FILE_LIMIT:
        raise ConfigError(f"{name}: larger than {_FILE_LIMIT} bytes")
    try:
        root = yaml.compose(raw.decode("utf-8-sig"), Loader=yaml.SafeLoader)
        if root is None:
            return {}
        tree = _Plain(name, source).value(root, (), 0)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}" if mark else ""
        # The parser quotes what it stumbled over, which may be a part of a password.
        problem = re.sub(r"(alias|anchor|handle) .*", r"\1", error.problem or "cannot be read")
        raise ConfigError(f"{name}{where}: YAML: {printable(problem)}") from None
    except yaml.reader.ReaderError as error:
        number = raw.decode(errors="replace").count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{number}: YAML: a character that is not allowed") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}:{root.start_mark.line + 1}: must be a mapping of keys to values")
    return tree


class _Plain:
    """Plain values of YAML nodes: mappings, lists, text and None."""

    def __init__(self, name: str, source: Source) -> None:
        self._name = name
        self._source = source
        self._nodes = 0

    def _wrong(self, node: yaml.Node, why: str) -> ConfigError:
        return ConfigError(f"{self._name}:{node.start_mark.line + 1}: {why}")

    def value(self, node: yaml.Node, path: Path_, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > _NODE_LIMIT:
            raise self._wrong(node, f"more than {_NODE_LIMIT} values, aliases counted")
        if depth > _DEPTH_LIMIT:
            raise self._wrong(node, "nested too deeply")
        if not node.tag.startswith("tag:yaml.org,2002:") or ":python/" in node.tag:
            raise self._wrong(
                node, "YAML tags are not used here (quote a value that begins with !)"
            )
        self._source.places.setdefault(path, f"{self._name}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(n, (*path, i), depth + 1) for i, n in enumerate(node.value)]
        return None if node.tag.endswith(":null") else node.value

    def _mapping(self, node: yaml.MappingNode, path: Path_, depth: int) -> Tree:
        found: Tree = {}
        merged: list[yaml.Node] = []
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag.endswith(":merge"):
                merged += (
                    value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                )
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._wrong(key_node, "a key must be a word")
            key = key_node.value
            here = (*path, key)
            if key in lines:
                why = f"{dotted(here)}: there twice, first on line {lines[key]}"
                raise self._wrong(key_node, why)
            lines[key] = key_node.start_mark.line + 1
            self._source.places[here] = f"{self._name}:{lines[key]}"
            found[key] = self.value(value_node, here, depth + 1)
        for other in merged:
            values = self.value(other, path, depth + 1)
            if not isinstance(values, dict):
                raise self._wrong(other, "only a mapping can be merged with <<")
            found = {**values, **found}
        return found


# --- environment ----------------------------------------------------------------------------------

# What Kubernetes and Docker links put into every container beside a Service named oci-mirror.
_SERVICE_LINK: Final = re.compile(
    r"(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)"
)


def variable_part(name: str) -> str:
    """An upstream's name in a variable: ``docker.io`` is ``DOCKER_IO``."""
    return re.sub(r"[^A-Za-z0-9]", "_", name).upper()


def _apply_environment(tree: Tree, environ: Mapping[str, str], source: Source) -> None:
    ours = {name for name in environ if name.startswith(PREFIX)}
    # Sections before what is in them; by name, so that the order of the environment says nothing.
    for name in sorted(ours, key=lambda name: (name.count("__"), name)):
        rest = name.removeprefix(PREFIX)
        path = _find(rest, tree, name)
        if path is None:
            if _SERVICE_LINK.fullmatch(rest):
                continue
            near = _nearest(name, _names(tree))
            raise ConfigError(f"{printable(name, 120)}: unknown variable{near}")
        source.places[path] = name
        _put(tree, path, _decode(name, environ[name], path), source)


def _find(rest: str, tree: Tree, variable: str) -> Path_ | None:
    """The path of the key that a variable names."""
    if rest.startswith("UPSTREAMS__"):
        return _find_upstream(rest.removeprefix("UPSTREAMS__"), tree, variable)
    return _find_key(rest, Settings)


def _find_key(rest: str, model: type[Frozen]) -> Path_ | None:
    first, _, more = rest.partition("__")
    key = first.lower()
    if first != first.upper() or key not in model.model_fields:
        return None
    if not more:
        return None if rest.endswith("__") else (key,)
    section = _section(_kind(model, key))
    below = _find_key(more, section) if section else None
    return None if below is None else (key, *below)


def _find_upstream(rest: str, tree: Tree, variable: str) -> Path_ | None:
    upstreams = tree.get("upstreams")
    found: dict[str, Path_] = {}
    for name in upstreams if isinstance(upstreams, dict) else ():
        part = variable_part(name)
        if not rest.startswith(f"{part}__"):
            continue
        section = _section(_kind(Settings, "upstreams"))
        assert section is not None
        if below := _find_key(rest.removeprefix(f"{part}__"), section):
            found[name] = ("upstreams", name, *below)
    if len(found) > 1:
        raise ConfigError(f"{variable}: could be of any of {', '.join(sorted(found))}")
    return next(iter(found.values()), None)


def _names(tree: Tree) -> Iterator[str]:
    """Every variable there is."""

    def below(model: type[Frozen], prefix: str) -> Iterator[str]:
        for key in model.model_fields:
            kind = _kind(model, key)
            yield f"{prefix}{key.upper()}"
            section = _section(kind)
            if section and get_origin(kind) is not dict:
                yield from below(section, f"{prefix}{key.upper()}__")

    yield from below(Settings, PREFIX)
    upstreams = tree.get("upstreams")
    section = _section(_kind(Settings, "upstreams"))
    assert section is not None
    for name in upstreams if isinstance(upstreams, dict) else ():
        yield from below(section, f"{PREFIX}UPSTREAMS__{variable_part(name)}__")


def _decode(name: str, text: str, path: Path_) -> Any:
    """A section is JSON, a list is separated by commas, all else is text. Empty: none."""
    model: type[Frozen] = Settings
    kind: Any = None
    keys = path if path[0] != "upstreams" or len(path) == 1 else ("upstreams", *path[2:])
    for key in keys:
        kind = _kind(model, str(key))
        model = _section(kind) or model
    if get_origin(kind) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    if _section(kind) is not None:
        try:
            value = json.loads(text, parse_int=str, parse_float=str) if text else None
        except (ValueError, RecursionError):
            raise ConfigError(f"{name}: {dotted(path)}: not JSON") from None
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{name}: {dotted(path)}: must be a JSON object")
        return value
    return text or None


def _put(tree: Tree, path: Path_, value: Any, source: Source) -> None:
    *above, last = path
    for key in above:
        below = tree.get(str(key))
        if not isinstance(below, dict):
            # An alias of YAML became two values, so that no other key changes with this one.
            below = tree[str(key)] = {}
        tree = below
    old = tree.get(str(last))
    tree[str(last)] = value
    if isinstance(old, dict) and isinstance(value, dict):
        tree[str(last)] = _merged(old, value)


def _merged(old: Tree, new: Tree) -> Tree:
    both = dict(old)
    for key, value in new.items():
        before = both.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            value = _merged(before, value)
        both[key] = value
    return both
