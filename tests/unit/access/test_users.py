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
    assert (set(parsed.content.names), parsed.problems) == ({"a", "b", "c"}, ())
    check = parsed.content
    assert [check.is_right(name, "x") for name in "abc"] == [True] * 3


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a:$apr1$salt$0123456789", "the hash is not bcrypt: make it with htpasswd -B"),
        ("a:{SHA}qUqP5cyxm6YcTAhz05Hph5gvu9M=", "the hash is not bcrypt"),
        ("a:plain", "the hash is not bcrypt"),
        ("a", "needs NAME:HASH: make it with htpasswd -B"),
        (f"a:$2y$15${'.' * 53}", "the cost of the hash is not 4 to 14: make it with htpasswd -B"),
        (f"a:$2y$03${'.' * 53}", "the cost of the hash is not 4 to 14"),
        (f"a:$2y$00${'.' * 53}", "the cost of the hash is not 4 to 14"),
        (f"a:$2y$05${'a' * 53}", "the hash is not bcrypt"),
        (f"anonymous:{'x'}", "anonymous has a meaning of its own"),
        (f"retention:{'x'}", "retention has a meaning of its own"),
        (f"collection:{'x'}", "collection has a meaning of its own"),
        (f"group:a:{'x'}", "the hash is not bcrypt"),
        ("a b:x", "a name has 1 to 256 printable characters and no space"),
        (":x", "a name has 1 to 256"),
    ],
)
def test_line_that_cannot_be_used_is_a_problem_and_all_others_count(
    line: str, problem: str
) -> None:
    parsed = parse_users(f"{htpasswd(one='x')}{line}\n{htpasswd(two='x')}".encode())
    assert set(parsed.content.names) == {"one", "two"}
    (found,) = parsed.problems
    assert found.startswith("line 2: ")
    assert problem in found
    assert "$" not in found.removeprefix("line 2: "), "no part of a hash"


def test_user_with_two_lines_is_a_problem() -> None:
    parsed = parse_users((htpasswd(a="x") + htpasswd(a="y")).encode())
    assert parsed.problems == ("line 2: the user has a line already",)
    assert parsed.content.is_right("a", "x")


def test_password_is_right_or_wrong() -> None:
    check = parse_users(htpasswd(a="pass wörd").encode()).content
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


@pytest.mark.parametrize("password", ["", "\0", "\0\0"])
def test_empty_password_is_of_nobody(password: str) -> None:
    assert not PasswordCheck({"a": bcrypt.hashpw(b"", bcrypt.gensalt(4))}).is_right("a", password)


def test_only_72_bytes_of_a_password_count_as_with_htpasswd() -> None:
    long = "x" * 80
    check = PasswordCheck({"a": bcrypt.hashpw(long[:72].encode(), bcrypt.gensalt(4))})
    assert check.is_right("a", long)
    assert not check.is_right("a", long[:71])


def test_unknown_names_have_each_cost_as_often_as_users_and_always_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashes: list[bytes] = []

    def record(password: bytes, hashed: bytes) -> bool:
        hashes.append(hashed)
        return True

    monkeypatch.setattr(users.bcrypt, "checkpw", record)
    costs = {"a": 5, "b": 6, "c": 6, "d": 6}
    lines = "".join(f"{name}:$2b${cost:02}${'.' * 53}\n" for name, cost in costs.items())
    names = [f"nobody-{number}" for number in range(1000)]
    for check in (parse_users(lines.encode()).content, parse_users(lines.encode()).content):
        assert not any(check.is_right(name, "x") for name in names)
    first, second = hashes[:1000], hashes[1000:]
    assert first == second, "in all processes"
    assert {len(hashed) for hashed in first} == {60}
    assert 200 < sum(hashed.startswith(b"$2b$05$") for hashed in first) < 300
    assert 700 < sum(hashed.startswith(b"$2b$06$") for hashed in first) < 800


def test_hash_of_an_unknown_name_takes_its_time() -> None:
    check = PasswordCheck({})
    hashed = check._hash_of_unknown("nobody")
    assert not bcrypt.checkpw(b"x", hashed), "it raises for a hash that it does not compute"


def test_name_that_an_issuer_may_give_is_refused() -> None:
    parsed = parse_users(htpasswd(**{"ci-ann": "x", "bob": "y"}).encode(), reserved=("ci-",))
    assert list(parsed.content.names) == ["bob"]
    assert parsed.problems == ("line 1: the name begins with the user_prefix of an issuer",)
