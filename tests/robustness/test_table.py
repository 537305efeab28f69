"""The table in docs/robustness.md says what the tests say, and its numbers add up."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.robustness.table import BEGIN, BOLD, END, WORDS, Case, rewritten, rows_of, table

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "robustness.md"


def marked(source: str) -> set[str]:
    """The rows that are named by ``pytest.mark.row(…)`` in a module."""
    return {
        node.args[0].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "pytest.mark.row"
        and isinstance(node.args[0], ast.Constant)
    }


def test_the_table_names_the_rows_that_tests_name() -> None:
    rows = set().union(*(marked(path.read_text()) for path in TESTS.rglob("test_*.py")))
    named = rows_of(DOCUMENT.read_text())
    assert len(named) == len(set(named))
    assert set(named) == rows, "`make robustness` writes it anew"
    assert rows <= set(WORDS)


def test_no_row_in_bold_is_without_a_test_or_a_number() -> None:
    document = DOCUMENT.read_text()
    assert set(rows_of(document)) >= BOLD
    lines = document.partition(BEGIN)[2].partition(END)[0].splitlines()
    numbers = {line.split(" | ")[0][2:]: line.split(" | ")[3:5] for line in lines[3:]}
    assert not [row for row in BOLD if not any(text.strip(" |") for text in numbers[row])]


OLD = f"""before
{BEGIN}
| row | what it is | test cases | tried by `make test` | and by `make test-long` | where |
|---|---|--:|--:|--:|---|
| C1 | kills | 1 | 7 | 1,200 | `test_a.py` |
| all | | 1 | 7 | 1,200 | |
{END}
after
"""


def test_what_was_tried_is_added_up_by_row() -> None:
    cases = [Case("U1", "test_b.py", False, 3), Case("U1", "test_a.py", False, 1000)]
    lines = table(
        "", [*cases, Case("C10", "test_a.py", True, 2), Case("C9", "test_a.py", False, 1)]
    )
    assert lines.splitlines()[2:] == [
        f"| C9 | {WORDS['C9']} | 1 | 1 |  | `test_a.py` |",
        f"| C10 | {WORDS['C10']} | 1 |  | 2 | `test_a.py` |",
        f"| U1 | {WORDS['U1']} | 2 | 1,003 |  | `test_a.py`, `test_b.py` |",
        "| all | | 4 | 1,004 | 2 | |",
    ]


def test_what_did_not_run_as_a_whole_keeps_its_number() -> None:
    cases = [
        Case("C1", "test_a.py", False, 5),
        Case("C1", "test_a.py", False, 4),
        Case("C1", "test_a.py", True, None),
    ]
    written = rewritten(OLD, cases)
    assert f"| C1 | {WORDS['C1']} | 3 | 9 | 1,200 | `test_a.py` |" in written
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    cases[1] = Case("C1", "test_a.py", False, None)
    assert " | 3 | 7 | 1,200 | " in rewritten(OLD, cases), "one of them failed, or was left out"
    assert rows_of(written) == ["C1"]


SUITE = """
import pytest

@pytest.mark.row("C1")
@pytest.mark.parametrize("times", range(1, 9))
def test_counted(times, tried):
    tried(times)
    tried(1)

@pytest.mark.row("C1")
@pytest.mark.row("C4")
@pytest.mark.long
def test_left_out():
    pass

@pytest.mark.row("C5")
@pytest.mark.parametrize("passes", [True, False])
def test_one_of_two_fails(passes):
    assert passes

@pytest.mark.row("C7")
def test_without_a_count():
    pass
"""


@pytest.mark.parametrize("processes", [0, 3])
def test_processes_of_pytest_xdist_give_the_same_table(tmp_path: Path, processes: int) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    document = tmp_path / "table.md"
    document.write_text(OLD)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n", str(processes)),
            *("-m", "not long", f"--robustness-table={document}", "test_suite.py"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 1, run.stdout.decode()
    where = f"`{os.path.relpath(tmp_path, TESTS)}/test_suite.py`"
    lines = document.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()
    assert lines[3:] == [
        f"| C1 | {WORDS['C1']} | 9 | 44 | 1,200 | {where} |",
        f"| C4 | {WORDS['C4']} | 1 |  |  | {where} |",
        f"| C5 | {WORDS['C5']} | 2 |  |  | {where} |",
        f"| C7 | {WORDS['C7']} | 1 | 1 |  | {where} |",
        "| all | | 13 | 45 | 1,200 | |",
    ]
