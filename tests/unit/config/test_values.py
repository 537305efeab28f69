"""The grammars of sizes, durations, ratios and hosts, and their printing."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.config import values


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("50GiB", 50 * 2**30),
        ("50 GiB", 50 * 2**30),
        ("50Gi", 50 * 2**30),
        ("500MB", 500_000_000),
        ("500M", 500_000_000),
        ("500mb", 500_000_000),
        ("1.5KiB", 1536),
        ("7B", 7),
        (123, 123),
    ],
)
def test_size_is_read_as_bytes(text: object, size: int) -> None:
    assert values.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "GiB",
        "-1",
        "1e9",
        "1 2",
        "1GiBB",
        "1XB",
        "0x10",
        "½",
        "٣",
        "0",
        "8EiB",
        True,
        1.5,
        None,
        float("nan"),
        [],
        "0.1B",
        "9" * 400,
        "1\n2",
    ],
)
def test_text_that_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="size"):
        values.parse_size(text)


@given(st.integers(1, 2**63 - 1))
def test_every_size_is_read_as_it_is_printed(size: int) -> None:
    assert values.parse_size(values.format_size(size)) == size
    assert values.parse_size(str(size)) == size


@pytest.mark.row("FE7-commands-and-start-line")
@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("50G", "50GB"),
        ("50GiB", "50GiB"),
        ("50Gi", "50GiB"),
        ("1.5TB", "1500GB"),
        ("500MB", "500MB"),
        ("1536", "1536"),
        ("1EiB", "1EiB"),
        ("128KB", "128KB"),
        ("1KiB", "1KiB"),
    ],
)
def test_size_is_printed_in_the_unit_in_which_people_write_it(written: str, printed: str) -> None:
    assert values.format_size(values.parse_size(written)) == printed


@pytest.mark.parametrize("text", ["10.0.0.0/8", "192.0.2.1", "2001:db8::/32", "::1"])
def test_address_or_network_is_accepted(text: str) -> None:
    assert values.check_network(text) == text


@pytest.mark.parametrize("text", ["", "10.0.0.1/8", "10.0.0.0/33", "proxy.example", "*", "10.0.0"])
def test_text_that_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a network, such as"):
        values.check_network(text)


@given(st.integers(1, 999), st.sampled_from(["K", "M", "G", "T"]))
def test_binary_unit_is_a_power_of_1024_and_decimal_of_1000(number: int, prefix: str) -> None:
    binary = values.parse_size(f"{number}{prefix}iB")
    decimal = values.parse_size(f"{number}{prefix}B")
    assert binary > decimal
    assert binary % 1024 == 0
    assert decimal % 1000 == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("0s", 0.0),
        ("30", 30.0),
        ("30s", 30.0),
        ("250ms", 0.25),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1d", 86400.0),
        ("2w", 1209600.0),
        ("inf", math.inf),
        (0, 0.0),
        (1.5, 1.5),
        (math.inf, math.inf),
    ],
)
def test_duration_is_read_as_seconds(text: object, seconds: float) -> None:
    assert values.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "s", "-1", "-1s", "1x", "1 s", "nan", "1e3", "5 minutes", "m5", True, math.nan, -1, None],
)
def test_text_that_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"duration|negative"):
        values.parse_duration(text)


@pytest.mark.parametrize("text", ["0", "30", " 30 ", "1.5"])
def test_age_without_a_unit_is_refused_and_all_units_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"name a unit: {text.strip()}s, .*{text.strip()}d"):
        values.parse_age(text)


@pytest.mark.parametrize("seconds", [0.0, 0.25, 30.0, 90.5, 86400.0])
def test_age_is_read_as_it_is_printed(seconds: float) -> None:
    assert values.parse_age(values.format_age(seconds)) == seconds


@given(st.one_of(st.integers(0, 10**10), st.integers(0, 10**9).map(lambda ms: ms / 1000)))
def test_every_duration_is_read_as_it_is_printed(seconds: float) -> None:
    assert values.parse_duration(values.format_duration(seconds)) == pytest.approx(
        seconds, abs=1e-6
    )


@given(st.lists(st.tuples(st.integers(0, 999), st.sampled_from(["d", "h", "m", "s"])), min_size=1))
def test_parts_of_a_duration_add_up(parts: list[tuple[int, str]]) -> None:
    whole = values.parse_duration("".join(f"{number}{unit}" for number, unit in parts))
    assert whole == sum(values.parse_duration(f"{number}{unit}") for number, unit in parts)


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused_with_value_error(text: str) -> None:
    for parse in (values.parse_size, values.parse_duration, values.parse_ratio):
        with contextlib.suppress(ValueError):
            assert parse(text) >= 0
    try:
        values.split_host(text)
    except ValueError:
        pass
    else:
        assert not set(text) & set("/?#@ \t\r\n")


@pytest.mark.parametrize(("text", "ratio"), [("0.95", 0.95), ("95%", 0.95), ("1", 1.0), (0.5, 0.5)])
def test_ratio_is_read_as_number_or_percentage(text: object, ratio: float) -> None:
    assert values.parse_ratio(text) == pytest.approx(ratio)


@pytest.mark.parametrize(
    "text", ["0", "0%", "101%", "1.1", "95", "-1", "x", "%", True, None, math.nan]
)
def test_text_that_is_no_ratio_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"ratio|more than 0"):
        values.parse_ratio(text)


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("ghcr.io", ("ghcr.io", None)),
        ("reg:5000", ("reg", 5000)),
        ("[::1]:5100", ("::1", 5100)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
    ],
)
def test_host_is_split_from_its_port(text: str, split: tuple[str, int | None]) -> None:
    assert values.split_host(text) == split


@pytest.mark.parametrize(
    "text",
    ["", ":1", "a:", "a:b", "a:65536", "::1", "[::1", "[x]:1", "a/b", "u@h", "-a", "a b", "a\n"],
)
def test_text_that_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        values.split_host(text)
