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
from typing import Any, Final

from mirror.admin.json_values import JsonObject
from mirror.admin.problems import ApiProblem, problem_of
from mirror.admin.sources import ImageQuery, PullQuery
from mirror.admin.store_answers import StoreAnswers
from mirror.config.settings import build
from mirror.oci.errors import MirrorError
from mirror.store.layout import Layout

_NICENESS: Final = 10
"""The server goes first."""


def answer(queries: StoreAnswers, question: JsonObject) -> JsonObject:
    """Return ``{"result": …}``, or ``{"status": …, "detail": …}``."""
    try:
        return {"result": _ask(queries, question["ask"], question.get("with", {}))}
    except (ApiProblem, MirrorError, OSError) as error:
        problem = error if isinstance(error, ApiProblem) else problem_of(error)
        return {"status": problem.status, "detail": problem.detail}


def _ask(queries: StoreAnswers, name: str, given: JsonObject) -> Any:
    match name:
        case "find":
            return queries.find(ImageQuery(**given))
        case "pulls":
            outcomes = tuple(given.pop("outcomes"))
            return queries.pulls(PullQuery(outcomes=outcomes, **given))
        case "show" | "usage" | "uploads" | "users" | "forget":
            return getattr(queries, name)(**given)
        case "pull" | "refused" | "tag_digests" | "savings":
            return getattr(queries, name)(**given)
        case _:
            raise ApiProblem(500, f"no such question: {name}")


def answer_lines(lines: Iterator[str]) -> None:
    """Answer the questions in ``lines``, until they end."""
    os.nice(_NICENESS)
    settings = build(json.loads(next(lines)))
    queries = StoreAnswers(Layout(Path(settings.data_dir)), settings)
    for line in lines:
        sys.stdout.write(
            json.dumps(answer(queries, json.loads(line)), separators=(",", ":")) + "\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    answer_lines(iter(sys.stdin))
