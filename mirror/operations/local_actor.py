"""The user behind a command, for the events of its changes.

Lives here: that name. Must not know: commands.
"""

from __future__ import annotations

import os
import pwd
from typing import Final

from mirror.config.access import LOCAL
from mirror.observability.hosted_events import Actor

ADMIN_API: Final = Actor(user=f"{LOCAL}admin-api")
"""The callers of the admin API, whose tokens have no names."""


def local_actor() -> Actor:
    """Return the user of the operating system who runs this process, such as ``local:root``."""
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:  # In a container, a user need not have a name.
        name = str(uid)
    return Actor(user=f"{LOCAL}{name}")
