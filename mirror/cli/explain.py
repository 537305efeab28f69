"""``explain``: say what happened to the last pulls, and why they took their time.

Lives here: the arguments and the lines. Must not know: how a pull is explained.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, Final

from mirror.cli.arguments import Commands, add_config, add_json, load_settings
from mirror.cli.data_directory import find_layout
from mirror.cli.output import UsageError, print_line, print_note
from mirror.observability.events import Outcome
from mirror.oci.errors import InvalidRequest
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Digest, Tag
from mirror.oci.text import printable, size_text, time_text

if TYPE_CHECKING:
    from mirror.history.queries import HistoryReader
    from mirror.history.stored_pull import StoredPull

_DEFAULT_LAST: Final = 10
"""Pulls without ``--last``: a few more than a screen has."""
_MAX_SENTENCE_CHARS: Final = 2000
"""Characters of a line: the text of an error may be long."""


def add_parser(commands: Commands) -> None:
    """Add the parser of ``explain``."""
    parser = commands.add_parser(
        "explain",
        help="say what happened to the last pulls, and why they took their time",
        description="Explains the last requests for an image, or one request by its id (the "
        "X-Request-Id of its response, id in the log), newest first. Without SUBJECT: of all "
        "images. Fast hits are kept as examples only.",
    )
    add_config(parser)
    add_json(parser)
    parser.add_argument(
        "subject", metavar="IMAGE|ID", nargs="?", default="", help="image, digest, or request id"
    )
    parser.add_argument(
        "--client", metavar="ADDRESS", default="", help="only of this address or network"
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
        help=f"number of requests (default: {_DEFAULT_LAST})",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run ``explain``. Returns the exit code."""
    from mirror.history.queries import open_history
    from mirror.history.sentences import explain

    if arguments.last < 1:
        raise UsageError("--last must be at least 1")
    settings = load_settings(arguments)
    with open_history(find_layout(settings)) as history:
        pulls = _find_pulls(history, arguments)
    # The rows of several processes are a second apart.
    pulls.sort(key=lambda pull: pull.at, reverse=True)
    if arguments.is_json:
        for pull in pulls:
            row = {"time": time_text(pull.at), "sentences": explain(pull), **pull.to_json()}
            print_line(json.dumps(row))
        return 0
    for number, pull in enumerate(pulls):
        if number:
            print_line("")
        print_line(printable(_headline(pull), _MAX_SENTENCE_CHARS))
        for sentence in explain(pull):
            print_line(f"  {printable(sentence, _MAX_SENTENCE_CHARS)}")
    if not pulls:
        print_note("no such request is in the history (it begins with the first start of a server)")
    return 0


def _find_pulls(history: HistoryReader, arguments: argparse.Namespace) -> list[StoredPull]:
    subject: str = arguments.subject
    filters: dict[str, Any] = {
        "last": arguments.last,
        "client": arguments.client,
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
        name = ImageName.parse(subject)
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
    sent = pull.fetched_bytes if pull.command else pull.bytes_sent
    size = f"{size_text(sent)} in " if sent else ""
    asker = f"`oci-mirror {pull.command}`" if pull.command else pull.client or "-"
    status: int | str = pull.status or "no response"
    if pull.command:
        status = pull.outcome
    return (
        f"{time_text(pull.at)} {pull.method} {pull.kind} {pull.name} for {asker}: "
        f"{status}, {size}{pull.duration:.3f} s (id {pull.request_id})"
    )
