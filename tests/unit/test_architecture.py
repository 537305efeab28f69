"""The packages and their dependencies, compared with the imports of each module.

Each rule is a function that returns the violations in given sources. So each rule is also tested
itself: it must find a planted violation (``test_rule_finds_a_planted_violation``).
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TypeAlias

import pytest

ROOT = Path(__file__).parents[2]
Sources: TypeAlias = dict[str, str]
"""Dotted module name -> its text. A package is named without ``__init__``."""

SHARED = {
    *("", "oci", "observability.events", "observability.hosted_events"),
    *("observability.traces", "config.settings"),
    *("single_flight", "threads"),
}
LOADING = {"config.load", "config.values"}
OBSERVERS = {
    "observability.library_logs",
    "observability.log_stream",
    "observability.logs",
    "observability.metrics",
}
BELOW_SERVER = {"web", "pull", "store", "upstream", "history", *OBSERVERS, *SHARED}
QUEUED_WRITES = {
    *("store.batch_writer", "store.layout", "store.private_directory", "store.shared_database"),
    "store.sqlite_connection",
}
ALLOWED_IMPORTS: dict[str, set[str]] = {
    "": set(),
    "oci": {"oci"},
    "observability": set(),
    "observability.events": {
        *("oci", "observability.hosted_events", "observability.job_events"),
        *("observability.notification_events", "observability.traces"),
    },
    "observability.hosted_events": {"oci"},
    "observability.job_events": set(),
    "observability.notification_events": set(),
    "observability.traces": set(),
    "config": set(),
    "config.values": {"oci"},
    "config.section": {"config.values"},
    "config.hosted_rules": {"config.retention", "config.section"},
    "config.listeners": {"config.hosted_rules", "config.section", "config.values"},
    "config.rule_coverage": set(),
    "config.access": {"config.rule_coverage", "config.section", "config.values"},
    "config.event_target": {"config.access", "config.section", "config.values"},
    "config.prefetch": {"config.section", "oci"},
    "config.retention": {"config.section", "oci"},
    "config.transfers": {"config.section", "config.values"},
    "config.settings": {
        *("config.access", "config.event_target", "config.listeners", "config.prefetch"),
        *("config.retention", "config.section", "config.transfers", "config.values", "oci"),
    },
    "config.reload": {"config.settings", "oci"},
    "config.load": {"config.settings", "config.values", "oci"},
    "single_flight": {"oci"},
    "terminal": set(),
    "threads": set(),
    "store": {"store", *SHARED},
    "upstream": {"upstream", *SHARED},
    "hosted": {"hosted", "store", "config.values", *SHARED},
    "pull": {"pull", "store", "upstream", "hosted.hosted_service", *SHARED},
    # The header Server-Timing and the log line format the stages of a request with the same code.
    # A response is sent from the extents of a reader. ``pull`` would only pass these types on.
    "web": {
        *("web", "access.access_control", "access.failure_limit", "access.identity", "pull"),
        *("config.access", "config.values", "hosted", "observability.logs"),
        *("store.file_stamp", "store.reader", *SHARED),
    },
    # The names of earlier users are a file in the data directory.
    "access": {
        *("access", "config.access", "config.section", "store.file_stamp", "store.layout"),
        *("store.private_directory", "store.spare_file", *SHARED),
    },
    # The start line prints the quota as the configuration does.
    "observability.logs": {*SHARED, "config.values"},
    "observability.library_logs": {"observability.logs", *SHARED},
    "observability.log_stream": set(),
    "observability.hosted_metrics": {"observability.hosted_events"},
    "observability.metric_labels": set(),
    "observability.metrics": {
        "observability.metric_labels",
        "observability.hosted_metrics",
        "observability.notification_metrics",
        *SHARED,
    },
    "observability.notification_metrics": SHARED,
    # Listings say which tags are stale and which images are refused, by the rules that serve them.
    "inventory": {"inventory", "store", "pull.admission", "pull.freshness", *SHARED},
    # Where the data directory is, and which contents it has. And a file that may be replaced.
    "history": {"history", *QUEUED_WRITES, *SHARED},
    "notifications": {
        *("access.rules", "notifications", "store.disk", "store.file_stamp", "upstream.outbound"),
        *("observability.notification_events", "upstream.registries"),
        *("upstream.transport", *QUEUED_WRITES, *SHARED),
    },
    "composition": {"hosted", "pull", "store", "upstream", *SHARED},
    "operations": {
        *("operations", "composition", "config.access", "config.listeners", "config.prefetch"),
        *("access.known_names", "config.values", "history", "hosted", "inventory", "pull"),
        *("store", *SHARED),
    },
    # Its listener cuts off clients, and refuses requests of web pages, as that of ``web`` does. Its
    # tokens are in files that count as those of ``access`` do.
    "admin": {
        *("access.access_tokens", "access.watched_file", "admin", "composition", "config.values"),
        *("history", "inventory", "operations", "pull"),
        *("store", "web.browser_guard", "web.client_connection", "web.client_socket", *SHARED),
    },
    "housekeeping": {
        *("access", "composition", "operations", "pull.marks_watch", "web.listening", *SHARED),
    },
    "server": {
        *(
            "server",
            "access",
            "housekeeping",
            "admin",
            "composition",
            "notifications",
            "operations",
        ),
        *("config.reload", "terminal"),
        *BELOW_SERVER,
    },
    "processes": {
        "access.login_credentials",
        "hosted.database",
        *("store.hosted_marker", "store.layout", "terminal"),
        *("admin", "notifications", "server", "config.reload", "observability.metrics", *SHARED),
    },
    "cli": {
        *("cli", "operations", "inventory", "composition", "notifications", "processes"),
        *("access.login_credentials", "access.identity", "access.rules", "hosted.immutable_tags"),
        *("admin.tokens", "config.access", "config.rule_coverage"),
        *(*LOADING, *BELOW_SERVER),
    },
    "__main__": {"cli"},
}
"""Package -> the packages, or single modules, that it may import. Modules of ``SPLIT`` packages
count one by one."""
SPLIT = {"config", "observability"}

THIRD_PARTIES: dict[str, tuple[str, ...]] = {
    "diskcache": ("mirror.store.rows",),
    "prometheus_client": (
        *("mirror.observability.metrics", "mirror.observability.notification_metrics"),
    ),
    "pydantic": ("mirror.config", "mirror.access.access_tokens"),
    "bcrypt": ("mirror.access.users",),
    "jwt": ("mirror.access.issuers", "mirror.access.key_sets"),
    "aiohttp": (
        *("mirror.web", "mirror.upstream", "mirror.server"),
        *("mirror.admin.dispatch", "mirror.admin.listener"),
    ),
}
"""Third-party package -> the only packages and modules that may import it."""
FORBIDDEN_STDLIB: dict[str, set[str]] = {
    "oci": {"asyncio", "io", "os", "pathlib", "socket", "subprocess", "tempfile", "threading"},
    "observability.events": {"asyncio", "os", "pathlib", "socket"},
    "history": {"asyncio", "http", "socket", "ssl", "urllib"},
    "store": {"http", "socket", "ssl", "urllib"},
    "inventory": {"asyncio", "http", "socket", "ssl", "subprocess", "urllib"},
    "pull": {"http", "os", "pathlib", "socket", "ssl", "urllib"},
}
"""Package -> the modules of the standard library that it must not import ("Must not know")."""
CLIENT_LIBRARIES = {
    *("ftplib", "http.client", "httpx", "requests", "smtplib", "urllib.request", "urllib3"),
}
"""Libraries that connect without the outbound guard."""
MAY_CONNECT = {"cli", "mirror.operations.kubernetes"}
"""Package and module that may use these libraries: for ``healthcheck``, and for the API server that
an operator names. No upstream has a say in where they connect to."""
CONNECT_CALLS = {"create_connection", "open_connection", "sock_connect", "open_unix_connection"}
"""Functions that connect without the outbound guard."""

MAX_MODULE_LINES = 500


@cache
def parse(source: str) -> ast.Module:
    """Parse a module once for all rules."""
    return ast.parse(source)


def load(package: Path) -> Sources:
    found: Sources = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def package_of(module: str) -> str:
    """The package of a module: ``store`` of ``mirror.store.index``, ``""`` of ``mirror``."""
    _, first, second, *_ = [*module.split("."), "", ""]
    return f"{first}.{second}" if first in SPLIT and second else first


def imported(sources: Sources, module: str) -> set[str]:
    """The absolute names that ``module`` imports: our modules in full, others as written.

    Imports inside functions and under ``TYPE_CHECKING`` count, too.
    """
    found: set[str] = set()
    for node in ast.walk(parse(sources[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = any(name.startswith(f"{module}.") for name in sources)
                up = module.split(".")[: None if is_package and node.level == 1 else -node.level]
                base = ".".join([*up, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in sources or full in CLIENT_LIBRARIES else base)
    return found


def ours(name: str) -> bool:
    return name == "mirror" or name.startswith("mirror.")


def under(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def calls(source: str) -> Iterator[tuple[str, str]]:
    """(receiver, name) of every call, and of every bare use of an attribute."""
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield "", node.func.id


def identifiers(source: str) -> set[str]:
    """Every name, attribute and imported name."""
    return {
        getattr(node, field)
        for node in ast.walk(parse(source))
        for field in ("id", "attr", "name")
        if hasattr(node, field)
    }


# --- the rules ----------------------------------------------------------------------------------


def allowed_imports(sources: Sources) -> list[str]:
    """A package imports only the packages that ``ALLOWED_IMPORTS`` names."""
    return [
        f"{module} imports {name}"
        for module in sources
        for name in imported(sources, module)
        if ours(name)
        and not {package_of(name), name.removeprefix("mirror.")}
        & ALLOWED_IMPORTS.get(package_of(module), set())
    ]


def pure_oci(sources: Sources) -> list[str]:
    """``oci`` imports only the standard library and itself, and opens no file."""
    return [
        f"{module} imports {name}"
        for module in sources
        if package_of(module) == "oci"
        for name in imported(sources, module)
        if not ours(name) and name.split(".")[0] not in sys.stdlib_module_names
    ] + [
        f"{module} opens a file"
        for module, source in sources.items()
        if package_of(module) == "oci" and ("", "open") in set(calls(source))
    ]


def third_parties(sources: Sources) -> list[str]:
    """A third-party package is imported only where ``THIRD_PARTIES`` allows it."""
    return [
        f"{module} imports {name}"
        for module in sources
        for name in imported(sources, module)
        for party, prefixes in THIRD_PARTIES.items()
        if name.split(".")[0] == party and not under(module, prefixes)
    ]


def forbidden_stdlib(sources: Sources) -> list[str]:
    """A package does not import the modules of ``FORBIDDEN_STDLIB``."""
    return [
        f"{module} imports {name}"
        for module in sources
        for name in imported(sources, module)
        if name.split(".")[0] in FORBIDDEN_STDLIB.get(package_of(module), set())
    ]


def upstream_by_protocol(sources: Sources) -> list[str]:
    """``pull`` knows an upstream only by its protocol, so a test can use another implementation."""
    return [
        f"{module} imports {name}"
        for module in sources
        for name in imported(sources, module)
        if package_of(module) == "pull"
        and package_of(name) == "upstream"
        and name != "mirror.upstream.api"
    ]


HTTP_METHODS = {"request", "ws_connect", "get", "head", "options", "post", "put", "patch", "delete"}


def one_client_session(sources: Sources) -> list[str]:
    """Only one module makes and calls the client session, and it imports the outbound guard."""
    violations, makers, callers = [], set(), set()
    for module, source in sources.items():
        if package_of(module) != "upstream" and "ClientSession" in identifiers(source):
            violations.append(f"{module} names ClientSession")
        for receiver, name in calls(source):
            if name == "ClientSession":
                makers.add(module)
            if name in HTTP_METHODS and receiver.lower().endswith(("session", "session()")):
                callers.add(module)
            if name in CONNECT_CALLS and not receiver.endswith("socketpair"):
                violations.append(f"{module} connects with {receiver}.{name}")
        if not {package_of(module), module} & MAY_CONNECT:
            violations += [
                f"{module} imports {name}"
                for name in imported(sources, module)
                if any(under(name, (library,)) for library in CLIENT_LIBRARIES)
            ]
    if len(makers | callers) > 1:
        violations.append(f"more than one module has the session: {sorted(makers | callers)}")
    violations += [
        f"{module} calls the session without the guard"
        for module in callers
        if "mirror.upstream.outbound" not in imported(sources, module)
    ]
    return violations


def one_way_to_open_a_database(sources: Sources) -> list[str]:
    """Only one module opens a file of SQLite: it says how long to wait for other processes.

    A database in memory, or in a temporary file, has a constant for its name.
    """
    return [
        f"{module} connects to a database"
        for module, source in sources.items()
        if module != "mirror.store.sqlite_connection"
        for node in ast.walk(parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "sqlite3.connect"
        and not isinstance(node.args[0], ast.Constant)
    ]


def one_owner_of_tasks(sources: Sources) -> list[str]:
    """Only ``single_flight`` makes tasks, so none is lost when the server stops."""
    return [
        f"{module} uses {receiver}.{name}"
        for module, source in sources.items()
        if module != "mirror.single_flight"
        for receiver, name in calls(source)
        if name in {"create_task", "ensure_future", "shield"}
        and (receiver in {"", "asyncio"} or receiver.rstrip("()").endswith("loop"))
    ]


def no_default_executor(sources: Sources) -> list[str]:
    """Nothing runs in the default executor of the event loop: a call that hangs would fill it.

    ruff finds the functions that it can name (``asyncio.to_thread``), but no method of a loop.
    """
    violations = []
    for module, source in sources.items():
        for node in ast.walk(parse(source)):
            match node:
                case ast.Call(func=ast.Attribute(attr="run_in_executor"), args=[first, *_]):
                    is_default = isinstance(first, ast.Constant) and first.value is None
                case ast.Attribute(attr="getaddrinfo" | "getnameinfo", value=owner):
                    is_default = ast.unparse(owner) != "socket"
                case ast.Attribute(attr="to_thread" | "set_default_executor"):
                    is_default = True
                case ast.Call(func=ast.Attribute(attr="TCPConnector"), keywords=keywords):
                    is_default = "resolver" not in {keyword.arg for keyword in keywords}
                case ast.Call(
                    func=ast.Attribute(value=ast.Name("aiofiles"), attr="open"), keywords=keywords
                ):
                    is_default = "executor" not in {keyword.arg for keyword in keywords}
                case _:
                    is_default = False
            if is_default:
                violations.append(f"{module}:{getattr(node, 'lineno', 0)}")
    return violations


def no_import_cycles(sources: Sources) -> list[str]:
    """No module imports itself through others."""
    graph = {
        module: {name for name in imported(sources, module) if name in sources and name != module}
        for module in sources
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def module_shape(sources: Sources) -> list[str]:
    """A module has a docstring, a name that says what is in it, and a bounded length."""
    violations = []
    for module, source in sources.items():
        lines = source.count("\n")
        if lines > MAX_MODULE_LINES:
            violations.append(f"{module} has {lines} lines")
        if module.rpartition(".")[2] in {"utils", "util", "helpers", "common", "misc"}:
            violations.append(f"{module} has a name that says nothing")
        if not (ast.get_docstring(parse(source)) or "").strip():
            violations.append(f"{module} has no docstring")
    return violations


# "noqa: S104 - reason", "type: ignore[arg-type]  # reason"
_EXEMPTION = re.compile(
    r"#\s*(?:noqa|type:\s*ignore|pragma:\s*no cover|nosec)"
    r"(?:\[[^\]]*\])?(?::\s*[A-Z]+[0-9]+(?:,\s*[A-Z]+[0-9]+)*)?(?P<reason>.*)"
)


def exemptions_have_reasons(sources: Sources) -> list[str]:
    """``noqa``, ``type: ignore`` and the like are followed by a reason."""
    return [
        f"{module}:{number}: an exemption without a reason"
        for module, source in sources.items()
        for number, line in enumerate(source.splitlines(), 1)
        if (found := _EXEMPTION.search(line)) and len(found["reason"].strip(" #-:(")) < 5
    ]


RULES: list[Callable[[Sources], list[str]]] = [
    allowed_imports,
    pure_oci,
    third_parties,
    forbidden_stdlib,
    upstream_by_protocol,
    one_client_session,
    one_way_to_open_a_database,
    one_owner_of_tasks,
    no_import_cycles,
    no_default_executor,
    module_shape,
    exemptions_have_reasons,
]
MIRROR = load(ROOT / "mirror")


@pytest.mark.parametrize("rule", RULES)
def test_mirror_follows_the_rule(rule: Callable[[Sources], list[str]]) -> None:
    assert rule(MIRROR) == []


def test_exemptions_in_tests_have_reasons() -> None:
    tests = load(ROOT / "tests")
    del tests["tests.unit.test_architecture"]  # plants violations
    assert exemptions_have_reasons(tests) == []


def test_every_package_has_its_allowed_imports() -> None:
    assert {package_of(module) for module in MIRROR} <= set(ALLOWED_IMPORTS)


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (allowed_imports, "mirror.oci.x", "from mirror.config.settings import Settings"),
        (allowed_imports, "mirror.oci.x", "from mirror.observability import events"),
        (allowed_imports, "mirror.oci.x", "from ..store import index"),
        (allowed_imports, "mirror.store.x", "def f():\n    import mirror.upstream.api"),
        (allowed_imports, "mirror.upstream.x", "from mirror.store.index import Index"),
        (allowed_imports, "mirror.web.x", "from mirror.store import index"),
        (allowed_imports, "mirror.web.x", "import mirror.observability.metrics"),
        (allowed_imports, "mirror.pull.x", "from mirror.web.paths import parse"),
        (allowed_imports, "mirror.new.x", "import mirror.oci.reference"),
        (pure_oci, "mirror.oci.x", "import yarl"),
        (pure_oci, "mirror.oci.x", "open('x')"),
        (third_parties, "mirror.store.eviction", "import diskcache"),
        (third_parties, "mirror.web.health", "from prometheus_client import REGISTRY"),
        (third_parties, "mirror.pull.x", "from aiohttp.web import Request"),
        (forbidden_stdlib, "mirror.oci.x", "import asyncio"),
        (forbidden_stdlib, "mirror.pull.x", "from pathlib import Path"),
        (
            upstream_by_protocol,
            "mirror.pull.x",
            "from mirror.upstream.registry import HttpRegistry",
        ),
        (upstream_by_protocol, "mirror.pull.x", "from mirror.upstream import auth"),
        (one_client_session, "mirror.pull.x", "from aiohttp import ClientSession"),
        (one_client_session, "mirror.upstream.x", "async def f(s):\n    await s.session.get('x')"),
        (one_client_session, "mirror.upstream.x", "import urllib.request"),
        (one_client_session, "mirror.upstream.x", "from http import client"),
        (one_client_session, "mirror.web.x", "import asyncio\nasyncio.open_connection('x', 1)"),
        (one_way_to_open_a_database, "mirror.hosted.x", "import sqlite3\nsqlite3.connect(path)"),
        (one_owner_of_tasks, "mirror.pull.x", "import asyncio\nasyncio.create_task(f())"),
        (one_owner_of_tasks, "mirror.web.x", "asyncio.get_running_loop().create_task(f())"),
        (one_owner_of_tasks, "mirror.web.x", "from asyncio import shield\nshield(f())"),
        (no_default_executor, "mirror.web.x", "loop.run_in_executor(None, f)"),
        (no_default_executor, "mirror.web.x", "import asyncio\nasyncio.to_thread(f)"),
        (no_default_executor, "mirror.web.x", "import aiofiles\naiofiles.open('x')"),
        (no_default_executor, "mirror.upstream.x", "await loop.getaddrinfo('x', 1)"),
        (no_default_executor, "mirror.upstream.x", "import aiohttp\naiohttp.TCPConnector()"),
        (no_import_cycles, "mirror.oci.reference", "import mirror.oci.headers"),
        (module_shape, "mirror.oci.x", '"""x"""\n' + "#\n" * MAX_MODULE_LINES),
        (module_shape, "mirror.oci.utils", '"""x"""'),
        (module_shape, "mirror.oci.x", "x = 1"),
        (exemptions_have_reasons, "mirror.oci.x", "x = 1  # type: ignore[arg-type]"),
        (exemptions_have_reasons, "mirror.oci.x", "x = 1  # noqa: S104, E501"),
        (exemptions_have_reasons, "mirror.oci.x", "x = 1  # noqa"),
    ],
)
def test_rule_finds_a_planted_violation(
    rule: Callable[[Sources], list[str]], module: str, source: str
) -> None:
    known = {
        "mirror.oci.reference": "",
        "mirror.oci.headers": "from mirror.oci import reference",
        **dict.fromkeys(["mirror", "mirror.oci", "mirror.store", "mirror.upstream"], ""),
        **dict.fromkeys(
            ["mirror.observability.events", "mirror.store.index", "mirror.upstream.auth"], ""
        ),
    }
    before = rule(known)
    assert len(rule({**known, module: source})) > len(before)


def test_second_client_session_is_found() -> None:
    guarded = "import aiohttp\nimport mirror.upstream.outbound\nsession = aiohttp.ClientSession()\n"
    sources = {"mirror.upstream.registry": guarded + "session.get('x')"}
    assert one_client_session(sources) == []
    assert one_client_session({**sources, "mirror.upstream.auth": guarded})
    assert one_client_session({**sources, "mirror.upstream.auth": "self._session.post('x')"})


def test_exemption_with_a_reason_passes() -> None:
    for line in (
        "x = 1  # noqa: S104 - a listener, asked for",
        "x = 1  # type: ignore[arg-type]  # the stub is wrong",
    ):
        assert exemptions_have_reasons({"mirror.x": line}) == []
