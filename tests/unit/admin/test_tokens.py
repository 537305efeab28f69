"""Roles of bearer tokens, their files, and the tickets of event streams."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.admin.tokens import TICKET_TTL_S, CallerRole, Tickets, Tokens
from mirror.config.settings import Admin
from mirror.oci.errors import ConfigError
from tests.unit.access.test_watched_file import no_descriptor

FULL = "full-token-0123456789"
READ_ONLY = "read-only-0123456789"


def tokens(tmp_path: Path, full: str | None = FULL, read_only: str | None = READ_ONLY) -> Tokens:
    files = {}
    for key, text in (("token_file", full), ("read_only_token_file", read_only)):
        if text is not None:
            path = tmp_path / key
            path.write_text(text)
            files[key] = str(path)
    return Tokens(Admin.model_validate(files))


def reload(found: Tokens) -> None:
    """Do what the job does in the two seconds after a change."""
    found.refresh()
    found.refresh()


def test_role_is_that_of_the_file_that_has_the_token(tmp_path: Path) -> None:
    found = tokens(tmp_path, f"# old\n{'x' * 16}\n\n  {FULL}  \n")
    assert found.role_of(f"Bearer {FULL}") is CallerRole.FULL
    assert found.role_of(f"bearer   {READ_ONLY} ") is CallerRole.READ_ONLY
    assert found.role_of(f"Bearer {'x' * 16}") is CallerRole.FULL
    for wrong in (None, "", "Bearer", f"Bearer {FULL}x", f"Basic {FULL}", FULL, "Bearer # old"):
        assert found.role_of(wrong) is None


def test_token_in_both_files_permits_everything(tmp_path: Path) -> None:
    assert tokens(tmp_path, FULL, FULL).role_of(f"Bearer {FULL}") is CallerRole.FULL


def test_without_files_everything_is_permitted() -> None:
    assert Tokens(Admin()).role_of(None) is CallerRole.FULL


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no token"),
        ("# only a comment\n", "no token"),
        ("tiny-token\n", "line 1: shorter than 16 characters"),
        (f"{FULL}\nwith a space in it\n", "line 2: may have only letters"),
        ("x" * 70_000, "larger than 65536 bytes"),
    ],
)
def test_unusable_file_is_an_error_that_names_it_and_shows_no_token(
    tmp_path: Path, text: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as raised:
        tokens(tmp_path, text)
    assert "admin.token_file" in str(raised.value)
    assert text.strip() not in str(raised.value) or not text.strip()


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: No such file or directory: make one with"):
        Tokens(Admin(token_file=str(tmp_path / "none")))


@pytest.mark.parametrize("text", [None, "", "# none\n"])
def test_emptied_or_deleted_file_revokes_its_tokens_and_says_so_once(
    tmp_path: Path, text: str | None
) -> None:
    found, path = tokens(tmp_path), tmp_path / "token_file"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(ConfigError, match="all tokens of this file are revoked"):
        reload(found)
    reload(found)
    assert found.role_of(f"Bearer {FULL}") is None
    assert found.role_of(None) is None
    assert found.role_of(f"Bearer {READ_ONLY}") is CallerRole.READ_ONLY
    path.write_text(FULL)
    reload(found)
    assert found.role_of(f"Bearer {FULL}") is CallerRole.FULL


def test_file_that_cannot_be_opened_for_a_moment_has_its_tokens_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tokens(tmp_path)
    (tmp_path / "token_file").write_text(f"{FULL}\n# new\n")
    with monkeypatch.context() as full:
        full.setattr(Path, "open", no_descriptor)
        with pytest.raises(ConfigError, match=r"Too many open files: all tokens .* are revoked"):
            reload(found)
        reload(found)
        assert found.role_of(f"Bearer {FULL}") is None
    found.refresh()
    assert found.role_of(f"Bearer {FULL}") is CallerRole.FULL


def test_removed_token_is_never_valid_and_a_malformed_line_is_reported_once(tmp_path: Path) -> None:
    new = "another-token-0123456789"
    found = tokens(tmp_path, f"{FULL}\n{new}\n")
    (tmp_path / "read_only_token_file").write_text(f"{READ_ONLY}\nwith a space in it\n")
    (tmp_path / "token_file").write_text(f"tiny-token\n{new}\n")
    with pytest.raises(ConfigError, match=r"line 1: shorter .* \(and 1 more\)"):
        reload(found)
    reload(found)
    roles = [found.role_of(f"Bearer {token}") for token in (FULL, new, READ_ONLY, "tiny-token")]
    assert roles == [None, CallerRole.FULL, CallerRole.READ_ONLY, None]


@pytest.mark.parametrize("text", ["tiny-token", None])
def test_file_that_cannot_be_used_has_no_tokens_until_it_changes(
    tmp_path: Path, text: str | None
) -> None:
    found, path = tokens(tmp_path), tmp_path / "token_file"
    path.unlink()
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    with pytest.raises(ConfigError, match="all tokens of this file are revoked"):
        reload(found)
    assert found.role_of(f"Bearer {FULL}") is None
    if text is None:
        path.rmdir()
    path.write_text(f"{FULL}\n")
    reload(found)
    assert found.role_of(f"Bearer {FULL}") is CallerRole.FULL


def test_ticket_is_valid_once_and_for_a_short_time() -> None:
    now = 0.0
    tickets = Tickets(lambda: now)
    first, second = tickets.issue(CallerRole.FULL), tickets.issue(CallerRole.READ_ONLY)
    assert tickets.redeem(second) is CallerRole.READ_ONLY
    assert tickets.redeem(second) is None
    assert tickets.redeem("other") is None
    now = TICKET_TTL_S
    assert tickets.redeem(first) is None


def test_number_of_tickets_is_bounded() -> None:
    tickets = Tickets(lambda: 0.0)
    issued = [tickets.issue(CallerRole.FULL) for _ in range(300)]
    valid = [ticket for ticket in issued if tickets.redeem(ticket)]
    assert valid == issued[-256:]
