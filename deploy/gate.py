"""The gate: what the nodes' network sees of the SuperLink, its Fleet API and nothing else.

It ends TLS with the server's certificate and passes requests on to the SuperLink on loopback, over TLS checked with our
own CA. Only known paths and headers go through, bodies are streamed both ways, and a SuperLink that is down is a 503,
on which SuperNodes try again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import httpx
import uvicorn

from deploy.upstream import Upstream

FLEET = (
    "activate-node", "confirm-message-received", "deactivate-node", "get-fab", "get-run", "pull-messages",
    "pull-object", "push-messages", "push-object", "register-node", "send-node-heartbeat", "unregister-node",
)  # fmt: skip
PASSED = {("POST", f"/v1/fleet/{name}") for name in FLEET} | {("GET", "/health")}
REQUEST = (b"accept", b"accept-encoding", b"content-length", b"content-type")
RESPONSE = (b"content-encoding", b"content-length", b"content-type")
FLOWER = b"flwr-"  # node authentication and version of Flower
BODY = 20 << 20  # bytes: a piece of an array and what is around it
HEADERS = 1 << 14  # bytes
CONNECTIONS = 512
PATIENCE = 30.0  # seconds without a byte
KEPT = 30  # seconds that a silent connection is kept: longer than a node keeps it
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

log = logging.getLogger("uvicorn.error")


class TooLarge(Exception):
    """A body beyond the limit."""


class Gone(Exception):
    """A node that left in the middle, or fell silent."""


def gate(superlink: httpx.AsyncClient, body: int = BODY) -> App:
    """The ASGI app. `body`: largest request, in bytes."""
    away = False

    def note(error: Exception | None) -> None:
        nonlocal away
        if away != (error is not None):
            away = not away
            log.warning("the SuperLink %s", f"is away: {type(error).__name__}" if away else "answers again")

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) not in PASSED:
            if scope["type"] == "http":
                log.warning("refused %s %s of %s", scope["method"][:9], ascii(scope["path"][:99]), scope["client"][0])
                await _say(send, 404)
            return
        if sum(len(k) + len(v) for k, v in scope["headers"]) > HEADERS:
            await _say(send, 431)
            return
        headers = _some(scope["headers"], REQUEST)
        length = dict(headers).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > body:
            await _say(send, 413)
            return
        try:
            first = await _next(receive)
            more = first.get("more_body", False)
            content = _stream(first, receive, body) if more else first.get("body", b"")
            request = superlink.build_request(scope["method"], scope["path"], headers=headers, content=content)
            answer = await superlink.send(request, stream=True)
        except TooLarge:
            await _say(send, 413)
        except Gone:
            pass
        except httpx.ReadTimeout:
            await _say(send, 504)
        except httpx.TransportError as error:
            note(error)
            await _say(send, 503)
        else:
            note(None)
            await _pass(answer, send)

    return app


async def _pass(answer: httpx.Response, send: Send) -> None:
    """The SuperLink's answer; when it breaks off, so does ours: nobody takes a part for the whole."""
    try:
        headers = _some(answer.headers.raw, RESPONSE)
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        async for part in answer.aiter_raw():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})
    finally:
        await answer.aclose()


async def _say(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


def _some(headers: Headers, known: tuple[bytes, ...]) -> Headers:
    return [(k, v) for k, v in ((k.lower(), v) for k, v in headers) if k in known or k.startswith(FLOWER)]


async def _stream(first: Message, receive: Receive, limit: int) -> AsyncIterator[bytes]:
    message, size = first, 0
    while True:
        size += len(message.get("body", b""))
        if size > limit:
            raise TooLarge
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return
        message = await _next(receive)


async def _next(receive: Receive) -> Message:
    try:
        message = await asyncio.wait_for(receive(), PATIENCE)
    except TimeoutError:
        raise Gone from None
    if message["type"] == "http.disconnect":
        raise Gone
    return message


def serve(host: str, port: int, superlink: str, certificate: str, key: str, ca: str) -> None:
    """Until SIGINT or SIGTERM. `superlink`: host:port. Empty paths: no TLS on either side."""
    verify = ssl.create_default_context(cafile=ca) if ca else None
    name, _, number = superlink.rpartition(":")
    transport = Upstream(name, int(number), verify, PATIENCE)
    client = httpx.AsyncClient(base_url=f"{'https' if ca else 'http'}://{superlink}", transport=transport)
    client.headers.clear()
    config = uvicorn.Config(
        gate(client), host=host, port=port, http="h11", lifespan="off", access_log=False, server_header=False,
        limit_concurrency=CONNECTIONS, h11_max_incomplete_event_size=HEADERS,
        timeout_keep_alive=KEPT, timeout_graceful_shutdown=3, ssl_certfile=certificate or None,
        ssl_keyfile=key or None, ssl_ciphers=CIPHERS, log_config=None, log_level="warning",
    )  # fmt: skip
    uvicorn.Server(config).run()  # on uvloop, where it is installed


def main() -> None:
    """`python -m deploy.gate HOST PORT SUPERLINK [CERTIFICATE KEY CA]`; the server starts it."""
    parser = argparse.ArgumentParser(prog="deploy.gate")
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("superlink")
    parser.add_argument("tls", nargs="*", default=["", "", ""], metavar="CERTIFICATE KEY CA")
    given = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * CONNECTIONS)), hard))  # two a request
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    serve(given.host, given.port, given.superlink, *given.tls)


if __name__ == "__main__":
    main()
