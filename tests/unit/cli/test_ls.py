"""``ls``: rows, order, filters."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from mirror.oci.reference import Digest
from mirror.oci.text import size_text
from mirror.store.marks import Block, Pin
from tests.unit.cli.inventory_kit import Site
from tests.unit.inventory.kit import content, text

SMALL, LARGE = content("small", 100), content("large", 5000)


@pytest.fixture
def filled(site: Site) -> Site:
    """Three images: the second one shares a layer with the first, and lacks its own."""
    site.data.image("app:v1", "one", SMALL, checked=site.now - 10)
    site.data.image("app:v2", "two", SMALL, LARGE, checked=site.now - 4000)
    site.data.image("ghcr.io/team/tool:v1", "three", content("tool", 900), checked=site.now - 4000)
    site.data.remove(LARGE)
    return site


def names(site: Site, *arguments: str) -> list[str]:
    return [row["name"] for row in site.rows("ls", *arguments)]


ALL = ["docker.io/library/app:v1", "docker.io/library/app:v2", "ghcr.io/team/tool:v1"]


def test_table_has_a_line_for_each_image_with_its_state(filled: Site) -> None:
    title, first, second, third = filled.lines("ls")

    assert title.split()[:3] == ["UPSTREAM", "REPOSITORY", "TAG"]
    assert first.split()[:4] == ["docker.io", "library/app", "v1", "linux/amd64"]
    assert first.split()[-1] == "complete"
    assert second.endswith("partial (lacks 1 part, at least 4.9KiB)")
    assert third.split()[-4:] == ["66", "min", "ago", "complete"]


def test_json_has_the_fields_of_the_schema(filled: Site) -> None:
    rows = filled.rows("ls")

    assert [row["name"] for row in rows] == ALL
    assert [row["state"] for row in rows] == [["complete"], ["partial"], ["complete"]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("app",), ALL[:2]),
        (("*:v1",), [ALL[0], ALL[2]]),
        (("nothing",), []),
        (("--filter", "tag=v1"), [ALL[0], ALL[2]]),
        (("--filter", "state=partial"), [ALL[1]]),
        (("--filter", "state=absent"), []),
        (("--filter", "upstream=ghcr.io"), [ALL[2]]),
        (("--filter", "repository=library/*"), ALL[:2]),
        (("--filter", "platform=linux/*"), ALL),
        (("--filter", "platform=windows/*"), []),
        (("--filter", "tag=v1", "--filter", "state=complete", "app"), ALL[:1]),
        (("--filter", "kind=referrer"), []),
        (("--sort", "size"), [ALL[2], ALL[1], ALL[0]]),
        (("--sort", "unique", "--reverse"), ALL),
        (("--sort", "confirmed"), [ALL[0], ALL[1], ALL[2]]),
        (("--reverse",), ALL[::-1]),
    ],
    ids=" ".join,
)
def test_rows_are_chosen_and_sorted(
    filled: Site, arguments: tuple[str, ...], expected: list[str]
) -> None:
    assert names(filled, *arguments) == expected


def test_digest_is_found_by_its_beginning(filled: Site) -> None:
    digest = filled.rows("ls", "app:v1")[0]["digest"]

    assert names(filled, "--filter", f"digest={digest[:15]}") == ALL[:1]
    assert names(filled, "--filter", f"digest={digest[7:20]}") == ALL[:1]


def test_rows_without_a_value_are_sorted_last(filled: Site) -> None:
    body = filled.data.image("app:v3", "four")
    filled.data.rows = [row for row in filled.data.rows if ":v3" not in row[0]]

    assert names(filled, "--sort", "confirmed")[-1] == f"docker.io/library/app@{text(body)}"


@pytest.mark.parametrize("filters", ["tag", "size=1", "=", ""])
def test_filter_without_a_known_key_is_wrong_usage(filled: Site, filters: str) -> None:
    code, _, err = filled.run("ls", "--filter", filters)

    assert code == 2
    assert "KEY one of upstream, repository" in err


def test_signatures_are_listed_on_demand(site: Site) -> None:
    body = site.data.image("app:v1", "one")
    signature = f"docker.io/library/app:sha256-{Digest.of(body).hex}.sig"
    site.data.image(signature, "signature")

    assert names(site) == [ALL[0]]
    assert names(site, "--all") == [signature, ALL[0]]
    assert names(site, "--filter", "kind=referrer") == [signature]


def test_marks_are_part_of_the_state(site: Site) -> None:
    digest = Digest.of(site.data.image("app:v1", "one", checked=site.now))
    pin, block = Pin(ALL[0], digest, 1.0), Block(ALL[0], "CVE-1", 1.0)
    site.data.mark(lambda marks: replace(marks, pins={ALL[0]: pin}, blocks={ALL[0]: block}))

    (row,) = site.rows("ls", "--filter", "state=pinned")

    assert row["state"] == ["complete", "pinned", "blocked"]
    assert row["unique"] == 0
    assert "CVE-1)" in site.lines("ls")[1]


def test_data_directory_without_images_says_what_to_do(site: Site) -> None:
    code, out, err = site.run("ls")

    assert (code, out.splitlines()[0].split()[0]) == (0, "UPSTREAM")
    assert "no image in" in err


def test_whole_digest_is_printed_on_demand(filled: Site) -> None:
    digest = filled.rows("ls", "app:v1")[0]["digest"]

    assert digest in filled.lines("ls", "--no-trunc", "app:v1")[1]
    assert digest not in filled.lines("ls", "app:v1")[1]


def test_command_imports_neither_aiohttp_nor_rich(filled: Site) -> None:
    filled.data.save()
    program = (
        "import sys; from mirror.cli.main import main; "
        f"code = main(['ls', '--config', {str(filled.config)!r}]); "
        "slow = {'aiohttp', 'rich', 'diskcache', 'prometheus_client'} & set(sys.modules); "
        "sys.exit(code or (', '.join(slow) if slow else 0))"
    )

    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160, 200])
def test_terminal_of_any_width_has_whole_digests_and_sizes_on_one_line(
    filled: Site, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"ghcr.io/{'organisation/' * 4}service:2026.11.27-build-{'ab' * 20}"
    body = filled.data.image(name, "long")
    for module in ("listing", "ls"):
        monkeypatch.setattr(f"mirror.cli.{module}.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    rows = filled.rows("ls")
    lines = filled.lines("ls")
    assert max(map(len, lines)) <= width
    for row in rows:
        short = row["digest"][:19]
        (line,) = [line for line in lines if short in line]
        assert size_text(row["size"]) in line.split()
    assert any(str(Digest.of(body))[:19] in line for line in lines)
    assert ("PLATFORMS" in lines[0]) is (width >= 120)
    assert "STATE" in lines[0]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_whole_digests_leave_names_and_the_state_whole(
    filled: Site, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("listing", "ls"):
        monkeypatch.setattr(f"mirror.cli.{module}.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))

    title, first, second, _ = filled.lines("ls", "--no-trunc")

    assert title.split()[-2:] == ["UNIQUE", "STATE"]
    assert first.startswith("app ")
    assert second.endswith("partial (lacks 1 part, at least 4.9KiB)")


def test_reason_of_a_block_is_short_on_a_terminal_only(
    filled: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "CVE-2026-1234: " + "word " * 60 + "end"
    block = Block(ALL[0], reason, 1.0)
    filled.data.mark(lambda marks: replace(marks, blocks={ALL[0]: block}))
    monkeypatch.setenv("COLUMNS", "80")
    assert reason in filled.lines("ls", "app:v1")[1]
    for module in ("listing", "ls"):
        monkeypatch.setattr(f"mirror.cli.{module}.is_terminal", lambda: True)
    lines = filled.lines("ls", "app:v1")
    assert len(lines) < 9
    assert filled.rows("ls", "app:v1")[0]["blocked_why"] == reason
    shown = " ".join(filled.lines("show", "app:v1"))
    assert reason in " ".join(shown.split())


def test_tags_without_content_are_listed_by_their_state(site: Site) -> None:
    site.data.remove(site.data.image("app:v1", "one"))
    site.data.image("app:v2", "two")

    assert names(site) == ALL[1:2]
    assert names(site, "--filter", "state=absent") == ALL[:1]
