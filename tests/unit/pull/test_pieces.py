"""The in-order window: every order of arrival yields the bytes in order, and no byte twice."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirror.pull.pieces import (
    _FIRST_LATENCY_S,
    _LEAD_LATENCIES,
    MIN_PIECE_BYTES,
    Piece,
    Pieces,
    RequestSize,
    piece_size,
)
from tests.unit.store.kit import random_bytes

DATA = random_bytes(4000, 17)
MIB = 2**20


@dataclass
class Window:
    """Pieces, and the connections that bring their bytes."""

    pieces: Pieces
    open: list[Piece] = field(default_factory=list)
    out: bytearray = field(default_factory=bytearray)
    accepted: int = 0
    now: float = 0.0

    def claim(self, lead: int, connections: int = 2, *, is_alone: bool = False) -> bool:
        rate = lead / (_LEAD_LATENCIES * (self.pieces.latency or _FIRST_LATENCY_S))
        size = RequestSize.SIXTEEN if is_alone else RequestSize.USUAL
        size = RequestSize.REST if connections == 1 else size
        piece = self.pieces.add_piece(self.now, rate, connections, size=size)
        if piece is not None:
            self.open.append(piece)
        return piece is not None

    def respond(self, piece: Piece) -> None:
        if not piece.has_response and not self.pieces.accept_response(piece, self.now):
            self.open.remove(piece)

    def receive(self, piece: Piece, count: int) -> None:
        """Let a connection bring bytes. It may bring more than the piece has room for."""
        self.now += 0.1
        end = piece.received_until
        chunk = DATA[end : end + count]
        if not piece.is_plain:
            chunk = DATA[end : min(end + count, piece.stop)]
        is_complete = self.pieces.receive(piece, chunk, self.now)
        self.accepted += piece.received_until - end
        if is_complete:
            self.open.remove(piece)

    def cut(self, piece: Piece) -> None:
        self.open.remove(piece)
        self.pieces.give_back(piece)

    def pop(self) -> None:
        while (chunk := self.pieces.pop()) is not None:
            self.out += chunk

    def check(self) -> None:
        """Assert what always holds."""
        pieces = self.pieces
        waiting = sum(piece.waiting for piece in pieces)
        assert pieces.missing == pieces.total - len(self.out) - waiting
        assert pieces.position == len(self.out)
        assert pieces.ahead >= waiting
        arrived = sorted(
            (piece.start, piece.received_until)
            for piece in pieces
            if piece.received_until > piece.start
        )
        assert all(one[1] <= two[0] for one, two in pairwise(arrived))


@settings(max_examples=100)
@given(st.data(), st.integers(1, 200), st.integers(1, 60), st.booleans())
def test_every_order_of_arrival_yields_the_exact_bytes_and_none_is_taken_twice(
    data: st.DataObject, total: int, size: int, has_plain: bool
) -> None:
    window = Window(Pieces(0, total, size))
    if has_plain:
        window.open.append(window.pieces.begin_plain(0.0))
    for _ in range(data.draw(st.integers(0, 40))):
        action = data.draw(st.sampled_from(["claim", "respond", "receive", "cut", "pop"]))
        if action == "claim":
            lead, connections = data.draw(st.integers(0, 80)), data.draw(st.integers(1, 4))
            window.claim(lead, connections, is_alone=data.draw(st.booleans()))
        elif action == "pop":
            window.pop()
        elif window.open:
            piece = data.draw(st.sampled_from(window.open))
            match action:
                case "respond":
                    window.respond(piece)
                case "receive" if piece.has_response:
                    window.receive(piece, data.draw(st.integers(1, 100)))
                case "cut":
                    window.cut(piece)
        window.check()
    # Then every connection brings what it has been asked for, and one more the rest.
    for _ in range(4 * total + 10):
        for piece in list(window.open):
            window.respond(piece)
            if piece in window.open:
                window.receive(piece, size)
        window.pop()
        window.check()
        if window.pieces.position == total:
            break
        window.claim(0, 2 if window.open else 1)
    assert bytes(window.out) == DATA[:total]
    assert window.accepted == total
    assert window.pieces.missing == window.pieces.ahead == 0


def test_plain_piece_runs_over_a_request_without_a_response_and_stops_at_one_with() -> None:
    window = Window(Pieces(0, 400, 50))
    plain = window.pieces.begin_plain(0.0)
    window.open.append(plain)
    window.claim(25)
    window.claim(25)
    (_, early, late) = window.open
    assert [(piece.start, piece.stop) for piece in (early, late)] == [(25, 75), (75, 125)]
    window.receive(plain, 30)
    window.respond(early)
    assert early not in window.open, "the plain piece has been faster"
    window.respond(late)
    window.receive(plain, 400)
    assert plain not in window.open
    assert (plain.received_until, window.pieces.position) == (75, 0)


def test_first_gap_is_requested_first_and_the_last_piece_takes_a_small_rest() -> None:
    window = Window(Pieces(0, 210, 50))
    while window.claim(0):
        pass
    spans = [(piece.start, piece.stop) for piece in window.open]
    assert spans == [(0, 50), (50, 100), (100, 150), (150, 210)]
    window.respond(window.open[1])
    window.receive(window.open[1], 20)
    window.cut(window.open[1])
    window.claim(0)
    assert (window.open[-1].start, window.open[-1].stop) == (70, 100)


def test_last_connection_requests_the_whole_gap_at_the_front() -> None:
    window = Window(Pieces(0, 400, 50))
    window.claim(0, 1)
    assert (window.open[0].start, window.open[0].stop) == (0, 400)
    assert window.pieces.ahead == 0, "it pauses in place of using memory"


def test_connection_that_is_alone_for_now_requests_sixteen_pieces_and_is_joined_at_their_end() -> (
    None
):
    window = Window(Pieces(0, 4000, 50))
    window.claim(0, is_alone=True)
    alone = window.open[0]
    assert (alone.start, alone.stop, window.pieces.ahead) == (0, 800, 0)
    window.respond(alone)
    assert not window.claim(0)
    window.receive(alone, 700)
    assert window.claim(0)
    assert (window.open[-1].start, window.open[-1].stop) == (800, 850)


def test_large_request_ahead_of_the_front_waits_for_it_and_needs_no_memory() -> None:
    window = Window(Pieces(0, 4000, 50))
    window.claim(0)
    window.claim(0, is_alone=True)
    front, ahead = window.open
    window.respond(ahead)
    window.receive(ahead, 10)
    pieces = window.pieces
    assert pieces.may_pause(ahead)
    assert [pieces.is_stuck(piece) for piece in (front, ahead)] == [False, True]
    assert pieces.ahead == 10, "beside the front one, which pauses, too"
    window.respond(front)
    window.receive(front, 50)
    window.pop()
    assert not pieces.is_stuck(ahead)
    assert bytes(window.out) == DATA[:60]


@pytest.mark.parametrize(
    ("total", "configured", "size"),
    [
        (10 * MIB, 8 * MIB, MIN_PIECE_BYTES),
        (96 * MIB, 8 * MIB, 6 * MIB),
        (10_000 * MIB, 8 * MIB, 8 * MIB),
        (10_000 * MIB, MIB, MIB),
    ],
)
def test_small_blobs_have_smaller_pieces(total: int, configured: int, size: int) -> None:
    assert piece_size(total, configured) == size


def rates(window: Window, *received: int, seconds: float) -> Piece | None:
    """Let connections bring bytes for some seconds. Returns the late piece."""
    while len(window.open) < len(received):
        window.claim(0)
    for piece, count in zip(list(window.open), received, strict=True):
        window.respond(piece)
        window.receive(piece, count)
    window.now = seconds
    return window.pieces.find_late(seconds)


def test_piece_far_below_the_median_is_late_the_front_one_first() -> None:
    window = Window(Pieces(0, 400, 100))
    late = rates(window, 1, 60, 60, 1, seconds=1.0)
    assert late is window.open[0]
    window.cut(late)
    assert window.pieces.find_late(1.0) is window.open[2]


def test_rest_of_a_piece_that_was_cut_has_twice_the_time() -> None:
    window = Window(Pieces(0, 400, 100))
    late = rates(window, 1, 60, 60, 60, seconds=1.0)
    assert late is window.open[0]
    window.cut(late)
    window.claim(0)
    assert (window.open[-1].start, window.open[-1].asked_at) == (1, 1.0)
    assert window.pieces.find_late(2.4) is None
    assert window.pieces.find_late(2.5) is window.open[-1]


def test_piece_is_not_late_at_once_nor_while_its_reader_pauses() -> None:
    window = Window(Pieces(0, 400, 100))
    assert rates(window, 1, 60, 60, seconds=0.7) is None
    window.open[0].pause(0.7)
    assert window.pieces.find_late(5.0) is None
    window.open[0].resume(5.0)
    assert window.pieces.find_late(5.2) is window.open[0]


def test_pieces_that_are_all_slow_are_not_late() -> None:
    window = Window(Pieces(0, 400, 100))
    assert rates(window, 1, 1, 2, 3, seconds=30.0) is None


def test_storage_that_gets_slow_as_a_whole_has_no_late_piece() -> None:
    """Neither compared with what it brought before, nor with what it brings now."""
    pieces, now = Pieces(0, 10_000, 100), 0.0
    for _ in range(8):
        piece = pieces.add_piece(now, 0, 2)
        assert piece is not None
        pieces.accept_response(piece, now)
        now += 0.1
        pieces.receive(piece, bytes(100), now)  # 1,000 bytes a second
    while len([piece for piece in pieces if piece.has_connection]) < 4:
        piece = pieces.add_piece(now, 0, 4)
        assert piece is not None
        pieces.accept_response(piece, now)
        pieces.receive(piece, bytes(60), now)
    assert pieces.find_late(now + 1.0) is None, "60 bytes a second"


def test_pieces_that_all_starve_are_late() -> None:
    """Compared with what came before, at least one of them may be fetched elsewhere."""
    window = Window(Pieces(0, 400, 100))
    assert rates(window, 100, 2, 2, seconds=0.0) is None
    assert window.pieces.find_late(2.0) in window.open


def test_pieces_become_smaller_near_the_end_so_that_connections_end_together() -> None:
    pieces, sizes = Pieces(0, 1000, 100), []
    while (piece := pieces.add_piece(0.0, 0, 4)) is not None:
        sizes.append(piece.stop - piece.start)
        pieces.accept_response(piece, 0.0)
        pieces.receive(piece, bytes(sizes[-1]), 1.0)
        assert pieces.pop()
    assert sizes[:2] == [100, 100]
    assert max(sizes[-4:]) < 50
    assert min(sizes) >= 25


def test_plain_piece_runs_over_a_trial_that_is_dropped() -> None:
    window = Window(Pieces(0, 400, 50))
    plain, pieces = window.pieces.begin_plain(0.0), window.pieces
    ahead = pieces.add_piece_ahead(0.0, 100, 20)
    assert ahead is not None
    assert (ahead.start, ahead.stop) == (100, 120)
    pieces.accept_response(ahead, 0.1)
    pieces.receive(ahead, DATA[100:120], 0.2)
    pieces.receive(plain, DATA[:90], 0.3)
    assert not pieces.is_meeting_next(plain, 9)
    assert pieces.is_meeting_next(plain, 10)
    pieces.drop_ranges()
    pieces.receive(plain, DATA[90:400], 0.4)
    window.pop()
    assert bytes(window.out) == DATA[:400]


def test_plain_piece_ends_where_an_accepted_trial_begins() -> None:
    pieces = Pieces(0, 400, 50)
    plain = pieces.begin_plain(0.0)
    ahead = pieces.add_piece_ahead(0.0, 100, 20)
    assert ahead is not None
    pieces.accept_response(ahead, 0.1)
    assert pieces.receive(plain, DATA[:150], 0.3)
    assert plain.received_until == 100


def test_cut_that_was_of_no_use_gives_all_pieces_twice_the_time() -> None:
    window = Window(Pieces(0, 400, 100))
    late = rates(window, 1, 60, 60, 60, seconds=1.0)
    assert late is window.open[0]
    window.cut(late)
    window.claim(0)
    assert window.pieces.find_late(2.5) is window.open[-1], "its rest brings no more"
    window.cut(window.open[-1])
    window.pieces.give_back(window.open[-1])
    window.claim(0)
    assert min(piece.late_after for piece in window.open[-1:]) >= 1.5
