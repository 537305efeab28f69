"""Names of images with the beginning of a digest, such as ``nginx@sha256:4bcff63911fc``.

Lives here: the argument, and which digest it means. Must not know: the commands, how names are
kept.

The digests of a repository are looked up by indexes of their databases: in a directory with 100,000
contents it takes a millisecond.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mirror.cli.arguments import image_name
from mirror.cli.data_directory import find_layout
from mirror.cli.output import CommandFailed
from mirror.config.settings import Settings
from mirror.oci.errors import InvalidRequest
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Repository
from mirror.store.layout import Layout

_SHORT: Final = re.compile(
    r"(?P<name>[^@]+)@(?P<digest>(?:sha256:[0-9a-f]{4,63}|sha512:[0-9a-f]{4,127}))"
)
_MAX_NAMED: Final = 3
"""Digests that an error names."""


@dataclass(frozen=True, slots=True)
class ShortName:
    """A repository, and at least 4 digits of a digest that it has."""

    repository: Repository
    digest: str
    """The beginning, with the algorithm."""


def image_or_short_name(text: str) -> ImageName | ShortName:
    """Parse an image name whose digest may be short: the ``type`` of an argument.

    Raises ``argparse.ArgumentTypeError``, which argparse reports as wrong usage.
    """
    try:
        return parse_short_name(text) or image_name(text)
    except InvalidRequest:
        return image_name(text)  # It says what is wrong.


def parse_short_name(text: str) -> ShortName | None:
    """Parse a name with the beginning of a digest. None: it has a whole one, or none.

    Raises ``InvalidRequest``.
    """
    match = _SHORT.fullmatch(text)
    if match is None:
        return None
    return ShortName(ImageName.parse(match["name"]).repository, match["digest"])


def whole_names(names: Iterable[ImageName | ShortName], settings: Settings) -> list[ImageName]:
    """Return the names with whole digests.

    Raises:
        CommandFailed: A short digest is the beginning of none, or of several. Or there is no data
            directory.
        StorageUnavailable: The names in the data directory cannot be read.
    """
    return [_whole(one, settings) if isinstance(one, ShortName) else one for one in names]


def _whole(name: ShortName, settings: Settings) -> ImageName:
    found = sorted(_find_digests(find_layout(settings), name))
    if len(found) == 1:
        return ImageName(name.repository, Digest.parse(found[0]))
    short = f"{name.repository}@{name.digest}"
    if not found:
        raise CommandFailed(
            f"no manifest of {name.repository} has a digest that begins with {name.digest}:"
            " `oci-mirror ls --all --no-trunc` prints them whole"
        )
    named = ", ".join(found[:_MAX_NAMED]) + (", and others" if len(found) > _MAX_NAMED else "")
    raise CommandFailed(f"{short} is the beginning of {named}: write more of its digits")


def _find_digests(layout: Layout, name: ShortName) -> set[str]:
    from mirror.inventory.hosted_names import read_manifests_beginning
    from mirror.store.saved_rows import read_keys_beginning

    prefix = f"{name.repository}@"
    keys = read_keys_beginning(layout, f"{prefix}{name.digest}")
    hosted = read_manifests_beginning(layout, name.repository, name.digest)
    return {key.removeprefix(prefix) for key in keys} | set(hosted)
