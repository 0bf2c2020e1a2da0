"""Serves the page by uvicorn, from a temporary folder, to this machine alone unless asked otherwise."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

from fastperc.errors import InputError
from fastperc.progress import say, silent
from fastperc.web.camera import Camera, Live, LiveOptions
from fastperc.web.limits import Limits
from fastperc.web.studio import Networks, Studio

MIB = 1 << 20  # bytes
FEW_BYTES = MIB  # of a request that is no upload
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
POLL = 0.02  # seconds between two looks at whether the camera's picture is new
PATIENCE = 2  # seconds that open connections get at the end
CSS = Path(__file__).with_name("page.css")
UPLOAD = "/gradio_api/upload"
POLICY = (  # the browser then asks no other server for anything
    b"content-security-policy",
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'",
)
ENVIRONMENT = {  # read by Gradio and what it imports
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_MCP_SERVER": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}


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


class LiveSource(NamedTuple):
    """A camera, and how its picture is painted."""

    device: str  # see :func:`fastperc.web.camera.device_address`
    options: LiveOptions


def import_gradio() -> Any:
    """The module ``gradio``, which sends nothing anywhere.

    Raises:
        InputError: it is not installed.
    """
    os.environ.update(ENVIRONMENT)
    try:
        import gradio
    except ImportError:
        raise InputError("the web page needs Gradio; run `pip install 'fastperc[web]'`") from None
    return gradio


def bound(address: Address) -> socket.socket:
    """A socket at ``address``.

    Raises:
        InputError: there is no such address here, or another program uses the port.
    """
    try:
        family = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {address.port} of {address.host} is in use; choose another by --port") from None
        reason = error.strerror or str(error)
        raise InputError(f"cannot serve at {address.host}, port {address.port} ({reason})") from None


class Guard:
    """An ASGI application in front of another: refuses large requests and what does not come from the page.

    A page of another site could make its name point to this machine, and then read what this one serves; so where only
    this machine is served, only its own names are. Gradio would fetch other servers' files for a browser; it may not.

    Args:
        app: serves what is not refused.
        address: where.
        limits: of uploads.
    """

    def __init__(self, app: Any, address: Address, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self.names = LOCAL_NAMES | {address.host} if address.is_local() else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        most = self.limits.megabytes * MIB + FEW_BYTES if scope["path"] == UPLOAD else FEW_BYTES
        length = headers.get(b"content-length", b"0").decode("latin1")
        if self.names is not None and _name(headers.get(b"host", b"").decode("latin1")) not in self.names:
            await _refuse(send, 421, "this page is served to this machine alone")
        elif "://" in scope["path"] or ":/" in scope["path"]:
            await _refuse(send, 404, "no address here")
        elif not length.isdecimal() or int(length) > most or b"transfer-encoding" in headers:
            await _refuse(send, 413, f"larger than {self.limits.megabytes} MB")
        else:

            async def send_with_policy(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", ()), POLICY]
                await send(message)

            await self.app(scope, receive, send_with_policy)


def _name(host: str) -> str:
    """The name in a ``Host`` header, without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


async def _refuse(send: Any, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})


async def live_parts(live: Live, disconnected: Any) -> AsyncIterator[bytes]:
    """The parts of a ``multipart/x-mixed-replace`` answer: a JPEG whenever the camera's picture is new."""
    shown = 0
    with live.watched():
        while not live.over and not await disconnected():
            if live.number == shown:
                await asyncio.sleep(POLL)
                continue
            shown, picture = live.number, live.picture
            yield (
                b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture) + picture + b"\r\n"
            )


def application(studio: Studio, live: Live | None, address: Address, selected: str | None) -> Any:
    """The ASGI application: the page, and the stream of the camera at ``/live``.

    Raises:
        InputError: Gradio is not installed, or the file of a style cannot be read.
    """
    gr = import_gradio()
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse

    from fastperc.web.tabs import build

    app = FastAPI(openapi_url=None)
    if live is not None:

        async def stream(request: Request) -> StreamingResponse:
            parts = live_parts(live, request.is_disconnected)
            return StreamingResponse(parts, media_type="multipart/x-mixed-replace; boundary=frame")

        stream.__annotations__["request"] = Request  # FastAPI looks for the name among the module's
        app.add_api_route("/live", stream, response_class=StreamingResponse, response_model=None)
    gr.mount_gradio_app(
        app,
        build(studio, live, selected),
        path="/",
        server_name=address.host,
        server_port=address.port,
        max_file_size=studio.limits.megabytes * MIB,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        theme=theme(gr),
        css_paths=[CSS],
    )
    return Guard(app, address, studio.limits)


def theme(gr: Any) -> Any:
    """The page's colours and fonts; the fonts are those of the system, so that none is fetched."""
    fonts: dict[str, Any] = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", **fonts).set(
        block_title_background_fill="none",
        block_title_text_color="*body_text_color",
        block_title_text_weight="500",
        block_title_padding="0",
        block_label_background_fill="*background_fill_primary",
        block_label_text_color="*body_text_color",
        block_label_text_weight="500",
        block_border_width="1px",
        block_border_color="*neutral_200",
        body_background_fill="*neutral_50",
    )


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for uploads and results, which Gradio uses too. It is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="fastperc-web-", ignore_cleanup_errors=True) as name:
        before = os.environ.get("GRADIO_TEMP_DIR")
        folder = Path(name).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
        try:
            yield folder
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


@contextmanager
def prepared(
    networks: Networks, address: Address, limits: Limits, source: LiveSource | None = None, selected: str | None = None
) -> Iterator[tuple[Any, socket.socket]]:
    """Yields a uvicorn server of the page and its socket, ready for ``server.run(sockets=[socket])``.

    Args:
        networks: that the page offers.
        address: where it is served.
        limits: see :class:`Limits`.
        source: a camera. Default: none.
        selected: the style that is chosen at first. Default: the first.

    Raises:
        InputError: the port is in use, Gradio is not installed, or the camera or a file cannot be opened.
    """
    import_gradio()
    import uvicorn

    with ExitStack() as stack:
        listener = stack.enter_context(bound(address))
        address = address._replace(port=listener.getsockname()[1])
        studio = Studio(networks, stack.enter_context(temporary_folder()), limits)
        stack.callback(studio.close)
        live = None
        if source is not None:
            live = stack.enter_context(Live(Camera(source.device), studio, source.options))
        app = application(studio, live, address, selected)
        config = uvicorn.Config(
            app, log_level="critical", access_log=False, ws="none", timeout_graceful_shutdown=PATIENCE
        )
        server = uvicorn.Server(config)
        server.config.load()
        yield server, listener


def serve(
    networks: Networks, address: Address, limits: Limits, source: LiveSource | None = None, selected: str | None = None
) -> None:
    """Serves the page until Ctrl-C. Arguments and errors are those of :func:`prepared`.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    with prepared(networks, address, limits, source, selected) as (server, listener):
        say(f"{address._replace(port=listener.getsockname()[1]).url()} shows the page; Ctrl-C stops it")
        with silent():  # what is said of an upload is for the person in the browser
            server.run(sockets=[listener])
