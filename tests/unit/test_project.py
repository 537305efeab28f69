"""The project's own files agree: metadata, hooks, workflow, changelog, threat model, links.

(Image, Compose file and Kubernetes manifests: ``test_packaging.py``.)
"""

from __future__ import annotations

import ast
import datetime
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mirror import __version__

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def read_yaml(name: str) -> Any:
    # Without types: "on" is a key of a workflow, and YAML would read it as true.
    return yaml.load(read(name), Loader=yaml.BaseLoader)


PYPROJECT: dict[str, Any] = tomllib.loads(read("pyproject.toml"))
PROJECT: dict[str, Any] = PYPROJECT["project"]
WORKFLOW: dict[str, Any] = read_yaml(".github/workflows/ci.yml")
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]
MARKDOWN = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", ".github/**/*.md", "mirror/**/*.md")
    for path in ROOT.glob(pattern)
)


def make_targets() -> dict[str, tuple[list[str], list[str]]]:
    """Target of the Makefile to its prerequisites and its commands."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    commands: list[str] = []
    for line in read("Makefile").splitlines():
        if line.startswith("\t"):
            commands.append(line.strip().lstrip("@"))
        elif rule := re.match(r"([a-z][\w-]*):(?!=)(.*)", line):
            commands = []
            found[rule[1]] = (rule[2].split(), commands)
    return found


TARGETS = make_targets()


# --- package metadata -----------------------------------------------------------------------------


def python_versions() -> list[str]:
    """The versions that the classifiers name."""
    prefix = "Programming Language :: Python :: "
    names = [one.removeprefix(prefix) for one in PROJECT["classifiers"] if one.startswith(prefix)]
    return [name for name in names if re.fullmatch(r"3\.\d+", name)]


def test_package_and_program_have_the_same_version() -> None:
    assert PROJECT["version"] == __version__


def test_metadata_workflow_tools_and_image_name_the_same_python_versions() -> None:
    versions = python_versions()
    oldest = versions[0]
    assert versions == sorted(versions, key=Version)
    assert PROJECT["requires-python"] == f">={oldest}"
    assert JOBS["test"]["strategy"]["matrix"]["python-version"] == versions
    assert PYPROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    images = re.findall(r"^FROM python:(\d+\.\d+)-", read("Dockerfile"), re.MULTILINE)
    assert set(images) <= set(versions)
    assert images
    for job in JOBS.values():
        for step in job["steps"]:
            version = step.get("with", {}).get("python-version", oldest)
            assert version in (*versions, "${{ matrix.python-version }}")


def test_licence_file_is_the_licence_of_the_metadata() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    (name,) = PROJECT["license-files"]
    text = read(name)
    assert re.match(r"\s*Apache License\s+Version 2\.0, January 2004\n", text)
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'org.opencontainers.image.licenses="Apache-2.0"' in read("Dockerfile")
    # SPDX expressions and license-files: PEP 639
    (build,) = (Requirement(one) for one in PYPROJECT["build-system"]["requires"])
    assert build.name == "setuptools"
    assert "76.1" not in build.specifier
    # setuptools refuses a licence classifier beside the expression.
    assert not [one for one in PROJECT["classifiers"] if one.startswith("License ::")]


def test_image_is_built_with_the_files_that_the_metadata_names() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", read("Dockerfile"), re.MULTILINE)
    files = " ".join(copied).split()
    for name in (PROJECT["readme"], *PROJECT["license-files"]):
        assert name in files
        assert (ROOT / name).is_file()


def pins() -> dict[str, Version]:
    lines = [line for line in read("tools/constraints.txt").splitlines() if line[:1] != "#"]
    pairs = [line.split("==") for line in lines]
    assert [name.lower() for name, _ in pairs] == sorted(
        (name.lower() for name, _ in pairs), key=lambda name: name.replace("-", "_")
    )
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize(
    "text", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
)
def test_every_dependency_is_pinned_within_its_range(text: str) -> None:
    requirement = Requirement(text)
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


# --- hooks ----------------------------------------------------------------------------------------

HOOKS: list[dict[str, Any]] = [
    hook
    for repository in read_yaml(".pre-commit-config.yaml")["repos"]
    for hook in repository["hooks"]
]


def test_hooks_need_no_other_repository() -> None:
    repositories = read_yaml(".pre-commit-config.yaml")["repos"]
    assert {one["repo"] for one in repositories} == {"local"}
    assert {hook["language"] for hook in HOOKS} == {"system"}


def test_hooks_run_what_make_check_runs() -> None:
    runs = {hook["entry"].split()[-1]: hook["stages"] for hook in HOOKS}
    assert runs == {"lint": ["pre-commit"], "check": ["pre-push"]}
    for hook in HOOKS:
        assert hook["entry"].startswith("make --no-print-directory ")
        # The make target names the files itself.
        assert hook["pass_filenames"] == "false"
    _, commands = TARGETS["check"]
    assert any("$(MAKE) --no-print-directory lint" in command for command in commands)
    assert any("$(PYTEST)" in command for command in commands)


def test_make_lint_has_every_static_gate() -> None:
    _, commands = TARGETS["lint"]
    for gate in ("ruff check .", "ruff format --check .", "mypy"):
        assert f"$(PYTHON) -m {gate}" in commands, gate


# --- workflow -------------------------------------------------------------------------------------


def steps() -> Iterator[dict[str, Any]]:
    for job in JOBS.values():
        yield from job["steps"]


def test_workflow_runs_what_ci_runs() -> None:
    run = re.findall(r"^make (\S+)$", read(".ci/run"), re.MULTILINE)
    commands = " ".join(step.get("run", "") for step in steps())
    assert set(re.findall(r"\bmake (\S+)", commands)) == set(run) <= set(TARGETS)


def test_workflow_has_least_permissions_and_limits() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in WORKFLOW["on"]
    assert WORKFLOW["concurrency"]["cancel-in-progress"] == "true"
    for job in JOBS.values():
        assert "permissions" not in job
        assert int(job["timeout-minutes"]) <= 60


def test_actions_are_pinned_by_commit() -> None:
    lines = re.findall(r"uses: (.*)", read(".github/workflows/ci.yml"))
    assert lines
    for line in lines:
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    # The same commit wherever an action is used.
    assert len(set(lines)) == len({line.partition("@")[0] for line in lines})


def test_checkouts_leave_no_token_behind() -> None:
    checkouts = [step for step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert len(checkouts) == len(JOBS)
    for step in checkouts:
        assert step["with"]["persist-credentials"] == "false"


# --- changelog ------------------------------------------------------------------------------------


def test_changelog_begins_with_unreleased_and_this_version() -> None:
    headings = re.findall(r"^## (.*)$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    found = []
    for heading in headings[1:]:
        match = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading)
        assert match is not None, heading
        found.append((Version(match[1]), datetime.date.fromisoformat(match[2])))
    assert found == sorted(found, reverse=True)
    assert str(found[0][0]) == __version__


def test_changelog_has_the_sections_of_keep_a_changelog() -> None:
    sections = re.findall(r"^### (.*)$", read("CHANGELOG.md"), re.MULTILINE)
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# --- security model -------------------------------------------------------------------------------


def robustness_rows() -> set[str]:
    return set(re.findall(r"^\| `?([A-Z]+\d+)\b", read("docs/robustness.md"), re.MULTILINE))


def named_rows() -> set[str]:
    """Rows in the last column of the tables of SECURITY.md."""
    cells = [line.rstrip("| ").rpartition("|")[2] for line in read("SECURITY.md").splitlines()]
    return {row for cell in cells for row in re.findall(r"\b(?:HU|HC|[A-Z])\d+\b", cell)}


def test_threat_model_names_every_hostile_row() -> None:
    hostile = {row for row in robustness_rows() if row.startswith(("HU", "HC"))}
    assert len(hostile) > 20
    assert hostile <= named_rows()


def test_threat_model_names_existing_rows_only() -> None:
    assert named_rows() <= robustness_rows()


# --- documents ------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that forges give to a heading."""
    return re.sub(r"[^\w -]", "", heading.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("name", MARKDOWN, ids=str)
def test_links_in_documents_have_existing_targets(name: Path) -> None:
    text = re.sub(r"^```.*?^```", "", read(str(name)), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


@pytest.mark.parametrize(
    "name",
    [
        *("CONTRIBUTING.md", "README.md", ".github/PULL_REQUEST_TEMPLATE.md", "docs/releasing.md"),
        *("docs/commands.md", "docs/configuration.md", "docs/kubernetes.md", "docs/metrics.md"),
        "docs/runbook.md",
    ],
)
def test_documents_name_commands_and_files_that_exist(name: str) -> None:
    text = read(name)
    for target in re.findall(r"(?:`|^\$ )make ([a-z-]+)", text, re.MULTILINE):
        assert target in TARGETS, target
    roots = r"mirror|tests|tools|docs|config|bench|\.github|\.ci"
    for path in re.findall(rf"(?<![\w/.-])((?:{roots})/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), path


def test_contributing_names_every_gate() -> None:
    text = read("CONTRIBUTING.md")
    for target in ("lint", "check", "test", "test-long", "robustness", "bench"):
        assert f"| `make {target}` |" in text


def test_readme_links_to_the_documents_of_the_project() -> None:
    text = read("README.md")
    for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "LICENSE", "docs/releasing.md"):
        assert f"]({name})" in text


def test_release_guide_names_every_place_of_the_version() -> None:
    guide = read("docs/releasing.md")
    places = {
        name
        for name in ("pyproject.toml", "mirror/__init__.py", "docker-compose.yml")
        if re.search(rf"[\"':]\s*{re.escape(__version__)}\b|:{re.escape(__version__)}", read(name))
    }
    places |= {str(path.relative_to(ROOT)) for path in ROOT.glob("config/*/kustomization.yaml")}
    assert places == set(re.findall(r"^\s*\| `([\w./-]+)` \|", guide, re.MULTILINE))


# --- programs of tests and benches ----------------------------------------------------------------

STARTERS = {"Popen", "call", "check_call", "check_output", "create_subprocess_exec", "run"}
"""Functions of ``subprocess`` and ``asyncio`` that start the program that they get first."""


def programs_from_the_path(source: str) -> list[str]:
    """Return the programs that a module starts by a bare name: the PATH chooses the version.

    Their paths come from ``need`` in tests/real/process.py. The command line is found where it is
    written in the call, or assigned to the name in the call.
    """
    tree = ast.parse(source)
    values: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            values.setdefault(ast.unparse(node.targets[0]), []).append(node.value)

    def first_words(node: ast.expr) -> Iterator[str]:
        match node:
            case ast.Constant(value=str(word)) if not word.startswith("/"):
                yield word
            case ast.List(elts=[first, *_]) | ast.Tuple(elts=[first, *_]):
                yield from first_words(first)
            case ast.BinOp(left=first) | ast.Starred(value=first):
                yield from first_words(first)
            case ast.Name(id=name):
                for value in values.get(name, []):
                    yield from first_words(value)

    return [
        word
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.args
        if isinstance(node.func, ast.Attribute) and node.func.attr in STARTERS
        if ast.unparse(node.func.value) in ("subprocess", "asyncio")
        for word in first_words(node.args[0])
    ]


@pytest.mark.parametrize(
    "call",
    [
        "subprocess.run(['sh', '-c', 'true'])",
        "subprocess.Popen(('sh', '-c', 'true'))",
        "asyncio.create_subprocess_exec('sh', '-c', 'true')",
        "asyncio.create_subprocess_exec(*('sh', '-c', 'true'))",
        "command = ['sh', '-c']\nsubprocess.run(command)",
        "subprocess.run(['sh'] + more)",
    ],
)
def test_program_by_a_bare_name_is_found(call: str) -> None:
    assert programs_from_the_path(call) == ["sh"]
    assert programs_from_the_path(call.replace("'sh'", "need('sh')")) == []
    assert programs_from_the_path(call.replace("'sh'", "'/bin/sh'")) == []


def test_tests_and_benches_start_programs_by_their_paths() -> None:
    modules = [path for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    sources = {str(path): path.read_text() for path in modules}
    starting = {path: text for path, text in sources.items() if "subprocess" in text}
    assert len(starting) > 20
    found = {path: programs_from_the_path(text) for path, text in starting.items()}
    assert {path: words for path, words in found.items() if words} == {}


# --- editorconfig ---------------------------------------------------------------------------------

TEXT = {".cfg", ".json", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}


def test_files_have_the_line_ends_that_editorconfig_demands() -> None:
    folders = ("mirror", "tests", "tools", "config", "docs", "bench", ".github")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    wrong = []
    for path in files:
        if path.suffix not in TEXT or not path.is_file() or "results" in path.parts:
            continue
        text = path.read_bytes()
        lines = text.split(b"\n")
        if b"\r" in text or (text and lines[-1]) or any(line != line.rstrip() for line in lines):
            wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


def test_editorconfig_has_the_line_length_of_ruff() -> None:
    python = read(".editorconfig").partition("[*.py]\n")[2].partition("\n\n")[0]
    assert f"max_line_length = {PYPROJECT['tool']['ruff']['line-length']}" in python
