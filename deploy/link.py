"""The link test: a small TCP service that swallows, sends and echoes bytes, and the measurement a device makes with it.

A connection is one request of eight bytes, `REQUEST`: what, and how many bytes. Then bytes that mean nothing flow:
"down" to the device; "up" to the server, which answers one byte for every whole block; "echo" both ways, one by one.
"""

from __future__ import annotations

import asyncio
import os
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from struct import Struct

REQUEST = Struct("!3scI")
MAGIC = b"PFL"
PORT = 8090
BLOCK = 1 << 14  # bytes
LARGEST = 1 << 26  # bytes of a connection
LONGEST = 30.0  # seconds of a connection
CONNECTIONS = 8  # at once
ECHOES = 64  # of a connection

Say = Callable[[str], None]


@dataclass(frozen=True)
class Link:
    """Bytes per second; `latency` in seconds, one way: half of the round trip."""

    down: float
    up: float
    latency: float


def address(text: str, port: int = PORT) -> tuple[str, int]:
    """HOST:PORT, HOST or [IPv6]:PORT. Raises ValueError."""
    host, sign, number = text.rpartition(":") if text.count(":") == 1 or "]:" in text else (text, "", "")
    if not host.strip("[]") or (sign and not (number.isascii() and number.isdigit() and 0 < int(number) < 2**16)):
        raise ValueError(f"an address is HOST:PORT, got {text!r}")
    return host.strip("[]"), int(number or port)


def serve(host: str, port: int, minutes: float, say: Say = print) -> None:
    """Answer link tests for so many minutes. Raises OSError when the address can not be had."""
    asyncio.run(_serve(host, port, 60 * minutes, say))


def measure(host: str, port: int, seconds: float = 3.0, runs: int = 3) -> Link:
    """The link to a `serve`: medians of `runs`, each some `seconds` long. Raises ValueError when there is none."""
    try:
        return asyncio.run(_measure(host, port, seconds, runs))
    except (OSError, EOFError, TimeoutError) as error:
        why = "it stopped answering" if isinstance(error, EOFError | TimeoutError) else "no connection"
        raise ValueError(f"link test with {host}:{port}: {why}; is `prfl devices link` running there?") from None


async def _serve(host: str, port: int, seconds: float, say: Say) -> None:
    at_work = 0

    async def accept(reader: StreamReader, writer: StreamWriter) -> None:
        nonlocal at_work
        at_work += 1
        try:
            async with asyncio.timeout(LONGEST):
                if at_work <= CONNECTIONS:
                    say(f"{writer.get_extra_info('peername')[0]}: {await _answer(reader, writer)}")
        except (OSError, EOFError, TimeoutError):
            pass  # whoever it was does not wait for an answer
        finally:
            at_work -= 1
            writer.transport.abort()

    server = await asyncio.start_server(accept, host, port, limit=BLOCK)
    async with server:
        say(f"link test on {host}:{server.sockets[0].getsockname()[1]} for {seconds / 60:g} minutes; Ctrl-C ends it")
        await asyncio.sleep(seconds)


async def _answer(reader: StreamReader, writer: StreamWriter) -> str:
    """One connection, in words for the log."""
    magic, what, size = REQUEST.unpack(await reader.readexactly(REQUEST.size))
    most = ECHOES if what == b"e" else LARGEST
    if magic != MAGIC or what not in (b"d", b"u", b"e") or not 0 < size <= most:
        return "refused"
    if what == b"d":
        await _send(writer, size)
    elif what == b"u":
        await _receive(reader, size, partial(_acknowledge, writer))
    else:
        for _ in range(size):
            writer.write(await reader.readexactly(1))
    writer.write_eof()
    while await reader.read(BLOCK):  # the device closes first, when it has everything
        pass
    return f"{size} {'echoes' if what == b'e' else 'bytes down' if what == b'd' else 'bytes up'}"


async def _measure(host: str, port: int, seconds: float, runs: int) -> Link:
    rates = []
    for what in (b"d", b"u"):
        flow = _down if what == b"d" else _up
        size, rate = 8 * BLOCK, 0.0
        while size < LARGEST:  # find the size that takes a quarter of the time
            rate = await _rate(host, port, what, size, flow)
            if size >= rate * seconds / 4:
                break
            size = min(LARGEST, 4 * size)
        size = min(LARGEST, max(8 * BLOCK, int(rate * seconds) // BLOCK * BLOCK))
        rates.append(median([await _rate(host, port, what, size, flow) for _ in range(runs)]))
    trips = await _ask(host, port, b"e", ECHOES // 2, _echoes)
    return Link(rates[0], rates[1], median(trips[1:]) / 2)


Flow = Callable[[StreamReader, StreamWriter, int], Awaitable[list[float]]]


async def _rate(host: str, port: int, what: bytes, size: int, flow: Flow) -> float:
    """Bytes per second after the first quarter, in which windows grow and buckets empty."""
    times = await _ask(host, port, what, size, flow)
    first = len(times) // 4
    return (len(times) - 1 - first) * BLOCK / max(times[-1] - times[first], 1e-6)


async def _ask(host: str, port: int, what: bytes, size: int, flow: Flow) -> list[float]:
    async with asyncio.timeout(LONGEST):
        reader, writer = await asyncio.open_connection(host, port, limit=BLOCK)
        try:
            writer.write(REQUEST.pack(MAGIC, what, size))
            return await flow(reader, writer, size)
        finally:
            writer.transport.abort()


async def _down(reader: StreamReader, writer: StreamWriter, size: int) -> list[float]:
    """When every block had come."""
    times: list[float] = []
    await _receive(reader, size, lambda: times.append(time.perf_counter()))
    return times


async def _up(reader: StreamReader, writer: StreamWriter, size: int) -> list[float]:
    """When the server had every block."""
    sending = asyncio.create_task(_send(writer, size))
    times = []
    try:
        for _ in range(size // BLOCK):
            await reader.readexactly(1)
            times.append(time.perf_counter())
    finally:
        sending.cancel()
    return times


async def _echoes(reader: StreamReader, writer: StreamWriter, size: int) -> list[float]:
    """Seconds of every round trip."""
    trips = []
    for _ in range(size):
        start = time.perf_counter()
        writer.write(b"x")
        await reader.readexactly(1)
        trips.append(time.perf_counter() - start)
    return trips


async def _send(writer: StreamWriter, size: int) -> None:
    block = os.urandom(BLOCK)  # nothing on the way can make it smaller
    for start in range(0, size, BLOCK):
        writer.write(block[: size - start])
        await writer.drain()


async def _receive(reader: StreamReader, size: int, block: Callable[[], object]) -> None:
    """Swallow so many bytes; call `block` for every whole one of them."""
    got = 0
    while got < size:
        data = await reader.read(min(BLOCK, size - got))
        if not data:
            raise EOFError
        for _ in range((got + len(data)) // BLOCK - got // BLOCK):
            block()
        got += len(data)


def _acknowledge(writer: StreamWriter) -> None:
    writer.write(b"x")
