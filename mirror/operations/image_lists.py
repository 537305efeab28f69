"""Lists of images: one name a line, Kubernetes objects, Compose files, the output of Helm.

Lives here: where these formats name images, and which files of a directory are read. Must not know:
registries, what the images are for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from mirror.oci.errors import InvalidRequest
from mirror.oci.image_name import ImageName
from mirror.oci.text import printable
from mirror.operations.yaml_documents import (
    MAX_DEPTH,
    MAX_MANIFESTS_BYTES,
    DocumentsRefused,
    Value,
    read_documents,
)

MAX_FILES: Final = 10_000
"""Files of one directory that are read."""
_SUFFIXES: Final = frozenset({".yaml", ".yml", ".json"})
"""Files with manifests. JSON is YAML as well."""
_MAX_SHOWN_CHARS: Final = 120
"""Characters of a name in a message, which is one line."""

_CONTAINERS: Final = ("initContainers", "containers", "ephemeralContainers")
_POD_SPECS: Final = (
    ("spec",),
    ("spec", "template", "spec"),
    ("spec", "jobTemplate", "spec", "template", "spec"),
    ("template", "spec"),
)
"""Where a Kubernetes object has a pod: Pod; Deployment, StatefulSet, DaemonSet, ReplicaSet, Job,
and kinds of others that are built like them; CronJob; PodTemplate."""

# Compose specification, "Interpolation": ${VAR}, ${VAR:-default}, ${VAR-default}, ${VAR:?error},
# ${VAR:+other}, $VAR; $$ is a dollar sign
_COMPOSE_VARIABLE: Final = re.compile(
    r"\$(?:(?P<dollar>\$)|(?P<bare>[A-Za-z_][A-Za-z0-9_]*)"
    r"|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?:(?P<operator>:?[-+?])(?P<other>[^{}$]*))?\})"
)

_Found: TypeAlias = Iterator[tuple[str, str]]
"""(path to an image in its document, its name as it is written)."""


@dataclass(slots=True)
class ImageList:
    """The images of one or more lists, each once, in the order of the lists."""

    images: dict[ImageName, str] = field(default_factory=dict)
    """Image -> where it was first named, such as ``deploy.yaml: spec.containers[0]``."""
    problems: list[str] = field(default_factory=list)
    """The lists and names that could not be read, each in one line that names the file."""

    def add(self, text: str, where: str) -> None:
        """Add the image that ``text`` names, or a problem."""
        name = text.strip()
        shown = f"'{printable(name, _MAX_SHOWN_CHARS)}'"
        if "{{" in name:
            remedy = "is a template: pass what `helm template` prints"
            self.problems.append(f"{where}: {shown} {remedy}")
            return
        try:
            self.images.setdefault(ImageName.parse(name).with_default_tag(), where)
        except InvalidRequest as error:
            self.problems.append(f"{where}: {shown} is no image name: {error.message}")


# --- plain lists ----------------------------------------------------------------------------------


def add_lines(found: ImageList, text: str, source: str) -> None:
    """Add the images of a list with one name a line. ``#`` begins a comment.

    Args:
        found: Gets the images and the problems.
        text: The list.
        source: Name of the file, for messages.
    """
    for number, line in enumerate(text.splitlines(), 1):
        name = line.partition("#")[0].strip()
        if name:
            found.add(name, f"{source}:{number}")


# --- files with manifests -------------------------------------------------------------------------


def find_files(directory: Path, found: ImageList) -> list[Path]:
    """Return the YAML and JSON files below a directory, in order. A file is returned as it is.

    Directories whose name begins with a dot are left out, as are links to directories. Adds a
    problem for a directory that cannot be read, and for files after the first :data:`MAX_FILES`.
    """
    if not directory.is_dir():
        return [directory]

    def on_error(error: OSError) -> None:
        found.problems.append(f"{error.filename}: {error.strerror}")

    files: list[Path] = []
    for root, directories, names in os.walk(directory, onerror=on_error):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        paths = [Path(root, name) for name in sorted(names) if Path(name).suffix in _SUFFIXES]
        # A pipe would be waited for. A link that leads nowhere is a problem once it is read.
        files += [path for path in paths if path.is_file() or not path.exists()]
        if len(files) > MAX_FILES:
            found.problems.append(f"{directory}: has more than {MAX_FILES} files")
            return files[:MAX_FILES]
    if not files:
        found.problems.append(f"{directory}: has no .yaml, .yml or .json file")
    return files


def read_text(path: Path) -> str:
    """Read a file. Raises ``OSError``, or ``ValueError`` if it is too large or not UTF-8."""
    with path.open("rb") as file:
        return decode(file.read(MAX_MANIFESTS_BYTES + 1))


def decode(raw: bytes) -> str:
    """Decode the bytes of a file. Raises ``ValueError`` if they are too many or not UTF-8."""
    if len(raw) > MAX_MANIFESTS_BYTES:
        raise ValueError(f"larger than {MAX_MANIFESTS_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def add_file(found: ImageList, path: Path, environ: Mapping[str, str]) -> None:
    """Add the images of a file with manifests, or a problem.

    Args:
        found: Gets the images and the problems.
        path: The file.
        environ: Variables that a Compose file may use.
    """
    try:
        text = read_text(path)
    except OSError as error:
        found.problems.append(f"{path}: {error.strerror or error}")
    except ValueError as error:
        found.problems.append(f"{path}: {error}")
    else:
        add_documents(found, text, str(path), environ)


def add_documents(found: ImageList, text: str, source: str, environ: Mapping[str, str]) -> None:
    """Add the images that the YAML documents of a text name. Other documents are passed over.

    A file that breaks off counts up to there.

    Args:
        found: Gets the images and the problems.
        text: One or more YAML documents, or JSON.
        source: Name of the file, for messages.
        environ: Variables that a Compose file may use.
    """
    number = 0
    try:
        for number, document in enumerate(read_documents(text), 1):
            where = source if number == 1 else f"{source}: document {number}"
            for path, image in images_in(document, found, where, environ):
                found.add(image, f"{where}: {path}")
    except DocumentsRefused as error:
        hint = ": is it a template? pass what `helm template` prints" if "{{" in text else ""
        reason = printable(str(error), _MAX_SHOWN_CHARS)
        found.problems.append(f"{source}:{error.line}: {reason}{hint}")


def images_in(document: Value, found: ImageList, where: str, environ: Mapping[str, str]) -> _Found:
    """Return the images of one document. ``found`` gets its problems, which ``where`` names."""
    match document:
        case {"apiVersion": str(), "kind": str()} | list():
            for path, image in _images_of_object(document, "", 0):
                if isinstance(image, str):
                    yield path, image
                else:
                    problem = "is no text: is it a template? pass what `helm template` prints"
                    found.problems.append(f"{where}: {path} {problem}")
        case {"services": dict(services)}:
            yield from _images_of_services(services, found, where, environ)


def _images_of_object(value: object, path: str, depth: int) -> Iterator[tuple[str, object]]:
    """Return the images of a Kubernetes object, of a List, or of a list of objects."""
    items, below = (value, path) if isinstance(value, list) else (_get(value, "items"), "items")
    if isinstance(items, list) and depth < MAX_DEPTH:
        prefix = f"{path}.{below}" if path and below != path else below
        for number, item in enumerate(items):
            yield from _images_of_object(item, f"{prefix}[{number}]", depth + 1)
        return
    for keys in _POD_SPECS:
        spec: object = value
        for key in keys:
            spec = _get(spec, key)
        if isinstance(spec, dict) and isinstance(spec.get("containers"), list):
            place = ".".join((path, *keys) if path else keys)
            yield from _images_of_pod(spec, place)


def _images_of_pod(spec: dict[str, Any], place: str) -> Iterator[tuple[str, object]]:
    for key in _CONTAINERS:
        for number, container in _entries(spec.get(key)):
            if "image" in container:
                yield f"{place}.{key}[{number}].image", container["image"]
    for number, volume in _entries(spec.get("volumes")):
        # An image volume (Kubernetes 1.31): the image is mounted, and not run.
        reference = _get(volume.get("image"), "reference")
        if reference is not None:
            yield f"{place}.volumes[{number}].image.reference", reference


def _images_of_services(
    services: dict[str, Any], found: ImageList, where: str, environ: Mapping[str, str]
) -> _Found:
    """Return the images of Compose services. A service that is built here needs none."""
    for name, service in services.items():
        image = _get(service, "image")
        if not isinstance(image, str) or _get(service, "build") is not None:
            continue
        place = f"services.{printable(name, _MAX_SHOWN_CHARS)}.image"
        try:
            yield place, _interpolate(image, environ)
        except ValueError as error:
            found.problems.append(f"{where}: {place}: {error}")


def _interpolate(text: str, environ: Mapping[str, str]) -> str:
    """Replace the variables of a Compose file. Raises ``ValueError`` for one that is not set."""

    def replace(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        name, operator = match["bare"] or match["name"], match["operator"] or ""
        value, other = environ.get(name), match["other"] or ""
        is_set = bool(value) if operator.startswith(":") else value is not None
        if operator.endswith("+"):
            return other if is_set else ""
        if is_set and value is not None:
            return value
        if operator.endswith("-"):
            return other
        raise ValueError(f"the variable {name} is not set")

    return _COMPOSE_VARIABLE.sub(replace, text)


def _get(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, dict) else None


def _entries(value: object) -> Iterable[tuple[int, dict[str, Any]]]:
    """Return (number, mapping) of the mappings in a list."""
    entries = value if isinstance(value, list) else []
    return ((number, one) for number, one in enumerate(entries) if isinstance(one, dict))
