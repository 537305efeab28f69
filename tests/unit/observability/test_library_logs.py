"""Lines of libraries: their level and form, a limit, and other threads."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
import time

import pytest
from aiohttp.http_exceptions import BadStatusLine

from mirror.config.settings import Log
from mirror.observability.library_logs import configure_logging
from mirror.threads import call_soon_from_any_thread


@pytest.mark.row("FE4-severity-of-failures")
def test_bytes_that_are_no_http_request_are_info_and_other_faults_of_aiohttp_stay_errors() -> None:
    for level, expected in (("info", ["info", "error"]), ("warning", ["error"])):
        stream = io.StringIO()
        configure_logging(Log.model_validate({"format": "json", "level": level}), stream)
        for error in (BadStatusLine("x"), ZeroDivisionError("x")):
            try:
                raise error
            except Exception:
                logging.getLogger("aiohttp.server").exception("Error handling request")
        lines = stream.getvalue().splitlines()
        assert [json.loads(line)["level"] for line in lines] == expected


def test_library_record_below_the_level_is_not_written() -> None:
    stream = io.StringIO()
    configure_logging(Log(format="json", level="error"), stream)
    logging.getLogger("asyncio").warning("slow")
    assert stream.getvalue() == ""


@pytest.mark.row("HC2-malformed-requests")
def test_traceback_of_a_library_becomes_one_line_and_is_limited() -> None:
    stream = io.StringIO()
    configure_logging(Log(format="json"), stream)
    try:
        raise ZeroDivisionError("oops")
    except ZeroDivisionError:
        for _ in range(100):
            logging.getLogger("aiohttp.server").exception("Error handling request")
    lines = stream.getvalue().splitlines()
    assert 1 <= len(lines) <= 5
    assert json.loads(lines[0])["error"] == "ZeroDivisionError: oops"


async def test_line_that_a_library_logs_in_a_thread_is_written_while_the_loop_is_idle() -> None:
    written = asyncio.Event()

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            written.set()
            return super().write(text)

    stream = Stream()
    configure_logging(Log(format="json"), stream, call_soon_from_any_thread())

    def work() -> None:
        time.sleep(0.1)
        logging.getLogger("library").warning("from a thread")

    thread = threading.Thread(target=work)
    thread.start()
    async with asyncio.timeout(30):
        await written.wait()
    thread.join()
    assert json.loads(stream.getvalue())["message"] == "from a thread"
