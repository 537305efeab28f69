"""Forms of endpoints, upstreams, patterns and paths that people write: put right, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mirror.config import values
from mirror.config.load import load
from mirror.oci.errors import ConfigError

HUB = "https://registry-1.docker.io"


@pytest.mark.row("FD3-forms-of-endpoints")
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("https://docker.io", HUB),
        ("http://docker.io", HUB),
        ("docker.io", HUB),
        ("https://hub.docker.com", HUB),
        ("https://hub.docker.com/v2/", HUB),
        ("https://index.docker.io/v1/", HUB),
        ("https://index.docker.io", HUB),
        ("https://registry.hub.docker.com/", HUB),
        ("registry-1.docker.io", HUB),
        ("https://registry-1.docker.io/org", f"{HUB}/org"),
        ("https://registry.example/v2/", "https://registry.example"),
        ("https://registry.example/v2", "https://registry.example"),
        ("https://registry.example//", "https://registry.example"),
        ("HTTPS://Registry.Example:443", "https://registry.example"),
        ("http://registry.example:80/", "http://registry.example"),
        ("http://registry.example:443", "http://registry.example:443"),
        ("http://[FD00::1]:5000/", "http://[fd00::1]:5000"),
        ("registry.example", "https://registry.example"),
        ("registry.example/v2/", "https://registry.example"),
        ("registry.example/hub-proxy", "https://registry.example/hub-proxy"),
        ("https://harbor.example/v2/hub-proxy/", "https://harbor.example/hub-proxy"),
        ("https://a.example/base/v2/", "https://a.example/base/v2"),
        ("https://a.example/base/v2/hub/x", "https://a.example/base/v2/hub/x"),
        ("https://a.example/api/docker/hub", "https://a.example/api/docker/hub/v2"),
        (
            "https://a.example/artifactory/api/docker/hub/",
            "https://a.example/artifactory/api/docker/hub/v2",
        ),
        ("https://r.example/v2/v2", "https://r.example/v2/v2"),
        ("https://r.example/api/v2", "https://r.example/api/v2"),
        ("https://quay.io/org", "https://quay.io/org"),
        (
            "https://gitlab.com/org/dependency_proxy/containers",
            "https://gitlab.com/org/dependency_proxy/containers",
        ),
    ],
)
def test_plain_form_of_an_endpoint_is_put_right(written: str, meant: str) -> None:
    assert values.normalise_endpoint(written) == meant
    assert values.normalise_endpoint(meant) == meant, "the canonical form stays as it is"


@pytest.mark.row("FD3-forms-of-endpoints")
@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("localhost:5000", "begins with https:// or http://"),
        ("registry.example:5000", "begins with https:// or http://"),
        ("10.0.0.1", "begins with https:// or http://"),
        ("registry", "begins with https:// or http://"),
        ("docker://registry.example", "begins with https:// or http://"),
        ("oci://registry.example", "begins with https:// or http://"),
        ("https://registry.example/v1/", "version 2 of the API"),
        ("https://hub.docker.com/r/library/alpine", f"write {HUB}"),
        ("https://docker.io/library", f"write {HUB}"),
        ("https://docker.com", f"write {HUB}"),
        ("docker.com", f"write {HUB}"),
        ("https://www.docker.com/products", f"write {HUB}"),
        ("https://github.com/org", "write https://ghcr.io"),
        ("https://gitlab.com/org/project", "write https://registry.gitlab.com"),
        ("https://gallery.ecr.aws", "write https://public.ecr.aws"),
        ("https://quay.io/repository/org/app", "or https://quay.io/ORGANIZATION"),
        ("https://harbor.example/api/v2.0/projects", "or https://HOST/PROJECT"),
        ("https://harbor.example/harbor/projects/3/repositories", "or https://HOST/PROJECT"),
        ("https://git.example/gitea/api/v1", "or https://HOST/PROJECT"),
        ("https://registry.example/v2/library/alpine/tags/list", "is one object of a registry"),
        ("https://registry.example/v2/app/manifests/latest", "is one object of a registry"),
        ("https://registry.example/v2/_catalog", "prefix of repositories"),
        ("https://registry.example/library/alpine:3", "prefix of repositories"),
        ("https://registry.example/Hub", "prefix of repositories"),
        ("https://registry.example/a/../v2", "neither . nor .."),
    ],
)
def test_other_form_of_an_endpoint_is_refused_with_the_remedy(written: str, why: str) -> None:
    with pytest.raises(ValueError, match=why.replace(".", r"\.")):
        values.normalise_endpoint(written)


@pytest.fixture
def refused(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Load a file of this text, which must be refused. Returns the message."""

    def call(text: str) -> str:
        file = tmp_path_factory.mktemp("c") / "m.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load(str(file), {})
        return str(caught.value).removeprefix(f"{file.parent}/")

    return call


@pytest.mark.row("FD3-forms-of-endpoints")
@pytest.mark.parametrize(
    "name", ["index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"]
)
def test_other_name_of_docker_hub_is_docker_io(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("c") / "m.yaml"
    file.write_text(
        f"default_upstream: {name}\nupstreams:\n  {name}:\n    endpoints: [docker.io]\n"
        "    tag_ttl: 1h\n"
    )
    variable = f"OCI_MIRROR_UPSTREAMS__{name.replace('.', '_').replace('-', '_').upper()}__TAG_TTL"
    settings = load(str(file), {variable: "2h"})
    assert (settings.default_upstream, list(settings.upstreams)) == ("docker.io", ["docker.io"])
    assert settings.upstreams["docker.io"].tag_ttl == 7200


@pytest.mark.row("FD3-forms-of-endpoints")
def test_two_names_of_one_registry_are_refused(refused: Callable[[str], str]) -> None:
    one = "{endpoints: [https://r.example]}"
    message = refused(f"upstreams:\n  docker.io: {one}\n  index.docker.io: {one}\n")
    assert message == (
        "m.yaml:3: upstreams.index.docker.io: is docker.io, which is configured already"
    )


@pytest.mark.row("FD3-forms-of-endpoints")
@pytest.mark.parametrize("name", ["hub.docker.com", "www.docker.com"])
def test_host_that_is_in_no_reference_is_refused_as_a_name(
    name: str, refused: Callable[[str], str]
) -> None:
    message = refused(f"upstreams:\n  {name}: {{endpoints: [https://r.example]}}\n")
    assert message.startswith(f"m.yaml:2: upstreams.{name}: ")
    assert message.endswith("Docker Hub is named docker.io")


# --- suspicious values ----------------------------------------------------------------------------

UPSTREAM = "upstreams:\n  docker.io:\n    endpoints: [https://r.example]\n"


@pytest.mark.row("FE8-suspicious-configuration")
@pytest.mark.parametrize(
    ("more", "line", "key"),
    [
        (
            "    credentials: {username: joe, password: '${PW}'}",
            4,
            "upstreams.docker.io.credentials.password",
        ),
        (
            "    credentials: {username: '${USER}', password: x}",
            4,
            "upstreams.docker.io.credentials.username",
        ),
        (
            "    credentials: {username: joe, password: '{{ .Values.pw }}'}",
            4,
            "upstreams.docker.io.credentials.password",
        ),
        (
            "    credentials: {username: joe, password: '$(cat /secret)'}",
            4,
            "upstreams.docker.io.credentials.password",
        ),
        ("    allow: ['^library/.*$']", 4, "upstreams.docker.io.allow[0]"),
        ("    allow: [org/app, 'library/.*']", 4, "upstreams.docker.io.allow[1]"),
        ("    deny: ['(a|b)/c']", 4, "upstreams.docker.io.deny[0]"),
        ("    deny: ['Secret/*']", 4, "upstreams.docker.io.deny[0]"),
        ("    allow: ['library/alpine:3']", 4, "upstreams.docker.io.allow[0]"),
        ("    allow: ['library/']", 4, "upstreams.docker.io.allow[0]"),
        ("    deny: ['index.docker.io/library/*']", 4, "upstreams.docker.io.deny[0]"),
        ("    ca: ~/ca.pem", 4, "upstreams.docker.io.ca"),
        ("    ca: $HOME/ca.pem", 4, "upstreams.docker.io.ca"),
        ("    client_key: /k.pem", 4, "upstreams.docker.io.client_key"),
        ("    ca: /ca.pem\n    insecure: true", 5, "upstreams.docker.io.insecure"),
        ("    redirect_hosts: [169.254.169.254]", 4, "upstreams.docker.io.redirect_hosts[0]"),
        ("    redirect_hosts: ['https://x']", 4, "upstreams.docker.io.redirect_hosts[0]"),
        ("data_dir: ~/mirror", 4, "data_dir"),
        ("data_dir: ${DATA}/mirror", 4, "data_dir"),
        ("tls: {certificate: ~/a, key: /b}", 4, "tls.certificate"),
    ],
)
def test_value_that_cannot_be_meant_is_refused_with_line_and_key(
    more: str, line: int, key: str, refused: Callable[[str], str]
) -> None:
    assert refused(f"{UPSTREAM}{more}\n").startswith(f"m.yaml:{line}: {key}: ")


@pytest.mark.row("FE8-suspicious-configuration")
@pytest.mark.parametrize(
    "more",
    [
        "    credentials: {username: $oauthtoken, password: 'a$b{c}'}",
        "    allow: [library/*, 'org/a[0-9]?', '*', 'a.b-c__d/e']",
        "data_dir: /srv/a$b",
    ],
)
def test_unusual_value_that_is_valid_is_accepted(
    more: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("c") / "m.yaml"
    file.write_text(f"{UPSTREAM}{more}\n")
    load(str(file), {})
