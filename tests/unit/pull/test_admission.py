"""Admission: allow- and deny-lists."""

from __future__ import annotations

import pytest

from mirror.config.settings import Upstream
from mirror.oci.reference import Repository
from mirror.pull.admission import Allow, admit


@pytest.mark.parametrize(
    ("allow", "deny", "path", "served"),
    [
        ((), (), "library/nginx", True),
        (("library/*",), (), "library/nginx", True),
        (("library/*",), (), "evil/nginx", False),
        (("library/*",), ("library/nginx",), "library/nginx", False),
        ((), ("*/secret*",), "org/secret-app", False),
        ((), ("*/secret*",), "org/app", True),
        (("org/app",), (), "org/app/sub", False),
    ],
)
def test_allow_and_deny_lists_decide_by_repository_path_and_deny_wins(
    allow: tuple[str, ...], deny: tuple[str, ...], path: str, served: bool
) -> None:
    upstream = Upstream(endpoints=("http://x",), allow=allow, deny=deny)
    assert isinstance(admit(Repository("quay.io", path), upstream), Allow) is served
