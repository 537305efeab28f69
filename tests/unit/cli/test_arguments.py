"""Arguments that many commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from mirror.cli.arguments import add_config, config_file, image_name, load_settings
from mirror.oci.errors import ConfigError

UPSTREAMS = "upstreams: {docker.io: {endpoints: ['http://127.0.0.1:9']}}\n"


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_config(parser)
    return parser.parse_args(argv)


def test_configuration_is_named_by_option_then_variable_then_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OCI_MIRROR_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    assert config_file(None) is None

    (tmp_path / "config").mkdir()
    (tmp_path / "config/mirror.yaml").write_text(f"listen: 127.0.0.1:7\n{UPSTREAMS}")
    assert load_settings(parse()).listen == "127.0.0.1:7"

    (tmp_path / "other.yaml").write_text(f"listen: 127.0.0.1:8\n{UPSTREAMS}")
    monkeypatch.setenv("OCI_MIRROR_CONFIG", str(tmp_path / "other.yaml"))
    assert load_settings(parse()).listen == "127.0.0.1:8"
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_settings(parse("--config", "missing.yaml"))


def test_malformed_image_name_is_wrong_usage() -> None:
    assert str(image_name("nginx:1")) == "docker.io/library/nginx:1"
    with pytest.raises(argparse.ArgumentTypeError, match="'a b' is no image name: "):
        image_name("a b")
