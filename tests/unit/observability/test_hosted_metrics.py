"""The metrics of hosted repositories."""

from __future__ import annotations

from mirror.observability.hosted_events import HostedChange, HostedMeasured
from mirror.observability.metrics import MetricsObserver
from mirror.oci.reference import Digest, Repository

CHANGE = HostedChange(
    action="push",
    repository=Repository("registry.example", "team/app"),
    digest=Digest.of(b""),
    tag="v1",
    media_type="x",
    size=1,
    user="ci",
    client="127.0.0.1",
    at=1.0,
)


def test_changes_and_usage_of_hosted_repositories_are_counted() -> None:
    observer = MetricsObserver([])
    assert 'oci_mirror_hosted_changes_total{action="delete"} 0.0' in observer.render()[0].decode()
    observer.observe(CHANGE)
    observer.observe(
        HostedMeasured(
            repositories=1, contents=2, bytes=3, quota=4, uploads=5, reserved=6, metadata=7
        )
    )
    lines = observer.render()[0].decode().splitlines()
    for line in (
        *('oci_mirror_hosted_changes_total{action="push"} 1.0', "oci_mirror_hosted_bytes 3.0"),
        *("oci_mirror_hosted_repositories 1.0", "oci_mirror_hosted_contents 2.0"),
        *("oci_mirror_hosted_quota_bytes 4.0", "oci_mirror_uploads 5.0"),
        *("oci_mirror_upload_reserved_bytes 6.0", "oci_mirror_hosted_metadata_bytes 7.0"),
    ):
        assert line in lines
