"""``check-config``: effective settings without secrets, checks of named files, warnings."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mirror import processes
from mirror.cli.main import main
from mirror.config.load import load
from tests.unit.access.kit import DOCUMENTED, Signer, htpasswd, key_set

Check = Callable[..., tuple[int, str, str]]
SHIPPED = Path(__file__).parents[3] / "config" / "mirror.yaml"
HUB = "upstreams:\n  docker.io:\n    endpoints: [https://r.example]\n"


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Run ``check-config`` on a file of this text; returns exit code, output and errors."""

    def call(text: str, *options: str) -> tuple[int, str, str]:
        file = tmp_path / "m.yaml"
        file.write_text(text)
        code = main(["check-config", *options, str(file)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def pair(directory: Path, name: str) -> tuple[Path, Path]:
    """A certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    certificate_file, key_file = directory / f"{name}.crt", directory / f"{name}.key"
    certificate_file.write_bytes(certificate.public_bytes(pem))
    key_file.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_file, key_file


@pytest.mark.parametrize("options", [(), ("--all",)])
def test_printed_settings_load_to_the_same_configuration(
    check: Check, tmp_path: Path, options: tuple[str, ...]
) -> None:
    code, out, err = check(SHIPPED.read_text(), *options)
    assert code == 0
    assert not [line for line in err.splitlines() if "data_dir" not in line]
    again = tmp_path / "again.yaml"
    again.write_text(out)
    assert load(str(again), {}) == load(str(SHIPPED), {})
    assert ("pull_policy: IfNotPresent" in out) is bool(options)
    assert "credentials" not in out
    assert "# upstreams.docker.io.token_hosts, built in: auth.docker.io\n" in out


def test_settings_that_have_their_defaults_are_left_out(check: Check) -> None:
    out = check(f"{HUB}    tag_ttl: 5m\nworkers: 2\n")[1]
    assert [line for line in out.splitlines() if not line.startswith("#")] == [
        "workers: 2",
        "upstreams:",
        "  docker.io:",
        "    endpoints:",
        "    - https://r.example",
    ]


def test_printed_settings_include_the_environment(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCI_MIRROR_UPSTREAMS__DOCKER_IO__TAG_TTL", "90m")
    assert "tag_ttl: 90m" in check(HUB)[1]


def test_password_is_hidden_and_risky_credentials_are_warned_of(
    check: Check, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("s3cret")
    code, out, err = check(
        f"{HUB}    credentials: {{username: joe, password: s3cret}}\n"
        "  ghcr.io:\n    endpoints: [http://g.example]\n"
        f"    credentials: {{username: ann, password: 'file:{tmp_path}/secret'}}\n"
    )
    assert code == 0
    assert "s3cret" not in out + err
    shown = yaml.safe_load(out)["upstreams"]
    assert shown["docker.io"]["credentials"] == {
        "username": "joe",
        "password": "(not shown)",
    }
    assert shown["ghcr.io"]["credentials"]["password"] == f"file:{tmp_path}/secret"
    assert err.count("credentials without an allow list") == 2
    assert err.count("sent unencrypted to http://g.example") == 1


def test_certificate_must_match_its_key(check: Check, tmp_path: Path) -> None:
    certificate, key = pair(tmp_path, "one")
    _, other = pair(tmp_path, "two")
    assert check(f"{HUB}tls: {{certificate: {certificate}, key: {key}}}\n")[0] == 0
    code, out, err = check(f"{HUB}tls: {{certificate: {certificate}, key: {other}}}\n")
    assert (code, out) == (78, "")
    assert "KEY_VALUES_MISMATCH" in err
    code, _, err = check(f"{HUB}tls: {{certificate: {key}, key: {key}}}\n")
    assert code == 78
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "key", "why"),
    [
        ("tls: {certificate: /none, key: /none}", "tls.certificate", "No such file"),
        ("    ca: /none", "upstreams.docker.io.ca", "No such file"),
        ("    ca: /dev/null", "upstreams.docker.io.ca", "has no certificates"),
        (
            "    credentials: {username: a, password: 'file:/none'}",
            "upstreams.docker.io.credentials.password",
            "No such file",
        ),
        (
            "    credentials: {docker_config: /none}",
            "upstreams.docker.io.credentials.docker_config",
            "No such file",
        ),
        (
            "    credentials: {helper: none-such}",
            "upstreams.docker.io.credentials.helper",
            "docker-credential-none-such is not on the PATH",
        ),
    ],
)
def test_named_file_that_cannot_be_used_is_refused_in_one_line(
    check: Check, tmp_path: Path, more: str, key: str, why: str
) -> None:
    code, out, err = check(f"{HUB}{more}\n")
    assert (code, out) == (78, "")
    assert err.count("\n") == 1
    assert err.startswith(f"oci-mirror: {tmp_path}/m.yaml:4: {key}: '")
    assert why in err


def test_data_dir_that_cannot_be_made_is_refused_and_none_is_made(
    check: Check, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("none")
    for name in ("file", "file/below", "dangling/below"):
        code, out, err = check(f"data_dir: {tmp_path}/{name}\n{HUB}")
        assert (code, out) == (78, "")
        place = f"{tmp_path}/m.yaml:1: data_dir"
        assert err.startswith(f"oci-mirror: {place}: '{tmp_path}/{name}': '{tmp_path}/")
        assert err.endswith("is not a directory\n")
    assert check(f"data_dir: {tmp_path}/to/be/made\n{HUB}")[0] == 0
    assert not (tmp_path / "to").exists(), "the check made the directory"


def test_data_dir_that_is_not_writable_gives_a_warning(
    check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # These tests also run as root, who may write everywhere.
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    code, _, err = check(f"data_dir: {tmp_path}/to/be/made\n{HUB}")
    assert code == 0
    assert f"data_dir: '{tmp_path}' is not writable: no content would be stored" in err


@pytest.mark.parametrize(
    ("listen", "endpoint"),
    [
        ("127.0.0.1:5100", "http://127.0.0.1:5100"),
        ("127.0.0.1:5100", "http://localhost:5100"),
        ("0.0.0.0:80", "http://127.0.0.2"),
        ("'[::]:443'", "https://[::1]"),
        ("mirror.example:443", "https://mirror.example/sub"),
    ],
)
def test_endpoint_that_is_the_mirror_itself_is_refused(
    check: Check, tmp_path: Path, listen: str, endpoint: str
) -> None:
    code, out, err = check(
        f"listen: {listen}\nupstreams: {{docker.io: {{endpoints: ['{endpoint}']}}}}\n"
    )
    assert (code, out) == (78, "")
    key = f"{tmp_path}/m.yaml:2: upstreams.docker.io.endpoints"
    assert err == f"oci-mirror: {key}: '{endpoint}': an address of this mirror\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [(None, "No such file"), ("# only this\n", "no token"), ("short\n", "line 1: shorter than 16")],
)
def test_file_of_tokens_that_serve_refuses_is_refused(
    check: Check, tmp_path: Path, text: str | None, why: str
) -> None:
    file = tmp_path / "tokens"
    if text is not None:
        file.write_text(text)
    admin = f"admin:\n  listen: 127.0.0.1:5999\n  token_file: {file}\n"
    code, _, err = check(HUB + admin)
    assert code == 78
    assert why in err
    assert "short\n" not in err


def test_serve_checks_named_files_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(f"{HUB}tls: {{certificate: /none, key: /none}}\n")
    assert main(["serve", "--config", str(file)]) == 78
    assert capsys.readouterr().err == (
        f"oci-mirror: {file}:4: tls.certificate: '/none': No such file or directory\n"
    )


# --- suspicious configurations --------------------------------------------------------------------


@pytest.mark.row("FE8-suspicious-configuration")
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "line 1: not JSON"),
        ('{"auths":\n {"a": }}', "line 2: not JSON"),
        ("", "line 1: not JSON"),
        ("\xff", "not JSON"),
        ("[]", "not the config.json of Docker"),
        ('{"auths": ["docker.io"]}', "not the config.json of Docker"),
    ],
)
def test_docker_config_that_is_none_is_refused_with_line_and_key(
    check: Check, tmp_path: Path, text: str, line: str
) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    code, out, err = check(f"{HUB}    credentials: {{docker_config: {tmp_path}/config.json}}\n")
    assert (code, out) == (78, "")
    key = "upstreams.docker.io.credentials.docker_config"
    assert err == f"oci-mirror: {tmp_path}/m.yaml:4: {key}: '{tmp_path}/config.json': {line}\n"


@pytest.mark.row("FE8-suspicious-configuration")
@pytest.mark.parametrize(
    ("document", "is_warned"),
    [
        ('{"auths": {"ghcr.io": {}, "quay.io": {}}}', True),
        ("{}", True),
        ('{"auths": {"https://index.docker.io/v1/": {"auth": "dTpw"}}}', True),
        ('{"auths": {"docker.io": {"auth": "dTpw"}}}', True),
        ('{"auths": {"r.example": {}}}', True),
        ('{"auths": {"r.example": {"auth": "dTpw"}}}', False),
        ('{"auths": {"https://r.example/v1/": {"auth": "dTpw"}}}', False),
        ('{"auths": {"r.example/org": {"auth": "dTpw"}}}', False),
        ('{"credHelpers": {"r.example": "x"}}', False),
        ('{"credsStore": "desktop"}', False),
    ],
)
def test_docker_config_without_the_host_is_warned_of(
    check: Check, tmp_path: Path, document: str, is_warned: bool
) -> None:
    (tmp_path / "config.json").write_text(document)
    section = f"    credentials:\n      docker_config: {tmp_path}/config.json\n"
    text = f"{HUB}    allow: [library/*]\n{section}"
    code, _, err = check(text)
    assert code == 0
    warning = f"warning: {tmp_path}/m.yaml:6: upstreams.docker.io.credentials.docker_config: "
    assert (warning in err) is is_warned
    assert ("has no login for r.example" in err) is is_warned


@pytest.mark.row("FE8-suspicious-configuration")
@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("    allow: [org/app.*]", "allow[0]"),
        ("    deny: [alpine]", "deny[0]"),
        ("    insecure: true", "insecure"),
        (
            "    allow: ['*']\n    credentials: {username: a, password: /etc/hosts}",
            "credentials.password",
        ),
    ],
)
def test_likely_mistake_gives_a_warning_with_line_and_key(
    check: Check, tmp_path: Path, more: str, key: str
) -> None:
    code, _, err = check(f"{HUB}{more}\n")
    number = 3 + len(more.splitlines())
    assert code == 0
    assert f"warning: {tmp_path}/m.yaml:{number}: upstreams.docker.io.{key}: " in err
    assert "/etc/hosts" not in err, "a value of a password is not shown"


@pytest.mark.row("FD8-upstream-tls")
def test_serve_prints_the_warnings_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(f"{HUB}    insecure: true\n")
    monkeypatch.setattr(processes, "run", lambda settings, _: 0)
    assert main(["serve", str(file)]) == 0
    err = capsys.readouterr().err
    assert f"warning: {file}:4: upstreams.docker.io.insecure: certificates are not verified" in err


@pytest.mark.row("FD8-upstream-tls")
def test_client_certificate_must_match_its_key(check: Check, tmp_path: Path) -> None:
    certificate, key = pair(tmp_path, "one")
    _, other = pair(tmp_path, "two")
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    assert check(f"{HUB}    client_certificate: {certificate}\n    client_key: {key}\n")[0] == 0
    assert check(f"{HUB}    client_certificate: {both}\n")[0] == 0
    for text in (
        f"{HUB}    client_certificate: {certificate}\n    client_key: {other}\n",
        f"{HUB}    client_certificate: {certificate}\n",
        f"{HUB}    client_certificate: /none\n",
    ):
        code, _, err = check(text)
        assert code == 78
        assert ": upstreams.docker.io.client_certificate: '" in err


@pytest.mark.row("FD6-address-of-each-connection")
@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]"])
def test_endpoint_at_a_link_local_address_is_refused(check: Check, host: str) -> None:
    code, _, err = check(f"upstreams: {{r.example: {{endpoints: ['http://{host}']}}}}\n")
    assert code == 78
    assert "is a link-local address" in err


def test_secrets_and_urls_of_events_are_checked_and_not_shown(check: Check, tmp_path: Path) -> None:
    secret = tmp_path / "audit.secret"
    text = HUB + (
        f"events: [{{name: audit, secret_file: {secret}, url: 'https://a.example/x?key=hidden'}}]\n"
    )
    code, _, said = check(text)
    assert (code, f"m.yaml:4: events[0].secret_file: {secret}: No such file" in said) == (78, True)
    secret.write_text("whsec_" + "QUJD" * 8)
    code, shown, said = check(text)
    assert (code, said) == (0, "")
    assert "url: https://a.example/x?(not shown)" in shown
    assert "hidden" not in shown
    assert "QUJD" not in shown
    code, _, said = check(text.replace("https://a.example/x", "http://169.254.169.254/"))
    assert (code, "169.254.169.254" in said, "hidden" in said) == (78, True, False)


def test_documented_example_is_accepted_with_a_warning(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "htpasswd").write_text(htpasswd(ann="ann's"))
    (tmp_path / "tokens.yaml").write_text("- {name: ci, token: 0123456789abcdef}\n")
    (tmp_path / "jwks.json").write_bytes(key_set(Signer("one")))
    code, _, said = check(HUB + DOCUMENTED)
    assert (code, said.count("warning: ")) == (0, 1)
    assert "access.issuers[0]: without user_prefix, a rule for a user also fits a token" in said
    with_prefix = DOCUMENTED.replace("audience:", "user_prefix: 'ci:', audience:")
    assert check(HUB + with_prefix)[::2] == (0, "")
    groups = with_prefix.replace("audience:", "groups_claim: groups, audience:")
    code, _, said = check(HUB + groups)
    assert (code, said.count("warning: ")) == (0, 1)
    assert "its groups can have the names of groups of access.groups, access.tokens" in said
