"""Each count of ``tools/readability.py`` finds a planted violation, and passes the plain form."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
Plant = Callable[..., Path]


@pytest.fixture
def readability(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("readability")


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    def write(**sources: str) -> Path:
        """Write ``mirror/`` with one module for each keyword; ``__`` stands for a slash."""
        for name, source in sources.items():
            path = tmp_path / "mirror" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        return tmp_path

    return write


def count(readability: ModuleType, name: str, root: Path) -> list[str]:
    findings: list[str] = readability.STATIC[name](readability.load(root)).findings
    return findings


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """What is here."""',
        'async def f():\n    """Where it is."""',
        'class C:\n    """One who follows."""',
        'class C:\n    def f(self):\n        """Those who wait."""',
        'class C:\n    def __init__(self):\n        self.a = 1\n        """Whose it is."""',
        'class C:\n    a: int\n    """Somebody asks."""',
        'A = 1\n"""What it is."""',
        'def f() -> int:\n    """Whether it is."""',
        'a: int\n"""Whether it is."""',
        'class C:\n    """Whether it is."""',
    ],
)
def test_docstring_with_a_relative_clause_is_found(
    readability: ModuleType, plant: Plant, source: str
) -> None:
    assert len(count(readability, "relative", plant(m=source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        '"""What a module is."""',
        'def f():\n    """Return what is here."""',
        'def _f():\n    """What is here."""',
        'class _C:\n    a: int\n    """What is here."""',
        'def f():\n    def g():\n        """What is here."""',
        'def f():\n    """Whatsoever."""',
        'def f() -> bool:\n    """Whether it is."""',
        'class C:\n    @property\n    def f(self) -> bool | None:\n        """Whether it is."""',
        'a: bool\n"""Whether it is."""',
        'class C:\n    def __init__(self):\n        self.a = False\n        """Whether it is."""',
    ],
)
def test_docstring_with_a_noun_or_of_a_bool_passes(
    readability: ModuleType, plant: Plant, source: str
) -> None:
    assert count(readability, "relative", plant(m=source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "A = 5",
        "A: Final = 5.0",
        "_A_S: Final = -1",
        "A_BYTES: Final = 4 * 1024",
        "A: Final = 3 * B",
        "A, B = 1, 0.5",
        "A = 5  # bytes",
        "A = 5  # noqa: S104 - for some good reason",
        "# --- the section of it ---\nA = 5",
        "# A comment that is too far away.\n\nA = 5",
        'A = 5\n"""Bytes."""',
        "class C:\n    a: Final = 5",
    ],
)
def test_number_without_unit_or_reason_is_found(
    readability: ModuleType, plant: Plant, source: str
) -> None:
    assert len(count(readability, "constants", plant(m=source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        'A = 5\n"""Seconds until a retry."""',
        "A = 5  # bytes of one read",
        "# Seconds, as the\n# specification wants.\nA = 5",
        "A = True",
        "A = f(5)",
        'A = "5"',
        "class C:\n    a: int = 5",
        "def f():\n    a = 5",
    ],
)
def test_number_with_a_reason_and_other_values_pass(
    readability: ModuleType, plant: Plant, source: str
) -> None:
    assert count(readability, "constants", plant(m=source)) == []


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a": "LIMIT = 1", "b": "_LIMIT = 2"}, "constant LIMIT"),
        ({"a": "class Claim: pass", "b": "Claim: TypeAlias = int"}, "type Claim"),
        ({"a": "class Claim: pass", "b": "class _Claim: pass"}, "type Claim"),
        ({"a": "def judge(): pass", "b": "async def judge(): pass"}, "function judge"),
        ({"x__content": "", "y__content": ""}, "module content"),
    ],
)
def test_name_with_two_senses_is_found(
    readability: ModuleType, plant: Plant, sources: dict[str, str], found: str
) -> None:
    findings = count(readability, "names", plant(**sources))
    assert [finding.partition(":")[0] for finding in findings] == [found]


@pytest.mark.parametrize(
    "sources",
    [
        {"a": "LIMIT = 1", "b": "LIMIT = 1"},
        {"a": "def _judge(): pass", "b": "def _judge(): pass"},
        {"a": "class A:\n    def close(self): pass", "b": "def close(): pass"},
        {"x__health": "", "y__health": ""},
    ],
)
def test_name_with_one_sense_passes(
    readability: ModuleType, plant: Plant, sources: dict[str, str]
) -> None:
    assert count(readability, "names", plant(**sources)) == []


@pytest.mark.parametrize(
    "source",
    [
        'def f(a, b, c):\n    """Do it."""',
        "def f(a, /, b, *, c): pass",
        "class C:\n    async def f(self, a, b, c): pass",
        'class C:\n    """Say a."""\n    def __init__(self, a, b, c): pass',
    ],
)
@pytest.mark.parametrize("use", ["from mirror.x.m import f", "from mirror.x import m"])
def test_undocumented_parameters_across_packages_are_found(
    readability: ModuleType, plant: Plant, source: str, use: str
) -> None:
    assert len(count(readability, "parameters", plant(x__m=source, y__n=use))) == 1
    assert count(readability, "parameters", plant(x__m=source, y__n="", x__n=use)) == []


@pytest.mark.parametrize(
    "source",
    [
        'def f(a, b, c):\n    """Do it to ``b``."""',
        'def f(a, b, c):\n    """Do it.\n\n    Args:\n        a: The thing.\n    """',
        'class C:\n    """Uses ``a``."""\n    def __init__(self, a, b, c): pass',
        "class C:\n    def __aexit__(self, a, b, c): pass",
        "def f(a, b): pass",
        "def _f(a, b, c): pass",
    ],
)
def test_documented_or_few_parameters_pass(
    readability: ModuleType, plant: Plant, source: str
) -> None:
    root = plant(x__m=source, y__n="import mirror.x.m")
    assert count(readability, "parameters", root) == []


@pytest.mark.parametrize(
    "source",
    [
        "def head() -> bool: pass",
        "class C:\n    async def _wins(self) -> bool: pass",
        "def f(*, head: bool = False): pass",
        "def f(head: bool | None): pass",
        "class C:\n    head: bool",
        "class C:\n    def f(self):\n        self.head = True",
        "def f(other):\n    other.head = False",
        "def f():\n    head = False",
    ],
)
def test_yes_no_name_without_a_prefix_is_found(
    readability: ModuleType, plant: Plant, source: str
) -> None:
    assert len(count(readability, "booleans", plant(m=source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def is_head() -> bool: pass",
        "def try_lock(fd: int) -> bool: pass",
        "def f(may_wait: bool, _has_more: bool | None): pass",
        "class C:\n    can_wait: bool\n    head: int",
        "class C:\n    def f(self):\n        self._is_open = self.next = None",
        "a['head'] = True",
        "serve_stale: bool = True",
    ],
)
def test_yes_no_name_with_a_prefix_command_or_reason_passes(
    readability: ModuleType, plant: Plant, source: str
) -> None:
    assert count(readability, "booleans", plant(m=source)) == []


RECORD = """
@dataclass(frozen=True)
class Base:
    a: int
    b: int | None

class Record(Base, NamedTuple):
    c: str = field(repr=False)
    d: str = ""

"""


@pytest.mark.parametrize("call", ["Record(1, None)", "Record(1, 2, '')", "Record(1, 2, 'c', 'd')"])
def test_record_with_values_by_position_is_found(
    readability: ModuleType, plant: Plant, call: str
) -> None:
    assert len(count(readability, "records", plant(m=RECORD, n=call))) == 1


@pytest.mark.parametrize(
    "call",
    [
        *("Record(1, 2)", "Record(1, b=None, c='')", "Record(1, 2, 'c', d='')", "Base(1, 2)"),
        *("Other(None, True)", "Record(1, 2, c, d=d)", "Record(0)"),
    ],
)
def test_record_with_values_by_keyword_passes(
    readability: ModuleType, plant: Plant, call: str
) -> None:
    other = "class Other:\n    a: int | None\n    b: bool = True"
    assert count(readability, "records", plant(m=RECORD, o=other, n=call)) == []


def test_only_lines_with_code_are_counted(readability: ModuleType, plant: Plant) -> None:
    source = '"""Text.\n\nMore."""\n\n# Comment.\nA = (\n    1,\n)\n"""Below."""\nB = """x\ny"""\n'
    assert readability.count_lines(readability.load(plant(m=source))).number == 5


def test_calls_are_recorded_in_all_threads_while_active(
    monkeypatch: pytest.MonkeyPatch, plant: Plant, readability: ModuleType
) -> None:
    root = plant(m="def early(): pass\ndef here(): return [1 for _ in ()]\ndef there(): pass")
    monkeypatch.syspath_prepend(str(root / "mirror"))
    planted = importlib.import_module("m")
    recorder = readability.request_path.CallRecorder(root, "mirror")
    before = sys.getprofile()
    recorder.install()
    try:
        planted.early()
        recorder.is_active = True
        planted.here()
        thread = threading.Thread(target=planted.there)
        thread.start()
        thread.join()
    finally:
        recorder.remove()
        sys.setprofile(before)
        del sys.modules["m"]
    assert recorder.calls == {("mirror/m.py", "here"), ("mirror/m.py", "there")}


def test_path_counts_modules_and_functions_without_observers(
    monkeypatch: pytest.MonkeyPatch, readability: ModuleType
) -> None:
    call = readability.request_path.Call
    cold = {call("mirror/a.py", "f"), call("mirror/a.py", "g"), call("mirror/logs.py", "h")}
    monkeypatch.setattr(readability.request_path, "trace", lambda root: (cold, set()))
    numbers = {name: count.number for name, count in readability.count_path().items()}
    assert numbers == {
        "cold-modules": 1,
        "cold-functions": 2,
        "warm-modules": 0,
        "warm-functions": 0,
    }


def test_command_fails_and_prints_the_findings_of_a_count_above_its_limit(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    readability: ModuleType,
    plant: Plant,
) -> None:
    monkeypatch.setattr(readability, "count_path", dict)
    limits = dict.fromkeys(readability.STATIC, 0)
    monkeypatch.setattr(readability, "LIMITS", {**limits, "lines": 1})
    assert readability.main([], plant(m="A = 1  # as the disk has it")) == 0
    assert readability.main([], plant(m="A = 1")) == 1
    assert "mirror/m.py:1 A = 1" in capsys.readouterr().out.splitlines()[-1]


def test_list_prints_the_findings_of_one_count(
    capsys: pytest.CaptureFixture[str], readability: ModuleType, plant: Plant
) -> None:
    assert readability.main(["--list", "constants"], plant(m="A = 1")) == 0
    assert capsys.readouterr().out == "mirror/m.py:1 A = 1\n"


def test_every_count_has_a_limit_and_a_description(readability: ModuleType) -> None:
    assert readability.LIMITS.keys() == readability.HELP.keys()
    assert readability.STATIC.keys() < readability.LIMITS.keys()
