"""Serves the page by uvicorn, from a temporary folder, to this machine alone unless asked otherwise."""

from __future__ import annotations

import asyncio
import atexit
import errno
import os
import signal
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastperc.errors import InputError
from fastperc.progress import say, silent
from fastperc.web.camera import Camera, Live, LiveOptions
from fastperc.web.guard import MIB, Address, Guard
from fastperc.web.limits import Limits
from fastperc.web.studio import UPLOADS, Networks, Studio

POLL = 0.02  # seconds between two looks at whether the camera's picture is new
PATIENCE = 2  # seconds that open connections, and pictures that are being painted, get at the end
LOOK = 0.5  # seconds between two looks at whether the server has ended
CSS = Path(__file__).with_name("page.css")
ENVIRONMENT = {  # read by Gradio and what it imports
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_VIBE_MODE": "",  # in which a browser may change the page's code
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}


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
    listener = None
    try:
        options = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, place = options[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # a port that was in use a moment ago; on Windows this would take the port from another
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen()
        return listener
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {address.port} of {address.host} is in use; choose another by --port") from None
        reason = error.strerror or str(error)
        raise InputError(f"cannot serve at {address.host}, port {address.port} ({reason})") from None


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
    page = build(studio, live, selected)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=address.host,
        server_port=address.port,
        max_file_size=studio.limits.megabytes * MIB,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        run_history=False,
        theme=theme(gr),
        css_paths=[CSS],
    )
    page.has_launched = True  # which has Gradio check where files are; mounting alone does not
    return Guard(app, address, studio)


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
        os.environ["GRADIO_TEMP_DIR"] = str(folder / UPLOADS)
        try:
            yield folder
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


class Site(NamedTuple):
    """The page, ready to be served."""

    server: Any  # uvicorn's
    listener: socket.socket
    studio: Studio


@contextmanager
def prepared(
    networks: Networks, address: Address, limits: Limits, source: LiveSource | None = None, selected: str | None = None
) -> Iterator[Site]:
    """Yields the page, ready to be served while the block runs.

    Args:
        networks: that the page offers.
        address: where it is served.
        limits: see :class:`Limits`.
        source: a camera. Default: none.
        selected: the style that is chosen at first. Default: the first.

    Raises:
        InputError: the port is in use, Gradio is not installed, or the camera or a file cannot be opened.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(bound(address))
        address = address._replace(port=listener.getsockname()[1])
        studio = Studio(networks, stack.enter_context(temporary_folder()), limits)
        import_gradio()  # which looks for the folder in the environment
        import uvicorn

        stack.callback(studio.close)
        live = None
        if source is not None:
            live = stack.enter_context(Live(Camera(source.device), studio, source.options))
        app = application(studio, live, address, selected)
        config = uvicorn.Config(
            app, log_level="critical", access_log=False, ws="none", timeout_graceful_shutdown=PATIENCE
        )
        yield Site(uvicorn.Server(config), listener, studio)


def server_thread(site: Site) -> threading.Thread:
    """The thread that serves a page, not started yet.

    It is a daemon, and so are those in which Gradio runs the work: the end need not wait for a large picture.
    """

    def run() -> None:
        try:
            site.server.run(sockets=[site.listener])
        except BaseException:
            if not site.server.should_exit:  # what a connection says that is cut off at the end helps nobody
                raise

    return threading.Thread(target=run, name="fastperc-web", daemon=True)


@contextmanager
def running(site: Site, thread: threading.Thread) -> Iterator[None]:
    """Serves a page in ``thread``, that of :func:`server_thread`, while the block runs."""
    thread.start()
    try:
        yield
    finally:
        site.studio.close()
        site.server.should_exit = True
        thread.join(2 * PATIENCE)


def serve(
    networks: Networks, address: Address, limits: Limits, source: LiveSource | None = None, selected: str | None = None
) -> None:
    """Serves the page until Ctrl-C. Arguments and errors are those of :func:`prepared`.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    with prepared(networks, address, limits, source, selected) as site:
        say(f"{address._replace(port=site.listener.getsockname()[1]).url()} shows the page; Ctrl-C stops it")
        thread = server_thread(site)
        try:
            # What is said of an upload is for the person in the browser.
            with silent(), running(site, thread):
                while thread.is_alive():
                    thread.join(LOOK)  # on Windows, Ctrl-C does not end one that has no limit
        except KeyboardInterrupt as stop:
            # A thread that still runs would not bear that the process tidies up.
            if thread.is_alive() or not site.studio.close(PATIENCE):
                atexit.register(os._exit, 128 + getattr(stop, "number", signal.SIGINT))
            raise
