"""``make bench``: measures the mirror, and others in the same run.

``python -m bench [NAME …] [--rounds N] [--quick] [--into FILE]`` runs the rows whose names begin
with one of the given ones. Exit code 1 if one missed its bound.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bench import (
    cleaning,
    crowds,
    fetch_memory,
    growth,
    index_costs,
    listings,
    page,
    pushes,
    ranges,
    store_costs,
    table,
    window,
)
from bench.table import Run


def machine(run: Run) -> Iterator[str]:
    """Name what it runs on."""
    yield (
        f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores,"
        f" median of {run.rounds} rounds"
    )


ROWS = (
    {"machine": machine}
    | table.ROWS
    | window.ROWS
    | ranges.ROWS
    | crowds.ROWS
    | fetch_memory.ROWS
    | growth.ROWS
    | store_costs.ROWS
    | index_costs.ROWS
    | cleaning.ROWS
    | listings.ROWS
    | page.ROWS
    | pushes.ROWS
)


def put_into(text: str, name: str, lines: list[str]) -> str:
    """Replace the block of a row in a Markdown text. Its language is ``text NAME``."""
    block = re.compile(rf"^(```text {re.escape(name)}\n).*?^```$", re.MULTILINE | re.DOTALL)
    return block.sub(lambda found: found[1] + "\n".join([*map(str.rstrip, lines), "```"]), text)


def main() -> int:
    """Measure the rows that are asked for."""
    parser = argparse.ArgumentParser(prog="bench", description=f"Rows: {', '.join(ROWS)}")
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows that begin so; none: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round with small blobs")
    parser.add_argument("--into", type=Path, help="Markdown file whose blocks are replaced, too")
    options = parser.parse_args()
    names = [name for name in ROWS if name.startswith(tuple(options.names or [""]))]
    if not names:
        parser.error(f"no row is named so; there are {', '.join(ROWS)}")
    is_missed = False
    with ExitStack() as stack:
        run = Run(stack, 1 if options.quick else options.rounds, is_quick=options.quick)
        for name in names:
            begun, lines = time.monotonic(), []
            print(f"\n--- {name}")
            for line in ROWS[name](run):
                print(line, flush=True)
                lines.append(line)
            print(f"--- {time.monotonic() - begun:.0f} s", flush=True)
            is_missed = is_missed or any("MISSED" in line for line in lines)
            if options.into is not None:
                options.into.write_text(put_into(options.into.read_text(), name, lines))
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main())
