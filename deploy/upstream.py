"""The gate's connections to the SuperLink, on asyncio's own streams: httpx's read a TLS record at a time."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field

import h11
import httpx

PIECE = 1 << 18  # bytes read at once
CONNECT = 2.0  # seconds
EXPIRY = 2.0  # seconds a silent connection is used again; the SuperLink closes it after 5


@dataclass
class Link:
    """A connection, and what HTTP says of it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    patience: float
    http: h11.Connection = field(default_factory=lambda: h11.Connection(h11.CLIENT))
    since: float = 0.0

    async def send(self, event: h11.Request | h11.Data | h11.EndOfMessage) -> None:
        self.writer.write(self.http.send(event) or b"")
        async with asyncio.timeout(self.patience):
            await self.writer.drain()

    async def next(self) -> object:
        """The next event of the answer."""
        while (event := self.http.next_event()) is h11.NEED_DATA:
            async with asyncio.timeout(self.patience):
                self.http.receive_data(await self.reader.read(PIECE))
        return event

    @property
    def fresh(self) -> bool:
        return time.monotonic() - self.since < EXPIRY and not (self.reader.at_eof() or self.writer.is_closing())


@dataclass
class Upstream(httpx.AsyncBaseTransport):
    """To one server; without a context the connection is not encrypted. `patience`: seconds without a byte."""

    host: str
    port: int
    context: ssl.SSLContext | None
    patience: float
    idle: list[Link] = field(default_factory=list)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        link = await self._link()
        try:
            target = request.url.raw_path
            await link.send(h11.Request(method=request.method.encode(), target=target, headers=request.headers.raw))
            assert isinstance(request.stream, AsyncIterable)
            async for part in request.stream:
                await link.send(h11.Data(data=part))
            await link.send(h11.EndOfMessage())
            while isinstance(event := await link.next(), h11.InformationalResponse):
                pass
            if not isinstance(event, h11.Response):
                raise httpx.RemoteProtocolError("the connection ended before an answer")
        except BaseException as error:
            link.writer.close()
            raise _said(error) from None
        return httpx.Response(event.status_code, headers=event.headers.raw_items(), stream=_Body(link, self.idle))

    async def _link(self) -> Link:
        while self.idle:
            if (link := self.idle.pop()).fresh:
                return link
            link.writer.close()
        name = self.host if self.context else None
        try:
            async with asyncio.timeout(CONNECT):
                opened = await asyncio.open_connection(
                    self.host, self.port, ssl=self.context, server_hostname=name, limit=PIECE
                )
        except (OSError, TimeoutError) as error:
            raise httpx.ConnectError(str(error)) from None
        return Link(*opened, self.patience)

    async def aclose(self) -> None:
        while self.idle:
            self.idle.pop().writer.close()


@dataclass
class _Body(httpx.AsyncByteStream):
    link: Link
    idle: list[Link]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while isinstance(event := await self.link.next(), h11.Data):
                yield bytes(event.data)
        except Exception as error:
            raise _said(error) from None

    async def aclose(self) -> None:
        with suppress(h11.LocalProtocolError):
            self.link.http.start_next_cycle()  # unless there is more of it
            self.link.since = time.monotonic()
            self.idle.append(self.link)
            while self.idle and not self.idle[0].fresh:
                self.idle.pop(0).writer.close()
            return
        self.link.writer.close()


def _said(error: BaseException) -> BaseException:
    """As httpx would have said it."""
    if isinstance(error, TimeoutError):
        return httpx.ReadTimeout(str(error))
    if isinstance(error, (OSError, h11.ProtocolError)):
        return httpx.ReadError(str(error))
    return error
