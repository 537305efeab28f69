"""Deliveries: retries, pauses, order, restarts, and several processes."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from mirror.notifications import queue
from mirror.notifications.deliverer import backoff
from mirror.notifications.sender import DeliveryResult, result_of_status
from mirror.observability.events import LogMessage, NotificationQueueMeasured
from mirror.oci.errors import ConfigError
from tests.fakes.registry import Fault
from tests.real.tokens import Certificate
from tests.unit.notifications.kit import (
    NOW,
    SECRETS,
    Receiver,
    is_signed_by,
    notification_kit,
    settings_with,
)
from tests.waiting import until

DAY = 86400.0


@pytest.mark.parametrize(
    ("status", "result"),
    [
        (200, DeliveryResult.ACCEPTED),
        (202, DeliveryResult.ACCEPTED),
        (204, DeliveryResult.ACCEPTED),
        (301, DeliveryResult.REFUSED),
        (308, DeliveryResult.REFUSED),
        (400, DeliveryResult.REFUSED),
        (401, DeliveryResult.REFUSED),
        (404, DeliveryResult.REFUSED),
        (408, DeliveryResult.FAILED),
        (410, DeliveryResult.GONE),
        (425, DeliveryResult.FAILED),
        (429, DeliveryResult.FAILED),
        (500, DeliveryResult.FAILED),
        (503, DeliveryResult.FAILED),
    ],
)
def test_meaning_of_a_status(status: int, result: DeliveryResult) -> None:
    assert result_of_status(status) is result


def test_pause_doubles_up_to_five_minutes_and_has_jitter() -> None:
    assert [backoff(failures, 1.0) for failures in range(10)] == [
        *(1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0)
    ]
    assert backoff(10**6, 0.0) == 150.0


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=503, body=b"x" * 100_000),
        Fault(status=429),
        Fault(status=404),
        Fault(status=307, headers={"Location": "/elsewhere"}),
        Fault(close=True),
        Fault(reset_at=0, status=200, body=b"x"),
        Fault(delay=30.0),
    ],
    ids=["500", "503", "429", "404", "redirect", "close", "reset", "hang"],
)
async def test_failed_request_is_repeated_with_the_same_id_after_a_pause(
    tmp_path: Path, fault: Fault
) -> None:
    async with Receiver() as receiver:
        receiver.fault("/events", fault)
        target = {"url": receiver.target, "timeout": 0.2 if fault.delay else 15}
        async with notification_kit(tmp_path, target) as kit:
            kit.push()
            await kit.settle()
            await kit.settle()
            if fault.reset_at is None:
                assert len(receiver.requests) == 1
                await kit.settle(1.0)
            assert {request.path for request in receiver.requests} == {"/events"}
            assert len({body["id"] for body in receiver.bodies()}) == 1
            assert kit.results[-1] == "delivered"
            assert kit.results.count("delivered") == 1
            assert kit.dropped == {}


async def test_order_of_a_target_is_kept_over_failures(tmp_path: Path) -> None:
    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        receiver.fault("/events", Fault(status=500), Fault(status=500))
        for number in range(40):
            kit.push(f"v{number}")
        await kit.settle()
        await kit.settle(1.0)
        await kit.settle(2.0)
        subjects = receiver.subjects()
    assert subjects == ["team/app:v0"] * 2 + [f"team/app:v{number}" for number in range(40)]
    assert kit.messages == ["notifications are not delivered", "notifications are delivered again"]


async def test_retry_after_is_kept_also_if_its_notification_is_dropped(tmp_path: Path) -> None:
    async with Receiver() as receiver:
        target = {"url": receiver.target, "max_queued": 1}
        async with notification_kit(tmp_path, target) as kit:
            receiver.fault("/events", Fault(status=429, headers={"Retry-After": "3600"}))
            kit.push("v1")
            await kit.settle()
            kit.push("v2")
            await kit.settle(3599.0)
            assert len(receiver.requests) == 1
            await kit.settle(1.0)
            assert receiver.subjects() == ["team/app:v1", "team/app:v2"]


async def test_pause_that_a_wrong_clock_has_set_ends(tmp_path: Path) -> None:
    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        receiver.fault("/events", Fault(status=500))
        kit.clock[0] = NOW + 1000 * DAY
        kit.push()
        await kit.settle()
        await kit.settle(-1000 * DAY)
        assert kit.results == ["failed", "delivered"]


async def test_refused_notification_is_given_up_after_ten_refusals(tmp_path: Path) -> None:
    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        receiver.fault("/events", Fault(status=400, times=10))
        kit.push("v1")
        kit.push("v2")
        for _ in range(10):
            await kit.settle(300.0)
        assert receiver.subjects() == ["team/app:v1"] * 10 + ["team/app:v2"]
        assert kit.dropped == {("audit", "refused"): 1}


async def test_notifications_of_a_dead_target_are_given_up_after_three_days(tmp_path: Path) -> None:
    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        receiver.fault("/events", Fault(status=500, times=2))
        kit.push("v1")
        await kit.settle()
        kit.clock[0] += 3 * DAY + 1
        kit.push("v2")
        await kit.settle()
        assert kit.dropped == {("audit", "expired"): 1}
        await kit.settle(300.0)
        assert receiver.subjects()[-1] == "team/app:v2"


async def test_clock_that_is_ahead_gives_up_nothing_if_the_target_accepts(tmp_path: Path) -> None:
    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        kit.push()
        kit.clock[0] += 100 * DAY
        await kit.settle()
        assert (kit.results, kit.dropped) == (["delivered"], {})


async def test_gone_stops_a_target_until_the_configuration_is_read_again(tmp_path: Path) -> None:
    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        receiver.fault("/events", Fault(status=410))
        for tag in ("v1", "v2", "v3"):
            kit.push(tag)
        await kit.settle()
        kit.push("v4")
        await kit.settle(3600.0)
        assert receiver.subjects() == ["team/app:v1"]
        assert kit.dropped == {("audit", "gone"): 4}
        kit.configure({"url": receiver.target})
        kit.push("v5")
        await kit.settle()
        assert receiver.subjects() == ["team/app:v1", "team/app:v5"]


async def test_target_that_hangs_holds_up_no_other_one(tmp_path: Path) -> None:
    async with Receiver() as receiver:
        receiver.fault("/slow", Fault(delay=3600.0))
        targets = (
            {"name": "slow", "url": f"{receiver.target}/slow", "timeout": 60},
            {"name": "quick", "url": f"{receiver.target}/quick"},
        )
        async with notification_kit(tmp_path, *targets) as kit:
            for number in range(3):
                kit.push(f"v{number}")
            await until(lambda: receiver.count("POST", "/quick") == 3)
            assert receiver.count("POST", "/slow") == 1


async def test_restart_sends_what_waits_and_keeps_the_pause(tmp_path: Path) -> None:
    async with Receiver() as receiver:
        receiver.fault("/events", Fault(status=503, headers={"Retry-After": "60"}))
        async with notification_kit(tmp_path, {"url": receiver.target}) as kit:
            kit.push("v1")
            kit.push("v2")
            await kit.settle()
        async with notification_kit(tmp_path, {"url": receiver.target}) as kit:
            await kit.settle(30.0)
            assert len(receiver.requests) == 1
            await kit.settle(30.0)
        assert receiver.subjects() == ["team/app:v1", "team/app:v1", "team/app:v2"]
        first, second, _ = receiver.bodies()
        assert first == second


async def test_stop_in_the_middle_of_a_request_keeps_its_notification(tmp_path: Path) -> None:
    async with Receiver() as receiver:
        receiver.fault("/events", Fault(delay=3600.0))
        async with notification_kit(tmp_path, {"url": receiver.target}) as kit:
            kit.push()
            await until(lambda: len(receiver.requests) == 1)
        async with notification_kit(tmp_path, {"url": receiver.target}) as kit:
            await kit.settle()
        assert receiver.subjects() == ["team/app:v1"] * 2


async def test_one_of_two_processes_delivers_what_both_have_queued(tmp_path: Path) -> None:
    clock = [NOW]
    async with Receiver() as receiver:
        target = {"url": receiver.target}
        async with notification_kit(tmp_path, target, clock=clock) as one:
            await one.settle()
            async with notification_kit(tmp_path, target, clock=clock) as other:
                one.push("v1")
                other.push("v2")
                await other.settle()
                await one.settle()
                await one.settle()
                assert (len(one.results), len(other.results)) == (2, 0)
            async with notification_kit(tmp_path, target, clock=clock) as other:
                await other.settle()
                await one.service._deliverer.close()
                other.push("v3")
                await other.settle()
                assert other.results == ["delivered"]
        assert sorted(receiver.subjects()) == [f"team/app:v{number}" for number in (1, 2, 3)]


async def test_accepted_notification_that_cannot_be_removed_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = queue.remove_accepted

    def refuse(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        monkeypatch.setattr(queue, "remove_accepted", refuse)
        kit.push("v1")
        kit.push("v2")
        for _ in range(3):
            await kit.settle(60.0)
        assert receiver.subjects() == ["team/app:v1"]
        monkeypatch.setattr(queue, "remove_accepted", accept)
        await kit.settle()
        assert receiver.subjects() == ["team/app:v1", "team/app:v2"]


async def test_pause_is_kept_although_the_disk_refuses_to_note_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        receiver.fault("/events", Fault(status=500, headers={"Retry-After": "60"}))
        monkeypatch.setattr(queue, "note_failure", refuse)
        kit.push()
        await kit.settle()
        await kit.settle(59.0)
        assert kit.results == ["failed"]
        await kit.settle(1.0)
        assert kit.results == ["failed", "delivered"]


async def test_replaced_secret_signs_beside_the_old_one_without_a_restart(tmp_path: Path) -> None:
    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        secret = tmp_path / "secret"
        for text in (f"whsec_{SECRETS[1]}\n{SECRETS[0]}\n", f"whsec_{SECRETS[1]}\n", "nonsense\n"):
            secret.write_text(text)
            kit.push()
            await kit.settle()
        both, new, kept = receiver.requests
    assert [is_signed_by(both, secret) for secret in SECRETS] == [True, True, False]
    assert [is_signed_by(new, secret) for secret in SECRETS] == [False, True, False]
    assert [is_signed_by(kept, secret) for secret in SECRETS] == [False, True, False]
    assert set(kit.messages) == {"secrets were not read again: the previous ones stay in use"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no secret: make one with"),
        ("short\n", "secret: line 1: not the base64 form of 24 to 64 bytes"),
        ("# key\nwhsec_" + "A" * 20, "secret: line 2: not the base64"),
        ("\n".join(SECRETS * 2), "more than 4 secrets"),
        ("A" * 5000, "larger than 4096 bytes"),
    ],
)
async def test_unusable_file_of_secrets_is_refused_without_showing_it(
    tmp_path: Path, text: str, why: str
) -> None:
    (tmp_path / "secret").write_text(text)
    with pytest.raises(ConfigError, match=why) as caught:
        async with notification_kit(tmp_path, {"url": "https://x.example"}):
            pass
    assert "AAAA" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "http://127.0.0.1:5100/v2/"])
async def test_address_of_a_cloud_or_of_the_mirror_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="events: audit: url"):
        async with notification_kit(tmp_path, {"url": url, "allow_plain_http": True}):
            pass


async def test_certificate_of_a_target_is_verified(tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate.cert_file, certificate.key_file)
    async with (
        Receiver(tls=tls) as receiver,
        notification_kit(tmp_path, {"url": receiver.target}) as kit,
    ):
        kit.push()
        await kit.settle()
        assert (receiver.requests, kit.results) == ([], ["failed"])
        assert "events.audit.ca adds one" in str(kit.seen(LogMessage))
        kit.configure({"url": receiver.target, "ca": str(certificate.cert_file)})
        await kit.settle(1.0)
        assert kit.results == ["failed", "delivered"]


async def test_query_of_a_url_is_sent_and_never_logged(tmp_path: Path) -> None:
    async with Receiver() as receiver:
        receiver.fault("/events", Fault(status=500))
        async with notification_kit(tmp_path, {"url": f"{receiver.target}?key=hidden"}) as kit:
            kit.push()
            await kit.settle()
            assert receiver.requests[0].query == {"key": ["hidden"]}
            assert "hidden" not in str(kit.events)
            assert "500" in str(kit.events)


async def test_configuration_that_is_prepared_only_changes_nothing(tmp_path: Path) -> None:
    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        other = {"name": "other", "url": f"{receiver.target}/other"}
        use_targets = kit.service.prepare(settings_with(tmp_path, other))
        unusable = {"name": "third", "url": receiver.target, "secret_file": "/nowhere"}
        with pytest.raises(ConfigError, match="third: secret_file: /nowhere: No such file"):
            kit.service.prepare(settings_with(tmp_path, other, unusable))
        kit.push("v1")
        await kit.settle()
        use_targets()
        kit.push("v2")
        await kit.settle()
        paths = [request.path for request in receiver.requests]
        assert paths == ["/events", "/events/other"]


async def test_removed_target_loses_its_queue_after_a_minute(tmp_path: Path) -> None:
    async with Receiver() as receiver, notification_kit(tmp_path, {"url": receiver.target}) as kit:
        receiver.fault("/events", Fault(status=500, times=None))
        kit.push()
        await kit.settle()
        kit.configure({"name": "other", "url": receiver.target})
        await kit.settle()
        await kit.settle(59.0)
        assert kit.dropped == {}
        await kit.settle(1.0)
        assert kit.dropped == {("audit", "removed"): 1}


async def test_length_and_age_of_the_queue_are_measured(tmp_path: Path) -> None:
    async with notification_kit(tmp_path, {"url": "http://127.0.0.1:9/"}) as kit:
        kit.push("v1")
        kit.push("v2")
        await kit.settle(100.0)
        assert kit.seen(NotificationQueueMeasured)[-1] == NotificationQueueMeasured(
            "audit", 2, 100.0
        )
