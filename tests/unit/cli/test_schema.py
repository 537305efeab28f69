"""``schema``: the printed schema agrees with the loader, the shipped file and the documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from mirror.cli.main import main
from mirror.cli.schema import json_schema
from mirror.config.load import load
from mirror.oci.errors import ConfigError

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "config" / "mirror.schema.json"
CONFIGURATION = ROOT / "config" / "mirror.yaml"
SCHEMA = json_schema()
VALIDATOR = Draft7Validator(SCHEMA)
ANY_UPSTREAM = "<host>"
"""Stands for the name of an upstream in the path of a key, as in docs/configuration.md."""
HUB = "upstreams:\n  docker.io:\n    endpoints: [https://r.example]\n"


def keys(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Path of each key, as in docs/configuration.md, and its schema."""
    for key, value in schema.get("properties", {}).items():
        yield f"{prefix}{key}", value
        yield from keys(value, f"{prefix}{key}.")
        entry = value.get("additionalProperties")
        if isinstance(entry, dict):
            yield from keys(entry, f"{prefix}{key}.{ANY_UPSTREAM}.")


KEYS = dict(keys(SCHEMA))


def test_shipped_schema_equals_the_printed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert SHIPPED.read_text(encoding="utf-8") == printed, (
        "run: oci-mirror schema > config/mirror.schema.json"
    )
    assert json.loads(printed) == SCHEMA


def test_schema_is_valid_and_names_no_host() -> None:
    Draft7Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == Draft7Validator.META_SCHEMA["$schema"]
    assert SCHEMA["$id"].startswith("urn:")
    assert SCHEMA["title"]


def test_every_key_has_a_description_of_whole_sentences() -> None:
    assert len(KEYS) > 30
    for path, schema in KEYS.items():
        assert schema["description"].endswith("."), path


def test_every_section_refuses_unknown_keys() -> None:
    sections = [SCHEMA, KEYS["upstreams"]["additionalProperties"], *KEYS.values()]
    for section in sections:
        if "properties" in section:
            assert section["additionalProperties"] is False


def test_shipped_configuration_names_its_schema_for_editors() -> None:
    first = CONFIGURATION.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# yaml-language-server: $schema={SHIPPED.name}"
    assert SHIPPED.parent == CONFIGURATION.parent


@pytest.mark.parametrize(
    "path",
    [CONFIGURATION, ROOT / "config" / "kubernetes" / "mirror.yaml"],
    ids=lambda p: p.parent.name,
)
def test_shipped_configurations_validate(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [error.message for error in VALIDATOR.iter_errors(yaml.safe_load(text))] == []


# --- the loader ----------------------------------------------------------------------------------


def loads(text: str, tmp_path: Path) -> bool:
    file = tmp_path / "m.yaml"
    file.write_text(text)
    try:
        load(str(file), {})
    except ConfigError:
        return False
    return True


def with_key(path: str, value: str) -> str:
    """A configuration of one upstream, with this value (YAML) of the key."""
    *sections, key = path.removeprefix(f"upstreams.{ANY_UPSTREAM}.").split(".")
    indentation = "    " if path.startswith("upstreams.") else ""
    lines = [HUB]
    for section in sections:
        lines.append(f"{indentation}{section}:\n")
        indentation += "  "
    return "".join([*lines, f"{indentation}{key}: {value}\n"])


DURATIONS = ["30", "0.5", "30s", "1h30m", "250ms", "1.5d", "'30'", "' 5m '", "2w"]
NO_DURATIONS = ["-1", "-1s", "fast", "5 m", "5M", "m5", "''", "true", "[5m]", "1e3s"]
SIZES = ["4096", "50GiB", "500MB", "50Gi", "1.5 TiB", "10b", "1k", "1.5", "'4096'"]
NO_SIZES = ["0", "-1", "0.5", "big", "50GiBs", "50iB", "true", "[1]", "5 0GB"]
RATIOS = ["0.9", "1", "90%", "'0.9'", "87.5 %"]
NO_RATIOS = ["0", "1.5", "-0.5", "much", "'%'", "true", "[0.9]"]
OTHERS = [
    ("listen", "'[::1]:5100'", True),
    ("listen", "[a]", False),
    ("workers", "4", True),
    ("workers", "0", False),
    ("workers", "257", False),
    ("workers", "many", False),
    ("abandoned", "cancel", True),
    ("abandoned", "forget", False),
    ("log.level", "debug", True),
    ("log.level", "loud", False),
    ("log.colour", "red", False),
    ("tls", "{certificate: a}", False),
    ("tls", "{certificate: a, key: b}", True),
    ("tls", "on", False),
    ("storage", "", True),
    ("storage.max_size", "", True),
    ("upstreams.<host>.pull_policy", "Never", True),
    ("upstreams.<host>.pull_policy", "", True),
    ("upstreams.<host>.pull_policy", "never", False),
    ("upstreams.<host>.serve_stale", "false", True),
    ("upstreams.<host>.serve_stale", "often", False),
    ("upstreams.<host>.allow", "[library/*]", True),
    ("upstreams.<host>.allow", "library/*", False),
    ("upstreams.<host>.credentials", "{username: a, password: b}", True),
    ("upstreams.<host>.credentials", "{user: a}", False),
    ("upstreams.<host>.limits", "", True),
    ("upstreams.<host>.limits.idle", "inf", False),
    ("upstreams.<host>.limits.idle", "0", False),
    ("upstreams.<host>.negative_ttl", "inf", False),
    ("upstreams.<host>.negative_ttl", "0", True),
    ("upstreams.<host>.tag_ttl", "inf", True),
    ("storage.reverify", "inf", True),
]
CASES = [
    *(("drain_timeout", value, True) for value in DURATIONS),
    *(("drain_timeout", value, False) for value in NO_DURATIONS),
    *(("upstreams.<host>.tag_ttl", value, True) for value in DURATIONS),
    *(("upstreams.<host>.limits.connect", value, True) for value in DURATIONS),
    *(("upstreams.<host>.limits.connect", value, False) for value in NO_DURATIONS),
    *(("storage.max_size", value, True) for value in SIZES),
    *(("storage.max_size", value, False) for value in NO_SIZES),
    *(("upstreams.<host>.limits.min_rate", value, True) for value in SIZES),
    *(("storage.high_water", value, True) for value in RATIOS),
    *(("storage.high_water", value, False) for value in NO_RATIOS),
    *OTHERS,
]


@pytest.mark.parametrize(("path", "value", "accepted"), CASES)
def test_schema_and_loader_agree(path: str, value: str, accepted: bool, tmp_path: Path) -> None:
    text = with_key(path, value)
    assert loads(text, tmp_path) is accepted
    assert VALIDATOR.is_valid(yaml.safe_load(text)) is accepted


def test_upstream_without_endpoints_is_refused_by_schema_and_loader(tmp_path: Path) -> None:
    text = "upstreams: {docker.io: {tag_ttl: 5m}}\n"
    assert not loads(text, tmp_path)
    assert not VALIDATOR.is_valid(yaml.safe_load(text))


# --- the table of docs/configuration.md -----------------------------------------------------------

MEANINGS_OF_EMPTY = {"none", "all", "shipped for the public registries"}
"""Defaults in the table that are no values: they say what an empty key means."""


def table() -> dict[str, tuple[str, str]]:
    """Key to (default, meaning), as written in the document."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("| key | default | meaning |\n")
    rows = re.match(r"(?:\|.*\n)+", rest)
    assert rows is not None, "the document has no table of keys"
    found = {}
    for row in rows[0].splitlines()[1:]:
        key, default, meaning = (cell.strip() for cell in row.strip("|").split("|"))
        assert re.fullmatch(r"`[\w.<>]+`", key), key
        found[key.strip("`")] = (default.strip("`"), meaning)
    return found


TABLE = table()


def defaults(path: str) -> dict[str, object]:
    """Default of each key in a section."""
    return {
        key.removeprefix(f"{path}."): schema["default"]
        for key, schema in KEYS.items()
        if key.startswith(f"{path}.") and "default" in schema
    }


def rows_for(path: str) -> list[str]:
    """The rows that may describe a key: its own, or that of a section around it."""
    return [key for key in TABLE if path == key or path.startswith(f"{key}.")]


@pytest.mark.parametrize("path", KEYS)
def test_table_has_every_key(path: str) -> None:
    if any(key.startswith(f"{path}.") for key in TABLE):
        return  # a section whose keys have rows of their own
    (row,) = rows_for(path)
    default, meaning = TABLE[row]
    if path != row:
        # The row of a section names its keys: in its default, or in its meaning.
        key = path.removeprefix(f"{row}.")
        assert key in defaults(row) or re.search(rf"(`|\W){key}(`|:)", meaning), meaning
    elif "properties" in KEYS[path] and default not in MEANINGS_OF_EMPTY:
        assert yaml.safe_load(default) == defaults(path)
    elif default in MEANINGS_OF_EMPTY:
        assert not KEYS[path].get("default")
    elif default == "":
        assert "null" not in KEYS[path]["type"], "only a required key has no default"
    else:
        assert yaml.safe_load(default) == KEYS[path]["default"]


def test_table_has_no_other_key() -> None:
    assert set(TABLE) <= set(KEYS)
