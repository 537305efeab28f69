"""The settings of access: who the clients are, and what each may do.

Lives here: the keys, descriptions and rules of the section ``access``. Must not know: how a client
proves who it is, what the files hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Annotated, Final, Self

from pydantic import AfterValidator, Field, model_validator

from mirror.config import values
from mirror.config.rule_coverage import EVERYBODY as EVERYBODY
from mirror.config.rule_coverage import GROUP as GROUP
from mirror.config.rule_coverage import LOGGED_IN as LOGGED_IN
from mirror.config.rule_coverage import RuleScope, find_covering
from mirror.config.section import FilePath, NonEmptyText, Section, key_error

LOCAL: Final = "local:"
"""Begins the name of a user of this machine, who has run a command. Nobody logs in with such."""
RETENTION_USER: Final = "retention"
"""The user of the changes that the rules of retention make in a server."""
COLLECTION_USER: Final = "collection"
"""The user of the changes that the collection of a server makes."""
_RESERVED: Final = frozenset({EVERYBODY, LOGGED_IN, RETENTION_USER, COLLECTION_USER})
MAX_USER_CHARS: Final = 256
"""Characters of the name of a user or a group: the ``sub`` of a CI job has up to 200."""
_USER_NAME: Final = re.compile(r"[!-9;-~][!-~]*")  # Printable ASCII without spaces.
_COMPONENT: Final = re.compile(r"[a-z0-9._*-]+")
_HOST_PATTERN: Final = re.compile(
    r"[a-z0-9._*-]+(?::[0-9*]{1,5})?|\[[0-9a-f:.]+\](?::[0-9*]{1,5})?"
)

_PUBLIC_ISSUERS: Final = {
    "https://token.actions.githubusercontent.com": "repository_owner: ORGANISATION",
    "https://gitlab.com": "namespace_path: GROUP",
    "https://accounts.google.com": "hd: example.com",
    "accounts.google.com": "hd: example.com",
    "https://agent.buildkite.com": "organization_slug: ORGANISATION",
    "https://app.terraform.io": "terraform_organization_name: ORGANISATION",
    "https://oauth2.sigstore.dev/auth": "email: ci@example.com",
}
"""Issuers that give everybody a token -> a claim that says whose it is. The names of those of
CircleCI, Bitbucket and Fly.io have the organisation already."""


class AccessAction(StrEnum):
    """An action on a repository, as rules name it."""

    __hash__ = str.__hash__

    PULL = "pull"
    PUSH = "push"
    DELETE = "delete"
    ADMIN = "admin"
    """All others, and what only administrators may do."""


def check_name(text: str) -> str:
    """Check the name of a user or a group. Raises ``ValueError``."""
    if not _USER_NAME.fullmatch(text) or len(text) > MAX_USER_CHARS:
        raise ValueError(f"a name has 1 to {MAX_USER_CHARS} printable characters and no space")
    if text in _RESERVED or text.startswith((GROUP, LOCAL)):
        raise ValueError(f"{text} has a meaning of its own in rules or logs: use another name")
    return text


def _check_member(text: str) -> str:
    if text in (EVERYBODY, LOGGED_IN):
        return text
    if "*" in text:
        raise ValueError(
            f"has no wildcards: write {EVERYBODY} for everybody, or {LOGGED_IN} for everybody who"
            " has logged in"
        )
    return (
        f"{GROUP}{check_name(text.removeprefix(GROUP))}"
        if text.startswith(GROUP)
        else (check_name(text))
    )


def check_repository_pattern(text: str) -> str:
    """Check a pattern of whole repository names, and return it with the registry's usual name."""
    if text == "**":
        return text
    registry, slash, path = text.partition("/")
    is_registry = any(mark in registry for mark in ".:*[") or registry == "localhost"
    if not slash or not path or not is_registry:
        raise ValueError("must be ** or begin with a registry, such as registry.example/team/**")
    if text != text.lower():
        raise ValueError("must be in lower case, as the names of repositories are")
    components = path.split("/")
    if ":" in path or "@" in path:
        raise ValueError("must name repositories, without a tag or a digest")
    if not all(map(_COMPONENT.fullmatch, components)) or not _HOST_PATTERN.fullmatch(registry):
        raise ValueError("may have a-z, 0-9, . _ - and the wildcards * and **")
    if any("**" in one and one != "**" for one in (registry, *components)):
        raise ValueError("** stands for whole components: write a/**, or a* within one")
    return f"{values.usual_name(registry)}/{path}"


def _check_key_set(text: str) -> str:
    """Check the path or the URL of a key set."""
    if "://" not in text:
        return values.check_path(text)
    if not text.startswith("https://"):
        # Whoever can change the response can log in as anybody.
        raise ValueError("must be a file, or an https:// URL")
    return values.check_http_url(text)


Name = Annotated[str, AfterValidator(check_name)]


class Issuer(Section):
    """An OIDC issuer whose tokens (JWT) are accepted, such as a Kubernetes cluster or a CI."""

    issuer: NonEmptyText
    """The claim iss of its tokens, character for character."""
    jwks: Annotated[str, AfterValidator(_check_key_set)]
    """
    Its public keys (JSON Web Key Set): a file, which is read again when it changes, or an https
    URL, which is fetched every 10 minutes and when a token has an unknown key.
    """
    audience: NonEmptyText
    """The claim aud that tokens for this server have."""
    ca: FilePath | None = None
    """PEM file of certificate authorities for the URL of jwks, beside those of the system."""
    user_claim: NonEmptyText = "sub"
    """The claim that is the name of the user."""
    user_prefix: str = ""
    """
    Put before the name, so that no token has the name of another user. Needed with more than one
    issuer. Beside users or tokens, names that these files have, or once had, are refused without
    it.
    """
    groups_claim: NonEmptyText | None = None
    """The claim that lists the groups of the user. Default: tokens have no groups."""
    groups_prefix: str = ""
    """
    Put before the name of each group, so that it differs from those of groups, tokens, and other
    issuers. Without it, a rule for a group fits all groups of that name.
    """
    claims: dict[str, NonEmptyText] = Field(default={})
    """
    Claims that a token must have, with their values. An issuer that everybody can use, such as that
    of a public CI, needs one that names your organisation.
    """

    @property
    def has_key_url(self) -> bool:
        """Whether the keys are fetched from a URL."""
        return "://" in self.jwks

    @model_validator(mode="after")
    def _check_public(self) -> Self:
        claim = _PUBLIC_ISSUERS.get(self.issuer.rstrip("/").lower())
        if claim is not None and not self.claims:
            raise key_error(
                ("claims",),
                f"is needed: everybody can get a token of {self.issuer}. Name yours, such as"
                f" {{{claim}}}",
            )
        return self


class AccessRule(Section):
    """The actions that some clients may take on some repositories."""

    repositories: Annotated[
        tuple[Annotated[str, AfterValidator(check_repository_pattern)], ...], Field(min_length=1)
    ]
    """
    Patterns of whole names, such as registry.example/team/**. * stands for any characters within
    one component, ** for any number of components, and at the end for at least
    one: a/** does not match a itself.
    """
    who: Annotated[tuple[Annotated[str, AfterValidator(_check_member)], ...], Field(min_length=1)]
    """
    Names of users, groups as group:NAME, anonymous for everybody, or authenticated for everybody
    who has logged in.
    """
    may: tuple[AccessAction, ...]
    """
    pull, push, delete, or admin for all of them. Clients that push also need pull. An empty list
    refuses everything.
    """

    @property
    def scope(self) -> RuleScope:
        """The requests that this rule is about."""
        return RuleScope(self.repositories, self.who)


class AccessSection(Section):
    """The users, and the rules for what they may do."""

    users: FilePath | None = None
    """An htpasswd file with bcrypt hashes (htpasswd -B). Read again when it changes."""
    tokens: FilePath | None = None
    """
    A YAML file with a list of tokens, each with name, token or sha256, expires and groups. Read
    again when it changes.
    """
    issuers: tuple[Issuer, ...] = ()
    """OIDC issuers whose tokens are accepted, as a bearer token or as a password."""
    groups: dict[Name, tuple[Name, ...]] = Field(default={})
    """Groups of users, by name."""
    rules: tuple[AccessRule, ...] = ()
    """
    The first rule whose repositories and who fit decides, each with repositories, who and may. If
    none fits, the answer is no.
    """
    anonymous_pull: bool = True
    """
    Let everybody pull mirrored repositories that no rule fits. Hosted ones always need a rule.
    """
    allow_plain_http: bool = False
    """
    Accept passwords without TLS from other machines. Everybody on the network between can read
    them. Needed behind a proxy that has the certificate.
    """

    @property
    def has_login(self) -> bool:
        """Whether clients can log in."""
        return self.users is not None or self.tokens is not None or bool(self.issuers)

    def check_reach(self, listeners: tuple[tuple[str, str], ...], *, has_tls: bool) -> None:
        """Refuse listeners at which passwords would be sent in plain over the network.

        Raises an error of pydantic.

        Args:
            listeners: (key, address and port) of each listener that accepts passwords.
            has_tls: Whether they have a certificate.
        """
        if has_tls or self.allow_plain_http or not self.has_login:
            return
        for key, address in listeners:
            if not values.is_loopback_only(address):
                raise key_error(
                    ("access", "allow_plain_http"),
                    f"set tls, or allow_plain_http: true; otherwise passwords cross the network to"
                    f" {address} ({key}) unencrypted",
                )

    @model_validator(mode="after")
    def _check_prefixes(self) -> Self:
        names = [one.issuer for one in self.issuers]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise key_error(("issuers", index, "issuer"), "is listed twice")
        if len(names) > 1:
            for index, prefix in shared_prefixes([one.user_prefix for one in self.issuers]):
                raise key_error(
                    ("issuers", index, "user_prefix"),
                    f'"{prefix}" must differ from that of other issuers, and begin none of them: '
                    f'use a name of the issuer, such as "issuer{index}:"',
                )
        for name in self.groups:
            if name.startswith(self.group_prefixes):
                raise key_error(("groups", name), "begins with the groups_prefix of an issuer")
        return self

    @property
    def user_prefixes(self) -> tuple[str, ...]:
        """Return what begins the names of users of issuers, and of no others."""
        return tuple(one.user_prefix for one in self.issuers if one.user_prefix)

    @property
    def group_prefixes(self) -> tuple[str, ...]:
        """Return what begins the names of groups of issuers, and of no others."""
        return tuple(
            one.groups_prefix for one in self.issuers if one.groups_claim and one.groups_prefix
        )

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        scopes = [rule.scope for rule in self.rules]
        for index, scope in enumerate(scopes):
            covering = find_covering(scope, scopes[:index], self.groups)
            if covering is not None:
                raise key_error(
                    ("rules", index),
                    f"is never used: rules[{covering}] and those before it fit all that it fits."
                    " Put it first",
                )
        return self


def shared_prefixes(prefixes: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield (index, prefix) of each prefix that begins another one: both may give the same name."""
    for index, prefix in enumerate(prefixes):
        others = (*prefixes[:index], *prefixes[index + 1 :])
        if any(other.startswith(prefix) for other in others):
            yield index, prefix
