"""The table in docs/robustness.md names the rows that tests name, and its numbers add up."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.robustness.table import (
    BEGIN,
    END,
    REQUIRED,
    ROWS,
    Case,
    format_table,
    rewrite_document,
    row_id,
    row_name,
    row_names,
)

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "robustness.md"


def marked(source: str) -> set[str]:
    """Return the names in ``pytest.mark.row(…)`` of a module."""
    return {
        node.args[0].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "pytest.mark.row"
        and isinstance(node.args[0], ast.Constant)
    }


def test_table_has_the_rows_that_tests_name() -> None:
    names = set().union(*(marked(path.read_text()) for path in TESTS.rglob("test_*.py")))
    in_table = row_names(DOCUMENT.read_text())
    assert len(in_table) == len(set(in_table))
    assert set(in_table) == names, "`make robustness` writes the table"
    for name in names:
        row_id(name)


def test_slugs_are_unique() -> None:
    assert len({row.slug for row in ROWS.values()}) == len(ROWS)


@pytest.mark.parametrize("name", ["U12", "U12-", "U12-flapping", "X1-flapping-endpoint", ""])
def test_name_with_an_unknown_id_or_another_slug_is_refused(name: str) -> None:
    assert row_id("U12-flapping-endpoint") == "U12"
    with pytest.raises(ValueError, match=r"table\.py"):
        row_id(name)


def test_each_required_row_has_a_test_and_a_number() -> None:
    document = DOCUMENT.read_text()
    assert {row_id(name) for name in row_names(document)} >= REQUIRED
    lines = document.partition(BEGIN)[2].partition(END)[0].splitlines()
    numbers = {line[2:].partition("-")[0]: line.split(" | ")[3:5] for line in lines[3:-1]}
    assert not [row for row in REQUIRED if not any(text.strip(" |") for text in numbers[row])]


def test_no_row_has_fewer_tries_than_test_cases() -> None:
    """Such a number is of an older run: one of the cases has failed since, or was left out."""
    document = DOCUMENT.read_text()
    lines = document.partition(BEGIN)[2].partition(END)[0].splitlines()[3:-1]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    numbers = {row[0]: [int(cell.replace(",", "") or 0) for cell in row[2:5]] for row in cells}
    assert not [row for row, (cases, short, long) in numbers.items() if short + long < cases]


def test_the_table_names_files_that_exist() -> None:
    lines = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    files = set(re.findall(r"`([\w/]+\.py)`", lines))
    assert len(files) > 20
    assert not [name for name in files if not (TESTS / name).is_file()]


OLD = f"""before
{BEGIN}
| row | what is tried | test cases | tries in `make test` | in the long tests | where |
|---|---|--:|--:|--:|---|
| C1-sigkill-at-a-call | kills | 1 | 7 | 1,200 | `test_a.py` |
| all | | 1 | 7 | 1,200 | |
{END}
after
"""


def cells(row: str) -> str:
    """Return the first two cells of a row's line."""
    return f"| {row_name(row)} | {ROWS[row].description} |"


def test_tries_are_added_up_by_row() -> None:
    cases = [Case("U1", "test_b.py", False, 3), Case("U1", "test_a.py", False, 1000)]
    lines = format_table(
        "", [*cases, Case("C10", "test_a.py", True, 2), Case("C9", "test_a.py", False, 1)]
    )
    assert lines.splitlines()[2:] == [
        f"{cells('C9')} 1 | 1 |  | `test_a.py` |",
        f"{cells('C10')} 1 |  | 2 | `test_a.py` |",
        f"{cells('U1')} 2 | 1,003 |  | `test_a.py`, `test_b.py` |",
        "| all | | 4 | 1,004 | 2 | |",
    ]


def test_row_with_a_failed_or_omitted_case_keeps_its_number() -> None:
    cases = [
        Case("C1", "test_a.py", False, 5),
        Case("C1", "test_a.py", False, 4),
        Case("C1", "test_a.py", True, None),
    ]
    written = rewrite_document(OLD, cases)
    assert f"{cells('C1')} 3 | 9 | 1,200 | `test_a.py` |" in written
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    cases[1] = Case("C1", "test_a.py", False, None)
    assert " | 3 | 7 | 1,200 | " in rewrite_document(OLD, cases), (
        "one of them failed, or was left out"
    )
    assert row_names(written) == [row_name("C1")]


SUITE = """
import pytest

@pytest.mark.row("C1-sigkill-at-a-call")
@pytest.mark.parametrize("times", range(1, 9))
def test_counted(times, tried):
    tried(times)
    tried(1)

@pytest.mark.row("C1-sigkill-at-a-call")
@pytest.mark.row("C4-power-cut-states")
@pytest.mark.long
def test_left_out():
    pass

@pytest.mark.row("C5-planted-faults")
@pytest.mark.parametrize("passes", [True, False])
def test_one_of_two_fails(passes):
    assert passes

@pytest.mark.row("C7-sigkill-of-the-fetcher")
def test_without_a_count():
    pass
"""


@pytest.mark.parametrize("processes", [0, pytest.param(3, marks=pytest.mark.long)])
def test_table_is_the_same_from_one_or_several_processes(tmp_path: Path, processes: int) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    document = tmp_path / "table.md"
    document.write_text(OLD)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "xdist", "-p", "tests.conftest"),
            *("-n", str(processes)),
            *("-m", "not long", f"--robustness-table={document}", "test_suite.py"),
        ],
        cwd=tmp_path,
        # no other plugins: they take seconds to start in each process
        env={
            **os.environ,
            "PYTHONPATH": str(TESTS.parent),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 1, run.stdout.decode()
    where = f"`{os.path.relpath(tmp_path, TESTS)}/test_suite.py`"
    lines = document.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()
    assert lines[3:] == [
        f"{cells('C1')} 9 | 44 | 1,200 | {where} |",
        f"{cells('C4')} 1 |  |  | {where} |",
        f"{cells('C5')} 2 |  |  | {where} |",
        f"{cells('C7')} 1 | 1 |  | {where} |",
        "| all | | 13 | 45 | 1,200 | |",
    ]
