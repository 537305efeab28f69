"""Files of credentials: what counts when they change, break or vanish."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mirror.access import watched_file
from mirror.access.watched_file import ParsedFile, WatchedFile
from mirror.oci.errors import ConfigError


def parse(raw: bytes) -> ParsedFile[tuple[str, ...]]:
    """Parse a list of words. A word in capitals is a problem."""
    words = raw.decode().split()
    bad = tuple(f"bad word {index}" for index, word in enumerate(words) if word.isupper())
    return ParsedFile(tuple(word for word in words if not word.isupper()), bad)


def watched(path: Path) -> WatchedFile[tuple[str, ...]]:
    return WatchedFile(("access", "users"), str(path), parse, "write words")


def no_descriptor(*_: object, **__: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def has_changed(file: WatchedFile[tuple[str, ...]]) -> bool:
    """Return whether the file is to be read after it was still between two looks."""
    return file.has_changed() or file.has_changed()


def test_change_counts_once_two_looks_find_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text("a b")
    file = watched(path)
    file.read()
    path.write_text("a")
    assert not file.has_changed()
    path.write_text("a c")
    assert [file.has_changed(), file.has_changed()] == [False, True]
    file.read()
    path.unlink()
    assert not file.has_changed(), "an editor may be about to rename another one"
    path.write_text("a c")
    assert [file.has_changed(), file.has_changed()] == [False, True]


def test_file_that_is_written_all_the_time_counts_at_the_third_look(tmp_path: Path) -> None:
    path = tmp_path / "words"
    file = watched(path)
    file.read()
    looks = []
    for number in range(6):
        path.write_text("x" * number)
        looks.append(file.has_changed())
        if looks[-1]:
            file.read()
    assert looks == [False, False, True] * 2


def test_file_is_read_again_after_each_kind_of_change(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text("a b")
    file = watched(path)
    assert (file.content, file.has_changed()) == ((), True)
    assert file.read() == ()
    assert (file.content, file.has_changed()) == (("a", "b"), False)
    path.write_text("a c")
    assert has_changed(file), "of the same size"
    file.read()
    other = tmp_path / "other"
    other.write_text("a d")
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)
    assert has_changed(file), "another file of the same size and time"
    file.read()
    assert file.content == ("a", "d")


def test_what_cannot_be_read_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "words"
    path.write_text("a b")
    file = watched(path)
    file.read()
    path.write_text("a BAD c")
    assert file.read() == (f"access.users: {path}: bad word 1",)
    assert file.content == ("a", "c")
    path.write_text("")
    assert (file.read(), file.content) == ((), ())
    path.write_text("a")
    file.read()
    path.unlink()
    assert has_changed(file)
    assert file.read() == (f"access.users: {path}: No such file or directory: write words",)
    assert (file.content, file.has_changed()) == ((), False)
    path.mkdir()
    assert file.read() == (f"access.users: {path}: Is a directory",)
    path.rmdir()
    path.write_text("a b c")
    monkeypatch.setattr(watched_file, "_MAX_CREDENTIALS_BYTES", 4)
    assert file.read() == (f"access.users: {path}: larger than 4 bytes",)
    assert file.content == ()


def test_content_that_no_parser_expects_does_not_count(tmp_path: Path) -> None:
    """Otherwise a user who was removed would stay, without end."""

    def parse_or_fail(raw: bytes) -> ParsedFile[tuple[str, ...]]:
        if b"secret" in raw:
            raise LookupError(raw)
        return parse(raw)

    path = tmp_path / "words"
    path.write_text("a b")
    file = WatchedFile(("access", "users"), str(path), parse_or_fail, "write words")
    file.read()
    path.write_text("secret")
    assert file.read() == (f"access.users: {path}: its content cannot be used: write words",)
    assert (file.content, file.has_changed()) == ((), False)


def test_file_that_cannot_be_opened_for_a_moment_is_read_once_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "words"
    path.write_text("a b")
    file = watched(path)
    file.read()
    path.write_text("a c")
    with monkeypatch.context() as full:
        full.setattr(Path, "open", no_descriptor)
        assert file.read() == (f"access.users: {path}: Too many open files",)
        assert [file.has_changed() for _ in range(3)] == [False] * 3, "it is reported once"
        assert file.content == ()
    assert file.has_changed()
    assert (file.read(), file.content, file.has_changed()) == ((), ("a", "c"), False)


def test_strict_reading_refuses_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text("a BAD WORSE")
    with pytest.raises(ConfigError, match=r"^access\.users: .*words: bad word 1 \(and 1 more\)$"):
        watched(path).read_strictly()


def test_message_has_the_whole_path_and_all_problems_after_the_origin_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words").write_text("BAD WORSE")
    with pytest.raises(ConfigError) as caught:
        watched(Path("words")).read_strictly(lambda key: f"m.yaml:3: {'.'.join(map(str, key))}: ")
    assert caught.value.lines == (
        f"m.yaml:3: access.users: {tmp_path}/words: bad word 0",
        f"m.yaml:3: access.users: {tmp_path}/words: bad word 1",
    )
