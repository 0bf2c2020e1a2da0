"""The server of the web page without a browser: what it refuses, its queue, a camera, and the command."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import pixels
from PIL import Image
from web_server import CAMERA, needs, networks_for_tests, served

from fastperc.web.camera import Camera, Live, LiveOptions, device_address
from fastperc.web.guard import Address
from fastperc.web.limits import Limits
from fastperc.web.server import LiveSource, prepared
from fastperc.web.studio import Studio, StyleOptions

needs("gradio")
needs("av")
WAVE = StyleOptions("great_wave")


@pytest.fixture(scope="module")
def networks():
    return networks_for_tests()


@pytest.fixture
def studio(networks, tmp_path):
    return Studio(networks, tmp_path / "studio", Limits())


@pytest.fixture(scope="module")
def server(networks):
    with served(networks, Limits(megabytes=1, waiting=2)) as url:
        yield url


def asked(url, path, method="GET", headers=(), body=None):
    """The status of an answer, and its headers by names in lower case."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, dict(headers))
    answer = connection.getresponse()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}


def test_the_page_is_served_to_its_own_names_only(server):
    status, headers = asked(server, "/")
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    assert asked(server, "/", headers={"Host": "localhost:1"})[0] == 200
    assert asked(server, "/", headers={"Host": "[::1]:1"})[0] == 200
    assert asked(server, "/", headers={"Host": "example.com"})[0] == 421


@pytest.mark.parametrize("path", ["/gradio_api/file=http://127.0.0.1/", "/gradio_api/file=https%3A%2F%2Fexample.com"])
def test_nothing_is_fetched_for_a_browser(server, path):
    assert asked(server, path)[0] == 404


def test_files_of_the_machine_are_not_served(server):
    for path in ("/etc/passwd", __file__, os.path.join(os.environ["GRADIO_TEMP_DIR"], "..", "x")):
        assert asked(server, f"/gradio_api/file={path}")[0] in (403, 404)


def test_large_requests_are_refused(server):
    boundary = {"Content-Type": "multipart/form-data; boundary=b"}
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--b--\r\n'
    assert asked(server, "/gradio_api/upload", "POST", boundary, body % bytes(900_000))[0] == 200
    assert asked(server, "/gradio_api/upload", "POST", boundary, body % bytes(1_500_000))[0] == 413
    assert asked(server, "/gradio_api/upload", "POST", {"Content-Length": str(10**9)})[0] == 413
    assert asked(server, "/gradio_api/queue/join", "POST", {"Content-Length": str(10**8)})[0] == 413
    assert asked(server, "/gradio_api/upload", "POST", {"Transfer-Encoding": "chunked"})[0] == 411


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}], ids=str
)
def test_pages_of_other_sites_may_send_nothing(server, headers):
    assert asked(server, "/gradio_api/upload", "POST", headers, b"")[0] == 403
    assert asked(server, "/", headers=headers)[0] == 200  # a link to the page


@pytest.mark.parametrize("own", ["origin", "sec-fetch-site"])
def test_the_page_itself_may(server, own):
    headers = {"Origin": server} if own == "origin" else {"Origin": "null", "Sec-Fetch-Site": "same-origin"}
    assert asked(server, "/gradio_api/upload", "POST", headers, b"")[0] not in (403, 411, 413)


@pytest.fixture
def client(server, here):
    from gradio_client import Client

    return Client(server, verbose=False, download_files=False)


def submit(client, upload, style="great_wave"):
    return client.submit(upload, style, 1, 64, False, 0, api_name="/paint")


def test_the_queue_has_an_end(client):
    from gradio_client import handle_file

    jobs = [submit(client, handle_file("photo.png"), "slow") for _ in range(6)]
    failures = [str(job.exception(60)) for job in jobs if job.exception(60) is not None]
    assert 1 <= len(failures) <= 4 and all("queue" in failure.lower() for failure in failures)
    assert submit(client, handle_file("photo.png")).result(30)[-1] == ""  # the server goes on


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/a.png", "https://example.com/a.png", "/etc/passwd", __file__])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_only_uploads_are_painted(server, path, place):
    """Gradio takes a file in the place of any value, and would serve its content to the browser."""
    data = [None, "great_wave", 1, 64, False]
    data[place] = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [data], "fn_index": 1, "session_hash": "somebody"})
    assert asked(server, "/gradio_api/queue/join", "POST", {"Content-Type": "application/json"}, body)[0] == 403


@pytest.mark.parametrize("body", ["{", "[" * 100_000, '{"path": "\\u0000"}', "a=b", "\xff"])
def test_what_is_no_request_of_the_page_is_refused(server, body):
    assert asked(server, "/gradio_api/queue/join", "POST", {"Content-Type": "application/json"}, body)[0] == 400


def test_a_bad_upload_is_said_in_one_sentence(client, here):
    from gradio_client import handle_file

    (here / "bad.png").write_bytes(b"no image")
    *_, message = submit(client, handle_file("bad.png")).result(30)
    assert message == "bad.png: not an image, or in a format that Pillow cannot read."
    assert submit(client, None).result(30)[-1] == "Choose a photo first."
    assert submit(client, handle_file("photo.png"), "monet").result(30)[-1].startswith("No style 'monet'")


# The camera


def test_addresses_of_cameras(monkeypatch):
    assert device_address("lavfi:testsrc") == ("lavfi", "testsrc")
    for platform, device, address in (
        ("linux", "0", ("v4l2", "/dev/video0")),
        ("linux", "/dev/video2", ("v4l2", "/dev/video2")),
        ("darwin", "0", ("avfoundation", "0")),
        ("win32", "HD Camera", ("dshow", "video=HD Camera")),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        assert device_address(device) == address


def test_live(studio):
    live = Live(Camera(CAMERA), studio, LiveOptions(StyleOptions("great_wave", 0.0, 64)))
    with live:
        time.sleep(0.2)
        assert live.number == 0  # nobody watches
        with live.watched():
            wait_until(lambda: live.number >= 2)
            plain = Image.open(io.BytesIO(live.picture))
            assert plain.size == (64, 48)
            live.options = LiveOptions(StyleOptions("starry_night", 1.0, 80), 0.5)
            wait_until(lambda: Image.open(io.BytesIO(live.picture)).size == (80, 60))
            painted = Image.open(io.BytesIO(live.picture)).resize(plain.size)
            assert np.abs(pixels(painted) - pixels(plain)).mean() > 10
            live.options = LiveOptions(StyleOptions("monet", 1.0, 80))
            wait_until(lambda: "no style 'monet'" in live.fault)
    assert live.over


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_camera_that_stops(studio):
    live = Live(Camera("lavfi:testsrc=size=64x48:duration=0.1"), studio, LiveOptions(WAVE))
    with live, live.watched():
        wait_until(lambda: live.over)


def test_the_stream_of_the_camera(networks):
    with served(networks, source=LiveSource(CAMERA, LiveOptions(StyleOptions("great_wave", 1.0, 64)))) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        connection.request("GET", "/live")
        answer = connection.getresponse()
        assert answer.getheader("content-type") == "multipart/x-mixed-replace; boundary=frame"
        content = answer.read(8192)
        assert content.startswith(b"--frame\r\nContent-Type: image/jpeg\r\n") and b"\xff\xd8\xff" in content
        connection.close()


# The command


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("web --model gone.safetensors", "gone.safetensors: no such file"),
        ("web --host 192.0.2.1", "cannot serve at 192.0.2.1, port 7860 (Cannot assign requested address)"),
        ("web --host nowhere.invalid", "cannot serve at nowhere.invalid, port 7860 ("),
        ("web --port 0 --webcam /dev/video77", "camera /dev/video77: cannot be opened (No such file or directory); "),
        ("web --port 65536", "argument --port: 65536 is not a port, a number from 0 to 65535"),
        ("web --max-seconds 0", "argument --max-seconds: 0 is below 1"),
        ("web --device tpu", "no device 'tpu' here; use cpu"),
        ("stylize --port 0 --webcam 77", "camera 77: cannot be opened (No such file or directory); "),
        ("stylize --port 0 --webcam lavfi:nothing", "camera lavfi:nothing: cannot be opened ("),
        ("stylize photo.png --webcam 0", "--webcam takes the place of INPUT and --out; leave them out"),
        ("stylize photo.png --port 8000", "--port is for --webcam"),
        ("stylize --webcam 0 --style monet", "no style 'monet'; use "),
        ("stylize --webcam 0 --crf 9", "--crf is for clips"),
        ("stylize --webcam 0 --mask photo.png", "--mask is for photos and clips, not for --webcam"),
        ("stylize --webcam 0 --style great_wave --style starry_night", "give each network one mask"),
    ],
)
def test_refused(refused, command, message):
    refused(*command.split(), says=message)


def test_a_port_in_use(refused):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        refused("web", "--port", port, says=f"port {port} of 127.0.0.1 is in use; choose another by --port")


def test_without_gradio(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused("web", "--port", 0, says="the web page needs Gradio; run `pip install 'fastperc[web]'`")


def test_the_folder_is_deleted(networks):
    with prepared(networks, Address(port=0), Limits()):
        folder = Path(os.environ["GRADIO_TEMP_DIR"]).parent
        assert folder.exists()
    assert not folder.exists()


@pytest.mark.slow
def test_ctrl_c(tmp_path, model):
    """The command starts, serves, takes a model of one's own, and ends without a traceback or a file left behind."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "fastperc", "web", "--port", "0", "--model", str(model)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        line = process.stderr.readline()
        assert line.endswith(" shows the page; Ctrl-C stops it\n")
        url = line.split()[0]
        assert asked(url, "/")[0] == 200
        assert list(tmp_path.glob("fastperc-web-*"))
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert (rest, process.returncode) == ("fastperc web: interrupted\n", 130)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")]  # PyTorch's


def test_the_command_line_imports_no_gradio():
    code = "import sys, fastperc.cli; print(*[name for name in ('gradio', 'fastapi', 'av') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()
