"""What is likely a mistake in the users and rules of a configuration.

Lives here: the warnings of ``check-config`` and ``serve`` about them. Must not know: how rules
decide.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator

from mirror.access.login_credentials import FileNames, check_files
from mirror.config.access import EVERYBODY, GROUP, LOGGED_IN, AccessSection, shared_prefixes
from mirror.config.rule_coverage import RuleScope, find_covering, has_all_repositories
from mirror.config.settings import KeyPath, Settings


def access_warnings(settings: Settings, prefix: Callable[[KeyPath], str]) -> Iterator[str]:
    """Yield one line for each setting of access that works, but is likely a mistake.

    Args:
        settings: The configuration. Its files must be usable.
        prefix: Begins a message about a key.

    Raises ``ConfigError`` if a file has become unusable.
    """
    registries = set(settings.upstreams)
    if settings.hosted is not None:
        registries.add(settings.hosted.name)
    for index, target in enumerate(settings.events):
        path: KeyPath = ("events", index, "repositories")
        yield from _unknown_registries(path, target.repositories, registries, prefix)
    access = settings.access
    if access is None:
        return
    yield from _login_warnings(access, prefix, has_hosted=settings.hosted is not None)
    yield from _issuer_warnings(access, prefix)
    hosted_name = None if settings.hosted is None else settings.hosted.name
    yield from _refusal_warnings(access, hosted_name, prefix)
    names = check_files(access)
    for group, members in access.groups.items():
        for index, member in enumerate(members):
            if not _may_log_in(member, access, names):
                key = prefix(("access", "groups", group, index))
                yield f"{key}'{member}': {_near_user(member, names)}"
    for index, rule in enumerate(access.rules):
        path = ("access", "rules", index)
        yield from _unknown_registries(
            (*path, "repositories"), rule.repositories, registries, prefix
        )
        for number, member in enumerate(rule.who):
            problem = _find_problem(member, access, names)
            if problem:
                yield f"{prefix((*path, 'who', number))}'{member}': {problem}"
        if "push" in rule.may and not {"pull", "admin"} & set(rule.may):
            key = prefix((*path, "may"))
            yield f"{key}push without pull: clients that push ask first what is there: add pull"


def _issuer_warnings(access: AccessSection, prefix: Callable[[KeyPath], str]) -> Iterator[str]:
    """Yield a warning for each issuer whose users or groups share their names with others."""
    has_users = access.users is not None or access.tokens is not None
    with_groups = [(index, one) for index, one in enumerate(access.issuers) if one.groups_claim]
    of_others = {
        number for number, _ in shared_prefixes([one.groups_prefix for _, one in with_groups])
    }
    for index, issuer in enumerate(access.issuers):
        if has_users and not issuer.user_prefix:
            yield (
                f"{prefix(('access', 'issuers', index))}without user_prefix, a rule for a user also"
                " fits a token whose user has this name, unless the name is or was in access.users"
                f' or access.tokens: set user_prefix, such as "issuer{index}:", also in the rules'
            )
    for number, (index, issuer) in enumerate(with_groups):
        has_local = not issuer.groups_prefix and (access.groups or access.tokens is not None)
        if has_local or number in of_others:
            yield (
                f"{prefix(('access', 'issuers', index))}its groups can have the names of groups of"
                " access.groups, access.tokens or another issuer, and a rule for one fits all: set"
                f' groups_prefix, such as "issuer{index}:", also in the rules'
            )


def _login_warnings(
    access: AccessSection, prefix: Callable[[KeyPath], str], *, has_hosted: bool
) -> Iterator[str]:
    here = prefix(("access",))
    who = {member for rule in access.rules for member in rule.who}
    if who - {EVERYBODY} and not access.has_login:
        yield (
            f"{here}nobody can log in, so rules for users never fit: add users, tokens or issuers"
        )
    if has_hosted and not any({"push", "admin"} & set(rule.may) for rule in access.rules):
        yield f"{here}no rule has push, so nobody can push: add one to access.rules"


def _refusal_warnings(
    access: AccessSection, hosted_name: str | None, prefix: Callable[[KeyPath], str]
) -> Iterator[str]:
    """Warn of rules that refuse all below a repository, if the repository itself is permitted."""
    scopes = [rule.scope for rule in access.rules]
    for index, rule in enumerate(access.rules):
        if rule.may:
            continue
        for number, pattern in enumerate(rule.repositories):
            name = pattern.removesuffix("/**")
            if name == pattern or "/" not in name or name.endswith("**"):
                continue
            scope = RuleScope((name,), rule.who)
            if find_covering(scope, scopes[: index + 1], access.groups) is not None:
                continue
            by = _find_permission(scope, access, index + 1, hosted_name)
            if by:
                key = prefix(("access", "rules", index, "repositories", number))
                yield f"{key}'{pattern}' does not refuse {name} itself, which {by} permits: add it"


def _find_permission(
    scope: RuleScope, access: AccessSection, start: int, hosted_name: str | None
) -> str:
    """Return the key that permits a repository to clients whom no rule before has. Empty: none."""
    broad = {EVERYBODY, LOGGED_IN}
    for index, rule in enumerate(access.rules[start:], start):
        has_common = bool(set(rule.who) & set(scope.who) or broad & {*rule.who, *scope.who})
        if has_common and any(
            has_all_repositories(pattern, scope.repositories[0]) for pattern in rule.repositories
        ):
            return f"access.rules[{index}]" if rule.may else ""
    is_mirrored = scope.repositories[0].partition("/")[0] != hosted_name
    return "access.anonymous_pull" if is_mirrored and access.anonymous_pull else ""


def _unknown_registries(
    path: KeyPath,
    patterns: Collection[str],
    registries: Collection[str],
    prefix: Callable[[KeyPath], str],
) -> Iterator[str]:
    """Warn of patterns that match no registry of the configuration."""
    for index, pattern in enumerate(patterns):
        registry = pattern.partition("/")[0]
        if registry == "**" or any(has_all_repositories(registry, one) for one in registries):
            continue
        near = difflib.get_close_matches(registry, sorted(registries), n=1)
        hint = f": did you mean {near[0]}?" if near else f": there are {', '.join(registries)}"
        yield (
            f"{prefix((*path, index))}'{pattern}' matches nothing: {registry} is neither one of"
            f" upstreams nor hosted.name{hint}"
        )


def _find_problem(member: str, access: AccessSection, names: FileNames) -> str:
    """Return why nobody can be meant by a member of ``who``. Empty if somebody may be."""
    if member in (EVERYBODY, LOGGED_IN) or not access.has_login:
        return ""
    if not member.startswith(GROUP):
        return "" if _may_log_in(member, access, names) else _near_user(member, names)
    group = member.removeprefix(GROUP)
    known = names.groups | set(access.groups)
    of_issuers = tuple(one.groups_prefix for one in access.issuers if one.groups_claim)
    if group in known or group.startswith(of_issuers):
        return ""
    near = _near(group, known)
    return f"no user has this group: neither access.groups nor access.tokens has it{near}"


def _may_log_in(user: str, access: AccessSection, names: FileNames) -> bool:
    of_issuers = tuple(one.user_prefix for one in access.issuers)  # Empty: any name.
    return user in names.users or user.startswith(of_issuers)


def _near_user(user: str, names: FileNames) -> str:
    near = _near(user, names.users)
    return f"nobody can log in with this name: it is in no file of users or tokens{near}"


def _near(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f": did you mean {near[0]}?" if near else ""
