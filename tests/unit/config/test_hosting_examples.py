"""Each YAML example in docs/hosting.md is a valid configuration, or one of another program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mirror.access.access_tokens import parse_tokens
from mirror.config.access import AccessSection
from mirror.config.settings import Settings

DOCUMENT = (Path(__file__).parents[3] / "docs/hosting.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
UPSTREAMS = {"docker.io": {"endpoints": ["https://registry-1.docker.io"]}}
HOSTED = {"name": "registry.example.internal", "listen": "127.0.0.1:5101"}


def check_configuration(document: dict[str, Any]) -> None:
    """Raise an error of pydantic unless the sections are valid."""
    hosted = {**HOSTED, **document.get("hosted", {})}
    Settings.model_validate({"upstreams": UPSTREAMS, **document, "hosted": hosted})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 12


@pytest.mark.parametrize("text", EXAMPLES)
def test_yaml_example_is_valid(text: str) -> None:
    document = yaml.safe_load(text)
    if isinstance(document, list) and "repositories" in document[0]:
        assert AccessSection.model_validate({"rules": document}).rules
    elif isinstance(document, list):
        assert not parse_tokens(text.encode()).problems
    elif {"hosted", "access", "events"} & set(document):
        check_configuration(document)
    else:
        # Pods, and jobs of CI: tests/real/test_hosting_documents.py runs them.
        assert document.get("kind") == "Pod" or "push" in document.get("jobs", document)
