"""The process that answers questions about the store: ``python -m mirror.admin.reader_process``.

Lives here: its protocol, one JSON object a line. The first line is the configuration, each further
line a question, and each is answered by one line. It ends with its standard input. Must not know:
HTTP, how a question is answered.

To read 100,000 contents takes a second of processor time. In the server, requests would wait for
the interpreter lock meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

from mirror.admin.problems import Problem, problem_of
from mirror.admin.queries import Queries
from mirror.admin.sources import ImageQuery, PullQuery
from mirror.config.settings import build
from mirror.oci.errors import MirrorError
from mirror.store.disk import Layout

Json: TypeAlias = dict[str, Any]

_NICENESS: Final = 10
"""The server goes first."""


def answer(queries: Queries, question: Json) -> Json:
    """Return ``{"result": …}``, or ``{"status": …, "detail": …}``."""
    try:
        return {"result": _ask(queries, question["ask"], question.get("with", {}))}
    except (Problem, MirrorError, OSError) as error:
        problem = error if isinstance(error, Problem) else problem_of(error)
        return {"status": problem.status, "detail": problem.detail}


def _ask(queries: Queries, name: str, given: Json) -> Any:
    match name:
        case "find":
            return queries.find(ImageQuery(**given))
        case "pulls":
            outcomes = tuple(given.pop("outcomes"))
            return queries.pulls(PullQuery(outcomes=outcomes, **given))
        case "show" | "usage" | "pull" | "refused" | "tag_digests" | "savings" | "forget":
            return getattr(queries, name)(**given)
        case _:
            raise Problem(500, f"no such question: {name}")


def main(lines: Iterator[str]) -> None:
    """Answer the questions in ``lines``, until they end."""
    os.nice(_NICENESS)
    settings = build(json.loads(next(lines)))
    queries = Queries(Layout(Path(settings.data_dir)), settings)
    for line in lines:
        sys.stdout.write(
            json.dumps(answer(queries, json.loads(line)), separators=(",", ":")) + "\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main(iter(sys.stdin))
