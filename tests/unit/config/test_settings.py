"""The shipped configuration file, and the settings: defaults, comments, secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirror.config.load import load
from mirror.config.settings import (
    InvalidSetting,
    Section,
    Settings,
    Upstream,
    build,
    section_type,
)

FILE = Path(__file__).parents[3] / "config" / "mirror.yaml"
PUBLIC = {
    "docker.io": "https://registry-1.docker.io",
    "ghcr.io": "https://ghcr.io",
    "quay.io": "https://quay.io",
    "registry.k8s.io": "https://registry.k8s.io",
    "gcr.io": "https://gcr.io",
    "mcr.microsoft.com": "https://mcr.microsoft.com",
    "public.ecr.aws": "https://public.ecr.aws",
    "nvcr.io": "https://nvcr.io",
}
LINES = FILE.read_text(encoding="utf-8").splitlines()


def keys(model: type[Section]) -> Iterator[tuple[type[Section], str]]:
    for key in model.model_fields:
        yield model, key
        if section := section_type(model, key):
            yield from keys(section)


@pytest.mark.parametrize(("model", "key"), list(keys(Settings)))
def test_shipped_file_has_and_explains_every_key(model: type[Section], key: str) -> None:
    """The comment is on the line, above it, or above the section around the line."""
    place = next(
        (n for n, line in enumerate(LINES) if re.match(rf"\s*(# *)?{key}:", line)),
        None,
    )
    assert place is not None, f"{model.__name__}.{key} is not in {FILE.name}"
    block = LINES[place : place + 1]
    while place > 0 and LINES[place - 1].strip():
        place -= 1
        block.append(LINES[place])
    words = [line.partition("#")[2] for line in block]
    # A key that is commented out is no explanation.
    assert any(re.search(r"[A-Za-z]{2,} [A-Za-z]{2,}", text) for text in words), block


def test_shipped_file_has_the_defaults_and_the_public_registries() -> None:
    settings = load(str(FILE), {})
    assert {name: one.endpoints for name, one in settings.upstreams.items()} == {
        name: (endpoint,) for name, endpoint in PUBLIC.items()
    }
    assert settings.listen == "127.0.0.1:5100"
    assert settings.data_dir == "./data"
    assert settings.model_copy(update={"upstreams": {}}) == Settings()
    for upstream in settings.upstreams.values():
        bare = upstream.model_copy(update={"token_hosts": ()})
        assert bare == Upstream(endpoints=upstream.endpoints)


def test_each_commented_example_of_the_shipped_file_loads(tmp_path: Path) -> None:
    """One example at a time, without its comment signs, makes a file that loads."""
    examples = [
        LINES[start:end]
        for start, line in enumerate(LINES)
        if (found := re.match(r"( *)# (tls|ca|credentials):", line))
        for end in [
            next(
                (
                    n
                    for n in range(start + 1, len(LINES))
                    if not re.match(rf"{found[1]}#   \S", LINES[n])
                ),
                len(LINES),
            )
        ]
    ]
    assert len(examples) == 5
    for example in examples:
        at = LINES.index(example[0])
        used = [re.sub(r"# ", "", line, count=1) for line in example]
        if example[0] == "    # credentials:":
            at = next(n for n in range(at, len(LINES)) if LINES[n : n + len(example)] == example)
        text = [*LINES[:at], *used, *LINES[at + len(example) :]]
        file = tmp_path / "m.yaml"
        file.write_text("\n".join(text) + "\n")
        assert load(str(file), {}) != load(str(FILE), {})


def test_variables_in_the_comments_of_the_shipped_file_load() -> None:
    found = re.findall(r"(OCI_MIRROR_\w+)=(\S.*)", "\n".join(LINES))
    environ = {name: value.strip("'") for name, value in found}
    assert len(environ) == 4
    settings = load(str(FILE), environ)
    assert settings.storage.max_size == 200 * 2**30
    assert "registry.example:5000" in settings.upstreams


def test_build_accepts_numbers_and_raises_with_the_path_of_a_missing_key() -> None:
    tree = {"upstreams": {"r.example": {"endpoints": ["http://r.example"], "tag_ttl": 1.5}}}
    assert build(tree).upstreams["r.example"].tag_ttl == 1.5
    with pytest.raises(InvalidSetting, match="is missing") as caught:
        build({"upstreams": {"r.example": {}}})
    assert caught.value.path == ("upstreams", "r.example", "endpoints")


def test_password_is_not_in_the_text_of_settings() -> None:
    tree = {"endpoints": ["http://r"], "credentials": {"username": "joe", "password": "s3cret"}}
    settings = build({"upstreams": {"r.example": tree}})
    assert "joe" in repr(settings)
    assert "s3cret" not in repr(settings)
    assert "s3cret" not in str(settings)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().listen = "x"  # type: ignore[misc]  # the assignment that must fail
