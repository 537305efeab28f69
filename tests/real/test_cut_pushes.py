"""Pushes that are cut, that meet, and that are large: by real clients, to a server process."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.real import images
from tests.real.clients import Podman, Skopeo
from tests.real.process import free_port, run, wait_until
from tests.real.registry import DockerRegistry
from tests.real.server import Mirror
from tests.real.wire import Response, ask

pytestmark = pytest.mark.timeout(300)

NAME = "registry.example"
MEMORY_BOUND = 150 * 2**20
"""Most memory of the server beside a push."""
TENTHS = [
    pytest.param(tenth, marks=[] if tenth == 5 else [pytest.mark.long]) for tenth in range(10)
]
"""Where a push is cut. One of them is tried in every run."""


@contextmanager
def hosting(*upstream: str) -> Iterator[tuple[Mirror, str]]:
    """Run a server that hosts. Yields it, and ``host:port`` of the push listener."""
    push_host = f"127.0.0.1:{free_port()}"
    hosted = {"name": NAME, "listen": push_host}
    with Mirror({"docker.io": (*upstream, "http://127.0.0.1:9")[0]}, hosted=hosted) as mirror:
        yield mirror, push_host


class CuttingProxy:
    """Passes connections on to a server, and cuts the first one that has sent so many bytes."""

    def __init__(self, push_host: str, after: int) -> None:
        """Listen. ``after``: bytes of one connection from the client. It is cut once."""
        self._target = urlsplit(f"http://{push_host}")
        self._after = after
        self.cuts = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._target.hostname, self._target.port))
                up = threading.Thread(target=self._pass_up, args=(client, server), daemon=True)
                down = threading.Thread(target=_pass_down, args=(server, client), daemon=True)
                up.start()
                down.start()

    def _pass_up(self, client: socket.socket, server: socket.socket) -> None:
        sent = 0
        with suppress(OSError):
            while data := client.recv(4096):
                sent += len(data)
                with self._lock:
                    is_cut = not self.cuts and sent >= self._after
                    self.cuts += is_cut
                if is_cut:
                    break
                server.sendall(data)
        _cut(client)
        _cut(server)

    def close(self) -> None:
        """Stop to listen."""
        self._listener.close()


def _pass_down(server: socket.socket, client: socket.socket) -> None:
    with suppress(OSError):
        while data := server.recv(65_536):
            client.sendall(data)
    _cut(client)


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.mark.parametrize("tenth", TENTHS)
@pytest.mark.parametrize("client", ["skopeo", "podman"])
def test_push_that_is_cut_is_repeated_by_the_client(
    tmp_path: Path, client: str, tenth: int
) -> None:
    image = images.image(20 + tenth, layers=(1_000_000,))
    layout = images.write_layout(tmp_path, image)
    with (
        hosting() as (mirror, push_host),
        closing(CuttingProxy(push_host, 1 + 100_000 * tenth)) as proxy,
    ):
        target = f"docker://{proxy.host}/team/app:v1"
        flags = ("--preserve-digests", "--dest-tls-verify=false")
        with ExitStack() as stack:
            if client == "skopeo":
                tool = Skopeo()
                stack.callback(tool.close)
                push = partial(tool.skopeo, "copy", *flags, f"oci:{layout}:latest", target)
            else:
                podman = stack.enter_context(Podman())
                podman.pull(f"oci:{layout}:latest")
                (pulled,) = podman.podman("images", "-q", "--no-trunc").stdout.decode().split()
                push = partial(podman.podman, "push", "--tls-verify=false", pulled, target)
            # Some versions repeat it themselves. Otherwise a person or a job does.
            if push(check=False).returncode != 0:
                push()
        assert proxy.cuts == 1
        found = Skopeo().copy(f"{mirror.host}/{NAME}/team/app:v1")
        # Podman compresses the layer anew.
        assert len(found) == 3
        assert client == "podman" or found == image.contents()


def send_part(push_host: str, path: str, data: bytes, start: int, end: int) -> None:
    """Announce the rest of ``data`` from ``start`` on, send it up to ``end``, and disconnect."""
    with socket.create_connection(("127.0.0.1", int(push_host.partition(":")[2]))) as connection:
        connection.sendall(
            f"PATCH {path} HTTP/1.1\r\nHost: {push_host}\r\nContent-Length: {len(data) - start}\r\n"
            f"Content-Range: {start}-{len(data) - 1}\r\n\r\n".encode()
        )
        connection.sendall(data[start:end])


def test_push_that_is_cut_at_every_tenth_goes_on_where_it_ended() -> None:
    """A client that follows the specification asks how far it has come, and sends the rest."""
    data = images.random_bytes(5_000_000, 9)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    sent = position = 0
    with hosting() as (_, push_host):
        url = f"http://{push_host}"
        path = ask(f"{url}/v2/team/app/blobs/uploads/", "POST", body=b"").headers["Location"]

        def is_free() -> bool:
            """Ask whether the server has seen that the client is gone, and how far it has come."""
            nonlocal position
            state = ask(f"{url}{path}", "PATCH", body=b"")
            position = received(state)
            return state.status == 202

        for tenth in range(1, 11):
            end = len(data) * tenth // 10
            send_part(push_host, path, data, position, end)
            sent += end - position
            before = position
            wait_until(is_free, "the upload can go on", 20)
            assert before <= position <= end
        rest = ask(f"{url}{path}", "PATCH", body=data[position:])
        assert received(rest) == len(data)
        assert sent < 2 * len(data), "it never begins anew"
        assert ask(f"{url}{path}?digest={digest}", "PUT", body=b"").status == 201
        assert ask(f"{url}/v2/team/app/blobs/{digest}").body == data


@pytest.mark.long
def test_push_goes_on_at_another_worker_while_its_broken_request_hangs() -> None:
    """The client's network was gone for a while. Each connection stays at one of both workers."""
    push_host = f"127.0.0.1:{free_port()}"
    hosted, address = {"name": NAME, "listen": push_host}, ("127.0.0.1", int(push_host[10:]))
    upstreams = {"docker.io": "http://127.0.0.1:9"}
    with Mirror(upstreams, hosted=hosted, workers=2), ExitStack() as stack:
        kept = []
        for _ in range(6):
            url = f"http://{push_host}/v2/team/app/blobs/uploads/"
            path = ask(url, "POST", body=b"").headers["Location"]
            hanging = stack.enter_context(socket.create_connection(address))
            head = f"PATCH {path} HTTP/1.1\r\nHost: {push_host}\r\nContent-Length: 100\r\n\r\n"
            hanging.sendall(head.encode() + b"x" * 10)
            kept.append((path, stack.enter_context(closing(HTTPConnection(push_host)))))

        def goes_on(path: str, connection: HTTPConnection) -> bool:
            connection.request("PATCH", path, b"y", {"Content-Range": "10-10"})
            response = connection.getresponse()
            response.read()
            return response.status == 202

        for path, connection in kept:
            wait_until(partial(goes_on, path, connection), "the upload can go on", 20)


def received(response: Response) -> int:
    """Return how many bytes of an upload a response says that the server has."""
    last = int(response.headers["Range"].partition("-")[2])
    return last + 1 if last else 0


def test_two_pushes_of_one_tag_at_once_leave_one_of_both_whole(tmp_path: Path) -> None:
    both = [images.image(seed, layers=(300_000,)) for seed in (31, 32)]
    layouts = [images.write_layout(tmp_path / image.digest[7:], image) for image in both]
    with hosting() as (mirror, push_host):

        def push(layout: Path) -> None:
            Skopeo().skopeo(
                *("copy", "--preserve-digests", "--dest-tls-verify=false"),
                *(f"oci:{layout}:latest", f"docker://{push_host}/team/app:v1"),
            )

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(push, layouts))
        found = Skopeo().copy(f"{mirror.host}/{NAME}/team/app:v1")
        assert found in [image.contents() for image in both]
        for image in both:
            assert Skopeo().copy(f"{push_host}/team/app@{image.digest}") == image.contents()


def test_push_beside_pull_of_the_same_content_keeps_one_copy_and_both_rights() -> None:
    data = images.random_bytes(4_000_000, 41)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    with DockerRegistry() as registry:
        images.push_blob(registry.url, "library/app", digest, len(data), iter((data,)))
        with hosting(registry.url) as (mirror, push_host), ThreadPoolExecutor(4) as threads:
            url = f"http://{push_host}"
            pulls = [
                threads.submit(mirror.download, f"/v2/library/app/blobs/{digest}") for _ in range(2)
            ]
            pushes = [
                threads.submit(
                    images.push_blob, url, f"team/{number}", digest, len(data), iter((data,))
                )
                for number in range(2)
            ]
            assert {pull.result().sha256 for pull in pulls} == {digest[7:]}
            for done in pushes:
                done.result()
            blobs = list((mirror.data_dir / "blobs/sha256").iterdir())
            assert [path.name for path in blobs] == [digest[7:]]
            assert ask(f"{url}/v2/team/0/blobs/{digest}").body == data
            # Neither side opens the other one.
            assert mirror.ask(f"/v2/{NAME}/library/app/blobs/{digest}").status == 404
            assert mirror.ask(f"/v2/library/other/blobs/{digest}").status == 404
            assert ask(f"{url}/v2/team/2/blobs/{digest}").status == 404


def resident(pid: int) -> int:
    """Return the most memory that a process has had, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.long(50)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("size", [5 * 2**30])
def test_layer_of_5_gib_is_pushed_and_pulled_in_little_memory(tmp_path: Path, size: int) -> None:
    file = tmp_path / "layer"
    with file.open("wb") as out:
        out.truncate(size)  # It is sparse: only the server writes all of it.
    whole, block = hashlib.sha256(), bytes(1 << 20)
    for _ in range(size >> 20):
        whole.update(block)
    with hosting() as (mirror, push_host):
        url = f"http://{push_host}"
        path = ask(f"{url}/v2/team/app/blobs/uploads/", "POST", body=b"").headers["Location"]
        run("curl", "-sSf", "-X", "PATCH", "-T", file, f"{url}{path}", timeout=900)
        done = ask(f"{url}{path}?digest=sha256:{whole.hexdigest()}", "PUT", body=b"", timeout=300)
        assert done.status == 201
        assert mirror.download(f"/v2/{NAME}/team/app/blobs/sha256:{whole.hexdigest()}").size == size
        assert resident(mirror.pid) < MEMORY_BOUND
