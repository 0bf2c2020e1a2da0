"""What stands between the network and Gradio: it refuses requests that do not come from the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fastperc.web.studio import Studio

MIB = 1 << 20  # bytes
FEW_BYTES = MIB  # of a request that is no upload
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
UPLOAD = "/gradio_api/upload"
POLICY = (  # the browser then asks no other server for anything
    b"content-security-policy",
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'",
)


class Address(NamedTuple):
    """Where the page is served."""

    host: str = "127.0.0.1"
    port: int = 7860  # 0: any that is free

    def url(self) -> str:
        """The page's address for a browser on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False


class Refusal(NamedTuple):
    """Why a request is refused."""

    status: int  # of HTTP
    reason: str


class Guard:
    """An ASGI application in front of another.

    - Where only this machine is served, only its own names are: a page of another site could have its name point here,
      and read what is served.
    - Only the page itself may send anything: a page of another site could fill the disk.
    - Requests have a largest size.
    - A file that a request names must be an upload: Gradio would download an address.
    - The browser is told to ask no other server for anything.

    Args:
        app: serves what is not refused.
        address: where.
        studio: its folder holds the uploads.
    """

    def __init__(self, app: Any, address: Address, studio: Studio) -> None:
        self.app, self.studio = app, studio
        self.names = LOCAL_NAMES | {address.host} if address.is_local() else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves a request, or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), POLICY]
            await send(message)

        refusal = self.why_not(scope)
        if refusal is None and scope["method"] not in ("GET", "HEAD") and scope["path"] != UPLOAD:
            body = await whole_body(receive)
            if body is None:
                return
            refusal, receive = self.why_not_body(body), again(body, receive)
        if refusal is None:
            await self.app(scope, receive, send_with_policy)
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": refusal.reason.encode()})

    def why_not(self, scope: Any) -> Refusal | None:
        """Why the head of a request is refused, or None."""
        headers = {name: value.decode("latin1") for name, value in scope["headers"]}
        if self.names is not None and _name(headers.get(b"host", "")) not in self.names:
            return Refusal(421, "this page is served to this machine alone")
        sends = scope["method"] not in ("GET", "HEAD")
        if sends and _is_of_another_site(headers):
            return Refusal(403, "only the page itself may send anything")
        if ":/" in scope["path"]:  # of a file on another server
            return Refusal(404, "no addresses here")
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or b"transfer-encoding" in headers:
            return Refusal(411, "a request must say its length")
        megabytes = self.studio.limits.megabytes if scope["path"] == UPLOAD else 0
        if int(length) > megabytes * MIB + FEW_BYTES:
            return Refusal(413, f"larger than {megabytes or FEW_BYTES // MIB} MB")
        return None

    def why_not_body(self, body: bytes) -> Refusal | None:
        """Why the body of a request is refused, or None: it must be JSON in which all files are uploads."""
        try:
            files = list(paths_in(json.loads(body or b"null")))
            if all(Path(path).resolve().is_relative_to(self.studio.folder) for path in files):
                return None
            return Refusal(403, "only uploads are painted")
        except (ValueError, RecursionError, OSError):  # not JSON, too deep, or no path
            return Refusal(400, "not a request of the page")


def paths_in(content: Any) -> Iterator[str]:
    """All that is called ``path`` in parsed JSON."""
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if isinstance(item.get("path"), str):
                yield item["path"]
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


async def whole_body(receive: Any) -> bytes | None:
    """The body of a request, whose size was checked; None if the browser is gone."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def again(body: bytes, receive: Any) -> Any:
    """A ``receive`` of ASGI that gives ``body`` and then what ``receive`` does."""
    given = False

    async def receive_again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _is_of_another_site(headers: Mapping[bytes, str]) -> bool:
    """Whether a browser says that a page of another site, or of another port, sends this request."""
    if (site := headers.get(b"sec-fetch-site")) is not None:
        return site not in ("same-origin", "none")
    origin = headers.get(b"origin")
    return origin is not None and urlsplit(origin).netloc != headers.get(b"host")


def _name(host: str) -> str:
    """The name in a ``Host`` header, without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
