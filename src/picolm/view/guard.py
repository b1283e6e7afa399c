"""What stands before the routes: the token in the path, the Host and Origin of a request, limits of bodies, headers of answers.

A page of somebody else in the same browser can send requests to this address. It knows no token, and its Origin is another one;
a name of somebody else that leads here (DNS rebinding) is another Host.
"""

import asyncio
import ipaddress
import secrets
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from picolm.view.refusal import Refused

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
BODY_BYTES = 2**20
SLOWEST_S = 30.0  # to receive a body


class Guard:
    """An ASGI application that lets through what has the token and comes from its own page."""

    def __init__(self, app: ASGIApp, token: str, hosts: Iterable[str], port: int, any_address: bool = False):
        """hosts: names that may stand in the Host of a request. any_address: also any IP address."""
        self.app, self.token, self.hosts, self.port, self.any_address = app, token, set(hosts), port, any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            inner = self._admit(scope)
        except Refused as error:
            await PlainTextResponse(f"{error}\n", error.status)(scope, receive, send_guarded)
            return
        if inner["path"] == "":
            await RedirectResponse(f"/{self.token}/")(scope, receive, send_guarded)
            return
        await self.app(inner, receive, send_guarded)

    def _admit(self, scope: Scope) -> Scope:
        """Return the scope of a request without the token in its path. Raises Refused for one that is not of the page."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_own(host):
            raise Refused(
                f"This address is not known here. Open the one that pico view printed (port {self.port}); if the port is "
                "forwarded, use the same number on both sides.",
                403,
            )
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            raise Refused("This request comes from another page.", 403)
        first, slash, rest = scope["path"].removeprefix("/").partition("/")
        if not secrets.compare_digest(first.encode(errors="replace"), self.token.encode()):
            raise Refused(
                "There is no such page. Open the whole address that pico view printed; its end is a key.", 404
            )
        return {**scope, "path": f"{slash}{rest}", "raw_path": f"{slash}{rest}".encode(), "root_path": ""}

    def _is_own(self, host: str) -> bool:
        name, _, port = host.rpartition(":")
        if port != str(self.port):
            return False
        if name.lower() in self.hosts:
            return True
        try:
            return self.any_address and bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return False


def hosts_of(host: str, remote: bool) -> set[str]:
    """Return the names that may stand in the Host of a request to a server that is bound to `host`."""
    own = {"localhost", "127.0.0.1", "[::1]", host.lower()}
    return own | ({socket.gethostname().lower(), socket.getfqdn().lower()} if remote else set())


async def body_of(request: Request, most_bytes: int = BODY_BYTES) -> bytes:
    """Return the body of a request. Raises Refused for one that is too large, or takes too long."""
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > most_bytes:
        raise Refused(f"the request has more than {most_bytes} bytes", 413)
    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(SLOWEST_S):
            async for part in request.stream():
                size += len(part)
                if size > most_bytes:
                    raise Refused(f"the request has more than {most_bytes} bytes", 413)
                parts.append(part)
    except TimeoutError:
        raise Refused(f"the request was not complete after {SLOWEST_S:.0f} s", 408) from None
    return b"".join(parts)


def failure(error: Exception, status: int) -> JSONResponse:
    """Return an error as an answer."""
    return JSONResponse({"error": str(error)}, status)
