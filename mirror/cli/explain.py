"""``explain``: say what happened to the last pulls, and why they took their time.

Lives here: the arguments and the lines. Must not know: how a pull is explained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from mirror.cli.arguments import Commands, add_config, add_json, load_settings
from mirror.cli.data_directory import find_layout, layout_of
from mirror.cli.inventory import add_no_trunc
from mirror.cli.listing import print_text
from mirror.cli.output import UsageError, print_line, print_note
from mirror.cli.short_digests import parse_short_name, whole_names
from mirror.observability.events import Kind, Outcome
from mirror.oci.errors import InvalidRequest
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Repository, Tag, is_digest
from mirror.oci.text import printable, size_text, time_text

if TYPE_CHECKING:
    from mirror.config.settings import Settings
    from mirror.history.client_pulls import ClientPull
    from mirror.history.queries import HistoryReader
    from mirror.history.stored_pull import StoredPull
    from mirror.store.layout import Layout

_DEFAULT_LAST: Final = 10
"""Pulls without ``--last``: a few more than a screen has."""
_REQUESTS_OF_PULL: Final = 20
"""Requests that are read for each pull: most images have fewer layers."""
_MAX_TAGS: Final = 5
"""Tags of a sentence: a base layer may be in hundreds of images."""
_DELAY: Final = "a request is in it a second after its end"
_MAX_SENTENCE_CHARS: Final = 2000
"""Characters of a line: the text of an error may be long."""


def add_parser(commands: Commands) -> None:
    """Add the parser of ``explain``."""
    parser = commands.add_parser(
        "explain",
        help="say what happened to the last pulls, and why they took their time",
        description="Explains the last pulls of an image, or one request by its id (the "
        "X-Request-Id of its response, id in the log), newest first. The requests of one client "
        "for one image are shown together. Without IMAGE and ID: of all images. Fast hits are "
        "kept as examples only. With --user: what a user may do with a repository.",
    )
    add_config(parser)
    add_json(parser)
    parser.add_argument(
        "subject", metavar="IMAGE|ID", nargs="?", default="", help="image, digest, or request id"
    )
    add_no_trunc(parser)
    parser.add_argument(
        "--client",
        metavar="ADDRESS",
        type=_address,
        help="only of this address or network",
    )
    parser.add_argument(
        "--requests",
        dest="by_request",
        action="store_true",
        help="explain each request by itself, in place of each pull",
    )
    parser.add_argument(
        "--outcome",
        dest="outcomes",
        action="append",
        default=[],
        choices=[outcome.value for outcome in Outcome],
        help="only with this outcome; may be repeated",
    )
    parser.add_argument(
        "--last",
        metavar="N",
        type=int,
        default=_DEFAULT_LAST,
        help=f"number of pulls; of requests with --requests or --json (default: {_DEFAULT_LAST})",
    )
    parser.add_argument(
        "--user",
        metavar="NAME",
        help="say instead what this user may do with the repository of IMAGE, and which rule says "
        "so; anonymous: a client that has not logged in",
    )
    parser.add_argument(
        "--group",
        dest="groups",
        action="append",
        default=[],
        metavar="NAME",
        help="with --user: a group that its token names; may be repeated",
    )
    parser.add_argument(
        "--may",
        choices=("pull", "push", "delete", "admin"),
        help="with --user: only this; the exit code is 1 if the answer is no",
    )
    parser.set_defaults(run=run)


def _address(text: str) -> str:
    import ipaddress

    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no address and no network") from None
    return text


def run(arguments: argparse.Namespace) -> int:
    """Run ``explain``. Returns the exit code."""
    from mirror.history.queries import open_history

    if arguments.last < 1:
        raise UsageError("--last must be at least 1")
    settings = load_settings(arguments)
    if arguments.user is not None:
        from mirror.cli.explain_access import explain_access

        return explain_access(arguments, settings)
    if arguments.groups or arguments.may:
        raise UsageError("--group and --may need --user")
    sentences = partial(_sentences, settings)
    by_request = arguments.is_json or arguments.by_request
    number = arguments.last * (1 if by_request else _REQUESTS_OF_PULL)
    with open_history(find_layout(settings)) as history:
        pulls = _find_pulls(history, arguments, settings, number)
        begin = None if pulls else history.begin()
    # The rows of several processes are a second apart.
    pulls.sort(key=lambda pull: pull.at, reverse=True)
    if arguments.is_json:
        for pull in pulls:
            row = {"time": time_text(pull.at), "sentences": sentences(pull), **pull.to_json()}
            print_line(json.dumps(row))
        return 0
    from mirror.history.client_pulls import ClientPull, group_requests

    groups = [ClientPull([one]) for one in pulls] if by_request else group_requests(pulls)
    for number, group in enumerate(groups[: arguments.last]):
        if number:
            print_line("")
        _print_pull(group, sentences, is_whole=arguments.is_whole)
    if not pulls:
        print_note(_nothing_found(arguments, begin))
    return 0


def _nothing_found(arguments: argparse.Namespace, begin: float | None) -> str:
    if begin is None:
        return f"the history is empty: it begins with the first request to a server; {_DELAY}"
    name: str = arguments.subject
    with suppress(InvalidRequest):
        name = str(ImageName.parse(name))
    about = f" for {name}" if name else ""
    return f"no such request{about} in the history, which begins at {time_text(begin)}; {_DELAY}"


def _print_pull(
    pull: ClientPull, sentences: Callable[[StoredPull], list[str]], *, is_whole: bool
) -> None:
    """Print a pull: its requests, and why the slowest one took its time."""
    requests, slowest = pull.requests, pull.slowest
    if len(requests) == 1:
        _print(_headline(slowest), is_whole=is_whole)
        _print_sentences(sentences(slowest), margin="  ", is_whole=is_whole)
        return
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in pull.outcomes.items())
    size = size_text(sum(map(_size, requests)))
    _print(
        f"{time_text(pull.begin)} {_asker(slowest)} {pull.name}: {size} in "
        f"{pull.end - pull.begin:.3f} s, {len(requests)} requests ({outcomes})",
        is_whole=is_whole,
    )
    for one in requests:
        what = f"{one.kind} {one.reference}"
        line = f"  {one.duration:9.3f} s  {one.outcome:<11}  {size_text(_size(one)):>8}  {what}"
        _print(line, is_whole=is_whole)
    _print(f"  Slowest: {slowest.kind} {slowest.reference} (id {slowest.request_id})", is_whole)
    _print_sentences(sentences(slowest), margin="    ", is_whole=is_whole)


def _sentences(settings: Settings, request: StoredPull) -> list[str]:
    """Explain a request. Of hosted content, also say which tags need it now."""
    from mirror.history.sentences import explain

    sentences = explain(request)
    hosted = settings.hosted
    digest = request.digest or request.reference
    if hosted is not None and request.upstream == hosted.name and is_digest(digest):
        sentences.append(_hosted_sentence(layout_of(settings), request, digest))
    return sentences


def _hosted_sentence(layout: Layout, request: StoredPull, digest: str) -> str:
    from mirror.inventory.hosted_names import read_tags_above

    repository = Repository(request.upstream, request.repository)
    tags = read_tags_above(layout, repository, digest, _MAX_TAGS + 1)
    if tags is None:
        return f"Hosted: {repository} does not have it now: it was deleted, or never pushed there."
    if not tags:
        return f"Hosted: {repository} has it, and no tag names it now."
    more = ", and more" if len(tags) > _MAX_TAGS else ""
    noun = "tag" if len(tags) == 1 else "tags"
    return f"Hosted: {repository} has it, by the {noun} {', '.join(tags[:_MAX_TAGS])}{more}."


def _print_sentences(sentences: Iterable[str], margin: str, *, is_whole: bool) -> None:
    for sentence in sentences:
        _print(f"{margin}{sentence}", is_whole=is_whole)


def _print(text: str, is_whole: bool) -> None:
    print_text(printable(text, _MAX_SENTENCE_CHARS), indent=4, is_whole=is_whole)


def _find_pulls(
    history: HistoryReader, arguments: argparse.Namespace, settings: Settings, number: int
) -> list[StoredPull]:
    subject: str = arguments.subject
    filters: dict[str, Any] = {
        "last": number,
        "client": arguments.client or "",
        "outcomes": [Outcome(name) for name in arguments.outcomes],
    }
    if not subject:
        return history.pulls(**filters)
    by_id = history.pulls(request_id=subject, **filters)
    if by_id:
        return by_id
    try:
        if ":" in subject and "/" not in subject and "@" not in subject:
            return history.pulls(digest=str(Digest.parse(subject)), **filters)
    except InvalidRequest:
        pass  # It is ``image:tag``.
    try:
        (name,) = whole_names([parse_short_name(subject) or ImageName.parse(subject)], settings)
    except InvalidRequest as error:
        raise UsageError(
            f"'{subject}' is no image name, and no known id: {error.message}"
        ) from None
    match name.reference:
        case Tag():
            filters["tag"] = name.reference.name
        case Digest():
            filters["digest"] = str(name.reference)
    return history.pulls(repository=name.repository, **filters)


def _headline(pull: StoredPull) -> str:
    size = f"{size_text(_size(pull))} in " if _size(pull) else ""
    status = "" if pull.command else f" {pull.status or 'no response'}"
    # A path that names no image of a configured registry.
    kind = "" if pull.kind == Kind.INVALID.value else f"{pull.kind} "
    return (
        f"{time_text(pull.at)} {_asker(pull)} {pull.outcome}{status} {pull.method} {kind}"
        f"{pull.name}: {size}{pull.duration:.3f} s (id {pull.request_id})"
    )


def _asker(pull: StoredPull) -> str:
    return f"`oci-mirror {pull.command}`" if pull.command else pull.client or "-"


def _size(pull: StoredPull) -> int:
    """Return the bytes that a client got, or that a command has fetched."""
    return pull.fetched_bytes if pull.command else pull.bytes_sent
