"""The images that the pods of a Kubernetes cluster use, from its API.

Lives here: the request for the list of pods, page by page, and the names of images in a pod. Must
not know: leases, the data directory.

Theory of operation: a pod names its images in ``spec``, as a user has written them, and their
digests in ``status``, once a node has pulled them (Kubernetes API, "Pod v1 core"). The list is
read with ``limit`` and ``continue``. A token of ``continue`` expires after some minutes: the API
says 410 then, and the list begins again.
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

from mirror.oci.errors import MirrorError, UpstreamProtocolError, UpstreamUnavailable
from mirror.store.records import MALFORMED

ACCOUNT_DIR: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Directory with the token of a pod's service account, and the authority of the API server."""
_PAGE_PODS: Final = 500
"""Pods of one page, as kubectl asks for them: 5 MiB of JSON."""
_MAX_POD_PAGES: Final = 10_000
"""Pages of a list: 5 million pods, which no cluster has."""
_MAX_PAGE_BYTES: Final = 256 * 1024 * 1024
"""Bytes of one page: pods of 500 KiB each."""
_API_TIMEOUT_S: Final = 30.0
"""Seconds without a byte from the API server."""
_MAX_ATTEMPTS: Final = 3
"""Lists that are begun before an expired one is an error."""
# RFC 6750, section 2.1.
_IS_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII).fullmatch
_FINISHED_PHASES: Final = frozenset({"Succeeded", "Failed"})
"""Phases of pods whose containers have ended and are not started again."""
_TOKEN_EXPIRED: Final = 410
"""Status of a ``continue`` token that has expired."""
_STATUS_REMEDIES: Final = {
    401: "the API server does not accept the token: see --token-file",
    403: "the account may not list pods: bind a ClusterRole with the verb list on pods to it",
    404: "this is no Kubernetes API server: see --api-server",
}


@dataclass(frozen=True, slots=True)
class ApiServer:
    """An API server, and how a client proves who it is."""

    url: str
    """Such as ``https://10.0.0.1:443``."""
    token_file: Path | None = None
    """File with a bearer token. It is read at each use: the kubelet replaces it. None: no token."""
    ca_file: Path | None = None
    """File with the certificate authority (PEM). None: those of the system."""

    @classmethod
    def in_cluster(cls, environment: Mapping[str, str]) -> ApiServer:
        """Return the API server of the cluster in which this process runs in a pod.

        Raises ``UpstreamUnavailable`` if it does not run in a pod.
        """
        host, port = (environment.get(f"KUBERNETES_SERVICE_{one}") for one in ("HOST", "PORT"))
        if not host or not port:
            raise UpstreamUnavailable(
                "this is no pod of a cluster, so the API server is not known: give --api-server"
            )
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", ACCOUNT_DIR / "token", ACCOUNT_DIR / "ca.crt")


@dataclass(frozen=True, slots=True)
class UsedImage:
    """An image that a container uses."""

    name: str = ""
    """As the pod names it. Empty: it has no name."""
    digest: str = ""
    """The digest that the node has pulled, such as ``sha256:…``. Empty: not known yet."""


@dataclass(frozen=True, slots=True)
class PodImages:
    """The images of all pods."""

    pods: int
    images: frozenset[UsedImage]


def list_pod_images(server: ApiServer) -> PodImages:
    """Ask the API server for all pods, and return their images. Blocks.

    Raises:
        MirrorError: The API server cannot be asked, or refuses. The text has the remedy.
        OSError: A file cannot be read.
    """
    for _ in range(_MAX_ATTEMPTS):
        try:
            return _list_images(server)
        except _ListExpired:
            continue
    raise UpstreamUnavailable("the list of pods has expired several times: try again later")


class _ListExpired(Exception):
    """The API server does not continue the list, which has changed too much."""


def _list_images(server: ApiServer) -> PodImages:
    count, images, token, seen = 0, set[UsedImage](), "", set[str]()
    with _Connection(server) as connection:
        while True:
            page = connection.get(token)
            for pod in page["items"]:
                count += 1
                images.update(images_of(pod))
            token = str(page["metadata"].get("continue") or "")
            if not token:
                return PodImages(count, frozenset(images))
            if token in seen or len(seen) >= _MAX_POD_PAGES:
                raise UpstreamProtocolError("the API server has sent an endless list of pods")
            seen.add(token)


class _Connection:
    """A connection to the API server. Redirects and proxies are not used."""

    def __init__(self, server: ApiServer) -> None:
        try:
            parts = urlsplit(server.url)
            port, is_url = parts.port, parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            is_url = False
        if not is_url or not server.url.isprintable():
            raise UpstreamUnavailable("--api-server is no URL of an API server")
        host = parts.hostname or ""
        self._path = parts.path.rstrip("/")
        self._headers = {"Accept": "application/json", "User-Agent": "oci-mirror"}
        if server.token_file is not None:
            token = server.token_file.read_text(encoding="ascii", errors="replace").strip()
            if not _IS_TOKEN(token):
                raise UpstreamUnavailable(f"{server.token_file} has no bearer token in one line")
            self._headers["Authorization"] = f"Bearer {token}"
        self._name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        if parts.scheme == "https":
            context = _tls_context(server.ca_file)
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=_API_TIMEOUT_S, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(host, port, timeout=_API_TIMEOUT_S)

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, token: str) -> dict[str, Any]:
        """Return the next page of the list of pods. ``token``: empty for the first page."""
        query = {"limit": _PAGE_PODS} | ({"continue": token} if token else {})
        try:
            self._connection.request(
                "GET", f"{self._path}/api/v1/pods?{urlencode(query)}", headers=self._headers
            )
            response = self._connection.getresponse()
            body = response.read(_MAX_PAGE_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UpstreamUnavailable(f"{self._name} cannot be asked: {why}") from None
        if response.status == _TOKEN_EXPIRED and token:
            raise _ListExpired
        if response.status != http.HTTPStatus.OK:
            raise self._refusal(response.status)
        return self._parse(body)

    def _refusal(self, status: int) -> MirrorError:
        remedy = _STATUS_REMEDIES.get(status, "try again later")
        return UpstreamUnavailable(f"{self._name} has answered with {status}: {remedy}")

    def _parse(self, body: bytes) -> dict[str, Any]:
        try:
            page = json.loads(body)
            items = page["items"] or []  # Go writes an empty list as null.
            is_list = page["kind"] == "PodList" and isinstance(items, list)
            if is_list and isinstance(page["metadata"], dict):
                return {**page, "items": items}
        except MALFORMED:
            pass
        raise UpstreamProtocolError(f"{self._name} has sent no list of pods")


def images_of(pod: Any) -> Iterator[UsedImage]:
    """Return the images of one pod: of its containers, of init and ephemeral ones, of volumes.

    There are none if it has finished. What is malformed is passed over.
    """
    spec, status = _fields(pod, "spec"), _fields(pod, "status")
    if _text(status, "phase") in _FINISHED_PHASES:
        return
    for kind in ("containers", "initContainers", "ephemeralContainers"):
        digests = {
            _text(one, "name"): digest_of_image_id(one.get("imageID"))
            for one in _items(status, f"{kind[:-1]}Statuses")
        }
        for container in _items(spec, kind):
            name, digest = container.get("image"), digests.pop(_text(container, "name"), "")
            if isinstance(name, str) and name:
                yield UsedImage(name=name, digest=digest)
            elif digest:
                yield UsedImage(digest=digest)
    for volume in _items(spec, "volumes"):
        name = _fields(volume, "image").get("reference")
        if isinstance(name, str) and name:
            yield UsedImage(name=name)


def digest_of_image_id(image_id: Any) -> str:
    """Return the digest in the ``imageID`` of a container's status. Empty: it has none.

    Runtimes write ``docker.io/library/app@sha256:…`` or ``docker-pullable://app@sha256:…``. A
    digest alone is that of the image's configuration, which says nothing of its manifest.
    """
    _, has_digest, digest = image_id.rpartition("@") if isinstance(image_id, str) else ("", "", "")
    return digest if has_digest else ""


def _fields(value: Any, key: str) -> Mapping[str, Any]:
    field = value.get(key) if isinstance(value, dict) else None
    return field if isinstance(field, dict) else {}


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    return value if isinstance(value, str) else ""


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Return the settings of TLS. Raises ``UpstreamUnavailable`` if a file has no certificate."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        raise UpstreamUnavailable(f"{ca_file} has no certificate (PEM)") from None


def _items(fields: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    items = fields.get(key)
    return [one for one in items if isinstance(one, dict)] if isinstance(items, list) else []
