"""The files of the page: their policy, and that they need nothing from elsewhere."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from mirror.admin.page_files import POLICY, PageFiles
from tests.unit.admin.kit import running_admin

PAGE = resources.files("mirror.admin").joinpath("page")
NAMES = sorted(entry.name for entry in PAGE.iterdir())
TEXTS = {name: PAGE.joinpath(name).read_text(encoding="utf-8") for name in NAMES}
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\("
    r"[\"']on|javascript:|DOMParser|createContextualFragment"
)
"""Ways from text to markup or code."""


def test_policy_permits_own_files_only() -> None:
    directives = dict(one.strip().partition(" ")[::2] for one in POLICY.split(";"))
    assert directives["default-src"] == "'none'"
    assert "unsafe" not in POLICY
    for name in ("script-src", "style-src", "img-src", "connect-src"):
        assert directives[name] == "'self'"
    for name in ("base-uri", "form-action", "frame-ancestors"):
        assert directives[name] == "'none'"


@pytest.mark.parametrize("name", NAMES)
def test_file_refers_to_no_other_host_and_makes_no_markup_of_text(name: str) -> None:
    text = TEXTS[name].replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//[a-z0-9-]+\.[a-z]", text)
    assert not FORBIDDEN.search(text)


def test_html_has_no_inline_code_or_style() -> None:
    html = TEXTS["index.html"]
    assert not re.search(r"\sstyle=|\son[a-z]+=|<style|<script(?![^>]*\ssrc=)", html)
    for path in re.findall(r'(?:src|href)="(/page/[^"]+)"', html):
        assert PageFiles().find(path) is not None, path


def test_every_module_that_is_imported_exists() -> None:
    for name, text in TEXTS.items():
        for imported in re.findall(r'from "\./([^"]+)"', text):
            assert imported in NAMES, f"{name} imports {imported}"


async def test_files_are_served_with_their_type_and_are_not_sent_twice() -> None:
    async with running_admin() as kit:
        for path, content_type in (("/", "text/html"), ("/page/app.js", "text/javascript")):
            status, _, headers = await kit.ask("GET", path)
            assert (status, headers["Content-Type"].partition(";")[0]) == (200, content_type)
            assert headers["Content-Security-Policy"] == POLICY
            status, _, _ = await kit.ask("GET", path, If_None_Match=headers["ETag"])
            assert status == 304
        assert (await kit.get("/page/../tokens.py"))[0] == 404
        assert (await kit.get("/page/index.html"))[0] == 404
        assert (await kit.ask("POST", "/", {}))[0] == 405
