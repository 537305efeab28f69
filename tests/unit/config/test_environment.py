"""Environment variables: each key has one, and a bad one is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from mirror.config.load import load
from tests.unit.config.test_load import UPSTREAMS, read, refused, upstream


def test_variable_overrides_the_value_in_the_file(tmp_path: Path) -> None:
    environ = {
        "OCI_MIRROR_LISTEN": "[::1]:5200",
        "OCI_MIRROR_WORKERS": "3",
        "OCI_MIRROR_STORAGE__MAX_SIZE": "1GiB",
        "OCI_MIRROR_TLS__CERTIFICATE": "/c",
        "OCI_MIRROR_TLS__KEY": "/k",
        "OCI_MIRROR_UPSTREAMS__DOCKER_IO__TAG_TTL": "inf",
        "OCI_MIRROR_UPSTREAMS__DOCKER_IO__ALLOW": "library/*, org/app,",
        "OCI_MIRROR_UPSTREAMS__DOCKER_IO__DENY": "",
        "OCI_MIRROR_UPSTREAMS__DOCKER_IO__LIMITS__IDLE": "7s",
        "OCI_MIRROR_UPSTREAMS__DOCKER_IO__CREDENTIALS__USERNAME": "joe",
        "OCI_MIRROR_UPSTREAMS__DOCKER_IO__CREDENTIALS__PASSWORD": "a,b",
        "PATH": "/bin",
        "MIRROR": "x",
    }
    got = read(tmp_path, upstream("deny: [a/*]"), environ)
    hub = got.upstreams["docker.io"]
    assert (got.listen, got.workers, got.storage.max_size) == ("[::1]:5200", 3, 2**30)
    assert got.tls is not None
    assert (got.tls.certificate, got.tls.key) == ("/c", "/k")
    assert hub.tag_ttl == float("inf")
    assert (hub.allow, hub.deny) == (("library/*", "org/app"), ())
    assert (hub.limits.idle, hub.limits.headers) == (7, 15)
    assert (hub.credentials.username, hub.credentials.password) == ("joe", "a,b")


def test_json_object_in_a_variable_adds_an_upstream() -> None:
    environ = {
        "OCI_MIRROR_UPSTREAMS": json.dumps(
            {
                "reg.example:5000": {
                    "endpoints": ["http://r:5000"],
                    "tag_ttl": 9,
                    "serve_stale": False,
                }
            }
        ),
        "OCI_MIRROR_UPSTREAMS__REG_EXAMPLE_5000__PULL_POLICY": "Never",
    }
    got = load(None, environ).upstreams["reg.example:5000"]
    assert (got.endpoints, got.tag_ttl, got.serve_stale) == (("http://r:5000",), 9, False)
    assert got.pull_policy == "Never"


def test_json_object_in_a_variable_is_merged_into_the_section_of_the_file(tmp_path: Path) -> None:
    got = read(
        tmp_path,
        upstream("tag_ttl: 1h"),
        {"OCI_MIRROR_UPSTREAMS": '{"docker.io": {"negative_ttl": "1s"}}'},
    ).upstreams["docker.io"]
    assert (got.tag_ttl, got.negative_ttl) == (3600, 1)


def test_every_key_can_be_set_by_its_variable(tmp_path: Path) -> None:
    """The values are those of the defaults, as they are printed."""
    text = upstream("", "a-b.example")
    base = read(tmp_path, text).model_dump(mode="json")
    base["upstreams"]["a-b.example"]["credentials"] = {"helper": "x", "hosts": []}
    base["tls"] = {"certificate": "/c", "key": "/k"}
    base["admin"] = {
        "listen": "0.0.0.0:5102",
        "token_file": "/t",
        "read_only_token_file": "/r",
        "hosts": ["admin.example"],
        "tls": {"certificate": "/c", "key": "/k"},
    }
    base["hosted"] = {
        "name": "registry.example",
        "listen": "127.0.0.1:5101",
        "hosts": ["push.example"],
        "max_size": "1GiB",
        "max_repository_size": "1MiB",
        "sparse_indexes": True,
    }
    base["access"] = {
        "users": "/users",
        "tokens": "/tokens",
        "issuers": [],
        "groups": {},
        "rules": [],
        "anonymous_pull": False,
        "allow_plain_http": True,
    }
    base["default_upstream"] = "a-b.example"
    for key in ("ca", "client_certificate", "client_key"):
        base["upstreams"]["a-b.example"][key] = f"/{key}"
    base["upstreams"]["a-b.example"]["alias"] = "a"
    environ: dict[str, str] = {}

    def gather(tree: Mapping[str, object], prefix: str) -> None:
        for key, value in tree.items():
            name = f"{prefix}{key.replace('-', '_').replace('.', '_').upper()}"
            if isinstance(value, dict):
                gather(value, f"{name}__")
            else:
                environ[name] = ",".join(value) if isinstance(value, list) else str(value)

    gather(base, "OCI_MIRROR_")
    got = read(tmp_path, text, environ).model_dump(mode="json", exclude_none=True)
    assert got == base
    assert len(environ) >= 27


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        (
            "OCI_MIRROR_WORKER",
            "3",
            "OCI_MIRROR_WORKER: unknown variable, did you mean OCI_MIRROR_WORKERS?",
        ),
        (
            "OCI_MIRROR_STORAGE_MAX_SIZE",
            "3",
            (
                "OCI_MIRROR_STORAGE_MAX_SIZE: unknown variable, "
                "did you mean OCI_MIRROR_STORAGE__MAX_SIZE?"
            ),
        ),
        (
            "OCI_MIRROR_UPSTREAMS__DOCKER_IO__TAG_TLL",
            "3",
            (
                "OCI_MIRROR_UPSTREAMS__DOCKER_IO__TAG_TLL: unknown variable, "
                "did you mean OCI_MIRROR_UPSTREAMS__DOCKER_IO__TAG_TTL?"
            ),
        ),
        (
            "OCI_MIRROR_UPSTREAMS__DOCKER_IO",
            "{}",
            (
                "OCI_MIRROR_UPSTREAMS__DOCKER_IO: unknown variable, "
                "did you mean OCI_MIRROR_UPSTREAMS__DOCKER_IO__CA?"
            ),
        ),
        (
            "OCI_MIRROR_WORKERS",
            "0",
            "OCI_MIRROR_WORKERS: workers: '0': must be greater than or equal to 1",
        ),
        ("OCI_MIRROR_UPSTREAMS", "{s3cret", "OCI_MIRROR_UPSTREAMS: upstreams: not JSON"),
        (
            "OCI_MIRROR_UPSTREAMS",
            '["s3cret"]',
            "OCI_MIRROR_UPSTREAMS: upstreams: must be a JSON object",
        ),
        (
            "OCI_MIRROR_UPSTREAMS__DOCKER_IO__CREDENTIALS__PASSWORD",
            "s3cret",
            "m.yaml:2: upstreams.docker.io.credentials: username and password must be set together",
        ),
    ],
)
def test_bad_variable_is_refused_in_one_line(
    tmp_path: Path, name: str, value: str, line: str
) -> None:
    said = refused(tmp_path, upstream(""), {name: value})
    assert said == line
    assert "s3cret" not in said


def test_service_links_of_kubernetes_are_ignored(tmp_path: Path) -> None:
    environ = {
        "OCI_MIRROR_SERVICE_HOST": "10.0.0.1",
        "OCI_MIRROR_SERVICE_PORT": "5100",
        "OCI_MIRROR_SERVICE_PORT_HTTP": "5100",
        "OCI_MIRROR_PORT": "tcp://10.0.0.1:5100",
        "OCI_MIRROR_PORT_5100_TCP": "tcp://10.0.0.1:5100",
        "OCI_MIRROR_PORT_5100_TCP_ADDR": "10.0.0.1",
        "OCI_MIRROR_NODES_SERVICE_HOST": "10.0.0.1",
    }
    assert read(tmp_path, UPSTREAMS, environ) == read(tmp_path, UPSTREAMS)


def test_variable_that_names_two_upstreams_is_refused(tmp_path: Path) -> None:
    text = (
        "upstreams:\n"
        "  a-b.example: {endpoints: [https://r.example]}\n"
        "  a.b.example: {endpoints: [https://r.example]}\n"
    )
    assert refused(tmp_path, text, {"OCI_MIRROR_UPSTREAMS__A_B_EXAMPLE__CA": "x"}) == (
        "OCI_MIRROR_UPSTREAMS__A_B_EXAMPLE__CA: "
        "names more than one upstream: a-b.example, a.b.example"
    )
