"""YAML files that others wrote, read with bounds: Kubernetes objects, Compose files, charts.

Lives here: the documents of a file as plain values, and what is refused. Must not know: what the
documents mean.

A scalar stays text, as it is written. No tag is interpreted and no object is made, so a file cannot
run anything. An alias counts with all values below it each time that it is used, which stops a
"billion laughs", also for whoever walks through the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import yaml

MAX_MANIFESTS_BYTES: Final = 16 * 1024 * 1024
"""Bytes of one file: the output of ``helm template`` for a whole cluster has 5 MiB."""
MAX_VALUES: Final = 1_000_000
"""Values of one file: those of such an output, three times. They are read in 3 s."""
MAX_DEPTH: Final = 100
"""Nested mappings and lists. The schema in a custom resource definition has up to 60."""

Value: TypeAlias = "str | list[Any] | dict[str, Any]"
"""Text, a list of values, or a mapping of text to values."""

_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The parser in C if PyYAML has it: it is ten times as fast."""


class DocumentsRefused(ValueError):
    """A file is no YAML, or exceeds a bound. ``line``: where, from 1 on."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def read_documents(text: str) -> Iterator[Value]:
    """Return the documents of a file, one after the other, as far as it can be read.

    Raises :class:`DocumentsRefused` where it cannot, after all documents before that.
    """
    builder = _DocumentBuilder()
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            document = builder.add(event)
            if document is not None:
                yield document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise DocumentsRefused(line, f"not YAML: {error.problem or 'cannot be read'}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DocumentsRefused(line, "not YAML: a character that is not allowed") from None
    except RecursionError:
        raise DocumentsRefused(1, "nested too deeply") from None


# YAML 1.2, section 10.2.1.1.
_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})


@dataclass(slots=True)
class _Frame:
    """A mapping or list whose end has not come."""

    value: list[Any] | dict[str, Any]
    anchor: str | None
    key: str | None = None
    """Key of a mapping whose value comes next. None: a key comes next."""
    is_skipped: bool = False
    """Whether the key that comes next has a key that is no text: its value is dropped."""
    merged: list[dict[str, Any]] = field(default_factory=list)
    """Mappings of ``<<``, whose keys the mapping has where it does not set them itself."""
    weight: int = 1
    """Values in it so far, with those below an alias as often as they are used."""


class _DocumentBuilder:
    """Builds the values of documents from the events of the parser."""

    def __init__(self) -> None:
        self._stack: list[_Frame] = []
        self._anchors: dict[str, tuple[Value, int]] = {}
        """Anchor -> (value, weight), of values that are complete."""
        self._total = 0

    def add(self, event: yaml.Event) -> Value | None:
        """Take the next event. Returns a document once it is complete, unless it is empty."""
        match event:
            case yaml.ScalarEvent():
                self._count(event, 1)
                return self._put(event.value, 1, event.anchor, is_plain=not event.style)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                if len(self._stack) >= MAX_DEPTH:
                    raise _refused(event, f"nested more than {MAX_DEPTH} levels deep")
                self._count(event, 1)
                is_list = isinstance(event, yaml.SequenceStartEvent)
                self._stack.append(_Frame([] if is_list else {}, event.anchor))
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                frame = self._stack.pop()
                if frame.merged:
                    frame.value = _merge(frame)
                return self._put(frame.value, frame.weight, frame.anchor)
            case yaml.AliasEvent():
                found = self._anchors.get(str(event.anchor))
                if found is None:
                    raise _refused(event, "an alias of nothing, or of a value that it is part of")
                value, weight = found
                self._count(event, weight)
                return self._put(value, weight, None)
            case yaml.DocumentStartEvent():
                self._anchors.clear()
        return None

    def _count(self, event: yaml.Event, weight: int) -> None:
        self._total += weight
        if self._total > MAX_VALUES:
            raise _refused(event, f"more than {MAX_VALUES} values, with each use of an alias")

    def _put(
        self, value: Value, weight: int, anchor: str | None, *, is_plain: bool = False
    ) -> Value | None:
        """Put a complete value where it belongs. Returns it if it is a whole document."""
        if anchor is not None:
            self._anchors[anchor] = value, weight
        is_null = is_plain and value in _NULLS
        if not self._stack:
            return None if is_null else value
        frame = self._stack[-1]
        if is_null and (isinstance(frame.value, list) or frame.key is not None):
            value = ""  # Not the text, which could be the name of an image.
        frame.weight += weight
        if isinstance(frame.value, list):
            frame.value.append(value)
        elif frame.is_skipped:
            frame.is_skipped = False
        elif frame.key is None:
            frame.is_skipped = not isinstance(value, str)
            frame.key = value if isinstance(value, str) else None
        else:
            _set(frame, frame.key, value)
            frame.key = None
        return None


def _set(frame: _Frame, key: str, value: Value) -> None:
    assert isinstance(frame.value, dict)
    if key == "<<":
        parts = value if isinstance(value, list) else [value]
        # The first mapping of a list wins over those after it.
        frame.merged += [part for part in parts if isinstance(part, dict)]
    else:
        frame.value[key] = value


def _merge(frame: _Frame) -> dict[str, Any]:
    """Return a mapping with the keys of those that it merges."""
    assert isinstance(frame.value, dict)
    merged: dict[str, Any] = {}
    for mapping in (*reversed(frame.merged), frame.value):
        merged.update(mapping)
    return merged


def _refused(event: yaml.Event, reason: str) -> DocumentsRefused:
    mark = event.start_mark
    return DocumentsRefused(mark.line + 1 if mark is not None else 1, reason)
