"""The documents of the source tree name only files and definitions that exist.

Links, and the commands and files of the README: ``test_project.py``.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
DECISIONS = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
SECTIONS = ["Context", "Alternatives", "Measured", "Decision", "Consequences"]


def rows(heading: str) -> list[list[str]]:
    """The cells of each row of the tables below ``heading``, without the first header."""
    section = ARCHITECTURE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named_definitions() -> list[tuple[str, str]]:
    """(file, name) for each name in a column of places; name "" for a file alone."""
    found = []
    places = [row[2] for row in rows("Where to find things")]
    for where in [*places, *(row[1] for row in rows("One push"))]:
        for part in where.split(";"):
            path, *names = re.findall(r"`([^`]+)`", part)
            found += [(path, name) for name in names or [""]]
    return found


@cache
def definitions(path: str) -> frozenset[str]:
    """What a module defines at its top level, and ``Class.member``."""
    return frozenset(_defined(ast.parse((ROOT / path).read_text(encoding="utf-8")), ""))


def _defined(node: ast.Module | ast.ClassDef, prefix: str) -> set[str]:
    found = set()
    for child in node.body:
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                found.add(prefix + child.name)
            case ast.ClassDef():
                found |= {prefix + child.name, *_defined(child, f"{prefix}{child.name}.")}
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(prefix + name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                found.add(prefix + name)
    return found


def test_table_of_where_to_find_things_is_read_whole() -> None:
    assert len(rows("Where to find things")) >= 9
    assert all(len(row) == 3 for row in rows("Where to find things"))
    assert len(named_definitions()) >= len(rows("Where to find things"))


@pytest.mark.parametrize(("path", "name"), named_definitions())
def test_named_file_exists_and_defines_the_name(path: str, name: str) -> None:
    assert (ROOT / path).is_file()
    if name:
        assert name in definitions(path)


def test_missing_definition_is_found() -> None:
    known = definitions("mirror/oci/reference.py")
    assert {"Digest", "Digest.parse"} <= known
    assert not {"Digest.missing", "missing"} & known


def test_reading_orders_have_different_files_that_exist() -> None:
    numbered = [row for row in rows("Reading order") if row[0].isdecimal()]
    paths = [re.findall(r"`([^`]+)`", row[1])[0] for row in numbered]
    assert len(set(paths)) == len(paths) == 17
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_table_of_packages_has_every_package() -> None:
    listed = {name for row in rows("Packages") for name in re.findall(r"`mirror/(\w+)/`", row[0])}
    assert listed == {path.parent.name for path in (ROOT / "mirror").glob("*/__init__.py")}


def test_glossary_has_as_many_different_words_as_it_says() -> None:
    words = [row[0] for row in rows("Glossary")]
    assert len(set(words)) == len(words)
    assert f"These {len(words)} words" in ARCHITECTURE


def test_code_names_only_documents_that_exist() -> None:
    named = {
        path
        for file in (ROOT / "mirror").rglob("*.py")
        for path in re.findall(r"docs/[\w/.-]+\.md", file.read_text(encoding="utf-8"))
    }
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []


def test_decisions_are_numbered_and_listed() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\d{4})\]\(([^)]+)\) \| (.*?) \|", index, re.MULTILINE)
    assert [name for _, name, _ in listed] == [path.name for path in DECISIONS]
    assert all(name.startswith(f"{number}-") for number, name, _ in listed)
    numbers = [int(number) for number, _, _ in listed]
    assert numbers[0] == 1
    assert all(after == before + 1 for before, after in pairwise(numbers))


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem[:4])
def test_decision_has_its_sections_and_is_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# {path.stem[:4]}: ")
    assert re.search(r"^Status: (accepted|replaced by \d{4})$", text, re.MULTILINE)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert 20 <= text.count("\n") <= 60
