"""Count where the code is hard to read, and fail when a count exceeds its limit.

``make check`` runs this. ``--list NAME`` prints the findings of one count, with file and line.
Each count is an approximation: it finds a habit, not every hard sentence. Lower a limit when its
count has fallen. Raise only those of size, in the commit of the feature that needs more.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import request_path

ROOT: Final = Path(__file__).resolve().parents[1]
"""The checkout: the parent of ``tools/``."""

LIMITS: Final[dict[str, int]] = {
    "relative": 0,
    "constants": 0,
    "names": 0,
    "parameters": 0,
    "booleans": 0,
    "records": 0,
    "lines": 43250,
    # Beside the 30 and 16 of a mirror that asks for a blob once and parses each request: the
    # protocol that receives large bodies (cold), and the one that reuses stored responses (both).
    # Each is the first to see all bytes of a connection, so every request passes it. And the retry
    # state of a source, which learns that a transfer has begun, has a response and brought bytes
    # (cold). And what a source proves (`ContentRequest.proof_key`, cold). And the table of the
    # running fetches, which was split from `fetch.py`: a module has at most 500 lines (cold).
    # And the paths of the data directory, the keys of the index's rows and their queued updates,
    # which were split from `disk.py` and `index.py` for the same reason. And how content is opened
    # that no upstream has, which the cache uses, too (`BlobStore.find_hosted`). And the header
    # fields of all responses, which were split from `handler.py`.
    "cold-modules": 39,
    "cold-functions": 309,
    "warm-modules": 20,
    "warm-functions": 89,
}
"""Count -> the largest number that passes. :data:`HELP` describes each count.

The limits of functions are two above the count: which ones are called depends on timing a little.
"""

HELP: Final[dict[str, str]] = {
    "relative": "public docstrings that begin with a relative clause or an indefinite pronoun",
    "constants": "numeric constants without a unit or a reason",
    "names": "names that are defined in more than one sense",
    "parameters": "functions across packages that document none of 3 or more parameters",
    "booleans": "yes/no names that do not begin with is_, has_, may_ or can_",
    "records": "records with several optional values by position",
    "lines": "lines of code, without docstrings, comments and blank lines",
    "cold-modules": "modules that the GET of an uncached blob passes",
    "cold-functions": "functions that the GET of an uncached blob passes",
    "warm-modules": "modules that the GET of a cached blob passes",
    "warm-functions": "functions that the GET of a cached blob passes",
}

SAME_SENSE: Final[dict[str, str]] = {
    "module __init__": "every package has one",
    "function add_parser": "each command of the command line has one",
    "function run": "each command of the command line has one",
    "function main": "the entry point of a process of its own",
    "function verify": "of the hash of a file, and of all images by that",
    "module forget": "the command, and the operation that it runs",
    "module gc": "the command, and the operation that it runs",
    "module in_use": "the arguments of the command, and the operation that it runs",
    "module marking": "the arguments of the commands, and the operations that they run",
    "module prefetch": "the settings, and the operation that they configure",
    "module prune": "the command, and the operation that it runs",
    "module removal": "of content, and of images by that",
    "module retention": "the settings, and the operation that they configure",
    "module verify": "the command, and the operation that it runs",
    "module refresh": "the command, and the operation that it runs",
    "module warm": "the command, and the operation that it runs",
    "module messages": "each has the messages of its package, to print or to pass on",
    "module health": "the command asks the server's own health report",
    "module errors": "web/errors.py renders the errors that oci/errors.py defines",
    "constant GARBAGE": "exceptions that malformed input raises in the parser of that module",
    "constant PARAMETER": "the parameter of a header field, by the grammar of that field",
    "constant QUOTED": "the quoted-string of RFC 9110, with the group that its module needs",
}
"""Findings of ``names`` that are not counted, each with its reason."""

FOREIGN_FLAGS: Final[dict[str, str]] = {
    "_keep_alive": "attribute of aiohttp's response",
    "catalog": "key of the configuration, which users write",
    "__eq__": "method of object",
    "__lt__": "method of object",
    "check_hostname": "attribute of ssl.SSLContext",
    "filter": "method of logging.Filter",
    "insecure": "key of the configuration, which users write",
    "isatty": "method of a text stream",
    "raiseExceptions": "variable of logging",
    "matches": "a verb in the third person, so it asks: a range or a pattern has a value",
    "read": "parameter of diskcache.Disk",
    "referrers": "key of the configuration, which users write",
    "anonymous_pull": "key of the configuration, which users write",
    "allow_plain_http": "key of the configuration, which users write",
    "serve_stale": "key of the configuration, which users write",
    "sparse_indexes": "key of the configuration, which users write",
}
"""Names that ``booleans`` does not count, each with its reason."""

COMMANDS: Final = {
    *("accept", "acquire", "allocate", "begin", "evict", "expire", "forget", "keep"),
    *("make", "mark", "pin", "put"),
    *("delete", "end", "mount", "publish", "quarantine", "read", "remove", "reserve"),
    *("receive", "reclaim", "refresh", "restore", "reuse", "send", "set", "start", "try"),
    *("unlink", "wait", "write"),
}
"""First words of functions that do something, and return whether they did."""

OBSERVERS: Final = {"logs", "metrics", "recorder", "batch", "writer"}
"""Modules that only hear of a request. They are not counted among those that it passes."""

_RELATIVE: Final = re.compile(
    r"(?:What|Whatever|Who|Whoever|Whom|Whose|Where|That|Those"
    r"|One (?:who|that|which|whose)|Some(?:body|one|thing)|Every(?:body|one)|Any(?:body|one))\b"
)
_EXEMPTION: Final = re.compile(r"#\s*(?:noqa|type:|pragma:|mypy:|-{3})")
_MANY_PARAMETERS: Final = 3  # parameters; two are told apart by their names and types
_MIN_WORDS: Final = 3  # words; fewer are a label, such as "# bytes", and give no reason

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
Assignment: TypeAlias = ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Count:
    """The result of one count. ``findings`` has one line for each thing to look at."""

    number: int
    findings: list[str]


@dataclass(frozen=True)
class Module:
    """One parsed source file. ``path`` is relative to the checkout, ``name`` is dotted."""

    path: str
    name: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """``store`` for ``mirror.store.index``; a top-level module is its own package."""
        return [*self.name.split("."), ""][1]


def load(root: Path) -> list[Module]:
    """Parse every module of ``root / "mirror"``."""
    modules = []
    for file in sorted((root / "mirror").rglob("*.py")):
        path = file.relative_to(root)
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        text = file.read_text(encoding="utf-8")
        modules.append(Module(str(path), name, text, ast.parse(text)))
    return modules


# --- syntax ---------------------------------------------------------------------------------------


def assignments(body: Sequence[ast.stmt]) -> Iterator[tuple[Assignment, str, str | None]]:
    """(statement, name, docstring below it) of the assignments in ``body``."""
    for index, node in enumerate(body):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            following = body[index + 1] if index + 1 < len(body) else None
            yield node, ast.unparse(target), string_of(following)


def string_of(node: ast.stmt | None) -> str | None:
    """The text of a statement that is only a string; None for any other statement."""
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return text
    return None


def is_public(name: str) -> bool:
    """True for names without a leading underscore, and for special methods."""
    last = name.removeprefix("self.")
    return not last.startswith("_") or last.endswith("__")


def is_numeric(node: ast.expr | None) -> bool:
    """True for a number, for arithmetic with at least one, and for a tuple of these."""
    match node:
        case ast.Constant(value=value):
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case ast.UnaryOp(operand=operand):
            return is_numeric(operand)
        case ast.BinOp(left=left, right=right):
            sides = [left, right]
            return any(map(is_numeric, sides)) and all(
                is_numeric(side) or isinstance(side, (ast.Name, ast.Attribute)) for side in sides
            )
        case ast.Tuple(elts=elements):
            return bool(elements) and all(map(is_numeric, elements))
    return False


def functions(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | None, Function]]:
    """(class or None, function) of all functions and methods that are not nested."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield None, node
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield node, member


# --- docstrings -----------------------------------------------------------------------------------


def count_relative(modules: list[Module]) -> Count:
    """Find docstrings with a relative clause in place of a noun.

    "Whether …" is the habit of the standard library for a yes/no. It passes where the type of the
    function or the attribute is ``bool``.
    """
    findings = [
        f"{module.path}:{line} {name}: {text.splitlines()[0]}"
        for module in modules
        for line, name, type_, text in docstrings(module.tree)
        if _RELATIVE.match(text) or (re.match(r"Whether\b", text) and "bool" not in type_)
    ]
    return Count(len(findings), findings)


def docstrings(
    scope: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[int, str, str, str]]:
    """(line, name, type, docstring) of all public classes, functions and attributes in ``scope``.

    Attributes that ``__init__`` sets are included. The type is empty where none is written.
    """
    yield from _attributes(scope.body, prefix)
    for node in scope.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if not is_public(node.name):
            continue
        name = prefix + node.name
        if text := ast.get_docstring(node):
            returns = None if isinstance(node, ast.ClassDef) else node.returns
            yield node.lineno, name, ast.unparse(returns) if returns else "", text
        if isinstance(node, ast.ClassDef):
            yield from docstrings(node, f"{name}.")
        elif node.name == "__init__":
            yield from _attributes(node.body, prefix)


def _attributes(body: list[ast.stmt], prefix: str) -> Iterator[tuple[int, str, str, str]]:
    for node, name, text in assignments(body):
        if text and is_public(name):
            if isinstance(node, ast.AnnAssign):
                type_ = ast.unparse(node.annotation)
            else:
                is_flag = isinstance(node.value, ast.Constant) and isinstance(
                    node.value.value, bool
                )
                type_ = "bool" if is_flag else ""
            yield node.lineno, prefix + name.removeprefix("self."), type_, text.strip()


# --- constants ------------------------------------------------------------------------------------


def count_constants(modules: list[Module]) -> Count:
    """Find numbers that have neither a docstring below nor a comment beside or above them.

    Counted are module-level assignments and ``Final`` ones of classes. A unit in the name alone
    (``_S``, ``_BYTES``) does not pass: it gives no reason.
    """
    findings = []
    for module in modules:
        comments = comments_of(module.text)
        scopes: list[ast.Module | ast.ClassDef] = [module.tree]
        scopes += [node for node in module.tree.body if isinstance(node, ast.ClassDef)]
        for scope in scopes:
            prefix = f"{scope.name}." if isinstance(scope, ast.ClassDef) else ""
            for node, name, text in assignments(scope.body):
                is_final = isinstance(node, ast.AnnAssign) and "Final" in ast.dump(node.annotation)
                if not is_numeric(node.value) or (prefix and not is_final):
                    continue
                texts = [text or "", *_comments_at(node, comments)]
                if not any(len(words.split()) >= _MIN_WORDS for words in texts):
                    value = ast.unparse(node.value) if node.value else ""
                    findings.append(f"{module.path}:{node.lineno} {prefix}{name} = {value}")
    return Count(len(findings), findings)


def comments_of(text: str) -> dict[int, tuple[str, bool]]:
    """Line -> (comment, True if the line has no code). Exemptions and rulers are left out."""
    return {
        token.start[0]: (token.string.strip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT and not _EXEMPTION.match(token.string)
    }


def _comments_at(node: Assignment, comments: dict[int, tuple[str, bool]]) -> list[str]:
    """Return the comments on the lines of ``node``, and the block of comments above it as one."""
    last = node.end_lineno or node.lineno
    beside = [comments[line][0] for line in range(node.lineno, last + 1) if line in comments]
    above: list[str] = []
    line = node.lineno - 1
    while line in comments and comments[line][1]:
        above.insert(0, comments[line][0])
        line -= 1
    return [*beside, " ".join(above)]


# --- names ----------------------------------------------------------------------------------------


def count_names(modules: list[Module]) -> Count:
    """Find names that mean different things in different modules.

    These are constants with different values, classes and type aliases, public functions, and
    modules of different packages. A leading underscore makes no difference between two names.
    Methods are not compared: protocols and their implementations share names on purpose.
    """
    places: dict[str, dict[str, str]] = defaultdict(dict)  # name -> place -> its sense
    for module in modules:
        path = module.path
        places[f"module {Path(path).stem}"][path] = path
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                places[f"type {node.name.lstrip('_')}"][f"{path}:{node.lineno}"] = path
        for owner, function in functions(module.tree):
            if owner is None and is_public(function.name):
                places[f"function {function.name}"][f"{path}:{function.lineno}"] = path
        for assigned, name, _ in assignments(module.tree.body):
            place, bare = f"{path}:{assigned.lineno}", name.lstrip("_")
            if isinstance(assigned, ast.AnnAssign) and "TypeAlias" in ast.dump(assigned.annotation):
                places[f"type {bare}"][place] = path
            elif bare.isupper() and assigned.value is not None:
                value = ast.unparse(assigned.value)
                places[f"constant {bare}"][f"{place} = {value[:40]}"] = value
    findings = [
        f"{name}: {', '.join(senses)}"
        for name, senses in sorted(places.items())
        if len(set(senses.values())) > 1 and name not in SAME_SENSE
    ]
    return Count(len(findings), findings)


# --- parameters -----------------------------------------------------------------------------------


def count_parameters(modules: list[Module]) -> Count:
    """Find functions across packages with many parameters, none of which is documented.

    A function crosses packages if its module is imported by another package. A docstring documents
    a parameter by ``name`` in backticks, or by a line of ``Args:``. The docstring of a class counts
    for its ``__init__``. Other special methods do not count: Python sets their parameters.
    """
    crossing = imported_across_packages(modules)
    findings = []
    for module in modules:
        if module.name not in crossing:
            continue
        for owner, function in functions(module.tree):
            if function.name != "__init__" and function.name.startswith("_"):
                continue
            given = function.args
            names = [
                parameter.arg
                for parameter in (*given.posonlyargs, *given.args, *given.kwonlyargs)
                if parameter.arg not in {"self", "cls"}
            ]
            text = ast.get_docstring(function) or ""
            if owner is not None and function.name == "__init__":
                text += "\n" + (ast.get_docstring(owner) or "")
            if len(names) >= _MANY_PARAMETERS and not any(_documents(text, name) for name in names):
                called = f"{owner.name}.{function.name}" if owner else function.name
                findings.append(
                    f"{module.path}:{function.lineno} {called}({', '.join(names)}): "
                    f"{text.strip().partition(chr(10))[0] or 'no docstring'}"
                )
    return Count(len(findings), findings)


def _documents(text: str, name: str) -> bool:
    return bool(re.search(rf"``{name}\b|^\s*{name}(?: \([^)]*\))?: ", text, re.MULTILINE))


def imported_across_packages(modules: list[Module]) -> set[str]:
    """Return the names of modules that a module of another package imports."""
    by_name = {module.name: module for module in modules}
    found = set()
    for module in modules:
        for node in ast.walk(module.tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            for name in names:
                target = by_name.get(name)
                if target is not None and target.package != module.package:
                    found.add(name)
    return found


# --- booleans -------------------------------------------------------------------------------------


def count_booleans(modules: list[Module]) -> Count:
    """Find yes/no names that do not begin with ``is_``, ``has_``, ``may_`` or ``can_``.

    These are functions, parameters and variables of type ``bool``, and variables that are set to
    True or False. A function that begins with one of :data:`COMMANDS` reports its success.
    """
    findings = [
        f"{module.path}:{line} {name}"
        for module in modules
        for line, name in _booleans(module.tree)
        if not re.match(r"_*(?:is|has|may|can)_", name) and name not in FOREIGN_FLAGS
    ]
    return Count(len(findings), findings)


def _booleans(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case (
                ast.FunctionDef(name=name, returns=type_)
                | ast.AsyncFunctionDef(name=name, returns=type_)
            ):
                if _is_bool(type_) and name.strip("_").partition("_")[0] not in COMMANDS:
                    yield node.lineno, name
            case ast.arg(arg=name, annotation=type_) if _is_bool(type_):
                yield node.lineno, name
            case ast.AnnAssign(target=annotated, annotation=type_) if _is_bool(type_):
                yield node.lineno, _last_name(annotated)
            case ast.Assign(targets=targets, value=ast.Constant(value=bool())):
                for target in targets:
                    if isinstance(target, (ast.Name, ast.Attribute)):
                        yield node.lineno, _last_name(target)


def _is_bool(annotation: ast.expr | None) -> bool:
    return annotation is not None and ast.unparse(annotation) in ("bool", "bool | None")


def _last_name(target: ast.expr) -> str:
    return ast.unparse(target).rpartition(".")[2]


# --- records --------------------------------------------------------------------------------------


def count_records(modules: list[Module]) -> Count:
    """Find records whose optional fields are given by position, where a reader has to count them.

    These are calls of our dataclasses and named tuples that have two or more optional fields by
    position, or a literal None, True, False or ``""``. A field is optional if it may be None or has
    a default.
    """
    records = _records(modules)
    findings = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in records:
                fields = records[ast.unparse(node.func)]
                optional = sum(fields[: len(node.args)])
                if optional > 1 or any(map(_says_nothing, node.args)):
                    findings.append(f"{module.path}:{node.lineno} {ast.unparse(node)}")
    return Count(len(findings), findings)


def _records(modules: list[Module]) -> dict[str, list[bool]]:
    """Name of a record to its fields: True for an optional one."""
    classes = {
        node.name: node
        for module in modules
        for node in module.tree.body
        if isinstance(node, ast.ClassDef)
    }

    def fields(node: ast.ClassDef) -> list[bool]:
        inherited = [
            field
            for base in node.bases
            if ast.unparse(base) in classes
            for field in fields(classes[ast.unparse(base)])
        ]
        return inherited + [
            "None" in ast.unparse(statement.annotation) or _is_default(statement.value)
            for statement in node.body
            if isinstance(statement, ast.AnnAssign)
        ]

    return {
        name: fields(node)
        for name, node in classes.items()
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
        or any(ast.unparse(base) == "NamedTuple" for base in node.bases)
    }


def _is_default(value: ast.expr | None) -> bool:
    match value:
        case ast.Call(func=ast.Name("field"), keywords=keywords):
            return any((keyword.arg or "").startswith("default") for keyword in keywords)
    return value is not None


def _says_nothing(argument: ast.expr) -> bool:
    match argument:
        case ast.Constant(value=None | bool() | ""):
            return True
    return False


# --- lines ----------------------------------------------------------------------------------------


def count_lines(modules: list[Module]) -> Count:
    """Count the lines that carry code. Strings that are statements are docstrings, not code."""
    numbers = {module.path: len(code_lines(module)) for module in modules}
    largest = sorted(numbers, key=lambda path: -numbers[path])
    return Count(sum(numbers.values()), [f"{path}: {numbers[path]} lines" for path in largest])


_NO_CODE: Final = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(module: Module) -> set[int]:
    """Return the numbers of the lines with at least one token of code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Expr) and string_of(node) is not None:
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


# --- the path of one request ----------------------------------------------------------------------


def count_path() -> dict[str, Count]:
    """Count the modules and the functions that a cold request and a warm one pass."""
    counts = {}
    for name, calls in zip(("cold", "warm"), request_path.trace(ROOT), strict=True):
        passed = sorted(call for call in calls if Path(call.file).stem not in OBSERVERS)
        files = sorted({call.file for call in passed})
        counts[f"{name}-modules"] = Count(len(files), files)
        functions_passed = [f"{call.file} {call.function}" for call in passed]
        counts[f"{name}-functions"] = Count(len(passed), functions_passed)
    return counts


# --- the command ----------------------------------------------------------------------------------

STATIC: Final[dict[str, Callable[[list[Module]], Count]]] = {
    "relative": count_relative,
    "constants": count_constants,
    "names": count_names,
    "parameters": count_parameters,
    "booleans": count_booleans,
    "records": count_records,
    "lines": count_lines,
}
"""The counts that read the source only."""


def report(counts: dict[str, Count], limits: dict[str, int]) -> int:
    """Print the table. Below it, print every finding of each count that exceeds its limit.

    Returns 1 if one of ``counts`` exceeds its entry in ``limits``, else 0.
    """
    print(f"{'name':<15} {'count':>6} {'limit':>6}")
    for name, count in counts.items():
        print(f"{name:<15} {count.number:>6} {limits[name]:>6}  {HELP[name]}")
    exceeded = [name for name, count in counts.items() if count.number > limits[name]]
    for name in exceeded:
        print(f"\n{name}: {counts[name].number}, limit {limits[name]}")
        print(*(f"  {finding}" for finding in counts[name].findings), sep="\n")
    return 1 if exceeded else 0


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command. Counts the source below ``root``, and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", metavar="NAME", choices=LIMITS, help="print the findings of NAME")
    listed = parser.parse_args(arguments).list
    if listed in STATIC:
        print(*STATIC[listed](load(root)).findings, sep="\n")
        return 0
    modules = load(root)
    counts = {name: count(modules) for name, count in STATIC.items()} | count_path()
    if listed is not None:
        print(*counts[listed].findings, sep="\n")
        return 0
    return report(counts, LIMITS)


if __name__ == "__main__":
    sys.exit(main())
