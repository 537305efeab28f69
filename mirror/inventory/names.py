"""The names of images, as the index has them.

Lives here: from the rows of the index to one name after another. Must not know: which content is on
disk, databases.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from mirror.inventory.model import DigestText
from mirror.oci.errors import InvalidRequest
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.records import NamedManifest, load_access_record, load_tag, repository_of


@dataclass(frozen=True, slots=True)
class TagName:
    """A tag in the index."""

    repository: Repository
    tag: Tag
    digests: Mapping[Digest, float]
    """The current digest, and the earlier ones, newest first -> when it was first seen, in seconds
    since the epoch. Zero: not known."""
    variant: str = ""
    """See :attr:`mirror.inventory.model.Image.variant`."""
    checked: float | None = None
    """When the upstream last confirmed it, in seconds since the epoch. None: never."""


@dataclass(frozen=True, slots=True)
class Name:
    """A name whose manifest is on disk."""

    repository: Repository
    tag: Tag | None
    """None: a digest that was pulled, and that no tag of the repository has now."""
    digest: Digest
    """The newest manifest of it on disk."""
    current: Digest
    """The manifest that the upstream has named last."""
    variant: str = ""
    """See :attr:`mirror.inventory.model.Image.variant`."""
    checked: float | None = None
    """When the upstream last confirmed it, in seconds since the epoch. None: never."""
    first_seen: float = 0.0
    """When the digest was first seen under a tag, in seconds since the epoch. Zero: not known."""

    @property
    def text(self) -> str:
        """The image reference, as in :attr:`mirror.inventory.model.Image.name`."""
        if self.tag is None:
            return f"{self.repository}@{self.digest}"
        return f"{self.repository}:{self.tag}"


@dataclass(frozen=True, slots=True)
class Names:
    """All names in the index."""

    tags: list[TagName]
    manifests: dict[str, tuple[Repository, Digest, str]]
    """``repository@digest`` -> that, and the text of its access record."""

    def images(self, present: Container[DigestText]) -> list[Name]:
        """Return the names whose manifest is on disk, each once.

        A variant of a tag (see :attr:`mirror.inventory.model.Image.variant`) is a name of its own
        if its manifest is another one.
        """
        found: dict[tuple[Repository, Tag | None, Digest], Name] = {}
        for row in sorted(self.tags, key=lambda row: row.variant):  # Variants come last.
            digest = next((one for one in row.digests if str(one) in present), None)
            if digest is not None:
                name = Name(
                    row.repository,
                    row.tag,
                    digest,
                    current=next(iter(row.digests)),
                    variant=row.variant,
                    checked=row.checked,
                    first_seen=row.digests[digest],
                )
                found.setdefault((row.repository, row.tag, digest), name)
        tagged = {f"{repository}@{digest}" for repository, _, digest in found}
        seen = self._first_seen()
        for key, (repository, digest, _) in self.manifests.items():
            if str(digest) in present and key not in tagged:
                at = seen.get((repository, digest), 0.0)
                found[repository, None, digest] = Name(
                    repository, None, digest, digest, first_seen=at
                )
        return list(found.values())

    def _first_seen(self) -> dict[tuple[Repository, Digest], float]:
        """Return when the digests that tags had earlier were first seen."""
        return {
            (row.repository, digest): at
            for row in self.tags
            for digest, at in islice(row.digests.items(), 1, None)
        }

    def media_type(self, name: Name) -> str:
        """Return the media type that a source has stated for a manifest. Empty: none has."""
        row = self.manifests.get(f"{name.repository}@{name.digest}")
        record = load_access_record(row[2]) if row is not None else None
        return "" if record is None else record.media_type


def load_names(rows: Iterable[tuple[str, str]]) -> Names:
    """Return the names in (key, text) rows of the index. Malformed rows are passed over."""
    names = Names([], {})
    repositories: dict[str, Repository | None] = {}
    for key, text in rows:
        name, separator, digest = key.partition("@")
        if not separator:
            names.tags.extend(_load_tag(key, text))
            continue
        if name not in repositories:
            repositories[name] = repository_of(name)
        repository = repositories[name]
        if repository is not None:
            try:
                names.manifests[key] = repository, Digest.parse(digest), text
            except InvalidRequest:
                continue
    return names


def _load_tag(key: str, text: str) -> Iterator[TagName]:
    record = load_tag(text)
    if record is not None:
        variant = key.removeprefix(f"{record.repository}:{record.tag}")
        # A restored record has no time, so the upstream has not confirmed it since.
        checked = record.confirmed or None
        digests = {record.digest: record.first_seen}
        for previous in record.previous_digests:
            digests.setdefault(previous.digest, previous.first_seen)
        yield TagName(record.repository, record.tag, digests, variant, checked)


def saved_names(saved: Iterable[NamedManifest]) -> Names:
    """Return the names in ``index.json``, from which the next server restores a lost index."""
    names = Names([], {})
    for named in saved:
        key = f"{named.repository}@{named.digest}"
        names.manifests.setdefault(key, (named.repository, named.digest, ""))
        if named.tag is not None:
            names.tags.append(
                TagName(named.repository, named.tag, {named.digest: 0.0}, named.variant)
            )
    return names
