"""Loading of a configuration file: a bad one is refused in one line with origin, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirror.config.load import load
from mirror.config.settings import Settings
from mirror.oci.errors import ConfigError

UPSTREAMS = "upstreams: {docker.io: {endpoints: [https://r.example]}}\n"


def upstream(more: str, name: str = "docker.io", endpoints: str = "[https://r.example]") -> str:
    return f"upstreams:\n  '{name}':\n    endpoints: {endpoints}\n    {more}\n"


def read(path: Path, text: str | bytes, environ: Mapping[str, str] | None = None) -> Settings:
    file = path / "m.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(str(file), environ or {})


def refused(path: Path, text: str | bytes, environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, text, environ)
    line = str(caught.value)
    assert line
    assert line.isprintable()
    assert "\n" not in line
    return line.replace(str(path / "m.yaml"), "m.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # the file
        ("", "m.yaml: upstreams: at least one is needed"),
        ("upstreams:\n", "m.yaml: upstreams: at least one is needed"),
        ("- a\n", "m.yaml:1: must be a mapping of keys to values"),
        ("word\n", "m.yaml:1: must be a mapping of keys to values"),
        ("a: [\n", "m.yaml:2: YAML: expected the node content, but found '<stream end>'"),
        ("a: b: c\n", "m.yaml:1: YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "m.yaml:2: YAML: but found another document"),
        (b"a: 1\nb: \xff\n", "m.yaml:2: not UTF-8"),
        ("a: 1\nb: \x01\n", "m.yaml:2: YAML: a character that is not allowed"),
        (UPSTREAMS + "workers: 1\nworkers: 2\n", "m.yaml:3: workers: set twice, first on line 2"),
        (
            upstream("tag_ttl: 1m\n    tag_ttl: 2m"),
            "m.yaml:5: upstreams.docker.io.tag_ttl: set twice, first on line 4",
        ),
        ("? [a]\n: b\n", "m.yaml:1: a key must be plain text"),
        ("a: &a\n  b: *a\n", "m.yaml:1: nested too deeply"),
        ("a: *b\n", "m.yaml:1: YAML: found undefined alias"),
        (
            "a: !!python/name:os.system x\n",
            "m.yaml:1: YAML tags are not used here (quote a value that begins with !)",
        ),
        # keys
        ("stroage: {}\n", "m.yaml:1: stroage: unknown key, did you mean storage?"),
        (
            "storage: {maxsize: 1}\n",
            "m.yaml:1: storage.maxsize: unknown key, did you mean max_size?",
        ),
        (
            upstream("tag_tll: 1"),
            "m.yaml:4: upstreams.docker.io.tag_tll: unknown key, did you mean tag_ttl?",
        ),
        (
            upstream("limits: {ide: 1}"),
            "m.yaml:4: upstreams.docker.io.limits.ide: unknown key, did you mean idle?",
        ),
        # values
        (
            UPSTREAMS + "listen: ':5100'\n",
            "m.yaml:2: listen: ':5100': must be address:port, such as 0.0.0.0:5100 or [::1]:5100",
        ),
        (
            UPSTREAMS + "listen: ::1:51\n",
            "m.yaml:2: listen: '::1:51': must be address:port, such as 0.0.0.0:5100 or [::1]:5100",
        ),
        (
            UPSTREAMS + "listen: a:65536\n",
            "m.yaml:2: listen: 'a:65536': must be address:port, such as 0.0.0.0:5100 or [::1]:5100",
        ),
        (UPSTREAMS + "data_dir: ' '\n", "m.yaml:2: data_dir: ' ': must not be empty"),
        (
            UPSTREAMS + "workers: 0\n",
            "m.yaml:2: workers: '0': must be greater than or equal to 1",
        ),
        (UPSTREAMS + "workers: two\n", "m.yaml:2: workers: 'two': must be a whole number"),
        (UPSTREAMS + "workers: [1]\n", "m.yaml:2: workers: must be a whole number"),
        (
            UPSTREAMS + "drain_timeout: soon\n",
            "m.yaml:2: drain_timeout: 'soon': not a duration, such as 30s, 5m, 1d, 0 or inf",
        ),
        (UPSTREAMS + "drain_timeout: inf\n", "m.yaml:2: drain_timeout: 'inf': must be finite"),
        (
            UPSTREAMS + "abandoned: maybe\n",
            "m.yaml:2: abandoned: 'maybe': must be 'finish' or 'cancel'",
        ),
        (UPSTREAMS + "tls: {certificate: a}\n", "m.yaml:2: tls.key: is missing"),
        (UPSTREAMS + "log: loud\n", "m.yaml:2: log: 'loud': must be a mapping"),
        (
            UPSTREAMS + "storage:\n  max_size: fifty\n",
            "m.yaml:3: storage.max_size: 'fifty': not a size, such as 50GiB or 500MB",
        ),
        (
            UPSTREAMS + "storage:\n  low_water: 99%\n",
            "m.yaml:3: storage.low_water: '99%': 0.99 is not less than high_water, 0.95",
        ),
        (
            UPSTREAMS + "storage:\n  high_water: 1.5\n",
            "m.yaml:3: storage.high_water: '1.5': must be more than 0 and at most 1 (100%)",
        ),
        (
            UPSTREAMS + "default_upstream: ghcr.io\n",
            "m.yaml:2: default_upstream: 'ghcr.io': is not one of upstreams",
        ),
        # upstreams
        ("upstreams: []\n", "m.yaml: upstreams: at least one is needed"),
        ("upstreams: [a]\n", "m.yaml:1: upstreams: must be a mapping"),
        ("upstreams:\n  docker.io:\n", "m.yaml:2: upstreams.docker.io: must be a mapping"),
        ("upstreams: {docker.io: {}}\n", "m.yaml:1: upstreams.docker.io.endpoints: is missing"),
        (
            upstream("", "https://r.example"),
            ("m.yaml:2: upstreams.https://r.example: must be a host or host:port, without a path"),
        ),
        (
            upstream("", "library"),
            (
                "m.yaml:2: upstreams.library: the host of a reference has a dot or a port, or is "
                "localhost"
            ),
        ),
        (upstream("", "Docker.io"), "m.yaml:2: upstreams.Docker.io: must be in lower case"),
        (
            upstream("", endpoints="https://r.example"),
            "m.yaml:3: upstreams.docker.io.endpoints: 'https://r.example': must be a list",
        ),
        (
            upstream("", endpoints="[]"),
            "m.yaml:3: upstreams.docker.io.endpoints: must not be empty",
        ),
        (
            upstream("", endpoints="[https://r.example, https://r.example/]"),
            "m.yaml:3: upstreams.docker.io.endpoints: https://r.example is listed twice",
        ),
        *[
            (
                upstream("", endpoints=f"['{url}']"),
                f"m.yaml:3: upstreams.docker.io.endpoints[0]: '{shown}': {why}",
            )
            for url, shown, why in [
                (
                    "r.example:5000",
                    "r.example:5000",
                    "must be an absolute URL that begins with https:// or http://",
                ),
                (
                    "//r.example",
                    "//r.example",
                    "must be an absolute URL that begins with https:// or http://",
                ),
                (
                    "ftp://r.example",
                    "ftp://r.example",
                    "must be an absolute URL that begins with https:// or http://",
                ),
                (
                    "https://u:s3cret@r.example",
                    "https://***@r.example",
                    "must not have a user or password: use credentials",
                ),
                (
                    "https://r.example/?token=s3cret",
                    "https://r.example/?***",
                    "must have neither query nor fragment",
                ),
                (
                    "https://r.example/#s3cret",
                    "https://r.example/?***",
                    "must have neither query nor fragment",
                ),
                (
                    "https://r.example:99999",
                    "https://r.example:99999",
                    "not a URL, such as https://registry.example",
                ),
                (
                    "https://r.example/a b",
                    "https://r.example/a b",
                    "must be a URL without spaces or control characters",
                ),
            ]
        ],
        (
            upstream("pull_policy: always"),
            (
                "m.yaml:4: upstreams.docker.io.pull_policy: 'always': "
                "must be 'Always', 'IfNotPresent' or 'Never'"
            ),
        ),
        (
            upstream("tag_ttl: -5m"),
            (
                "m.yaml:4: upstreams.docker.io.tag_ttl: '-5m': "
                "not a duration, such as 30s, 5m, 1d, 0 or inf"
            ),
        ),
        (
            upstream("serve_stale: perhaps"),
            "m.yaml:4: upstreams.docker.io.serve_stale: 'perhaps': must be true or false",
        ),
        (
            upstream("limits: {idle: 0}"),
            "m.yaml:4: upstreams.docker.io.limits.idle: '0': must be more than 0",
        ),
        (
            upstream("limits: {connect: inf}"),
            "m.yaml:4: upstreams.docker.io.limits.connect: 'inf': must be finite",
        ),
        (
            upstream("limits: {min_rate: 0}"),
            (
                "m.yaml:4: upstreams.docker.io.limits.min_rate: '0': "
                "must be a size of at least 1 byte, and less than 8EiB"
            ),
        ),
        (
            upstream("allow: ['']"),
            (
                "m.yaml:4: upstreams.docker.io.allow[0]: '': "
                "not a pattern of repositories, such as library/*"
            ),
        ),
        (
            upstream("deny: [docker.io/org/*]"),
            (
                "m.yaml:4: upstreams.docker.io.deny[0]: 'docker.io/org/*': "
                "a pattern must not begin with the upstream's name"
            ),
        ),
        (
            upstream("token_hosts: ['https://auth.example']"),
            (
                "m.yaml:4: upstreams.docker.io.token_hosts[0]: 'https://auth.example': "
                "not host or host:port"
            ),
        ),
        (upstream("ca: ''"), "m.yaml:4: upstreams.docker.io.ca: '': must not be empty"),
        # credentials
        (
            upstream("credentials: {username: joe}"),
            "m.yaml:4: upstreams.docker.io.credentials: username and password must be set together",
        ),
        (
            upstream("credentials: {password: s3cret}"),
            "m.yaml:4: upstreams.docker.io.credentials: username and password must be set together",
        ),
        (
            upstream("credentials: {username: joe, password: s3cret, helper: ecr-login}"),
            "m.yaml:4: upstreams.docker.io.credentials: more than one source: username and helper",
        ),
        (
            upstream("credentials: {username: joe, password: [s3cret]}"),
            "m.yaml:4: upstreams.docker.io.credentials.password: must be text",
        ),
        (
            upstream("credentials: {username: joe, password: 'file:'}"),
            "m.yaml:4: upstreams.docker.io.credentials.password: file: must be followed by a path",
        ),
        (
            upstream("credentials: {username: joe, password: s3cret, hosts: [other.example]}"),
            (
                "m.yaml:4: upstreams.docker.io.credentials.hosts[0]: "
                "other.example is the host of no endpoint: use r.example"
            ),
        ),
        (
            upstream("credentials: {helper: ecr-login, hosts: [r.example]}"),
            (
                "m.yaml:4: upstreams.docker.io.credentials.hosts: "
                "needs username: other sources name their hosts themselves"
            ),
        ),
        (
            upstream("credentials: s3cret"),
            "m.yaml:4: upstreams.docker.io.credentials: must be a mapping",
        ),
        (
            upstream("credentials: {helper: ../s3}"),
            (
                "m.yaml:4: upstreams.docker.io.credentials.helper: '../s3': "
                "must be the part after docker-credential-"
            ),
        ),
        # the text that the parser cannot read may be a password
        (
            upstream("credentials: {username: joe, password: *s3cret}"),
            "m.yaml:4: YAML: found undefined alias",
        ),
        (
            upstream("credentials: {username: joe, password: !s3cret }"),
            "m.yaml:4: YAML tags are not used here (quote a value that begins with !)",
        ),
        (
            upstream("credentials: {username: joe, password: !s3!cret }"),
            "m.yaml:4: YAML: found undefined tag handle",
        ),
    ],
)
def test_bad_file_is_refused_in_one_line_with_origin_key_and_value(
    tmp_path: Path, text: str | bytes, line: str
) -> None:
    said = refused(tmp_path, text)
    assert said == line
    assert "s3cret" not in said


def test_further_bad_values_are_counted_in_the_message(tmp_path: Path) -> None:
    assert refused(tmp_path, UPSTREAMS + "workers: x\nlisten: y\n").endswith("(and 1 more)")


def test_all_unknown_keys_and_bad_values_are_lines_of_the_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, UPSTREAMS + "rules: []\nworkers: x\nlog: {levle: info}\nlisten: y\n")
    lines = [line.removeprefix(f"{tmp_path}/") for line in caught.value.lines]
    assert [line[: line.index(" ", line.index(":") + 6)] for line in lines] == [
        "m.yaml:2: rules:",
        "m.yaml:4: log.levle:",
        "m.yaml:5: listen:",
        "m.yaml:3: workers:",
    ]
    assert lines[0].endswith("unknown key, did you mean access.rules?")


def test_file_with_too_many_aliases_is_refused(tmp_path: Path) -> None:
    levels = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefg", "bcdefgh", strict=True):
        levels.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    assert "more than 50000 values" in refused(tmp_path, "\n".join(levels))


def test_deeply_nested_file_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, "a: " + "[" * 100_000).endswith("nested too deeply")
    assert refused(tmp_path, "a: " + "[" * 100 + "]" * 100).endswith("nested too deeply")


def test_file_above_1_mib_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, b"#" * (1 << 20) + b"\n") == "m.yaml: larger than 1048576 bytes"


def test_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^/nowhere/m.yaml: No such file or directory$"):
        load("/nowhere/m.yaml", {})
    with pytest.raises(ConfigError, match=r"Is a directory$"):
        load(str(tmp_path), {})
    with pytest.raises(ConfigError, match=r"^a\\x00b: "):
        load("a\0b", {})


def test_scalars_are_read_as_text(tmp_path: Path) -> None:
    got = read(
        tmp_path, upstream("credentials: {username: 0x10, password: 0123}\n    serve_stale: no")
    ).upstreams["docker.io"]
    assert (got.credentials.username, got.credentials.password) == ("0x10", "0123")
    assert got.serve_stale is False


def test_section_without_values_has_its_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, UPSTREAMS + "storage:\ntls:\nlog: {level: }\n") == read(
        tmp_path, UPSTREAMS
    )


def test_alias_and_merge_key_copy_values_and_a_variable_changes_one_copy(tmp_path: Path) -> None:
    got = read(
        tmp_path,
        "upstreams:\n"
        "  docker.io: &hub\n    endpoints: [https://r.example]\n    tag_ttl: 1h\n"
        "  ghcr.io:\n    <<: *hub\n    endpoints: [https://ghcr.example]\n",
        {"OCI_MIRROR_UPSTREAMS__GHCR_IO__NEGATIVE_TTL": "3s"},
    ).upstreams
    assert got["ghcr.io"].tag_ttl == 3600
    assert got["ghcr.io"].endpoints == ("https://ghcr.example",)
    assert (got["ghcr.io"].negative_ttl, got["docker.io"].negative_ttl) == (3, 10)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=200,
)
@given(
    st.one_of(st.binary(max_size=200), st.text(alphabet="ab:-[]{}&*!<>?'\"#%\n \t|0", max_size=60))
)
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, text: str | bytes) -> None:
    said = ""
    try:
        read(tmp_path, text)
    except ConfigError as error:
        said = str(error)
    assert said.isprintable()


def test_missing_configuration_names_each_place_that_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(None, {})
    assert str(caught.value) == (
        f"no configuration: there is no config/mirror.yaml in {tmp_path}, and neither --config "
        "FILE nor OCI_MIRROR_CONFIG was given"
    )
    with pytest.raises(ConfigError, match=r"^environment: upstreams: at least one is needed"):
        load(None, {"OCI_MIRROR_WORKERS": "2"})
