"""Decide what a client may do with a repository.

Lives here: the decision, as a function of identity, repository and action only. It does not depend
on what exists, so its answer says nothing about that. Must not know: I/O, how users are known.

It stands beside :mod:`mirror.pull.admission`, which decides what the mirror serves to anybody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Final

from mirror.access.identity import ANONYMOUS, Identity
from mirror.config.access import (
    EVERYBODY,
    GROUP,
    LOGGED_IN,
    AccessAction,
    AccessRule,
    AccessSection,
)
from mirror.oci.reference import Repository

_MAX_DECISIONS: Final = 16_384
"""Decisions that are remembered: about 3 MB. A cluster pulls some hundred repositories."""


@dataclass(frozen=True, slots=True)
class AccessDecision:
    """A decision, and the rule behind it."""

    is_allowed: bool
    rule: int | None = None
    """Index of the first rule that fits. None: none does."""


class _CompiledRule:
    """A rule, in the form in which a decision needs it."""

    def __init__(self, rule: AccessRule) -> None:
        repositories, who, may = rule.repositories, rule.who, rule.may
        self.repositories = frozenset(repositories)
        self._patterns = [compile_pattern(pattern) for pattern in repositories]
        self.is_for_everybody = EVERYBODY in who
        self.is_for_logged_in = LOGGED_IN in who
        self.groups = frozenset(name.removeprefix(GROUP) for name in who if name.startswith(GROUP))
        self.users = frozenset(name for name in who if not name.startswith(GROUP))
        self.actions = frozenset(AccessAction if AccessAction.ADMIN in may else may)

    def is_for(self, identity: Identity) -> bool:
        """Return whether ``who`` has the client."""
        if self.is_for_everybody:
            return True
        if identity.is_anonymous:
            return False
        return (
            self.is_for_logged_in
            or identity.user in self.users
            or not self.groups.isdisjoint(identity.groups)
        )

    def is_about(self, name: str) -> bool:
        """Return whether ``repositories`` has a repository, by its whole name."""
        return any(pattern.fullmatch(name) for pattern in self._patterns)


class Rules:
    """The rules of a configuration."""

    def __init__(
        self,
        access: AccessSection,
        hosted_name: str | None,
        registries: Mapping[str, str] | None = None,
    ) -> None:
        """Compile the rules.

        Args:
            access: The section of the configuration.
            hosted_name: Name of the host of the hosted repositories. None: there are none.
            registries: Each name of a configured registry, to its usual name. None: there are none.
        """
        self._rules = [_CompiledRule(rule) for rule in access.rules]
        self._may_pull_mirrored = access.anonymous_pull
        self._hosted_name = hosted_name
        self._registries = registries or {}
        self._groups_of = _groups_of(access.groups)
        self._is_allowed_cached = lru_cache(_MAX_DECISIONS)(self._is_allowed)

    def is_allowed(self, identity: Identity, repository: Repository, action: AccessAction) -> bool:
        """Return whether a client may do something with a repository: the one decision.

        If the path of a mirrored repository begins with a registry, the client needs the right for
        the repository in that, too: an endpoint that is a mirror itself may serve that one.

        Args:
            identity: The client.
            repository: The repository, which need not exist.
            action: What the client wants to do.
        """
        return self._is_allowed_cached(identity, repository, action)

    def is_pull_refused(self, identity: Identity, repository: Repository) -> bool:
        """Return whether the first rule that fits refuses to pull. False also if no rule fits."""
        decision = self._decide_alone(identity, repository, AccessAction.PULL)
        return decision.rule is not None and not decision.is_allowed

    def _is_allowed(self, identity: Identity, repository: Repository, action: AccessAction) -> bool:
        return self.decide(identity, repository, action).is_allowed

    def decide(
        self, identity: Identity, repository: Repository, action: AccessAction
    ) -> AccessDecision:
        """Decide as :meth:`is_allowed`, and say by which rule. It is not remembered.

        Args:
            identity: The client.
            repository: The repository, which need not exist.
            action: What the client wants to do.
        """
        decision = self._decide_alone(identity, repository, action)
        if repository.upstream != self._hosted_name:
            for nested in islice(repository.with_nested(self._registries), 1, None):
                if decision.is_allowed:
                    decision = self._decide_alone(identity, nested, action)
        return decision

    def _decide_alone(
        self, identity: Identity, repository: Repository, action: AccessAction
    ) -> AccessDecision:
        """Decide about one name, and not about those that are nested in it."""
        more = self._groups_of.get(identity.user)
        if more is not None:
            identity = Identity(user=identity.user, groups=identity.groups | more)
        name = str(repository)
        # In image names, docker.io/app also means docker.io/library/app.
        short = repository.short_name
        for number, rule in enumerate(self._rules):
            if rule.is_for(identity) and (rule.is_about(name) or rule.is_about(short)):
                return AccessDecision(is_allowed=action in rule.actions, rule=number)
        is_mirrored = repository.upstream != self._hosted_name
        may_pull = is_mirrored and action is AccessAction.PULL and self._may_pull_mirrored
        return AccessDecision(is_allowed=may_pull)

    def is_login_needed(self) -> bool:
        """Return whether anonymous clients lack a right to hosted repositories.

        Then ``/v2/`` asks for credentials. Only the first rule that is for everybody counts: rules
        after it may permit less.
        """
        everything = {AccessAction.PULL, AccessAction.PUSH, AccessAction.DELETE}
        for rule in self._rules:
            if rule.is_for(ANONYMOUS):
                is_for_all = {"**", f"{self._hosted_name}/**"} & rule.repositories
                return not is_for_all or not everything <= rule.actions
        return True


def _groups_of(groups: Mapping[str, tuple[str, ...]]) -> dict[str, frozenset[str]]:
    """Return the groups of each user."""
    users = {user for members in groups.values() for user in members}
    return {
        user: frozenset(name for name, members in groups.items() if user in members)
        for user in users
    }


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return a pattern of repositories as a regular expression for whole names.

    ``*`` stands for any characters within a component, ``**`` for any number of components, and at
    the end for at least one.
    """
    parts = []
    components = pattern.split("/")
    for index, component in enumerate(components):
        is_last = index == len(components) - 1
        if component == "**":
            parts.append(".+" if is_last else "(?:[^/]+/)*")
        else:
            parts.append(re.escape(component).replace(r"\*", "[^/]*") + ("" if is_last else "/"))
    return re.compile("".join(parts), re.DOTALL)
