"""``fastperc completion``: its scripts, in the shells themselves."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from fastperc.cli import build_parser
from fastperc.cli.completion import SHELLS, actions

pytest.importorskip("shtab")

# What is typed before Tab, and what stands there after it.
COMPLETIONS = {
    "fastperc stylize --style g": "great_wave ",
    "fastperc stylize photo.png --style great_wave --mask photo.png --style s": "starry_night ",
    "fastperc styli": "stylize ",
    "fastperc sr ups": "upscale ",
    "fastperc sr upscale --method sr": "srcnn ",
    "fastperc stylize photo.png --keep": "--keep-colors ",
    "fastperc stylize --model nets/m": "nets/mine.safetensors ",
    "fastperc stylize photo.png --mask ne": "nets/",
    "fastperc stylize pho": "photo.png ",
    "fastperc export --network x4_p": "x4_pixel ",
    "fastperc styles x8_f": "x8_feature ",
    "fastperc train --data ne": "nets/",
}
START = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
LINES = {  # that a user adds to the shell's own file, with a file in the place of the command
    "bash": 'eval "$(cat script)"',
    "zsh": 'autoload -U compinit; compinit -u -D; eval "$(cat script)"',
}


class Terminal:
    """A shell in a terminal of its own; what it shows is ``shown``."""

    def __init__(self, command):
        self.shown = ""
        self.process, self.terminal = pty.fork()
        if not self.process:
            os.environ.update(TERM="dumb", PS1="", LC_ALL="C.UTF-8")
            os.execvp(command[0], command)
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 300, 0, 0))

    def type(self, text, until):
        """Types ``text`` and waits until ``until`` is shown."""
        self.shown, end = "", time.monotonic() + 20
        os.write(self.terminal, text.encode())
        while until not in self.shown and time.monotonic() < end:
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.shown += os.read(self.terminal, 1 << 16).decode(errors="replace")
        assert until in self.shown, self.shown

    def close(self):
        os.close(self.terminal)  # which ends the shell
        os.waitpid(self.process, 0)


@pytest.fixture
def folder(here, run):
    """The working directory, with something to complete, and the scripts of all shells."""
    Path("nets").mkdir()
    Path("nets/mine.safetensors").touch()
    for shell in SHELLS:
        status, script, err = run("completion", shell)
        assert (status, err) == (0, "")
        Path(f"script.{shell}").write_text(script)
    return here


def need(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_in_a_terminal(folder, shell):
    need(shell)
    Path(f"script.{shell}").rename("script")
    terminal = Terminal(START[shell])
    try:
        terminal.type(f"{LINES[shell]}; echo ready$((1 + 1))\n", "ready2")
        for typed, completed in COMPLETIONS.items():
            terminal.type(f"{typed}\t", f"{typed.rpartition(' ')[0]} {completed}")
            terminal.type("\x15echo next$((1 + 1))\n", "next2")  # Ctrl-U deletes the line
    finally:
        terminal.close()


def test_fish(folder):
    need("fish")
    lines = [f"complete -C '{typed}'; echo ---" for typed in COMPLETIONS]
    done = subprocess.run(
        ["fish", "--no-config", "-c", "\n".join(["source script.fish", *lines])], capture_output=True, text=True
    )
    assert done.stderr == ""
    for found, (typed, completed) in zip(done.stdout.split("---\n"), COMPLETIONS.items()):
        words = [line.split("\t")[0] for line in found.splitlines()]
        assert words == [completed.strip()], typed


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_is_in_the_script(run, shell):
    words = set(run("completion", shell).out.replace("'", " ").replace('"', " ").replace("=", " ").split())
    options = {option for action in actions(build_parser()) for option in action.option_strings}
    long_options = {
        option.removeprefix("--") if shell == "fish" else option for option in options if option[:2] == "--"
    }
    assert len(long_options) > 60
    text = run("completion", shell).out
    assert not [option for option in long_options if option not in words and option not in text]


def test_completing_imports_no_framework():
    code = "import sys; from fastperc.cli import main; main(['completion', 'bash']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "python" not in done.stdout and "fastperc completion" not in done.stdout  # Tab starts no Python


def test_bad_input(refused, monkeypatch):
    refused("completion", "tcsh", says="argument SHELL: invalid choice: 'tcsh'")
    refused("completion", says="the following arguments are required: SHELL")
    monkeypatch.setitem(sys.modules, "shtab", None)
    refused("completion", "bash", says="completion needs shtab; run `pip install 'fastperc[completion]'`")
