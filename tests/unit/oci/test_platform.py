"""Platforms, and which entries of an index a choice of platforms takes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mirror.oci.platform import Choice, Platform, choose_entries, entries_of
from mirror.oci.reference import Digest

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")


def entry(name: str, platform: str = "", attests: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {"digest": str(Digest.of(name.encode())), "size": 1}
    if platform:
        keys = ("os", "architecture", "variant")
        made["platform"] = dict(zip(keys, platform.split("/"), strict=False))
    if attests:
        made["annotations"] = {
            "vnd.docker.reference.type": "attestation-manifest",
            "vnd.docker.reference.digest": str(Digest.of(attests.encode())),
        }
    return made


def index(*entries: object) -> bytes:
    return json.dumps({"manifests": entries}).encode()


BODY = index(
    entry("a", "linux/amd64"),
    entry("b", "linux/arm64/v8"),
    entry("c", "linux/arm/v6"),
    entry("A", "unknown/unknown", attests="a"),
    entry("B", "unknown/unknown", attests="b"),
)


def chosen(choice: Choice) -> set[str]:
    return {name for name in "abcAB" if Digest.of(name.encode()) in choice.digests}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("linux/amd64", "linux/amd64"),
        ("Linux/x86_64", "linux/amd64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/arm/v6", "linux/arm/v6"),
        ("windows/amd64", "windows/amd64"),
    ],
)
def test_platform_has_containerds_normal_form(text: str, expected: str) -> None:
    assert str(Platform.parse(text)) == expected


@pytest.mark.parametrize("text", ["", "linux", "linux/", "a/b/c/d", "linux/amd 64", "*/*"])
def test_other_text_is_no_platform(text: str) -> None:
    with pytest.raises(ValueError, match="not a platform"):
        Platform.parse(text)


def test_without_platforms_all_entries_are_chosen() -> None:
    choice = choose_entries(BODY, (), has_attestations=False)
    assert chosen(choice) == set("abcAB")
    assert choice.missing == ()
    assert list(map(str, choice.present)) == ["linux/amd64", "linux/arm/v6", "linux/arm64"]


def test_chosen_platforms_leave_out_the_others_and_attestations() -> None:
    assert chosen(choose_entries(BODY, {AMD64}, has_attestations=False)) == {"a"}
    assert chosen(choose_entries(BODY, {AMD64, ARM64}, has_attestations=False)) == {"a", "b"}


def test_attestations_of_chosen_entries_come_with_them_if_wanted() -> None:
    assert chosen(choose_entries(BODY, {AMD64}, has_attestations=True)) == {"a", "A"}


def test_missing_platforms_are_named() -> None:
    choice = choose_entries(BODY, {AMD64, Platform("linux", "s390x")}, has_attestations=False)
    assert choice.missing == (Platform("linux", "s390x"),)
    assert chosen(choice) == {"a"}


def test_entries_without_platform_are_for_all_platforms() -> None:
    choice = choose_entries(index(entry("a"), entry("b")), {AMD64}, has_attestations=False)
    assert chosen(choice) == {"a", "b"}
    assert choice.missing == ()


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"{", b'{"manifests": 7}', b'{"manifests": [7, {}, {"digest": "x"}]}'),
        b"[" * 100_000,
    ],
)
def test_body_that_is_not_understood_has_no_entries(body: bytes) -> None:
    assert list(entries_of(body)) == []


def test_malformed_platforms_and_annotations_are_not_stated() -> None:
    odd = entry("a") | {"platform": {"os": 7, "architecture": ["x"]}, "annotations": "text"}
    assert [one.platform for one in entries_of(index(odd))] == [None]
