"""Connections that are kept and read in large pieces: httpx takes a body through Python one TLS record at a time."""

from __future__ import annotations

import http.client
import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import httpx


@dataclass
class Connections(httpx.BaseTransport):
    """To one server, for several threads. `kept`: seconds that a silent connection is used again.

    Without a context nothing is encrypted. Errors are httpx's.
    """

    context: ssl.SSLContext | None
    kept: float
    _idle: list[tuple[http.client.HTTPConnection, float]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        patience = request.extensions.get("timeout", {}).get("read")
        link = self._link(request.url, patience)
        try:
            link.putrequest(request.method, request.url.raw_path.decode(), skip_host=True, skip_accept_encoding=True)
            for key, value in request.headers.raw:
                link.putheader(key, value)
            with suppress(ConnectionError, ssl.SSLError):  # it may have answered before it had all
                link.endheaders(request.read())
            answer = link.getresponse()
            content = answer.read()
        except TimeoutError:
            link.close()
            raise httpx.ReadTimeout(f"no answer in {patience} s") from None
        except OSError:  # what TLS says of it, Flower takes for a wrong certificate
            link.close()
            raise httpx.ReadError("the connection broke") from None
        except http.client.HTTPException as error:
            link.close()
            raise httpx.RemoteProtocolError(f"{type(error).__name__}: {error}") from None
        except BaseException:
            link.close()
            raise
        if answer.will_close:
            link.close()
        else:
            with self._lock:
                self._idle.append((link, time.monotonic()))
        return httpx.Response(answer.status, headers=answer.getheaders(), content=content)

    def _link(self, url: httpx.URL, patience: float | None) -> http.client.HTTPConnection:
        """The connection that was used last, if it lives; else a new one."""
        while True:
            with self._lock:
                link, since = self._idle.pop() if self._idle else (None, 0.0)
            if link is None:
                break
            if time.monotonic() - since < self.kept and not _readable(link.sock):
                link.sock.settimeout(patience)
                return link
            link.close()
        if self.context is None:
            link = http.client.HTTPConnection(url.host, url.port, timeout=patience)
        else:
            link = http.client.HTTPSConnection(url.host, url.port, timeout=patience, context=self.context)
        try:
            link.connect()
        except OSError as error:
            link.close()
            raise httpx.ConnectError(str(error)) from None
        return link

    def close(self) -> None:
        with self._lock:
            for link, _ in self._idle:
                link.close()
            self._idle.clear()


def _readable(link: socket.socket) -> bool:
    """A silent connection that has something to read has ended."""
    look = select.poll()  # select() knows no numbers from 1024 on
    look.register(link, select.POLLIN)
    return bool(look.poll(0))
