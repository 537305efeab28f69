"""The rooms and the arrows between them, held against what the modules really import.

Every rule is a function from sources to complaints, so that each is also shown to complain: a
planted violation has to be found (``test_each_rule_can_fail``).
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TypeAlias

import pytest

ROOT = Path(__file__).parents[2]
Sources: TypeAlias = dict[str, str]
"""Dotted module name -> its text. A package is named without ``__init__``."""

GROUND = {"", "oci", "observability.events", "config.settings", "single_flight", "threads"}
LOADING = {"config.load", "config.values"}
OBSERVERS = {"observability.logs", "observability.metrics"}
BELOW_SERVER = {"web", "pull", "store", "upstream", *OBSERVERS, *GROUND}
ARROWS: dict[str, set[str]] = {
    "": set(),
    "oci": {"oci"},
    "observability": set(),
    "observability.events": {"oci"},
    "config": set(),
    "config.values": {"oci"},
    "config.settings": {"config.values", "oci"},
    "config.load": {"config.settings", "config.values", "oci"},
    "single_flight": {"oci"},
    "threads": set(),
    "store": {"store", *GROUND},
    "upstream": {"upstream", *GROUND},
    "pull": {"pull", "store", "upstream", *GROUND},
    # Server-Timing and the log line are formatted from one pull record by the same functions
    "web": {"web", "pull", "observability.logs", *GROUND},
    "observability.logs": GROUND,
    "observability.metrics": GROUND,
    "server": {"server", *BELOW_SERVER},
    "cli": {"cli", "server", *LOADING, *BELOW_SERVER},
    "__main__": {"cli"},
}
"""Package -> the packages that it may import. Modules of ``SPLIT`` packages count one by one."""
SPLIT = {"config", "observability"}

# What only some may import: the third party -> modules, by prefix.
KEEPERS: dict[str, tuple[str, ...]] = {
    "diskcache": ("mirror.store.rows",),
    "prometheus_client": ("mirror.observability.metrics",),
    "pydantic": ("mirror.config",),
    "aiohttp": ("mirror.web", "mirror.upstream", "mirror.server"),
}
# What a room must not know, whatever else it may import.
UNKNOWN_TO: dict[str, set[str]] = {
    "oci": {"asyncio", "io", "os", "pathlib", "socket", "subprocess", "tempfile", "threading"},
    "observability.events": {"asyncio", "os", "pathlib", "socket"},
    "store": {"http", "socket", "ssl", "urllib"},
    "pull": {"http", "os", "pathlib", "socket", "ssl", "urllib"},
}
# Ways out of the process that pass no guard. A command may ask its own server for its health.
DOORS = {"ftplib", "http.client", "httpx", "requests", "smtplib", "urllib.request", "urllib3"}
DIALLERS = {"create_connection", "open_connection", "sock_connect", "open_unix_connection"}

LINE_LIMIT = 500


def load(package: Path) -> Sources:
    found: Sources = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def package_of(module: str) -> str:
    """``mirror.store.index`` is in ``store``; the package itself is ``""``."""
    _, first, second, *_ = [*module.split("."), "", ""]
    return f"{first}.{second}" if first in SPLIT and second else first


def imported(sources: Sources, module: str) -> set[str]:
    """All that ``module`` imports, absolute: modules of ours in full, others as written.

    Imports inside functions and under ``TYPE_CHECKING`` count: an arrow is an arrow.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(sources[module])):
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
                found.add(full if full in sources or full in DOORS else base)
    return found


def ours(name: str) -> bool:
    return name == "mirror" or name.startswith("mirror.")


def under(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def calls(source: str) -> Iterator[tuple[str, str]]:
    """(receiver, name) of every call, and of every bare use of an attribute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield "", node.func.id


def identifiers(source: str) -> set[str]:
    """Every name, attribute and imported name."""
    return {
        getattr(node, field)
        for node in ast.walk(ast.parse(source))
        for field in ("id", "attr", "name")
        if hasattr(node, field)
    }


# --- the rules ----------------------------------------------------------------------------------


def arrows(sources: Sources) -> list[str]:
    return [
        f"{module} imports {name}"
        for module in sources
        for name in imported(sources, module)
        if ours(name) and package_of(name) not in ARROWS.get(package_of(module), set())
    ]


def ground_floor(sources: Sources) -> list[str]:
    """``oci`` is pure: the standard library and itself."""
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


def keepers(sources: Sources) -> list[str]:
    return [
        f"{module} imports {name}"
        for module in sources
        for name in imported(sources, module)
        for party, prefixes in KEEPERS.items()
        if name.split(".")[0] == party and not under(module, prefixes)
    ]


def ignorance(sources: Sources) -> list[str]:
    return [
        f"{module} imports {name}"
        for module in sources
        for name in imported(sources, module)
        if name.split(".")[0] in UNKNOWN_TO.get(package_of(module), set())
    ]


def one_protocol(sources: Sources) -> list[str]:
    """The pull room knows an upstream by its protocol only, so a test may put another there."""
    return [
        f"{module} imports {name}"
        for module in sources
        for name in imported(sources, module)
        if package_of(module) == "pull"
        and package_of(name) == "upstream"
        and name != "mirror.upstream.api"
    ]


VERBS = {"request", "ws_connect", "get", "head", "options", "post", "put", "patch", "delete"}


def one_way_out(sources: Sources) -> list[str]:
    """Only one module makes a client session and calls it, and that one asks the guard."""
    complaints, makers, callers = [], set(), set()
    for module, source in sources.items():
        if package_of(module) != "upstream" and "ClientSession" in identifiers(source):
            complaints.append(f"{module} names ClientSession")
        for receiver, name in calls(source):
            if name == "ClientSession":
                makers.add(module)
            if name in VERBS and receiver.lower().endswith(("session", "session()")):
                callers.add(module)
            if name in DIALLERS and not receiver.endswith("socketpair"):
                complaints.append(f"{module} dials by {receiver}.{name}")
        if package_of(module) != "cli":
            complaints += [
                f"{module} imports {name}"
                for name in imported(sources, module)
                if any(under(name, (door,)) for door in DOORS)
            ]
    if len(makers | callers) > 1:
        complaints.append(f"more than one module has the session: {sorted(makers | callers)}")
    complaints += [
        f"{module} calls the session without the guard"
        for module in callers
        if "mirror.upstream.outbound" not in imported(sources, module)
    ]
    return complaints


def one_owner_of_tasks(sources: Sources) -> list[str]:
    return [
        f"{module} uses {receiver}.{name}"
        for module, source in sources.items()
        if module != "mirror.single_flight"
        for receiver, name in calls(source)
        if name in {"create_task", "ensure_future", "shield"}
        and (receiver in {"", "asyncio"} or receiver.rstrip("()").endswith("loop"))
    ]


def circles(sources: Sources) -> list[str]:
    graph = {
        module: {name for name in imported(sources, module) if name in sources and name != module}
        for module in sources
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def shape(sources: Sources) -> list[str]:
    complaints = []
    for module, source in sources.items():
        lines = source.count("\n")
        if lines > LINE_LIMIT:
            complaints.append(f"{module} has {lines} lines")
        if module.rpartition(".")[2] in {"utils", "util", "helpers", "common", "misc"}:
            complaints.append(f"{module} is a room for anything")
        if not (ast.get_docstring(ast.parse(source)) or "").strip():
            complaints.append(f"{module} does not say what it is")
    return complaints


# "noqa: S104 - reason", "type: ignore[arg-type]  # reason"
_EXEMPTION = re.compile(
    r"#\s*(?:noqa|type:\s*ignore|pragma:\s*no cover|nosec)"
    r"(?:\[[^\]]*\])?(?::\s*[A-Z]+[0-9]+(?:,\s*[A-Z]+[0-9]+)*)?(?P<reason>.*)"
)


def reasons(sources: Sources) -> list[str]:
    return [
        f"{module}:{number}: an exemption without a reason"
        for module, source in sources.items()
        for number, line in enumerate(source.splitlines(), 1)
        if (found := _EXEMPTION.search(line)) and len(found["reason"].strip(" #-:(")) < 5
    ]


RULES: list[Callable[[Sources], list[str]]] = [
    arrows,
    ground_floor,
    keepers,
    ignorance,
    one_protocol,
    one_way_out,
    one_owner_of_tasks,
    circles,
    shape,
    reasons,
]
OURS = load(ROOT / "mirror")


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: Callable[[Sources], list[str]]) -> None:
    assert rule(OURS) == []


def test_exemptions_in_tests_carry_their_reason() -> None:
    tests = load(ROOT / "tests")
    del tests["tests.unit.test_architecture"]  # plants some
    assert reasons(tests) == []


def test_every_room_has_a_rule() -> None:
    assert {package_of(module) for module in OURS} <= set(ARROWS)


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (arrows, "mirror.oci.x", "from mirror.config.settings import Settings"),
        (arrows, "mirror.oci.x", "from mirror.observability import events"),
        (arrows, "mirror.oci.x", "from ..store import index"),
        (arrows, "mirror.store.x", "def f():\n    import mirror.upstream.api"),
        (arrows, "mirror.upstream.x", "from mirror.store.index import Index"),
        (arrows, "mirror.web.x", "from mirror.store import index"),
        (arrows, "mirror.web.x", "import mirror.observability.metrics"),
        (arrows, "mirror.pull.x", "from mirror.web.paths import parse"),
        (arrows, "mirror.new.x", "import mirror.oci.reference"),
        (ground_floor, "mirror.oci.x", "import yarl"),
        (ground_floor, "mirror.oci.x", "open('x')"),
        (keepers, "mirror.store.eviction", "import diskcache"),
        (keepers, "mirror.web.health", "from prometheus_client import REGISTRY"),
        (keepers, "mirror.pull.x", "from aiohttp.web import Request"),
        (ignorance, "mirror.oci.x", "import asyncio"),
        (ignorance, "mirror.pull.x", "from pathlib import Path"),
        (one_protocol, "mirror.pull.x", "from mirror.upstream.registry import HttpRegistry"),
        (one_protocol, "mirror.pull.x", "from mirror.upstream import auth"),
        (one_way_out, "mirror.pull.x", "from aiohttp import ClientSession"),
        (one_way_out, "mirror.upstream.x", "async def f(s):\n    await s.session.get('x')"),
        (one_way_out, "mirror.upstream.x", "import urllib.request"),
        (one_way_out, "mirror.upstream.x", "from http import client"),
        (one_way_out, "mirror.web.x", "import asyncio\nasyncio.open_connection('x', 1)"),
        (one_owner_of_tasks, "mirror.pull.x", "import asyncio\nasyncio.create_task(f())"),
        (one_owner_of_tasks, "mirror.web.x", "asyncio.get_running_loop().create_task(f())"),
        (one_owner_of_tasks, "mirror.web.x", "from asyncio import shield\nshield(f())"),
        (circles, "mirror.oci.reference", "import mirror.oci.headers"),
        (shape, "mirror.oci.x", '"""x"""\n' + "#\n" * LINE_LIMIT),
        (shape, "mirror.oci.utils", '"""x"""'),
        (shape, "mirror.oci.x", "x = 1"),
        (reasons, "mirror.oci.x", "x = 1  # type: ignore[arg-type]"),
        (reasons, "mirror.oci.x", "x = 1  # noqa: S104, E501"),
        (reasons, "mirror.oci.x", "x = 1  # noqa"),
    ],
)
def test_each_rule_can_fail(rule: Callable[[Sources], list[str]], module: str, source: str) -> None:
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


def test_two_sessions_are_one_too_many() -> None:
    guarded = "import aiohttp\nimport mirror.upstream.outbound\nsession = aiohttp.ClientSession()\n"
    sources = {"mirror.upstream.registry": guarded + "session.get('x')"}
    assert one_way_out(sources) == []
    assert one_way_out({**sources, "mirror.upstream.auth": guarded})
    assert one_way_out({**sources, "mirror.upstream.auth": "self._session.post('x')"})


def test_an_exemption_with_a_reason_is_one() -> None:
    for line in (
        "x = 1  # noqa: S104 - a listener, asked for",
        "x = 1  # type: ignore[arg-type]  # the stub is wrong",
    ):
        assert reasons({"mirror.x": line}) == []
