"""The pieces of one blob that several connections fetch: an in-order window. Pure, without I/O.

Lives here: which bytes are requested by which connection, what has arrived ahead, which piece is
late. Must not know: asyncio, connections, how many there may be (:mod:`mirror.pull.ramp`).

Theory of operation. Bytes are handed out in order. Those before ``position`` were handed out. After
it there are pieces, sorted and without overlap, and gaps that nobody has requested. The *plain*
piece is that of the response that a transfer begins with. It has no end of its own, and runs on
until it meets a piece of another connection. Until that one has a response, the plain piece runs
over it, so that a refusal costs nothing. During a trial (:mod:`mirror.pull.trial`), the caller
accepts the other pieces, or drops them, before the plain one meets them. All other pieces end where
their requests do: closing a connection early loses the bytes in its sockets, which are then fetched
twice.

The connection of the piece at the front pauses while its bytes are not handed out. A piece ahead of
it needs memory for all of its bytes. A *paced* piece needs none: it pauses ahead of the front, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from math import ceil
from statistics import median_low
from typing import Final

MIN_PIECE_BYTES: Final = 4 * 1024 * 1024
"""Bytes of a piece of a blob of less than 16 usual pieces, unless ``parallel.part`` is smaller.
Each piece costs a round trip without data."""
_PIECES_OF_A_BLOB: Final = 16
"""Pieces that a blob has at least, if they are not smaller than the minimum: with fewer, the last
one would be fetched alone for too long."""
_LAST_PIECES: Final = 4
"""Pieces that one of the usual size becomes at the end of a blob."""
_LATE_AFTER_S: Final = 0.75
"""Seconds after a request in which its piece is never late. The rest of a cut piece has twice as
many, so a range that is slow at every node is completed in the end. Shorter than two measurements
of the rate (0.8 s), so that a starved piece does not spoil both."""
_LATE_FACTOR: Final = 4
"""A piece is late if its rate is less than the median of the others, divided by this."""
_FASTER: Final = 2
"""A cut was useful if the rest arrives more than so many times as fast. A late piece is four times
slower than others, so a useful cut gains more than this."""
_STARVED_FACTOR: Final = 32
"""A piece is late, too, if its rate is less than the median of earlier pieces, divided by this. The
factor is large: when a storage or this machine becomes slow as a whole, all pieces are slow, and
cutting them would only lose the bytes in their sockets."""
_JUDGED_AFTER_S: Final = 0.25
"""Seconds after which the rate of a piece counts for others: before, it is that of a start."""
_KEPT_RATES: Final = 8
"""Number of complete pieces whose rates are kept for comparison."""
_FIRST_LATENCY_S: Final = 0.07
"""Seconds that a response is expected to take before one was measured: as on one continent."""
_LEAD_LATENCIES: Final = 1.5
"""Times of a response for which a plain piece runs on before it meets the next one. With less, the
plain one might be faster, and the response would be of no use."""
_REQUEST_LATENCIES: Final = 3
"""A request asks for as many bytes as arrive in the time of a response, times this, so that at most
a quarter of the time is spent without data."""
_PIECES_ALONE: Final = 16
"""Pieces that are requested as one if there may be no other connection now. With fewer, too much of
the time would be spent without data. With more, others could not help again soon."""


def piece_size(total: int, configured: int) -> int:
    """Return the bytes of each piece of a blob of ``total`` bytes.

    ``configured``: ``parallel.part`` in bytes. Small blobs have smaller pieces.
    """
    return min(configured, max(MIN_PIECE_BYTES, total // _PIECES_OF_A_BLOB))


@dataclass(slots=True, eq=False)
class Piece:
    """Bytes that one connection fetches, or has fetched. Times in seconds of one clock."""

    start: int
    """Offset of the first byte."""
    stop: int
    """Offset after the last byte that is fetched. That of the plain piece falls when it meets
    another one."""
    asked_at: float
    late_after: float = _LATE_AFTER_S
    """Seconds for which it is not late."""
    is_plain: bool = False
    alone_until: int = 0
    """Offset up to which this piece is fetched by the only connection. Nothing behind the piece is
    requested before it has arrived up to there. 0: no such limit."""
    is_paced: bool = False
    has_connection: bool = True
    """Whether a connection fetches it. False: it is complete, or was given back."""
    has_response: bool = False
    has_been_slow: bool = False
    """Whether it was slow once, but had a right to more time (``late_after``)."""
    cut_rate: float | None = None
    """Rate of the piece that was cut, and of which this is the rest. None: it is no such rest."""
    received_until: int = field(init=False)
    """Offset after the last byte that has arrived."""
    handed_out_until: int = field(init=False)
    """Offset after the last byte that was handed out."""
    paused_s: float = 0.0
    """Seconds in which its reader has paused."""
    paused_at: float | None = None
    """Time since which its reader pauses. None: it does not."""
    chunks: deque[bytes] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.received_until = self.handed_out_until = self.start

    @property
    def waiting(self) -> int:
        """Bytes that have arrived and are not handed out."""
        return self.received_until - self.handed_out_until

    def elapsed(self, now: float) -> float:
        """Return the seconds since the request, without pauses of the reader."""
        until = now if self.paused_at is None else self.paused_at
        return until - self.asked_at - self.paused_s

    def pause(self, now: float) -> None:
        """Note that the reader waits until bytes are handed out."""
        self.paused_at = now

    def resume(self, now: float) -> None:
        """Note that the reader goes on."""
        if self.paused_at is not None:
            self.paused_s += now - self.paused_at
            self.paused_at = None

    def rate(self, now: float) -> float:
        """Return the bytes per second since the request."""
        return (self.received_until - self.start) / max(self.elapsed(now), 1e-3)


class RequestSize(Enum):
    """How much a request asks for."""

    USUAL = auto()
    """One piece, or several if responses take long. There has to be memory for it."""
    SIXTEEN = auto()
    """Sixteen pieces: there may be no other connection now. It needs no memory: it is paced."""
    REST = auto()
    """All of the gap: there will be no other connection. It is paced, too."""


class Pieces:
    """The pieces of one blob. The caller passes the time."""

    def __init__(self, position: int, total: int, size: int) -> None:
        """Start without pieces.

        Args:
            position: Offset of the next byte to hand out.
            total: Bytes of the blob.
            size: Bytes of a piece.
        """
        self.position = position
        self.total = total
        self.size = size
        self._pieces: list[Piece] = []
        self.latency: float | None = None
        """Seconds from a request to its response headers: of the latest response, or longer if a
        request was cut before its response. None: there was no request."""
        self._rates: deque[tuple[float, float]] = deque(maxlen=_KEPT_RATES)
        """(time, rate) of each of the latest complete pieces."""
        self._late_after_s = _LATE_AFTER_S
        """Seconds for which no piece is late. Cuts that were of no use have raised them."""
        self._cut: dict[int, tuple[float, float]] = {}
        """Offset of the rest of a piece that was cut -> (seconds for which the rest is not late,
        rate of the piece)."""

    # --- what is there --------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def missing(self) -> int:
        """Bytes that have not arrived."""
        return self.total - self.position - sum(piece.waiting for piece in self._pieces)

    @property
    def ahead(self) -> int:
        """Bytes in memory, and those that will be there before their connection pauses."""
        return sum(
            piece.waiting if self.may_pause(piece) else piece.stop - piece.handed_out_until
            for piece in self._pieces
        )

    def may_pause(self, piece: Piece) -> bool:
        """Return whether the connection of a piece pauses while its bytes are not handed out."""
        return piece.is_paced or piece.handed_out_until == self.position

    def is_stuck(self, piece: Piece) -> bool:
        """Return whether a paced piece is ahead of the front, and waits for others."""
        return piece.is_paced and piece.handed_out_until > self.position

    def is_overtaken(self, piece: Piece) -> bool:
        """Return whether another piece has handed out what this connection would bring next."""
        return piece.has_response and piece.received_until < self.position

    @property
    def front(self) -> Piece | None:
        """The piece that has the next byte, or whose connection fetches it. None: nobody does."""
        at_front = (
            piece
            for piece in self._pieces
            if piece.handed_out_until == self.position and (piece.chunks or piece.has_connection)
        )
        # The plain piece and the one that it has met may both be at the front. Bytes count.
        return max(at_front, key=lambda piece: piece.waiting, default=None)

    # --- requests -------------------------------------------------------------------------------

    def begin_plain(self, now: float) -> Piece:
        """Add the piece of a response without an end. It begins at ``position``."""
        plain = Piece(
            self.position, self.total, now, is_plain=True, is_paced=True, has_response=True
        )
        self._insert(plain)
        return plain

    def add_piece(
        self,
        now: float,
        rate: float,
        connections: int,
        memory: int = 0,
        size: RequestSize = RequestSize.USUAL,
    ) -> Piece | None:
        """Add a piece of the first gap, for a request that is sent now. None: there is no gap.

        Near the end of the blob, usual pieces become smaller, so that all connections end together.

        Args:
            now: The time.
            rate: Bytes per second of one connection.
            connections: How many there are to be.
            memory: Bytes that it may have. It is larger than one piece only if there are so many.
            size: How much is asked for.
        """
        latency = self.latency or _FIRST_LATENCY_S
        lead = max(self.size // 2, int(_LEAD_LATENCIES * rate * latency))
        start, stop = self._first_gap(lead)
        if start >= stop:
            return None
        count = self._usual_bytes(rate, memory)
        smallest = count // _LAST_PIECES
        if size is RequestSize.SIXTEEN:
            count = self.size * _PIECES_ALONE
        elif self.missing < 2 * connections * count:  # The end is near.
            count = max(smallest, self.missing // (2 * connections))
        if size is not RequestSize.REST and stop - start - count >= smallest:
            stop = start + count
        late_after, cut_rate = self._cut.get(start, (0.0, None))
        is_paced = size is not RequestSize.USUAL
        piece = Piece(
            start,
            stop,
            now,
            max(late_after, self._late_after_s, _REQUEST_LATENCIES * (self.latency or 0.0)),
            alone_until=stop - connections * self.size if is_paced else 0,
            is_paced=is_paced,
            cut_rate=cut_rate,
        )
        self._insert(piece)
        return piece

    def add_piece_ahead(self, now: float, lead: int, size: int) -> Piece | None:
        """Add a piece of ``size`` bytes of the first gap. None: there is no gap.

        ``lead``: bytes that the plain piece brings before it reaches the new one.
        """
        start, stop = self._first_gap(lead)
        if start >= stop:
            return None
        piece = Piece(start, min(stop, start + size), now)
        self._insert(piece)
        return piece

    def _usual_bytes(self, rate: float, memory: int) -> int:
        """Return the bytes of a usual request: one piece, or several if responses take long."""
        wanted = _REQUEST_LATENCIES * rate * (self.latency or 0.0)
        return self.size * max(1, min(ceil(wanted / self.size), memory // self.size))

    def _first_gap(self, lead: int) -> tuple[int, int]:
        """Return (start, stop) of the first gap. Both are ``total`` without one."""
        cursor, is_behind_plain = self.position, False
        for piece in self._pieces:
            # A few bytes between the plain piece and the next one are left to it.
            smallest = self.size // 2 if is_behind_plain else 1
            if piece.start - cursor >= smallest:
                return cursor, piece.start
            if piece.has_connection and piece.received_until < piece.alone_until:
                break
            is_running = piece.has_connection and not self.is_overtaken(piece)
            is_behind_plain = piece.is_plain and is_running
            cursor = max(cursor, piece.received_until + lead if is_behind_plain else piece.stop)
        else:
            return min(cursor, self.total), self.total
        return self.total, self.total

    def _insert(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._pieces.sort(key=lambda other: other.start)

    def accept_response(self, piece: Piece, now: float) -> bool:
        """Note that the response to a request has arrived.

        Returns:
            False if the plain piece has been faster. The piece is dropped then.
        """
        self.latency = now - piece.asked_at
        is_taken = any(
            other is not piece and other.start <= piece.start < other.received_until
            for other in self._pieces
        )
        piece.has_response = not is_taken and piece.start >= self.position
        if not piece.has_response:
            self._pieces.remove(piece)
        return piece.has_response

    # --- bytes ----------------------------------------------------------------------------------

    def receive(self, piece: Piece, chunk: bytes, now: float) -> bool:
        """Add the next bytes of a piece. Returns whether it is complete. Further bytes are cut."""
        if piece.is_plain:
            piece.stop = self._stop_of_plain(piece)
        room = piece.stop - piece.received_until
        if len(chunk) > room:
            chunk = chunk[:room]
        if chunk:
            piece.chunks.append(chunk)
            piece.received_until += len(chunk)
        if piece.received_until == piece.stop and piece.has_connection:
            self._rates.append((now, piece.rate(now)))
            self._judge_cut(piece, now)
            piece.has_connection = False
            self._tidy(piece)
        return not piece.has_connection

    def is_meeting_next(self, plain: Piece, count: int) -> bool:
        """Return whether a plain piece reaches another one with its next ``count`` bytes."""
        return any(
            piece is not plain and piece.start <= plain.received_until + count
            for piece in self._pieces
        )

    def drop_ranges(self) -> None:
        """Drop all pieces but the plain one, and what they have brought."""
        self._pieces = [piece for piece in self._pieces if piece.is_plain]

    def _stop_of_plain(self, plain: Piece) -> int:
        """Return where a plain piece ends: where the next piece that has a response begins.

        The next one may have been handed out in part, while the plain one has not been read.
        """
        if plain.received_until < self.position:
            return plain.received_until  # The piece behind it was handed out, and is gone.
        starts = (
            piece.handed_out_until
            for piece in self._pieces
            if piece is not plain
            and piece.has_response
            and piece.handed_out_until >= plain.received_until
        )
        return min(starts, default=self.total)

    def give_back(self, piece: Piece) -> None:
        """Note that its connection has ended. What has arrived is kept."""
        if piece.has_connection:
            piece.has_connection = False
            piece.stop = piece.received_until
        self._tidy(piece)

    def skip(self, count: int) -> None:
        """Note that the next ``count`` bytes were handed out by the caller. There are no pieces."""
        self.position += count

    def pop(self) -> bytes | None:
        """Return the next bytes in order. None if they have not arrived."""
        piece = self.front
        if piece is None or not piece.chunks:
            return None
        chunk = piece.chunks.popleft()
        piece.handed_out_until += len(chunk)
        self.position += len(chunk)
        self._tidy(piece)
        return chunk

    def _tidy(self, piece: Piece) -> None:
        """Drop a piece of which nothing is left."""
        if (
            not piece.has_connection
            and piece.handed_out_until == piece.received_until
            and piece in self._pieces
        ):
            self._pieces.remove(piece)

    # --- late pieces ----------------------------------------------------------------------------

    def find_late(self, now: float) -> Piece | None:
        """Return a piece that is far slower than the others, the front one first. None: no such.

        The caller cuts it: it ends the connection, and gives the rest of the piece back. If it had
        no response, later requests get more time for theirs.
        """
        for piece in self._pieces:
            is_due = piece.elapsed(now) >= min(piece.late_after, self._late_after_s)
            if not (piece.has_connection and is_due and self._is_slow(piece, now)):
                continue
            piece.has_been_slow = True
            if piece.elapsed(now) >= piece.late_after:
                self._judge_cut(piece, now)
                self._cut[piece.received_until] = 2 * piece.late_after, piece.rate(now)
                if not piece.has_response:
                    self.latency = max(self.latency or 0.0, piece.elapsed(now))
                return piece
        return None

    def has_stood_still(self, piece: Piece, now: float) -> bool:
        """Return whether this piece is the rest of a cut one, and starves, too."""
        earlier = [rate for _, rate in self._rates]
        is_still = not earlier or piece.rate(now) * _STARVED_FACTOR < median_low(earlier)
        return piece.cut_rate is not None and is_still

    def _judge_cut(self, piece: Piece, now: float) -> None:
        """Give all pieces more time if a cut was of no use, or would have been.

        A piece that was slow and is complete now has begun slowly. Others may, too.
        """
        is_useless = piece.cut_rate is not None and piece.rate(now) <= _FASTER * piece.cut_rate
        if is_useless or (piece.has_been_slow and piece.received_until == piece.stop):
            self._late_after_s *= 2

    def _is_slow(self, piece: Piece, now: float) -> bool:
        """Compare the rate of a piece with those of the others in the time since its request."""
        peers = [rate for at, rate in self._rates if at >= piece.asked_at]
        peers += [
            other.rate(now)
            for other in self._pieces
            if other.has_connection and other is not piece and other.elapsed(now) >= _JUDGED_AFTER_S
        ]
        if peers and piece.rate(now) * _LATE_FACTOR < median_low(peers):
            return True
        # Those that are fetched now may all starve.
        earlier = [rate for _, rate in self._rates]
        return bool(earlier) and piece.rate(now) * _STARVED_FACTOR < median_low(earlier)
