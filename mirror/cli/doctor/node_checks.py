"""The checks of a node: does each runtime pull through the mirror?

Each runtime pulls the probe image of each registry, with a new nonce as its tag. No registry has
it, so a pull that succeeds came through a mirror. The mirror is then asked whether it was itself
(:mod:`mirror.web.probe_image`). The image is removed again.

Lives here: the pulls, and what their results mean. Must not know: the commands of a runtime.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from mirror.cli.doctor.findings import Checked, Finding
from mirror.cli.doctor.runtimes import Command, NodeMachine, Runtime, find_runtimes
from mirror.cli.own_server import OwnServer, ServerResponse, failure_text
from mirror.oci.text import printable

_PROBE: Final = "oci-mirror-check/probe"
"""The reserved repository (:data:`mirror.web.probe_image.PROBE_REPOSITORY`, which needs the
server's packages)."""
_PULL_TIMEOUT_S: Final = 30.0
"""Seconds of one pull of a few hundred bytes. A client whose file for the mirror is ignored may
wait for a registry that it cannot reach."""
_PARALLEL_PULLS: Final = 8
"""Pulls that run at the same time."""
_CONFIRM_REQUESTS: Final = 64
"""Requests after which a mirror with several workers is no longer asked for a nonce: each worker
knows its own. Of 8 workers, one is missed by all of them in two checks of ten thousand."""
_MAX_LAST_LINE_CHARS: Final = 300
"""Characters of the last line of a command that failed."""
_MAX_STOPPED_CHARS: Final = 120
"""Characters of it if the runtime does not run: the socket is at its beginning."""


@dataclass(frozen=True, slots=True)
class _CommandEnd:
    """The end of a command. ``reason``: its last line if it failed, otherwise empty."""

    reason: str


def check_node(
    node: NodeMachine, chosen: Sequence[str], registries: Sequence[str], mirror: OwnServer
) -> Iterator[Finding]:
    """Let the runtimes of a node pull, and yield what was found.

    Args:
        node: The node.
        chosen: Names of runtimes. Empty: all that are there.
        registries: The registries to pull from.
        mirror: The mirror at which the pulls should arrive.
    """
    unserved: list[str] = []
    for finding, registry in _check_mirror(mirror, registries):
        yield finding
        if registry is not None:
            unserved.append(registry)
    runtimes = find_runtimes(node, chosen)
    if not runtimes:
        names = ", ".join(chosen) or "containerd, crictl, k3s, docker, podman"
        yield Checked("runtime", "this node").problem(
            f"none of these was found: {names}", "run this command on the node, with its PATH"
        )
        return
    missing = sorted(set(chosen) - {runtime.name for runtime in runtimes})
    for name in missing:
        yield Checked("runtime", name).problem(
            "it is not installed", "leave out --runtime, or add its directory to the PATH"
        )
    with ThreadPoolExecutor(_PARALLEL_PULLS) as threads:
        stopped = list(threads.map(lambda runtime: _why_stopped(runtime, node), runtimes))
        running = [runtime for runtime, why in zip(runtimes, stopped, strict=True) if not why]
        for runtime, why in zip(runtimes, stopped, strict=True):
            if why:
                yield _stopped(runtime, why, is_needed=not running or runtime.name in chosen)
            else:
                yield from runtime.findings
        pulls = [
            (runtime, registry)
            for runtime in running
            for registry in registries
            if registry not in unserved and runtime.may_mirror(registry)
        ]
        yield from threads.map(lambda pull: _check_pull(node, mirror, *pull), pulls)


def _why_stopped(runtime: Runtime, node: NodeMachine) -> str:
    """Return why a runtime cannot pull anything at all. Empty: it runs."""
    return _run(runtime.probe, node).reason if runtime.probe else ""


def _stopped(runtime: Runtime, why: str, *, is_needed: bool) -> Finding:
    """Return the finding of an installed runtime that does not run.

    ``is_needed``: it was asked for, or no other one runs.
    """
    subject = Checked("runtime", runtime.name)
    message = f"it is installed, but does not run: {printable(why, _MAX_STOPPED_CHARS)}"
    remedy = (
        f"start it ({runtime.start}); or, if this node does not use it, name the one that it "
        "uses: --runtime"
    )
    return subject.problem(message, remedy) if is_needed else subject.warning(message, remedy)


def _check_mirror(
    mirror: OwnServer, registries: Sequence[str]
) -> Iterator[tuple[Finding, str | None]]:
    """Yield findings of the mirror. With each: a registry that it does not serve, or None."""
    subject = Checked("mirror", mirror.url)
    try:
        response = mirror.get("/healthz")
    except (OSError, ValueError) as error:
        yield (
            subject.problem(
                f"it does not respond: {failure_text(error)}",
                "start it (oci-mirror serve), or name its address as clients do: --mirror URL",
            ),
            None,
        )
        return
    if not response.is_ours:
        yield (
            subject.problem("the server there is no oci-mirror", "name the mirror: --mirror URL"),
            None,
        )
        return
    yield subject.ok("it responds"), None
    for registry in registries:
        with contextlib.suppress(OSError, ValueError):
            response = mirror.get(f"/v2/{_PROBE}/manifests/{secrets.token_hex(16)}?ns={registry}")
            if response.status != 200:
                yield _why_unserved(mirror, registry, response), registry


def _why_unserved(mirror: OwnServer, registry: str, response: ServerResponse) -> Finding:
    """Return the finding for a registry of which the mirror does not serve the probe image."""
    subject = Checked("mirror", mirror.url, registry)
    if b"NAME_UNKNOWN" in response.body:
        return subject.problem(
            "it is not configured for this registry",
            f"add upstreams.{registry} to its configuration, and reload it (SIGHUP)",
        )
    return subject.problem(
        f"it does not serve the probe image (status {response.status})",
        "update the mirror to this version, and read its log",
    )


def _check_pull(node: NodeMachine, mirror: OwnServer, runtime: Runtime, registry: str) -> Finding:
    """Let a runtime pull the probe image of a registry."""
    nonce = secrets.token_hex(16)
    image = f"{registry}/{_PROBE}:{nonce}"
    result = _run(runtime.pull(image), node, nonce)
    subject = Checked("pull", runtime.name, registry)
    has_arrived = _has_arrived(mirror, registry, nonce)
    if not result.reason:
        _run(runtime.remove(image), node)
        if has_arrived:
            return subject.ok(f"arrived at {mirror.url}")
        return subject.warning(
            f"arrived at a mirror, but {mirror.url} has not seen it",
            "compare the address in the files of the client with --mirror; behind a load "
            "balancer or with many workers, another one may have answered",
        )
    if has_arrived:
        return subject.problem(
            f"it reached {mirror.url}, but failed: {result.reason}",
            "read the log of the client; a proxy between it and the mirror may change responses",
        )
    return subject.problem(
        f"it did not come through the mirror: {result.reason}", runtime.remedy(registry)
    )


def _has_arrived(mirror: OwnServer, registry: str, nonce: str) -> bool:
    for _ in range(_CONFIRM_REQUESTS):
        try:
            response = mirror.get(f"/v2/{_PROBE}/tags/list?ns={registry}")
            tags = json.loads(response.body)["tags"] if response.status == 200 else []
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if isinstance(tags, list) and nonce in tags:
            return True
    return False


def _run(command: Command, node: NodeMachine, nonce: str = "") -> _CommandEnd:
    """Run a command with a time limit. Its children are killed, too.

    ``nonce``: is ``TAG`` in the reason, so that equal causes have equal reasons.
    """
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(  # noqa: S603 - fixed programs, no shell
                command,
                env=dict(node.environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return _CommandEnd(reason=f"{command[0]}: {error.strerror}")
        try:
            code = process.wait(_PULL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return _CommandEnd(reason=f"no result after {_PULL_TIMEOUT_S:.0f} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    lines = (text.replace(nonce, "TAG") if nonce else text).splitlines()
    if code == 0:
        return _CommandEnd(reason="")
    return _CommandEnd(
        reason=printable(lines[-1] if lines else f"exit code {code}", _MAX_LAST_LINE_CHARS)
    )
