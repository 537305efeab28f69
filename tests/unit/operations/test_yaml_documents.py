"""YAML of others, read with bounds (hostile files: deep, large, aliases without end)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.operations import yaml_documents
from mirror.operations.yaml_documents import DocumentsRefused, read_documents


def read(text: str) -> list[Any]:
    return list(read_documents(text))


def refusal(text: str) -> DocumentsRefused:
    with pytest.raises(DocumentsRefused) as caught:
        read(text)
    return caught.value


def test_scalars_stay_text_and_empty_documents_are_left_out() -> None:
    assert read("a: 1\nb: yes\nc: ~\n---\n---\n# nothing\n---\n- x\n---\nnull\n--- text") == [
        {"a": "1", "b": "yes", "c": ""},
        ["x"],
        "text",
    ]


def test_null_is_not_text_unless_it_is_quoted_or_a_key() -> None:
    text = "image: null\nlist: [~, 'null']\nquoted: 'null'\nnull: Null\n"
    assert read(text) == [{"image": "", "list": ["", "null"], "quoted": "null", "null": ""}]


def test_json_is_read() -> None:
    assert read('{"a": [{"b": "c"}, null]}') == [{"a": [{"b": "c"}, ""]}]


def test_alias_and_merge_key_give_the_value_of_the_anchor() -> None:
    text = "base: &b {image: x, tag: '1'}\none: {<<: *b, tag: '2'}\ntwo: {<<: [*b, {more: y}]}\n"
    assert read(text) == [
        {
            "base": {"image": "x", "tag": "1"},
            "one": {"image": "x", "tag": "2"},
            "two": {"image": "x", "tag": "1", "more": "y"},
        }
    ]


def test_tags_are_not_interpreted() -> None:
    assert read("!!python/object/apply:os.system ['true']") == [["true"]]
    assert read("a: !custom 7") == [{"a": "7"}]


def test_key_that_is_no_text_is_dropped_with_its_value() -> None:
    assert read("? [a, b]\n: c\nd: e\n") == [{"d": "e"}]


def test_documents_before_a_broken_one_are_returned() -> None:
    documents = read_documents("a: b\n---\nc: [d\n---\ne: f\n")
    assert next(documents) == {"a": "b"}
    with pytest.raises(DocumentsRefused, match="not YAML") as caught:
        next(documents)
    assert caught.value.line == 4


@pytest.mark.parametrize("text", ["a: \x00", "a: \x07", "a: b\n c: d", "\t- a", "a: 'b", "*x"])
def test_text_that_is_no_yaml_is_refused_with_its_line(text: str) -> None:
    assert refusal(text).line >= 1


def test_alias_of_itself_is_refused() -> None:
    assert "part of" in str(refusal("a: &a [*a]"))


def test_anchor_ends_with_its_document() -> None:
    assert refusal("a: &a b\n---\nc: *a\n").line == 3


@pytest.mark.parametrize("text", ["[" * 200, "{a: " * 200, "- " * 200 + "a"])
def test_deep_nesting_is_refused_before_the_end_is_read(text: str) -> None:
    assert "levels deep" in str(refusal(text))


def test_each_use_of_an_alias_counts_so_a_billion_laughs_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    refused = refusal("\n".join(lines))
    assert "more than" in str(refused)
    assert refused.line <= 7


def test_number_of_values_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_documents, "MAX_VALUES", 50)
    assert read("- a\n" * 49)
    assert "more than 50 values" in str(refusal("- a\n" * 50))
    assert "more than 50 values" in str(refusal("- []\n" * 50))


@given(st.text(alphabet="ab:-[]{}&*!<'\"\n #|>%?,~", max_size=60))
def test_any_text_gives_plain_values_or_is_refused(text: str) -> None:
    try:
        documents = read(text)
    except DocumentsRefused:
        return
    assert all(isinstance(one, str | list | dict) for one in documents)
