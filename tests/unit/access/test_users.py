"""htpasswd files: what is accepted, and passwords."""

from __future__ import annotations

import bcrypt
import pytest

from mirror.access import users
from mirror.access.users import PasswordCheck, parse_users
from tests.unit.access.kit import hash_of, htpasswd


def test_users_are_read_with_any_name_of_bcrypt() -> None:
    hashed = hash_of("x")
    other, third = hashed.replace("$2b$", "$2y$"), hashed.replace("$2b$", "$2a$")
    text = f"# users\n\na:{hashed}\nb:{other}\r\nc:{third}\n"
    parsed = parse_users(text.encode())
    assert (set(parsed.content), parsed.problems) == ({"a", "b", "c"}, ())
    check = PasswordCheck(parsed.content)
    assert [check.is_right(name, "x") for name in "abc"] == [True] * 3


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a:$apr1$salt$0123456789", "the hash is not bcrypt: make it with htpasswd -B"),
        ("a:{SHA}qUqP5cyxm6YcTAhz05Hph5gvu9M=", "the hash is not bcrypt"),
        ("a:plain", "the hash is not bcrypt"),
        ("a", "needs NAME:HASH: make it with htpasswd -B"),
        (f"a:$2y$15${'a' * 53}", "the cost of the hash is more than 14"),
        (f"anonymous:{'x'}", "anonymous has a meaning of its own"),
        (f"group:a:{'x'}", "the hash is not bcrypt"),
        ("a b:x", "a name has 1 to 256 printable characters and no space"),
        (":x", "a name has 1 to 256"),
    ],
)
def test_line_that_cannot_be_used_is_a_problem_and_all_others_count(
    line: str, problem: str
) -> None:
    parsed = parse_users(f"{htpasswd(one='x')}{line}\n{htpasswd(two='x')}".encode())
    assert set(parsed.content) == {"one", "two"}
    (found,) = parsed.problems
    assert found.startswith("line 2: ")
    assert problem in found
    assert "$" not in found.removeprefix("line 2: "), "no part of a hash"


def test_user_with_two_lines_is_a_problem() -> None:
    parsed = parse_users((htpasswd(a="x") + htpasswd(a="y")).encode())
    assert parsed.problems == ("line 2: the user has a line already",)
    assert PasswordCheck(parsed.content).is_right("a", "x")


def test_password_is_right_or_wrong() -> None:
    check = PasswordCheck(parse_users(htpasswd(a="pass wörd").encode()).content)
    assert check.is_right("a", "pass wörd")
    for user, password in (
        ("a", "pass"),
        ("a", ""),
        ("b", "pass wörd"),
        ("a", "\0"),
        ("a", "\ud800"),
    ):
        assert not check.is_right(user, password), (user, password)
    assert not PasswordCheck({}).is_right("a", "x")


def test_only_72_bytes_of_a_password_count_as_with_htpasswd() -> None:
    long = "x" * 80
    check = PasswordCheck({"a": bcrypt.hashpw(long[:72].encode(), bcrypt.gensalt(4))})
    assert check.is_right("a", long)
    assert not check.is_right("a", long[:71])


def test_unknown_user_costs_a_hash_of_the_usual_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes: list[bytes] = []

    def record(password: bytes, hashed: bytes) -> bool:
        hashes.append(hashed)
        return True

    monkeypatch.setattr(users.bcrypt, "checkpw", record)
    costs = {"a": "05", "b": "06", "c": "06"}
    check = PasswordCheck({name: f"$2b${cost}${'a' * 53}".encode() for name, cost in costs.items()})
    assert not check.is_right("nobody", "x")
    assert hashes[0].startswith(b"$2b$06$")
    assert len(hashes[0]) == 60


def test_name_that_an_issuer_may_give_is_refused() -> None:
    parsed = parse_users(htpasswd(**{"ci-ann": "x", "bob": "y"}).encode(), reserved=("ci-",))
    assert list(parsed.content) == ["bob"]
    assert parsed.problems == ("line 1: the name begins with the user_prefix of an issuer",)
