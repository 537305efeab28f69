"""``explain --user``: say what a user may do with a repository, and which rule says so.

Lives here: the rows and sentences of a decision. Must not know: how it is made
(:mod:`mirror.access.rules`), who a client is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, Final

from mirror.access.identity import ANONYMOUS, Identity
from mirror.access.rules import AccessDecision, Rules
from mirror.cli.listing import print_rows, print_text
from mirror.cli.output import UsageError
from mirror.config.access import EVERYBODY, AccessAction, AccessRule
from mirror.config.settings import Settings
from mirror.hosted.immutable_tags import ImmutableTagRules
from mirror.oci.errors import InvalidRequest
from mirror.oci.image_name import ImageName
from mirror.oci.reference import Tag

_VERBS: Final = {
    AccessAction.PULL: "pull from",
    AccessAction.PUSH: "push to",
    AccessAction.DELETE: "delete from",
    AccessAction.ADMIN: "administrate",
}
_HOSTED_ONLY: Final = frozenset({AccessAction.PUSH, AccessAction.DELETE})
"""The actions on hosted repositories only."""


def explain_access(arguments: argparse.Namespace, settings: Settings) -> int:
    """Say what a user may do. Returns 1 if it may not do what ``--may`` names.

    Raises ``UsageError`` if the arguments name no repository.
    """
    try:
        name = ImageName.parse(arguments.subject)
    except InvalidRequest as error:
        text = arguments.subject or "nothing"
        raise UsageError(f"--user: name a repository, not {text}: {error.message}") from None
    rows = list(_decisions(arguments, settings, name))
    if arguments.is_json:
        print_rows((), rows, is_json=True)
    for row in () if arguments.is_json else rows:
        may = "may" if row["is_allowed"] else "may not"
        verb = _VERBS[AccessAction(row["action"])]
        print_text(f"{row['user']} {may} {verb} {row['repository']}: {row['why']}", indent=2)
    return 0 if not arguments.may or rows[0]["is_allowed"] else 1


def _decisions(
    arguments: argparse.Namespace, settings: Settings, name: ImageName
) -> Iterator[dict[str, Any]]:
    identity = Identity(user=arguments.user, groups=frozenset(arguments.groups))
    if arguments.user == EVERYBODY:
        identity = ANONYMOUS
    access, hosted = settings.access, settings.hosted
    hosted_name = None if hosted is None else hosted.name
    rules = None if access is None else Rules(access, hosted_name, settings.registry_names())
    for action in [AccessAction(arguments.may)] if arguments.may else AccessAction:
        if action in _HOSTED_ONLY and (hosted is None or not hosted.has_image(str(name))):
            decision = AccessDecision(is_allowed=False)
            why = "nobody pushes to a mirrored repository, and nobody deletes from it"
        elif rules is None or access is None:
            decision = AccessDecision(is_allowed=action is not AccessAction.ADMIN)
            why = "everybody may, since the configuration has no access"
            if action is AccessAction.ADMIN:
                why = "the configuration has no access, so it names no admin"
        else:
            decision = rules.decide(identity, name.repository, action)
            why = _why(decision, action, access.rules)
        if action in _HOSTED_ONLY and _is_immutable(settings, name):
            why += (
                f". The tag {name.reference} is immutable (hosted.immutable_tags): once it is"
                " there, it cannot be moved, and only an admin deletes it"
            )
        yield {
            "kind": "access",
            "user": arguments.user,
            "groups": sorted(identity.groups),
            "action": action.value,
            "repository": str(name.repository),
            "is_allowed": decision.is_allowed,
            "rule": decision.rule,
            "why": why,
        }


def _why(decision: AccessDecision, action: AccessAction, rules: tuple[AccessRule, ...]) -> str:
    if decision.rule is None:
        if decision.is_allowed:
            return "no rule fits, and access.anonymous_pull lets everybody pull mirrored images"
        return "no rule of access.rules fits"
    rule = rules[decision.rule]
    keys = {"repositories": rule.repositories, "who": rule.who, "may": rule.may}
    text = ", ".join(f"{key}: [{', '.join(values)}]" for key, values in keys.items())
    what = f"access.rules[{decision.rule}] ({{{text}}}) is the first that fits"
    return what if decision.is_allowed else f"{what}, and does not have {action.value}"


def _is_immutable(settings: Settings, name: ImageName) -> bool:
    hosted, tag = settings.hosted, name.reference
    if hosted is None or not isinstance(tag, Tag):
        return False
    return ImmutableTagRules(hosted).is_immutable(name.repository.path, tag.name)
