"""Closures over references, and what only some roots reach."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mirror.inventory.sharing import Sharing, reached

PARTS = {"i": ["m", "n"], "m": ["c", "l"], "n": ["d", "l"], "x": ["l", "y"]}


def test_closure_has_the_root_and_all_that_it_refers_to() -> None:
    assert reached("i", PARTS) == {"i", "m", "n", "c", "l", "d"}


def test_closure_of_references_in_a_circle_ends() -> None:
    assert set(reached("a", {"a": ["b"], "b": ["a", "b"]})) == {"a", "b"}


def test_content_of_two_roots_is_reached_only_by_both() -> None:
    sharing = Sharing.of(["i", "x"], PARTS)

    assert sharing.reached_only_by(["i"]) == {"i", "m", "n", "c", "d"}
    assert sharing.reached_only_by(["x"]) == {"x", "y"}
    assert sharing.reached_only_by(["i", "x"]) == {"i", "m", "n", "c", "d", "l", "x", "y"}
    assert sharing.reached_only_by([]) == set()


def test_content_that_is_no_root_is_reached_with_its_parts() -> None:
    assert set(Sharing.of(["i"], PARTS).reached("m")) == {"m", "c", "l"}


names = st.sampled_from("abcdefgh")
graphs = st.dictionaries(names, st.lists(names, max_size=4), max_size=8)


@given(graphs, st.sets(names, max_size=5), st.sets(names, max_size=5))
def test_reached_only_by_is_what_goes_without_these_roots(
    parts: dict[str, list[str]], going: set[str], staying: set[str]
) -> None:
    staying -= going

    found = Sharing.of(going | staying, parts).reached_only_by(going)

    def closure(roots: set[str]) -> set[str]:
        return set().union(*(reached(root, parts) for root in roots))

    assert set(found) == closure(going) - closure(staying)
