"""A server of the web page in this process, and a browser to look at it.

Without Gradio or a browser the tests that need them are skipped, but fail if FASTPERC_TEST_BROWSER is set, as in CI.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import contextmanager

import pytest
import torch

from fastperc.cli.web import SHIPPED, networks_of
from fastperc.web.guard import Address
from fastperc.web.limits import Limits
from fastperc.weights import STYLES

DEMANDED = bool(os.environ.get("FASTPERC_TEST_BROWSER"))
BROWSERS = "chromium", "chromium-browser", "google-chrome"
CAMERA = "lavfi:testsrc=size=96x72:rate=20,realtime"  # stands in for a camera


def needs(module):
    """Skips the test module where ``module`` is not installed."""
    if not DEMANDED:
        pytest.importorskip(module)


def browser_path():
    """The browser to test with; skips the test if there is none."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None and not DEMANDED:
        pytest.skip(f"needs a browser: {', '.join(BROWSERS)}")
    assert path, "FASTPERC_TEST_BROWSER is set, and there is no browser"
    return path


class Slow:
    """A painter that takes its time; ``running`` counts how many paint at once, and ``most`` the most that ever did."""

    scale = 1
    running = most = 0

    def __init__(self, painter, seconds):
        self.painter, self.seconds = painter, seconds

    def tiles(self, *arguments, **options):
        Slow.running += 1
        Slow.most = max(Slow.most, Slow.running)
        try:
            time.sleep(self.seconds)
            yield from self.painter.tiles(*arguments, **options)
        finally:
            Slow.running -= 1


def networks_for_tests(seconds=0.3):
    """The networks that ship, and a style ``slow`` that takes so long for each picture."""
    networks = networks_of(SHIPPED | {"slow": STYLES["great_wave"].with_name("slow")}, torch.device("cpu"))

    def load(source):
        if source.name == "slow":
            return Slow(networks.load_style(STYLES["great_wave"]), seconds)
        return networks.load_style(source)

    return networks._replace(load_style=load)


@contextmanager
def served(networks, limits=None, source=None):
    """Serves the page in a thread while the block runs; yields its address."""
    from fastperc.web.server import prepared, running, server_thread

    with prepared(networks, Address(port=0), limits or Limits(), source) as site:
        thread = server_thread(site)
        with running(site, thread):
            while not site.server.started:
                assert thread.is_alive()
                time.sleep(0.02)
            yield f"http://127.0.0.1:{site.listener.getsockname()[1]}"
    assert not thread.is_alive()
