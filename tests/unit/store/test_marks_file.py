"""The form of ``marks.json``: what is written is read back, and damage is never passed over."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.store.marks_file import dump_entries, load_entries

ENTRIES = [{"pin": "docker.io/library/app:1.0"}, {"leases": "pods", "digests": ["a", "b"]}]


def load(text: str) -> list[dict[str, object]]:
    return list(load_entries(io.StringIO(text)))


@given(st.lists(st.dictionaries(st.text(), st.one_of(st.text(), st.floats(0, 1e12)))))
def test_entries_are_read_back_as_written_also_as_one_json_document(
    entries: list[dict[str, object]],
) -> None:
    text = "".join(dump_entries(entries))
    assert load(text) == entries
    assert json.loads(text) == {"version": 1, "marks": entries}
    assert load(json.dumps(json.loads(text), indent=2)) == entries, "as jq writes it"


@pytest.mark.parametrize("cut", range(1, 130, 3))
def test_file_that_ends_early_is_damaged(cut: int) -> None:
    text = "".join(dump_entries(ENTRIES))
    with pytest.raises(ValueError, match=r"ends early|no JSON"):
        load(text[:-cut])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the whole file is no JSON"),
        ("[]", "the whole file is no JSON object"),
        ('{"version": 2, "marks": []}', "its version is not 1"),
        ('{"version": 1, "marks": {}}', "it has no list of marks"),
        ('{"version": 1, "marks": [1]}', "it has no list of marks"),
        ('{"version": 1, "marks": [\n{},\nx\n]}\n', "line 3 is no JSON"),
        ('{"version": 1, "marks": [\n1\n]}\n', "line 2 is no JSON object"),
        ('{"version": 1, "marks": [\n{}\n]}\n{}\n', "line 4 follows its end"),
    ],
)
def test_damage_is_named(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^{why}$"):
        load(text)
