"""The names of images, as the index has them.

Lives here: from the rows of the index to one name after another. Must not know: which content is on
disk, databases.

Tag records are read here without :func:`mirror.store.records.load_tag`, and all at once: 10,000
take half as long. The rule is the same: a malformed record is a missing record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import Any, NamedTuple

from mirror.inventory.model import DigestText
from mirror.inventory.name import Name
from mirror.oci.errors import InvalidRequest
from mirror.oci.image_name import parse_with_reference
from mirror.oci.reference import Digest, Repository, Tag, is_digest
from mirror.store.records import MALFORMED, NamedManifest, load_access_record, repository_of


class TagName(NamedTuple):
    """A tag in the index. A tuple: there are 10,000 of them."""

    repository: Repository
    tag: Tag
    digests: Mapping[DigestText, object]
    """The current digest, and the earlier ones, newest first -> when it was first seen, in seconds
    since the epoch. Anything else: not known."""
    variant: str = ""
    """See :attr:`mirror.inventory.model.Image.variant`."""
    checked: float | None = None
    """When the upstream last confirmed it, in seconds since the epoch. None: never."""

    def served_of(self, frozen: Sequence[DigestText]) -> DigestText:
        """Return the one of the digests of a frozen tag that the clients of this row get."""
        return next((one for one in frozen if one in self.digests), frozen[0])


@dataclass(frozen=True, slots=True)
class Names:
    """All names in the index."""

    tags: list[TagName]
    manifests: dict[str, str]
    """``repository@digest`` of each manifest that was pulled -> the text of its access record."""

    def images(
        self,
        present: Container[DigestText],
        frozen: Mapping[str, Sequence[DigestText]] | None = None,
    ) -> list[Name]:
        """Return the names whose manifest is on disk, each once.

        A variant of a tag (see :attr:`mirror.inventory.model.Image.variant`) is a name of its own
        if its manifest is another one. ``frozen``: the digests that clients get of frozen tags, by
        the name of the tag.
        """
        found: dict[str, Name] = {}
        tagged: set[str] = set()
        for row in sorted(self.tags, key=attrgetter("variant")):  # Variants come last.
            repository, tag = row.repository, row.tag
            name = f"{repository.upstream}/{repository.path}"
            served = frozen.get(f"{name}:{tag}") if frozen else None
            digests = row.digests if served is None else (row.served_of(served),)
            text = next((one for one in digests if one in present), None)
            if text is None:
                continue
            key = f"{name}:{tag.name}@{text}"
            if key not in found:
                latest = next(iter(row.digests))
                if latest != text and not is_digest(latest):
                    continue
                found[key] = Name(
                    repository=repository,
                    tag=tag,
                    root=text,
                    current_root=latest,
                    variant=row.variant,
                    checked=row.checked,
                    first_seen=_time(row.digests.get(text)),
                )
                tagged.add(f"{name}@{text}")
        first_seen = self._first_seen()
        for key in self.manifests:
            name, _, text = key.partition("@")
            if text in present and key not in tagged:
                untagged = repository_of(name)
                if untagged is not None:
                    found[key] = Name(
                        untagged,
                        tag=None,
                        root=text,
                        current_root=text,
                        first_seen=_time(first_seen.get(key)),
                    )
        return list(found.values())

    def absent(
        self,
        present: Container[DigestText],
        frozen: Mapping[str, Sequence[DigestText]],
        marked: Mapping[str, Digest],
        wanted: Container[DigestText],
    ) -> list[Name]:
        """Return the names none of whose manifests is on disk.

        Args:
            present: The content on disk.
            frozen: As for :meth:`images`.
            marked: Names of pins and freezes -> their digests. They are returned also if the index
                does not have them.
            wanted: Digests that are returned although no tag has them. Others that are gone are
                as many as were ever evicted.
        """
        found: dict[str, Name] = {}
        for row in sorted(self.tags, key=attrgetter("variant")):
            name = f"{row.repository.upstream}/{row.repository.path}:{row.tag.name}"
            served = frozen.get(name)
            digests = row.digests if served is None else (row.served_of(served),)
            latest = next(iter(row.digests))
            root = next(iter(digests))
            if is_digest(root) and is_digest(latest) and not any(one in present for one in digests):
                new = Name(
                    row.repository,
                    row.tag,
                    root,
                    latest,
                    variant=row.variant,
                    checked=row.checked,
                )
                found.setdefault(f"{name}@{root}", new)
        tagged = {f"{one.repository}@{one.root}" for one in found.values()}
        names = {one.text for one in found.values()} | {
            f"{row.repository}:{row.tag}" for row in self.tags if marked
        }
        for key in self.manifests:
            name, _, text = key.partition("@")
            if text in wanted and text not in present and key not in tagged:
                repository = repository_of(name)
                if repository is not None:
                    found[key] = Name(repository, tag=None, root=text, current_root=text)
        for name, digest in marked.items():
            root = str(digest)
            if root not in present and name not in names and name not in found:
                with suppress(InvalidRequest):
                    repository, reference = parse_with_reference(name)
                    tag = reference if isinstance(reference, Tag) else None
                    found[name] = Name(repository, tag, root, root, is_recorded=False)
        return list(found.values())

    def _first_seen(self) -> dict[str, object]:
        """Return when the digests that tags had earlier were first seen, by repository@digest."""
        return {
            f"{row.repository}@{text}": at
            for row in self.tags
            for text, at in islice(row.digests.items(), 1, None)
        }

    def media_type(self, name: Name) -> str:
        """Return the media type that a source has stated for a manifest. Empty: none has."""
        record = load_access_record(self.manifests.get(f"{name.repository}@{name.root}"))
        return "" if record is None else record.media_type

    def add_saved(self, saved: Iterable[NamedManifest]) -> None:
        """Add the names in ``index.json`` that the index lacks, as the next server does."""
        known = {f"{row.repository}:{row.tag}{row.variant}" for row in self.tags}
        for named in saved:
            digest = str(named.digest)
            self.manifests.setdefault(f"{named.repository}@{digest}", "")
            if named.tag is not None and f"{named.name}{named.variant}" not in known:
                tag = TagName(named.repository, named.tag, {digest: None}, named.variant)
                self.tags.append(tag)


def parse_names(rows: Iterable[tuple[str, str]]) -> Names:
    """Return the names in (key, text) rows of the index. Malformed rows are passed over."""
    names = Names([], {})
    tags: list[tuple[str, str]] = []
    for key, text in rows:
        if "@" in key:
            names.manifests[key] = text
        elif ":" in key:  # Other keys, such as that of the pins, are about no content.
            tags.append((key, text))
    repositories: dict[tuple[str, str], Repository] = {}
    for (key, _), document in zip(tags, _parse_all([text for _, text in tags]), strict=True):
        with suppress(*MALFORMED):
            names.tags.append(_to_tag(key, document, repositories))
    return names


def _parse_all(texts: list[str]) -> list[Any]:
    """Parse JSON texts. One that is malformed is None."""
    try:
        documents: list[Any] = json.loads(f"[{','.join(texts)}]")
    except MALFORMED:
        documents = []
    return documents if len(documents) == len(texts) else list(_parse_each(texts))


def _parse_each(texts: Iterable[str]) -> Iterator[Any]:
    for text in texts:
        try:
            yield json.loads(text)
        except MALFORMED:
            yield None


def _to_tag(key: str, document: Any, repositories: dict[tuple[str, str], Repository]) -> TagName:
    """Return a tag record as a name. Raises ``MALFORMED``."""
    place = document["upstream"], document["repository"]
    repository = repositories.get(place)
    if repository is None:
        repository = repositories[place] = Repository.parse(*place)
    tag, checked = Tag.parse(document["tag"]), document["confirmed"]
    if type(checked) not in (int, float) or not math.isfinite(checked):
        raise ValueError("not a time")
    digests: dict[DigestText, object] = {document["digest"]: document.get("first_seen")}
    for text, first_seen, *_ in document["ledger"]:
        digests.setdefault(text, first_seen)
    variant = key.removeprefix(f"{repository.upstream}/{repository.path}:{tag.name}")
    # A restored record has the time zero: the upstream has not confirmed it since.
    return TagName(repository, tag, digests, variant=variant, checked=checked or None)


def _time(value: object) -> float:
    """Return a time of a record. Zero if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return 0.0
    return float(value)
