"""``pin``, ``unpin``, ``block``, ``unblock``, ``freeze``, ``unfreeze``, ``rollback``.

Lives here: their arguments. Must not know: what they do (:mod:`mirror.cli.marking_commands`).

Without an image, ``pin``, ``block`` and ``freeze`` list their marks.
"""

from __future__ import annotations

import argparse

from mirror.cli.arguments import Commands, add_config, add_json, image_name
from mirror.cli.short_digests import image_or_short_name
from mirror.oci.block_target import Target, parse_target
from mirror.oci.errors import InvalidRequest


def add_parser(commands: Commands) -> None:
    """Add the commands."""
    pin = _add(
        commands,
        "pin",
        "keep images through every eviction",
        "Pins images that are in the cache, with all that they refer to, their signatures, "
        "attestations and SBOMs. The image that a pinned tag gets later is kept, too. Without "
        "IMAGE, lists what is pinned.",
    )
    pin.add_argument("images", metavar="IMAGE", nargs="*", type=image_or_short_name)
    unpin = _add(commands, "unpin", "let pinned images be evicted again", "")
    unpin.add_argument("images", metavar="IMAGE", nargs="+", type=image_or_short_name)

    block = _add(
        commands,
        "block",
        "refuse an image, a repository or a digest to clients",
        "Refuses a target from now on: clients get 403 and the reason. A target is an image "
        "(app:v1), a repository (app), a pattern of repositories that begins with a registry or * "
        "(docker.io/library/app*), or a digest. The manifests that an image has now are refused "
        "under every name. Without TARGET, lists what is blocked.",
    )
    block.add_argument("target", metavar="TARGET", nargs="?", type=_target)
    block.add_argument("--reason", default="", help="one line that clients are told")
    unblock = _add(commands, "unblock", "serve a blocked target again", "")
    unblock.add_argument("targets", metavar="TARGET", nargs="+", type=_target)

    freeze = _add(
        commands,
        "freeze",
        "serve a tag from the digest that it has here, and do not ask for it",
        "Serves tags from the digest that they have in the cache, whatever the pull policy is, "
        "until `unfreeze`. The image is not evicted. Without IMAGE, lists what is frozen.",
    )
    freeze.add_argument("images", metavar="IMAGE:TAG", nargs="*", type=image_name)
    unfreeze = _add(commands, "unfreeze", "let a frozen tag follow the upstream", "")
    unfreeze.add_argument("images", metavar="IMAGE:TAG", nargs="+", type=image_name)

    rollback = _add(
        commands,
        "rollback",
        "serve a tag from a digest that it has had, until `unfreeze`",
        "Freezes a tag at an earlier digest of it. If that image is not complete in the cache, the "
        "upstream has to have it.",
    )
    rollback.add_argument("image", metavar="IMAGE:TAG", type=image_name)
    rollback.add_argument(
        "--to", metavar="DIGEST", required=True, help="the digest, or the first digits of it"
    )


def _add(
    commands: Commands,
    name: str,
    summary: str,
    description: str,
) -> argparse.ArgumentParser:
    text = description or f"{summary[0].upper()}{summary[1:]}."
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=text)
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=_run, command=name)
    return parser


def _target(text: str) -> Target:
    try:
        return parse_target(text)
    except InvalidRequest as error:
        message = f"'{text}' cannot be blocked: {error.message}"
        raise argparse.ArgumentTypeError(message) from None


def _run(arguments: argparse.Namespace) -> int:
    # Imported here: all other commands would start 0.1 s later.
    from mirror.cli import marking_commands

    return marking_commands.RUN[arguments.command](arguments)
