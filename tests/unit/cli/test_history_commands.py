"""``explain``, ``history`` and ``savings``: what they print, and the schema of ``--json``."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mirror.cli.history import build_rows
from mirror.cli.main import main
from mirror.cli.savings import _remarks
from mirror.cli.schemas import SCHEMAS
from mirror.history.stored_pull import TagDigest
from mirror.history.sums import Saving
from mirror.observability.events import (
    CURRENT_RECORD,
    BytesFetched,
    ExchangeEnded,
    Kind,
    Outcome,
    TagMoved,
)
from mirror.observability.traces import FetchProgress, PullTrace
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.image_layout import Draft
from mirror.store.index import Index
from mirror.store.layout import Layout
from mirror.store.records import NamedManifest, PreviousDigest, TagRecord
from tests.unit.cli.inventory_kit import Site
from tests.unit.cli.kit import make_data_directory
from tests.unit.history.kit import Recording, a_pull, recording
from tests.unit.inventory.kit import content

APP, V1 = Repository("docker.io", "library/app"), Tag("v1")
ONE, TWO, THREE = (Digest.of(text.encode()) for text in ("one", "two", "three"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_data_directory(tmp_path / "data")
    file = tmp_path / "mirror.yaml"
    upstreams = "upstreams: {docker.io: {endpoints: [http://127.0.0.1:9]}}"
    file.write_text(f"data_dir: {tmp_path / 'data'}\n{upstreams}\n")
    return file


@pytest.fixture
def run(config: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run_command(command: str, *arguments: str) -> tuple[int, str, str]:
        code = main([command, "--config", str(config), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


@pytest.fixture
def rows(
    run: Callable[..., tuple[int, str, str]],
) -> Callable[..., list[dict[str, Any]]]:
    """Run a command with ``--json``. Its lines must keep the schema."""

    def run_command(command: str, *arguments: str) -> list[dict[str, Any]]:
        code, out, _ = run(command, *arguments, "--json")
        assert code == 0
        lines = [json.loads(line) for line in out.splitlines()]
        for line in lines:
            jsonschema.validate(line, SCHEMAS[command])
        return lines

    return run_command


def record(root: Path, fill: Callable[[Recording], None]) -> None:
    async def fill_and_write() -> None:
        with recording(root, time.time()) as made:
            fill(made)
            made.write()

    asyncio.run(fill_and_write())


def fill(made: Recording) -> None:
    """A cold pull of a tag, its layer, a hit, and a refusal."""
    digest = made.has_blob(b"layer" * 100)
    manifest = {"kind": Kind.MANIFEST, "reference": "v1", "digest": str(ONE)}
    first = a_pull(request_id="cold", outcome=Outcome.MISS, **manifest)
    CURRENT_RECORD.set(first)
    exchange = ExchangeEnded("docker.io", "https://x", "GET", Kind.MANIFEST, 200, 0.1, True)
    made.recorder.observe(exchange)
    made.recorder.observe(BytesFetched("docker.io", 100))
    progress = FetchProgress(began=1.0, latest=3.0, bytes=80_000_000)
    layer = a_pull(request_id="layer", outcome=Outcome.MISS, digest=digest, reference=digest)
    layer.trace = PullTrace(size=80_000_000, source_wait=1.9, progress=progress)
    layer.bytes_sent, layer.stages = 80_000_000, [("send", 2.0)]
    refused = a_pull(
        request_id="refused", outcome=Outcome.DENIED, error="DENIED: no", client="10.9.9.9"
    )
    for pull in (first, layer, a_pull(request_id="hit", **manifest), refused):
        made.end(pull)


def test_explain_tells_of_the_last_pulls(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    record(tmp_path / "data", fill)
    code, out, err = run("explain", "app:v1")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert any(line.endswith("3 requests (2 miss, 1 hit)") for line in lines)
    assert sum("  manifest v1" in line for line in lines) == 2
    assert "  Slowest: manifest v1 (id " in out, "the first of the slowest"
    assert "Miss: the tag was not known" in out
    code, out, _ = run("explain", "app:v1", "--requests")
    assert "The upstream sent 40 MB/s." in out
    assert "the upstream is the bottleneck" in out
    code, out, _ = run("explain", "layer")
    assert out.count("(id ") == 1
    code, out, _ = run("explain", "--client", "10.9.9.0/24")
    assert "Refused: DENIED: no." in out
    assert out.count("(id ") == 1


def test_explain_filters_by_image_digest_outcome_and_number(
    tmp_path: Path, rows: Callable[..., list[dict[str, Any]]]
) -> None:
    record(tmp_path / "data", fill)
    assert len(rows("explain")) == 4
    assert len(rows("explain", "--last", "1")) == 1
    assert [row["request_id"] for row in rows("explain", "--outcome", "denied")] == ["refused"]
    assert {row["request_id"] for row in rows("explain", str(ONE))} == {"cold", "hit"}
    assert rows("explain", "docker.io/library/other") == []
    (layer,) = rows("explain", "layer")
    assert layer["fetched_bytes"] == 80_000_000
    assert layer["sentences"][0].startswith("Miss")


def test_explain_without_a_history_says_so(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("explain")
    assert (code, out) == (0, "")
    assert "the history is empty" in err
    assert "a request is in it a second after its end" in err


def test_explain_of_an_image_without_requests_names_it_and_the_begin_of_the_history(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    record(tmp_path / "data", fill)
    code, out, err = run("explain", "zzz")
    assert (code, out) == (0, "")
    assert "no such request for docker.io/library/zzz in the history, which begins at 20" in err


@pytest.mark.parametrize(
    "arguments", [["NO IMAGE"], ["--last", "0"], ["--outcome", "x"], ["--client", "x"]]
)
def test_explain_refuses_wrong_arguments(
    run: Callable[..., tuple[int, str, str]], arguments: list[str]
) -> None:
    assert run("explain", *arguments)[0] == 2


@pytest.mark.parametrize("command", [["explain"], ["savings"], ["history", "app:v1"]])
def test_missing_data_directory_is_no_empty_history(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], command: list[str]
) -> None:
    (tmp_path / "data").rename(tmp_path / "other")
    code, out, err = run(*command)
    assert (code, out) == (1, "")
    assert f"{tmp_path / 'data'} is no data directory of a mirror" in err


@pytest.mark.parametrize("has_log", [True, False])
def test_history_whose_tables_are_not_yet_created_is_empty(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], has_log: bool
) -> None:
    """The first second of the first start."""
    (tmp_path / "data" / "history").mkdir()
    database = tmp_path / "data" / "history" / "history.1.db"
    with closing(sqlite3.connect(database)) as connection:
        if has_log:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
        for command in (["explain"], ["savings"], ["history", "app:v1"]):
            assert run(*command)[0] == 0


def test_damaged_history_is_one_line_with_the_remedy(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "data" / "history").mkdir()
    (tmp_path / "data" / "history" / "history.1.db").write_bytes(b"no database" * 1000)
    for command in (["explain"], ["savings"], ["history", "app:v1"]):
        code, out, err = run(*command)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "may be deleted" in err


def test_savings_shows_bytes_billable_requests_and_other_disk_sizes(
    tmp_path: Path, rows: Callable[..., list[dict[str, Any]]]
) -> None:
    record(tmp_path / "data", fill)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in rows("savings", "--by", "repository", "--last", "hour"):
        by_kind.setdefault(row["kind"], []).append(row)
    assert {row["name"] for row in by_kind["repository"]} == {"docker.io/library/app", ""}
    (total,) = by_kind["total"]
    assert (total["billable"], total["billed"], total["billable_saved"]) == (2, 1, 1)
    assert total["hit_ratio"] == round(1 / 3, 4)
    assert [row["name"] for row in by_kind["disk"]] == ["0.5x", "1x", "2x", "4x"]


def test_savings_explains_rows_that_surprise() -> None:
    plain, warmed = Saving("docker.io", bytes_sent=2), Saving("", bytes_fetched=1)
    assert list(_remarks([("upstream", plain)])) == []
    negative, other = _remarks([("network", plain), ("network", warmed)])
    assert "`warm` and `prefetch`" in negative
    assert other.startswith("(other): work without a client")


def test_savings_says_what_the_prediction_is_drawn_from(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    record(tmp_path / "data", fill)
    out = " ".join(run("savings", "--last", "7d")[1].split())
    assert "Simulated with 3 recorded requests (GET of content) since 2" in out
    assert "These requests had a hit ratio of 33.3 %: compare with 1x." in out
    assert "All sizes are equal: each holds all that was pulled" in out
    assert "Do not rely" not in out


def test_savings_does_not_predict_what_marks_and_a_fast_disk_hide(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], rows: Callable[..., Any]
) -> None:
    def fill_fast(made: Recording) -> None:
        for number in [*range(20), *range(20)]:
            digest = str(Digest.of(str(number).encode()))
            size = 1 << 20
            made.end(a_pull(digest=digest, outcome=Outcome.MISS, bytes_sent=size))

    config = tmp_path / "mirror.yaml"
    config.write_text(config.read_text() + "storage: {max_size: 4MiB}\n")
    record(tmp_path / "data", fill_fast)
    out = " ".join(run("savings")[1].split())
    assert "Do not rely on the prediction for 0.5x, 1x, 2x, 4x: content would be evicted" in out
    assert [row["is_reliable"] for row in rows("savings") if row["kind"] == "disk"] == [False] * 4


def test_savings_takes_what_a_pin_protects_off_the_disk(site: Site) -> None:
    pinned, other = content("pinned", 600_000), content("other", 300_000)
    site.data.image("app:v1", "one", pinned)

    def fill_twice(made: Recording) -> None:
        for body in (pinned, other) * 2:
            digest, size = str(Digest.of(body)), len(body)
            made.end(a_pull(digest=digest, outcome=Outcome.MISS, bytes_sent=size))

    record(site.data.layout.root, fill_twice)
    fetched = {row["name"]: row["bytes_fetched"] for row in site.rows("savings")}
    assert (fetched["0.5x"], fetched["1x"]) == (1_500_000, 900_000)
    assert site.run("pin", "app:v1")[0] == 0
    fetched = {row["name"]: row["bytes_fetched"] for row in site.rows("savings")}
    assert (fetched["0.5x"], fetched["1x"]) == (1_200_000, 900_000)
    assert "0.5x: pins, freezes and leases take all of it" in " ".join(site.lines("savings"))


def test_savings_of_an_empty_history_has_a_total_only(
    rows: Callable[..., list[dict[str, Any]]], run: Callable[..., tuple[int, str, str]]
) -> None:
    (total,) = rows("savings")
    assert (total["kind"], total["hit_ratio"], total["since"]) == ("total", None, None)
    assert run("savings")[1].splitlines()[0].startswith("UPSTREAM")


def test_history_lists_each_digest_with_its_times(
    tmp_path: Path,
    rows: Callable[..., list[dict[str, Any]]],
    run: Callable[..., tuple[int, str, str]],
) -> None:
    async def move_twice(made: Recording) -> None:
        times = iter([1000.0, 2000.0, 3000.0])
        index = await Index.open(made.layout.index, made.recorder.observe, lambda: next(times))
        for digest in (ONE, TWO, TWO):
            await index.confirm_tag(APP, V1, digest)
        await index.close()

    async def record_moves() -> None:
        with recording(tmp_path / "data") as made:
            await move_twice(made)
            made.has_blob(b"two")

    asyncio.run(record_moves())
    found = rows("history", "app:v1")
    assert [(row["digest"], row["first_seen"], row["last_seen"]) for row in found] == [
        (str(TWO), "1970-01-01T00:33:20Z", "1970-01-01T00:50:00Z"),
        (str(ONE), "1970-01-01T00:16:40Z", "1970-01-01T00:16:40Z"),
    ]
    assert [(row["is_current"], row["here"]) for row in found] == [
        (True, "complete"),
        (False, "no"),
    ]
    assert run("history", "app:v1")[1].splitlines()[1].startswith(f"{str(TWO)[:19]} ")
    assert run("history", f"app@{ONE}")[0] == 2
    assert "has not been pulled" in run("history", "other:v1")[2]


def test_history_joins_the_index_and_the_history_without_doubles() -> None:
    digests = [TagDigest(str(TWO), 20.0, 20.0), TagDigest(str(ONE), 10.0, 15.0)]
    previous = (PreviousDigest(ONE, 10.0, 15.0), PreviousDigest(THREE, 1.0, 5.0))
    tag = TagRecord(APP, V1, TWO, first_seen=20.0, confirmed=99.0, previous_digests=previous)
    joined = build_rows("app:v1", digests, tag, lambda digest: "no")
    assert [row["digest"] for row in joined] == [str(TWO), str(ONE), str(THREE)]
    assert joined[0]["last_seen"] == "1970-01-01T00:01:39Z"
    assert build_rows("app:v1", digests, None, lambda digest: "no")[0]["is_current"] is False


def test_history_has_one_row_for_equal_neighbours() -> None:
    digests = [TagDigest(str(one), at, at + 1) for one, at in ((ONE, 9.0), (ONE, 5.0), (TWO, 3.0))]
    tag = TagRecord(APP, V1, ONE, first_seen=20.0, confirmed=30.0)
    found = build_rows("app:v1", [*digests, TagDigest(str(ONE), 1.0, 2.0)], tag, lambda one: "no")
    assert [(row["digest"], row["first_seen"][-3:], row["last_seen"][-3:]) for row in found] == [
        (str(ONE), "05Z", "30Z"),
        (str(TWO), "03Z", "04Z"),
        (str(ONE), "01Z", "02Z"),
    ]


def test_history_says_what_is_left_of_an_image(
    tmp_path: Path, rows: Callable[..., list[dict[str, Any]]]
) -> None:
    layout = Layout(tmp_path / "data")
    here, lost = Digest.of(b"layer"), Digest.of(b"lost")

    def manifest(*layers: Digest) -> bytes:
        blobs = [
            {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": str(one), "size": 5}
            for one in layers
        ]
        kind = "application/vnd.oci.image.manifest.v1+json"
        document = {"schemaVersion": 2, "mediaType": kind, "config": blobs[0], "layers": blobs}
        return json.dumps(document).encode()

    def fill_tag(made: Recording) -> None:
        made.has_blob(b"layer")
        for at, body in enumerate((manifest(here), manifest(here, lost))):
            event = TagMoved(
                *("docker.io", "library/app", "v1", "", made.has_blob(body)), 10.0 + at, None
            )
            made.recorder.observe(event)

    record(layout.root, fill_tag)
    assert [row["here"] for row in rows("history", "app:v1")] == ["partial", "complete"]


def test_history_of_a_lost_index_leaves_its_names_to_the_server(
    config: Path, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """The index is new to the command, too: it gets the names in index.json before it is used."""
    layout = Layout(tmp_path / "data")
    layout.index.mkdir(parents=True)
    layout.blob(ONE).parent.mkdir(parents=True)
    layout.blob(ONE).write_bytes(b"one")
    named = NamedManifest(APP, V1, ONE, "application/vnd.oci.image.manifest.v1+json", 3)
    draft = Draft(layout)
    assert draft.try_begin()
    draft.add([[named]])
    draft.publish()

    assert run("history", "app:v1")[0] == 0

    async def restored() -> TagRecord | None:
        index = await Index.open(layout.index, lambda event: None)
        try:
            return await index.tag(APP, V1)
        finally:
            await index.close()

    found = asyncio.run(restored())
    assert found is not None
    assert found.digest == ONE
