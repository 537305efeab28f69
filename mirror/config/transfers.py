"""The settings of transfers: their time limits, and several connections for one blob.

Lives here: their keys, descriptions and checks. Must not know: how bytes are received.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from mirror.config import values
from mirror.config.section import PositiveDuration, Section, Size


class Limits(Section):
    """The time limits and the minimum rate of one exchange with an upstream."""

    connect: PositiveDuration = 5.0
    """Longest time to connect, TLS included."""
    headers: PositiveDuration = 15.0
    """Longest time until the response headers are complete. For blobs, see first_byte."""
    first_byte: PositiveDuration = 90.0
    """
    Longest time until the response headers of a blob are complete. An upstream that is a cache
    itself may fetch the whole blob first.
    """
    idle: PositiveDuration = 30.0
    """Longest time in which a body receives no data."""
    min_rate: Size = 1024
    """
    Minimum rate of a body, in bytes per second over the time of idle.
    A slower body is given up and resumed.
    """


class Parallel(Section):
    """Several connections for one blob, each of which fetches a part."""

    connections: Annotated[int, Field(ge=1, le=4)] = 4
    """
    Most connections for one blob. Further ones are opened only while they make the fetch faster,
    and the upstream does not refuse them. 1: a blob is fetched by one connection, and a client that
    wants a part of it waits until the fetch has reached that part.
    """
    part: Annotated[Size, AfterValidator(values.check_part)] = 8 * 2**20
    """
    Usual bytes of one range request, from 64KiB to 8MiB. Requests are larger if responses take long
    or no other connection is possible, and smaller near the end of a blob. A blob that has fewer
    than 16 such parts gets smaller ones, of at least 4MiB. A blob of at most four parts is fetched
    by one connection.
    """
