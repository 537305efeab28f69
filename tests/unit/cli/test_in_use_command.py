"""``in-use``: leases from a list and from the pods of a cluster."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from mirror.cli.main import main
from mirror.cli.schemas import SCHEMAS
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.layout import Layout
from mirror.store.marks import protected_roots, read_marks
from tests.fakes.kubernetes import TOKEN, api_server
from tests.unit.store.kit import image, opened, pulled

REPO, OTHER = Repository("docker.io", "library/app"), Digest.of(b"other")
BODY = image(b"layer")
Run = Callable[..., str]


@pytest.fixture
async def layout(tmp_path: Path) -> Layout:
    async with opened(tmp_path / "data") as store:
        await pulled(store, BODY, Tag("latest"), b"layer")
    return Layout(tmp_path / "data")


@pytest.fixture
def run(layout: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    config = tmp_path / "mirror.yaml"
    config.write_text(
        f"data_dir: {layout.root}\nupstreams: {{docker.io: {{endpoints: ['http://127.0.0.1:9']}}}}\n"
    )

    def run(*argv: str, code: int = 0) -> str:
        assert main(["in-use", "--config", str(config), *argv]) == code, capsys.readouterr().err
        out, err = capsys.readouterr()
        return out + err

    return run


def test_list_is_leased_by_digest_and_by_tag(run: Run, layout: Layout, tmp_path: Path) -> None:
    names = tmp_path / "list"
    names.write_text(
        f"# what runs\n\napp  # latest\n{OTHER}\nghcr.io/x@{OTHER}\nmissing\nNO NAME\n"
    )
    assert run("--file", str(names)) == (
        "leased 2 digests of 5 lines for 24 h: 1 in the cache\n"
        "oci-mirror: 2 names without an image in the cache, not leased: NO NAME, missing\n"
    )
    marks = read_marks(layout)
    assert protected_roots(marks, 0.0) == {Digest.of(BODY), OTHER}
    assert {one.source for one in marks.leases.values()} == {str(names)}
    [row] = [json.loads(line) for line in run("--json").splitlines()]
    jsonschema.validate(row, SCHEMAS["in-use"])
    assert (row["source"], row["digests"], row["cached"]) == (str(names), 2, 1)
    title, line = run().splitlines()
    assert title.split() == ["SOURCE", "DIGESTS", "IN", "CACHE", "UNTIL"]
    assert line.split() == [str(names), "2", "1", row["until"]]


def test_newer_list_of_a_source_replaces_the_older_one_and_release_ends_it(
    run: Run, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, digest in ((f"{OTHER}\n", OTHER), ("app\n", Digest.of(BODY))):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        out = run("--file", "-", "--source", "site a", "--lease", "2h", "--json")
        row = json.loads(out)
        jsonschema.validate(row, SCHEMAS["in-use"])
        assert (row["source"], row["digests"], row["unknown"]) == ("site a", 1, [])
        assert protected_roots(read_marks(layout), 0.0) == {digest}
    assert run("--release", "--source", "site a") == "site a has no lease any more\n"
    assert run("--json") == ""
    assert "site a had no lease" in run("--release", "--source", "site a", code=1)


def test_pods_are_leased_by_the_digests_that_their_nodes_have_pulled(
    run: Run, layout: Layout, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    with api_server() as fake:
        options = ("--from-kubernetes", "--api-server", fake.url, "--token-file", str(token))
        out = run(*options)
        assert out.startswith(
            "leased 6 digests of 5 pods for 24 h: 1 in the cache\n"
            "oci-mirror: 2 names without an image in the cache, not leased: "
            "docker.io/library/local:dev, "
        )
        roots = protected_roots(read_marks(layout), 0.0)
        assert roots >= {Digest.of(name.encode()) for name in ("nginx", "migrate", "busybox")}
        assert Digest.of(BODY) in roots, "the tag of a pending pod"
        assert Digest.of(b"job") not in roots, "the pod has finished"
        fake.status = 403
        assert "may not list pods" in run(*options, code=1)
        assert protected_roots(read_marks(layout), 0.0) == roots, "the leases stay"


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--file", "/missing"], 1, "/missing: No such file or directory"),
        (["--lease", "0s"], 2, "from 1s to ten years"),
        (["--lease", "soon"], 2, "not a duration"),
        (["--lease", "30"], 2, "30: name a unit: 30s, 30m, 30h, 30d"),
        (["--token-file", "x"], 2, "are for --from-kubernetes"),
        (["--release"], 2, "--release needs --source"),
        (["--from-kubernetes"], 1, "this is no pod of a cluster"),
    ],
)
def test_wrong_use_is_said_in_one_line(
    run: Run, argv: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert said in run(*argv, code=code)
