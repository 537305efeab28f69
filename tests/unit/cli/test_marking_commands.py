"""``pin``, ``block``, ``freeze``, ``rollback``: on a directory that a server has filled."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import mirror.operations.asking  # noqa: F401 - its import would count as a slow callback
from mirror.cli.main import main
from mirror.cli.schemas import SCHEMAS
from mirror.observability.events import TagMoved
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.layout import Layout
from mirror.store.marks import Marks, protected_roots, read_marks
from tests.unit.history.kit import recording
from tests.unit.store.kit import fill_up, image, index_of, opened, pulled, small_disk

LAYERS = (b"layer of v1", b"layer of v2")
OLD, NEW = (image(layer) for layer in LAYERS)
INDEX = index_of(NEW)
NAME = "docker.io/library/app"


@dataclass
class Filled:
    """A data directory whose tag ``latest`` was OLD, and is INDEX with NEW now."""

    layout: Layout
    config: Path
    capsys: pytest.CaptureFixture[str]

    def run(self, *argv: str, code: int = 0) -> str:
        """Run a command, and return what it prints on standard output."""
        command, *rest = argv
        assert main([command, "--config", str(self.config), *rest]) == code
        out, self.notes = self.capsys.readouterr()
        return out

    def rows(self, *argv: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.run(*argv, "--json").splitlines()]
        for row in rows:
            jsonschema.validate(row, SCHEMAS[argv[0]])
        return rows

    @property
    def marks(self) -> Marks:
        return read_marks(self.layout)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")

    async def fill() -> None:
        async with opened(root / "data") as store:
            await pulled(store, OLD, Tag("latest"), LAYERS[0], b"{}")
            await pulled(store, NEW, None, LAYERS[1])
            await pulled(store, INDEX, Tag("latest"))

    asyncio.run(fill())
    return root / "data"


@pytest.fixture
def filled(template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Filled:
    root = tmp_path / "data"
    shutil.copytree(template, root)
    config = tmp_path / "mirror.yaml"
    config.write_text(
        f"data_dir: {root}\nupstreams: {{docker.io: {{endpoints: ['http://127.0.0.1:9']}}}}\n"
    )
    return Filled(Layout(root), config, capsys)


def test_pin_is_listed_until_it_is_taken_away(filled: Filled) -> None:
    assert filled.run("pin", "app") == f"pinned {NAME}:latest\n"
    assert filled.notes == ""
    since = filled.rows("pin")[0]["since"]
    first, second = filled.rows("pin", "app", f"app@{Digest.of(OLD)}")
    assert first == {"image": f"{NAME}:latest", "digest": str(Digest.of(INDEX)), "since": since}
    assert second.pop("since") >= since
    assert second == {"image": f"{NAME}@{Digest.of(OLD)}", "digest": str(Digest.of(OLD))}
    title, *lines = filled.run("pin").splitlines()
    assert title.split() == ["IMAGE", "DIGEST", "SINCE"]
    assert len(lines) == 2
    assert filled.run("unpin", "app", "other") == f"unpinned {NAME}:latest\n"
    assert filled.notes == "oci-mirror: docker.io/library/other:latest was not pinned\n"
    assert set(filled.marks.pins) == {f"{NAME}@{Digest.of(OLD)}"}


def test_mark_of_a_tag_that_has_moved_means_what_clients_get(filled: Filled) -> None:
    """A client's HEAD has found that the tag has moved. Nobody has pulled the new content."""
    old, new = Digest.of(OLD), Digest.of(INDEX)
    filled.layout.blob(new).unlink()
    filled.run("pin", "app")
    filled.run("freeze", "app")
    filled.run("block", "app:latest")
    assert filled.marks.pins[f"{NAME}:latest"].digest == old
    assert filled.marks.freezes[f"{NAME}:latest"].digests == (old,)
    assert filled.marks.blocks[f"{NAME}:latest"].digests == {old, new}


def test_block_and_lease_of_a_tag_that_is_rolled_back_mean_both_digests(
    filled: Filled, tmp_path: Path
) -> None:
    filled.run("rollback", "app", "--to", str(Digest.of(OLD)))
    filled.run("block", "app:latest")
    expected = {Digest.of(OLD), Digest.of(INDEX)}
    assert filled.marks.blocks[f"{NAME}:latest"].digests == expected | {Digest.of(NEW)}
    (tmp_path / "list").write_text("app\n")
    filled.run("in-use", "--file", str(tmp_path / "list"))
    assert {one.digest for one in filled.marks.leases.values()} == expected


def test_pin_of_an_image_that_is_not_here_pins_none_of_them(filled: Filled) -> None:
    assert filled.run("pin", "app", "app:missing", code=1) == ""
    assert filled.notes == (
        f"oci-mirror: {NAME}:missing is not in the cache: pull it through the mirror first\n"
    )
    assert filled.marks == Marks()
    filled.run("pin", f"app@{Digest.of(b'not here')}")
    assert "is not complete here" in filled.notes


@pytest.mark.parametrize("command", ["pin", "freeze", "rollback"])
def test_index_that_cannot_be_read_is_not_taken_for_a_tag_that_is_not_here(
    filled: Filled, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr("mirror.store.index.read_tag", fail)
    filled.run(command, "app", *(["--to", "abcd"] if command == "rollback" else []), code=1)
    assert "the index cannot be read" in filled.notes
    assert "not in the cache" not in filled.notes


def test_block_has_the_digests_of_the_image_and_its_platforms(filled: Filled) -> None:
    said = filled.run("block", "app", "--reason", "CVE-2026-1")
    assert said == f"blocked {NAME}: a running server applies it within a second\n"
    [row] = filled.rows("block", "app:latest")
    assert row["target"] == f"{NAME}:latest"
    assert row["digests"] == sorted([str(Digest.of(INDEX)), str(Digest.of(NEW))])
    assert filled.rows("block", str(Digest.of(LAYERS[0])))[0]["digests"] == [
        str(Digest.of(LAYERS[0]))
    ]
    assert [one["target"] for one in filled.rows("block")] == [
        NAME,
        f"{NAME}:latest",
        str(Digest.of(LAYERS[0])),
    ]
    filled.run("unblock", "app", "app:latest", "other")
    assert filled.notes == "oci-mirror: docker.io/library/other was not blocked\n"
    assert set(filled.marks.blocks) == {str(Digest.of(LAYERS[0]))}


@pytest.mark.parametrize("target", [f"{NAME}@{{}}", "{}", f"{NAME}:missing"])
def test_block_says_what_it_does_not_refuse_of_an_image_that_is_not_here(
    filled: Filled, target: str
) -> None:
    filled.run("block", target.format(Digest.of(INDEX)))
    filled.layout.blob(Digest.of(INDEX)).unlink()
    filled.run("block", target.format(Digest.of(INDEX)))
    what = "its digest is not refused" if "missing" in target else "if it is an index, also block"
    assert what in filled.notes


def test_freeze_keeps_the_manifest_of_clients_that_get_another_one(filled: Filled) -> None:
    async def pull() -> None:
        async with opened(filled.layout.root) as store:
            app = Repository("docker.io", "library/app")
            await store.index.confirm_tag(app, Tag("latest"), Digest.of(NEW), " old clients")

    asyncio.run(pull())
    filled.run("freeze", "app")
    (freeze,) = filled.marks.freezes.values()
    assert freeze.digests == (Digest.of(INDEX), Digest.of(NEW))
    assert Digest.of(NEW) in protected_roots(filled.marks, 0.0)
    rows = filled.rows("ls", "app:latest")
    assert {row["digest"] for row in rows} == {str(Digest.of(INDEX)), str(Digest.of(NEW))}
    assert all("frozen" in row["state"] for row in rows)


def test_second_block_of_a_target_replaces_the_reason_and_keeps_its_digests(
    filled: Filled,
) -> None:
    filled.run("block", "app:latest", "--reason", "one")
    filled.run("rollback", "app", "--to", Digest.of(OLD).hex[:12])
    [row] = filled.rows("block", "app:latest", "--reason", "two")
    assert row["reason"] == "two"
    assert str(Digest.of(INDEX)) in row["digests"]


@pytest.mark.parametrize(
    ("target", "said"), [("ev*", "begins with its registry"), ("A", "cannot be blocked")]
)
def test_target_that_cannot_be_blocked_is_wrong_usage(
    filled: Filled, target: str, said: str
) -> None:
    filled.run("block", target, code=2)
    assert said in filled.notes
    assert filled.marks == Marks()


def test_reason_of_several_lines_is_refused(filled: Filled) -> None:
    filled.run("block", "app", "--reason", "a\nb", code=2)
    assert filled.notes == "oci-mirror: a reason is one line of at most 500 characters\n"


def test_frozen_tag_stays_frozen_until_it_is_let_go(filled: Filled) -> None:
    index = str(Digest.of(INDEX))
    assert filled.run("freeze", "app") == (
        f"frozen {NAME}:latest at {index}: a running server applies it within a second\n"
    )
    assert filled.rows("freeze", "app") == filled.rows("freeze")
    assert filled.rows("freeze")[0]["digest"] == index
    said = "a running server applies it within a second"
    assert filled.run("unfreeze", "app", "other") == f"unfrozen {NAME}:latest: {said}\n"
    assert filled.notes == "oci-mirror: docker.io/library/other:latest was not frozen\n"
    assert filled.marks == Marks()


def test_digest_cannot_be_frozen(filled: Filled) -> None:
    filled.run("freeze", f"app@{Digest.of(OLD)}", code=2)
    assert "which never changes: give a tag" in filled.notes


def test_rollback_freezes_an_earlier_digest_that_is_complete(filled: Filled) -> None:
    old = Digest.of(OLD)
    for to in (old.hex[:6], f"sha256:{old.hex[:6]}", str(old)):
        [row] = filled.rows("rollback", "app", "--to", to)
        assert (row["image"], row["digest"], row["missing"]) == (f"{NAME}:latest", str(old), 0)
    assert filled.notes == ""
    assert filled.rows("pin", "app")[0]["digest"] == str(old), "clients get this one"


@pytest.mark.parametrize(
    ("to", "said"),
    [("abc", "at least 4 digits"), ("ffffffff", "has not had"), ("sha512:", "at least 4 digits")],
)
def test_rollback_to_another_digest_says_which_the_tag_has_had(
    filled: Filled, to: str, said: str
) -> None:
    filled.run("rollback", "app", "--to", to, code=1 if said == "has not had" else 2)
    assert said in filled.notes
    if said == "has not had":
        assert Digest.of(OLD).hex[:12] in filled.notes
    assert filled.marks == Marks()


def test_rollback_to_an_incomplete_image_asks_the_upstream(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.layout.blob(Digest.of(LAYERS[0])).unlink()
    filled.layout.blob(Digest.of(OLD)).unlink()
    filled.run("rollback", "app", "--to", str(Digest.of(OLD)), code=1)
    assert "127.0.0.1" in filled.notes or "upstream" in filled.notes
    assert filled.marks == Marks(), "nothing is frozen at an image that nobody has"


def test_rollback_knows_the_digests_that_history_shows(filled: Filled) -> None:
    """Also after ``rm`` has removed the tag, and the index has forgotten them."""

    async def see() -> None:
        with recording(filled.layout.root, time.time()) as made:
            old = str(Digest.of(OLD))
            moved = TagMoved("docker.io", "library/app", "gone", "", old, time.time(), None)
            made.recorder.observe(moved)
            made.write()

    asyncio.run(see())
    [row] = filled.rows("history", "app:gone")
    [frozen] = filled.rows("rollback", "app:gone", "--to", row["digest"][:12])
    assert frozen["digest"] == row["digest"] == str(Digest.of(OLD))


def test_rollback_lets_the_digest_go_that_it_rolls_back_from(filled: Filled) -> None:
    filled.run("rollback", "app", "--to", Digest.of(OLD).hex[:6])
    states = {row["digest"]: row["state"] for row in filled.rows("ls", "app")}
    assert "frozen" in states.pop(str(Digest.of(OLD)))
    assert states
    assert not any("frozen" in state for state in states.values())


def test_rollback_to_an_incomplete_image_of_the_upstream_says_what_is_missing(
    filled: Filled,
) -> None:
    filled.layout.blob(Digest.of(LAYERS[0])).unlink()
    [row] = filled.rows("rollback", "app", "--to", str(Digest.of(OLD)))
    assert row["missing"] == 1
    assert "1 part missing here" in filled.notes


def test_directory_without_a_mirror_is_not_created(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], filled: Filled
) -> None:
    filled.config.write_text(filled.config.read_text().replace("/data\n", "/typo\n"))
    for argv in (["pin", "app"], ["block", "app"], ["freeze", "app"], ["unpin", "app"]):
        filled.run(*argv, code=1)
        assert f"{tmp_path}/typo is no data directory of a mirror" in filled.notes
    assert not (tmp_path / "typo").exists()


@pytest.mark.row("D2-full-disk")
def test_full_disk_lets_marks_be_taken_away_and_is_named_by_what_it_has_no_room_for(
    filled: Filled, template: Path, tmp_path: Path
) -> None:
    (tmp_path / "small").mkdir()
    with small_disk(tmp_path / "small", "8m") as mount:
        shutil.copytree(template, mount / "data")
        filled.config.write_text(
            filled.config.read_text().replace(str(tmp_path / "data"), str(mount / "data"))
        )
        layout = Layout(mount / "data")
        for command in ("pin", "block", "freeze"):
            filled.run(command, "app")
        before = read_marks(layout)
        fill_up(mount)
        digests = "".join(f"{Digest.of(b'%d' % number)}\n" for number in range(1000))
        (tmp_path / "list").write_text(digests)
        filled.run("in-use", "--file", str(tmp_path / "list"), code=1)
        said = "marks.json: No space left on device: the marks are as they were"
        assert said in filled.notes
        assert read_marks(layout) == before
        for command in ("unpin", "unblock", "unfreeze"):
            assert filled.run(command, "app")
        assert read_marks(layout) == Marks()


@pytest.mark.parametrize("damage", ["{}", "directory"])
def test_damaged_marks_are_named_with_the_remedy_and_stay(filled: Filled, damage: str) -> None:
    if damage == "directory":
        filled.layout.marks.mkdir()
    else:
        filled.layout.marks.write_text(damage)
    commands: list[Callable[[], str]] = [
        lambda: filled.run("pin", "app", code=1),
        lambda: filled.run("pin", code=1),
        lambda: filled.run("unblock", "app", code=1),
    ]
    for command in commands:
        command()
        assert filled.notes.count("\n") == 1
        assert "marks.json is damaged" in filled.notes
        assert "delete it" in filled.notes
    assert filled.layout.marks.exists()


def test_block_of_a_registry_that_is_not_configured_warns(filled: Filled) -> None:
    filled.run("block", "nope.io/x/*")
    assert (
        "warning: nope.io is not one of upstreams, so nothing matches nope.io/x/*" in filled.notes
    )
    filled.run("block", "*/x")
    assert filled.notes == ""


def test_block_of_the_bare_name_of_a_registry_says_how_to_block_all_of_it(filled: Filled) -> None:
    filled.run("block", "docker.io", code=2)
    assert "docker.io is a registry: block 'docker.io/*' for all of it" in filled.notes
    assert not filled.marks.blocks
