"""BuildKit imports a build cache through the mirror: cold, warm, and with the registry gone.

Its configuration is the file that ``clients --for buildkit`` writes.

The index of such a cache refers to layers and to a configuration of its own, which BuildKit asks
for as blobs. It needs ``buildkitd`` and ``buildctl``, which Debian does not have:
``go install github.com/moby/buildkit/cmd/...`` builds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mirror.cli.main import main
from tests.real.process import Program, environment, go_program, run
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror


class Buildkitd(Program):
    """A buildkitd with an empty store of its own. ``hosts``: its ``[registry]`` sections."""

    name = "buildkitd"

    def __init__(self, hosts: str) -> None:
        super().__init__()
        self.socket = self.dir / "s"
        self.hosts = hosts

    def command(self) -> Sequence[str | Path]:
        config = self.dir / "buildkitd.toml"
        config.write_text(
            f'root = "{self.dir}/root"\n[grpc]\naddress = ["unix://{self.socket}"]\n'
            '[worker.oci]\nenabled = true\nsnapshotter = "native"\n'
            f"[worker.containerd]\nenabled = false\n{self.hosts}"
        )
        return [go_program("buildkitd"), "--config", config]

    def ready(self) -> bool:
        return self.socket.exists() and self.ctl("debug", "workers", check=False) == 0

    def ctl(self, *argv: str | Path, check: bool = True) -> int:
        """Run ``buildctl``. Returns its exit code."""
        command = (go_program("buildctl"), "--addr", f"unix://{self.socket}", *argv)
        return run(*command, env=environment(), check=check).returncode

    def build(self, source: Path, *more: str) -> str:
        """Build the Dockerfile of a directory, and return the progress that was shown."""
        local = ("--local", f"context={source}", "--local", f"dockerfile={source}")
        command = ("build", "--progress=plain", "--frontend", "dockerfile.v0", *local, *more)
        done = run(
            *(go_program("buildctl"), "--addr", f"unix://{self.socket}", *command),
            env=environment(),
        )
        return (done.stdout + done.stderr).decode()


@pytest.mark.long
@pytest.mark.go_program("buildkitd", "buildctl")
@pytest.mark.row("FB3-buildkit-cache-index")
@pytest.mark.row("FF5-client-files")
def test_buildkit_imports_a_cache_cold_warm_and_with_the_registry_gone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "Dockerfile").write_text("FROM scratch\nCOPY one /one\nCOPY two /two\n")
    (source / "one").write_bytes(b"1" * 300_000)
    (source / "two").write_bytes(b"2" * 200_000)
    with DockerRegistry() as registry:
        host = registry.url.removeprefix("http://")
        cache = f"type=registry,ref={host}/team/cache:v1"
        with Buildkitd(f'[registry."{host}"]\nhttp = true\n') as first:
            export = f"{cache},mode=max,image-manifest=false,oci-mediatypes=true"
            assert "CACHED" not in first.build(source, "--export-cache", export)
        with Mirror({host: registry.url}) as mirror:
            command = ["clients", "--config", str(mirror.config_file), "--mirror", mirror.url]
            assert main([*command, "--for", "buildkit", "--write", str(tmp_path / "etc")]) == 0
            hosts = (tmp_path / "etc" / "buildkit" / "buildkitd.toml").read_text()
            for state in ("cold", "warm", "gone"):
                if state == "gone":
                    registry.stop()
                with Buildkitd(hosts) as other:
                    output = ("--output", f"type=local,dest={tmp_path / state}")
                    progress = other.build(source, "--import-cache", cache, *output)
                assert "ERROR" not in progress, progress
                assert "CACHED" in progress, progress
                assert (tmp_path / state / "one").read_bytes() == b"1" * 300_000
            kinds = {line.get("kind") for line in mirror.log() if line.get("status") == 200}
            assert {"manifest", "blob"} <= kinds
