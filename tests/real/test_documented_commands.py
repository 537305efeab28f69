"""Every example of a command in the documents runs, against a server that clients have filled.

An example is a line ``$ oci-mirror …`` in a block ``console`` of a document. Blocks ``sh`` and
others are not run: they need a cluster, or a build. The output that a block shows is not compared.
But the fields of ``--json`` are, with the schema, and the schema with the document.

Each image that an example names exists at the upstream, and was pulled through the server twice,
with a new digest the second time. Files that examples read are in :data:`FILES`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from jsonschema import Draft202012Validator

from mirror.cli.main import main
from mirror.cli.schemas import SCHEMAS
from mirror.oci.image_name import ImageName
from tests.real import images
from tests.real.process import free_port
from tests.real.registry import DockerRegistry
from tests.real.server import ROOT, Mirror

pytestmark = pytest.mark.timeout(120)

DOCUMENTS: Final = (
    *("README.md", "docs/commands.md", "docs/hosting.md", "docs/kubernetes.md", "docs/runbook.md"),
)
UPSTREAMS: Final = ("docker.io", "ghcr.io", "quay.io", "registry.k8s.io")
NOT_RUN: Final = {
    "serve": "runs until it is stopped (tests/real)",
    "doctor --node": "needs the runtimes of a node (tests/real/test_doctor.py)",
    "in-use --from-kubernetes": "needs a cluster (tests/unit/operations/test_kubernetes.py)",
    "rm --upload": "needs an upload in progress (tests/unit/cli/test_hosted_images.py)",
    "check-config --online": "is in tests/unit/cli/test_online.py",
}
"""The beginning of an example, up to any option of it -> why it is not run here."""
ALWAYS: Final = ("docker.io/library/nginx:1.27", "ghcr.io/org/app:v1")
"""Images that the server has for every example."""
ALWAYS_LIST: Final = "# a comment\n" + "".join(f"{name}\n" for name in ALWAYS)
FILES: Final = {
    "images.txt": ALWAYS_LIST,
    "used-images.txt": ALWAYS_LIST,
    "deploy/app.yaml": yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "app"},
            "spec": {"containers": [{"name": "app", "image": "docker.io/library/nginx:1.27"}]},
        }
    ),
}
"""Files that examples read -> their text."""
HISTORY: Final = ("history", "rollback")
"""Commands that need what a tag was, which `forget` and `rm` in earlier examples remove."""
JSON_RUNS: Final = (
    *("ls", "ls --uploads", "du", "du --verbose", "show NAME", "explain NAME", "explain"),
    "history NAME",
    *("savings", "savings --by network", "warm NAME", "refresh NAME", "doctor"),
    *("pin NAME", "pin", "unpin NAME", "freeze NAME", "freeze", "unfreeze NAME"),
    *("rollback NAME --to EARLIER", "unfreeze NAME", "block NAME --reason x", "block"),
    *("unblock NAME", "in-use --file images.txt", "in-use", "in-use --release --source SOURCE"),
    *("verify NAME", "verify", "gc --dry-run", "prune --older-than 1s --dry-run"),
    *("backup BACKUP", "restore BACKUP", "forget NAME", "rm OTHER"),
)
"""Runs with ``--json``. NAME and OTHER are images, EARLIER is a digest that the tag had."""

_BLOCK: Final = re.compile(r"^ *```console\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_COMMAND: Final = re.compile(r"^ *\$ (oci-mirror (?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE)
_SHELL_PART: Final = re.compile(r"\s+(?:[|<>]|2>|&&|;|#\s).*", re.DOTALL)
"""What a shell would do with the rest of a line."""
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{6,64}")


@dataclass(frozen=True, slots=True)
class Block:
    """The examples of one block, which run one after the other."""

    document: str
    line: int
    commands: tuple[str, ...]


def blocks() -> list[Block]:
    found = []
    for document in DOCUMENTS:
        path = ROOT / document
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for block in _BLOCK.finditer(text):
            commands = tuple(
                _SHELL_PART.sub("", line.replace("\\\n", " "))
                for line in _COMMAND.findall(block["text"])
            )
            if commands:
                found.append(Block(document, text[: block.start()].count("\n") + 1, commands))
    return found


BLOCKS: Final = blocks()


def words_of(command: str) -> list[str]:
    """The arguments of an example, without the program."""
    return shlex.split(command)[1:]


def why_not_run(arguments: list[str]) -> str | None:
    for begin, reason in NOT_RUN.items():
        command, *options = begin.split()
        if arguments[0] == command and set(options) <= set(arguments):
            return reason
    return None


def images_of(commands: tuple[str, ...]) -> list[ImageName]:
    """The images that examples name, with a registry."""
    names = list(ALWAYS)
    for command in commands:
        for word in words_of(command):
            first, slash, _ = word.partition("/")
            if slash and first in UPSTREAMS and not set(word) & set("*?["):
                names.append(word)
    parsed = (ImageName.parse(name.partition("@")[0]).with_default_tag() for name in names)
    return list(dict.fromkeys(parsed))


class Site:
    """An upstream, and a server whose clients have pulled from it."""

    def __init__(self, directory: Path, registry: DockerRegistry, mirror: Mirror) -> None:
        self.directory = directory
        self.registry = registry
        self.mirror = mirror
        self.versions: dict[str, list[images.Image]] = {}
        """Whole name of an image -> what its tag was, and what it is."""

    def fill(self, name: ImageName) -> None:
        """Push an image twice, and pull it through the server each time: its tag has a history."""
        names = list(self.versions)
        number = names.index(str(name)) if str(name) in names else len(names)
        versions = [images.image(1000 + 2 * number + n, layers=(3000, 20_000)) for n in (0, 1)]
        self.versions[str(name)] = versions
        for image in versions:
            self.registry.push(name.repository.path, image, str(name.reference))
            self._pull(name)

    def refill(self, name: ImageName) -> None:
        """Pull an image again, which an earlier example may have removed."""
        self._pull(name, *(image.digest for image in self.versions[str(name)]))

    def _pull(self, name: ImageName, *digests: str) -> None:
        """Pull as containerd does: the tag, the manifest by digest, its blobs."""
        path, ns = name.repository.path, f"?ns={name.repository.upstream}"
        for reference in (*digests, str(name.reference)):
            answer = self.mirror.ask(f"/v2/{path}/manifests/{reference}{ns}", headers=images.ACCEPT)
            if answer.status == 403:
                return  # An earlier example has blocked it.
            assert answer.status == 200, (str(name), answer)
            manifest = json.loads(answer.body)
            for part in (manifest["config"], *manifest["layers"]):
                blob = self.mirror.ask(f"/v2/{path}/blobs/{part['digest']}{ns}")
                assert blob.status == 200, blob

    def arguments(self, command: str) -> list[str]:
        """The arguments of an example, with digests that exist in place of invented ones."""
        arguments: list[str] = []
        named = ALWAYS[0]
        for word in words_of(command):
            name, at, _ = word.partition("@")
            for known in (name, f"{name}:latest", f"docker.io/library/{name}"):
                named = known if known in self.versions else named
            earlier, current = self.versions[named]
            if at:
                word = f"{name}@{current.digest}"
            elif _DIGEST.fullmatch(word) or arguments[-1:] == ["--to"]:
                word = earlier.digest
            arguments.append(word)
        return arguments


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    with DockerRegistry() as registry:
        upstream = {"endpoints": [registry.url], "tag_ttl": 0}
        push_host = f"127.0.0.1:{free_port()}"
        hosted = {"name": "registry.example.internal", "listen": push_host}
        with Mirror(dict.fromkeys(UPSTREAMS, upstream), hosted=hosted) as mirror:
            images.push(f"http://{push_host}", "team/app", images.image(5), "v1")
            (directory / "config").mkdir()
            (directory / "config/mirror.yaml").write_text(mirror.config_file.read_text())
            for name, text in FILES.items():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                (directory / name).write_text(text)
            filled = Site(directory, registry, mirror)
            for image in images_of(tuple(one for block in BLOCKS for one in block.commands)):
                filled.fill(image)
            yield filled


def expected_codes(arguments: list[str]) -> set[int]:
    # These end with 1 if they find something, which depends on this machine and on other examples,
    # and `explain` if it finds nothing.
    may_fail = arguments[0] in ("doctor", "verify") or {"explain", "--outcome"} <= set(arguments)
    return {0, 1} if may_fail else {0}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_of_a_document_run(
    document: str,
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(site.directory)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # `verify` starts a process that hashes.
    monkeypatch.delenv("OCI_MIRROR_CONFIG", raising=False)
    failures: list[tuple[int, str, int | str, str]] = []
    for block in (one for one in BLOCKS if one.document == document):
        has_to_have_history = any(words_of(one)[0] in HISTORY for one in block.commands)
        for name in images_of(block.commands):
            (site.fill if has_to_have_history else site.refill)(name)
        for command in block.commands:
            arguments = site.arguments(command)
            if why_not_run(arguments) is not None:
                continue
            code = main(arguments)
            said = capsys.readouterr()
            if code not in expected_codes(arguments):
                failures.append((block.line, command, code, said.err))
            elif "--json" in arguments:
                errors = errors_of(arguments[0], said.out)
                failures += [(block.line, command, line, error) for line, error in errors]
    assert failures == [], "\n".join(map(str, failures))


def errors_of(command: str, output: str) -> list[tuple[str, str]]:
    """(line, message) of each violation of the schema of a command."""
    validator = Draft202012Validator(SCHEMAS[command])
    return [
        (line, error.message)
        for line in output.splitlines()
        for error in validator.iter_errors(json.loads(line))
    ]


def test_json_of_every_command_fits_its_schema(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(site.directory)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # `verify` starts a process that hashes.
    (site.mirror.data_dir / "marks.json").unlink(missing_ok=True)
    for name in images_of(()):
        site.fill(name)
    words = {
        **dict(zip(("NAME", "OTHER"), ALWAYS, strict=True)),
        "EARLIER": site.versions[ALWAYS[0]][0].digest,
        "SOURCE": str(site.directory / "images.txt"),
        "BACKUP": str(site.directory / "backup"),
    }
    failures: list[tuple[str, int | str, str]] = []
    printed = set()
    for run in JSON_RUNS:
        arguments = [words.get(word, word) for word in run.split()]
        code = main([*arguments, "--json"])
        said = capsys.readouterr()
        failures += [] if code in expected_codes(arguments) else [(run, code, said.err)]
        failures += [(run, line, error) for line, error in errors_of(arguments[0], said.out)]
        printed |= {arguments[0]} if said.out else set()
    assert failures == [], "\n".join(map(str, failures))
    # What these two list depends on the content: here, there is nothing to remove or to report.
    assert set(SCHEMAS) - {"gc", "verify"} <= printed


# --- the documents and the schemas ----------------------------------------------------------------


def sections() -> dict[str, str]:
    """Heading ``## COMMAND`` of docs/commands.md -> its text."""
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def fields_of(schema: Any) -> set[str]:
    """The names of all fields of a schema, also of nested objects."""
    found: set[str] = set()
    if isinstance(schema, dict):
        found |= set(schema.get("properties", {}))
        for value in schema.values():
            found |= fields_of(value)
    elif isinstance(schema, (list, tuple)):
        for value in schema:
            found |= fields_of(value)
    return found


def section_of(command: str) -> str:
    """The section of a command. One section may be about several: ``## pin and unpin``."""
    for heading, text in sections().items():
        if command in re.findall(r"[a-z][a-z-]+", heading):
            return text
    raise AssertionError(f"docs/commands.md has no section of {command}")


@pytest.mark.parametrize("command", SCHEMAS)
def test_schema_is_valid_and_each_field_is_documented(command: str) -> None:
    """In the section of the command, or in one that it names for its fields."""
    Draft202012Validator.check_schema(SCHEMAS[command])
    text = section_of(command)
    for other in re.findall(r"\[`[a-z-]+`\]\(#([a-z-]+)\)", text):
        text += section_of(other)
    documented = set(re.findall(r"`([^`\s]+)`", text))
    assert sorted(fields_of(SCHEMAS[command]) - documented) == []


def test_sections_of_commands_are_in_alphabetical_order() -> None:
    assert list(sections()) == sorted(sections())


def test_every_command_has_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    commands = re.findall(r"^    ([a-z][a-z-]+)(?:\s|$)", capsys.readouterr().out, re.MULTILINE)
    assert len(commands) > 7
    missing = []
    for command in commands:
        try:
            section_of(command)
        except AssertionError:
            missing.append(command)
    assert missing == []


def test_examples_are_found_and_few_are_not_run() -> None:
    commands = [words_of(command) for block in BLOCKS for command in block.commands]
    assert len(commands) >= 8
    skipped = [one for one in commands if why_not_run(one)]
    assert len(skipped) * 3 <= len(commands)
