"""Networks on the Hugging Face Hub, against a stub of it on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_stub import TOKEN, Repo, serve

import fastperc
from fastperc import InputError
from fastperc.cli import build_parser
from fastperc.cli.networks import style_file
from fastperc.files import read_safetensors_header
from fastperc.hub import Address
from fastperc.model_card import model_card
from fastperc.photos.photo import read_image

constants = pytest.importorskip("huggingface_hub.constants")
http = pytest.importorskip("huggingface_hub.utils._http")
yaml = pytest.importorskip("yaml")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stub, which huggingface_hub talks to; no token, and an empty cache."""
    with serve() as (address, stub):
        stub.address = address
        for name, value in {"HF_ENDPOINT": address, "NO_PROXY": "*", "no_proxy": "*"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))  # of retries
        yield stub


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def style(hub, model):
    """A repository with the file of ``model``, and an older commit with another network."""
    other = model.with_name("older.safetensors")
    fastperc.save(fastperc.TransformNet("instance", width=6), other)
    repo = hub.repos["me/wave"] = Repo({"nets/wave.safetensors": other.read_bytes()})
    repo.older = repo.head
    repo.add({"nets/wave.safetensors": model.read_bytes()})
    return repo


ADDRESS = "hf://me/wave/nets/wave.safetensors"


class TestAddress:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("hf://me/wave/a.safetensors", ("me/wave", "a.safetensors", None)),
            ("hf://me/wave.2/a/b c.safetensors@v1.0", ("me/wave.2", "a/b c.safetensors", "v1.0")),
            ("hf://me/wave/a.safetensors@refs/pr/1", ("me/wave", "a.safetensors", "refs/pr/1")),
        ],
    )
    def test_good(self, text, expected):
        assert Address.parse(text) == expected and str(Address.parse(text)) == text

    @pytest.mark.parametrize(
        "text",
        ["hf://", "hf://a.safetensors", "hf://me/a.safetensors", "hf://me//a.safetensors", "hf:///me/wave/a.safetensors",
         "hf://me/wave/../a.safetensors", "hf://me/wave/a.safetensors@", "hf://-me/wave/a.safetensors",
         "hf://m e/wave/a.safetensors", "hf://../wave/a.safetensors", "hf://me/wave//a.safetensors"],
    )  # fmt: skip
    def test_bad(self, text):
        with pytest.raises(InputError, match="not an address like hf://owner/name/file"):
            Address.parse(text)

    @pytest.mark.parametrize("name", ["a.pth", "a.pt2", "a.safetensors.bin", "README.md", "a"])
    def test_other_formats_are_refused_before_a_download(self, hub, name):
        hub.repos["me/wave"] = Repo({name: b""})
        with pytest.raises(InputError, match="files are downloaded, because other formats can run code"):
            fastperc.load(f"hf://me/wave/{name}")
        assert hub.requests == []


BAD_ADDRESSES = {
    "no repository": ("hf://me/gone/a.safetensors", "no such repository, or a private one; check the name, or log"),
    "no file": ("hf://me/wave/a.safetensors", "the repository has no such file"),
    "no revision": (f"{ADDRESS}@v9", "the repository has no such revision"),
    "gated": (ADDRESS, "its owner must grant you access"),
    "private": (ADDRESS, "no such repository, or a private one"),
    "hub is down": (ADDRESS, "answers 503 (try later)"),
    "no connection": (ADDRESS, "cannot be reached (ConnectError); the cache does not hold it"),
    "no hub": (ADDRESS, "does not answer as a hub does; check HF_ENDPOINT; the cache does not hold it"),
    "pickle": ("hf://me/wave/pickle.safetensors", "not in the safetensors format, despite its name"),
    "another network": ("hf://me/wave/other.safetensors", "neither a network saved by fastperc nor"),
    "bad address": ("hf://wave", "argument --model: hf://wave: not an address like hf://owner/name"),
}


class TestLoad:
    def test_by_address_and_from_the_cache(self, hub, style, model):
        net = fastperc.load(ADDRESS)
        expected = fastperc.load(model)
        assert all(map(torch.equal, net.state_dict().values(), expected.state_dict().values()))
        fastperc.load(ADDRESS)
        assert [method for method, path, _ in hub.requests if "resolve" in path] == ["HEAD", "GET", "HEAD"]

    def test_a_revision_is_pinned(self, style):
        assert fastperc.load(f"{ADDRESS}@{style.older}").config["width"] == 6
        assert fastperc.load(f"{ADDRESS}@{style.head}").config["width"] == 4
        assert fastperc.load(f"{ADDRESS}@main").config["width"] == 4

    def test_a_private_repository_with_a_token(self, hub, style, token):
        style.private = True
        fastperc.load(ADDRESS)
        assert {sent for _, _, sent in hub.requests} == {TOKEN}

    def test_commands(self, run, here, style, model, sr_model):
        style.add({"x4.safetensors": sr_model.read_bytes()})
        assert run("stylize", "photo.png", "--model", ADDRESS) == (0, "", "")
        assert read_image("photo-wave.png").rgb.size == (32, 24)
        assert run("sr", "upscale", "photo.png", "--model", "hf://me/wave/x4.safetensors") == (0, "", "")
        assert read_image("photo-x4.png").rgb.size == (128, 96)
        for command in (["export", "-o", "net.pt2"], ["bench"]):
            arguments = build_parser().parse_args([*command, "--model", ADDRESS])
            assert style_file(arguments).read_bytes() == model.read_bytes()

    @pytest.mark.parametrize("kind", BAD_ADDRESSES)
    def test_errors(self, kind, refused, here, hub, style, monkeypatch, tmp_path_factory):
        address, says = BAD_ADDRESSES[kind]
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        style.gated, style.private = kind == "gated", kind == "private"
        if kind == "hub is down":
            hub.refuses = {".*resolve.*": (503, "", "try later")}
        elif kind == "no hub":
            hub.refuses = {".*resolve.*": (200, "", "")}
        elif kind == "no connection":
            monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        elif kind == "pickle":
            style.add({"pickle.safetensors": b"PK\3\4" + bytes(100)})
        elif kind == "another network":
            from safetensors.torch import save

            style.add({"other.safetensors": save({"layer.weight": torch.ones(3)})})
        refused("stylize", "photo.png", "--model", address, says=says)

    def test_the_environment_is_read(self, hub, style, tmp_path):
        """In a process of its own: the endpoint, the cache, and no request where HF_HUB_OFFLINE is set."""
        code = "import sys; from fastperc.hub import Address; print(Address.parse(sys.argv[1]).download())"

        def download(address, **variables):
            environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), **variables}
            environment.pop("HF_HUB_CACHE", None)
            return subprocess.run(
                [sys.executable, "-c", code, address], capture_output=True, text=True, env=environment
            )

        first = download(ADDRESS)
        assert first.stderr == "" and Path(first.stdout.strip()).is_relative_to(tmp_path / "home")
        hub.requests.clear()
        assert download(ADDRESS, HF_HUB_OFFLINE="1").stdout == first.stdout
        refusal = download("hf://me/wave/new.safetensors", HF_HUB_OFFLINE="1").stderr.splitlines()[-1]
        assert "new.safetensors: HF_HUB_OFFLINE is set; the cache does not hold it" in refusal
        assert hub.requests == []

    def test_without_the_library(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(InputError, match=r"pip install 'fastperc\[hub\]'"):
            fastperc.load(ADDRESS)


class TestPush:
    def test_a_new_repository(self, run, here, hub, model, token):
        status, out, err = run("push", model, "me/wave", "--license", "CC-BY-4.0")
        repo = hub.repos["me/wave"]
        assert (status, out) == (0, f"{hub.address}/me/wave/commit/{repo.head}\n") and not repo.private
        size = f"{model.stat().st_size / 1e6:.1f} MB"
        creating = f"creating {hub.address}/me/wave"
        assert err.splitlines() == [creating, f"uploading wave.safetensors ({size})", "writing README.md"]
        assert repo.files()["wave.safetensors"] == model.read_bytes()
        assert 'license: "cc-by-4.0"' in repo.files()["README.md"].decode()
        net = fastperc.load("hf://me/wave/wave.safetensors")
        assert all(map(torch.equal, net.state_dict().values(), fastperc.load(model).state_dict().values()))

    def test_private_and_by_another_name(self, run, here, hub, model, token):
        status, _, err = run("push", model, "team/wave", "--private", "--name", "nets/first.safetensors")
        assert status == 0 and err.startswith(f"creating {hub.address}/team/wave, private\n")
        assert hub.repos["team/wave"].private
        assert set(hub.repos["team/wave"].files()) == {"nets/first.safetensors", "README.md"}

    def test_what_is_there_is_replaced_only_with_a_word(self, run, here, hub, model, token):
        repo = hub.repos["me/wave"] = Repo({"wave.safetensors": b"old", "README.md": b"mine"}, private=True)
        status, _, err = run("push", model, "me/wave", "--private")
        assert status == 0 and err.splitlines()[0].endswith("which is private; --private is for new ones")
        assert "it replaces the file of that name, which stays in the history" in err
        assert err.splitlines()[-1] == "keeping README.md as it is"
        assert repo.files()["README.md"] == b"mine" and repo.files()["wave.safetensors"] == model.read_bytes()

    def test_a_commit_in_between_is_not_overwritten(self, refused_with_lines, hub, model, token, monkeypatch):
        repo = hub.repos["me/wave"] = Repo({"README.md": b"mine"})
        head = repo.head
        monkeypatch.setattr(Repo, "head", property(lambda self: head if len(hub.requests) < 2 else "f" * 40))
        assert "answers 412 (A commit has happened since)" in refused_with_lines("push", model, "me/wave")

    @pytest.fixture
    def refused_with_lines(self, run, here):
        """Runs a command that fails after it has said what it does; returns its last line."""

        def refused_with_lines(*arguments):
            status, out, err = run(*arguments)
            assert (status, out) == (2, "") and TOKEN not in err
            return err.splitlines()[-1]

        return refused_with_lines

    def test_refusals_of_the_hub(self, refused_with_lines, hub, model, token):
        hub.refuses = {"/api/repos/create": (403, "", f"no rights in the namespace team, {TOKEN}")}
        line = refused_with_lines("push", model, "team/wave")
        assert "answers 403 (no rights in the namespace team, …); log in by `hf auth login`, or set HF_TOKEN" in line
        hub.refuses, hub.card_errors = {}, ["license must be one of"]
        assert "license must be one of" in refused_with_lines("push", model, "me/wave", "--license", "mine")

    def test_a_wrong_token_is_not_printed(self, refused_with_lines, hub, model, monkeypatch):
        for wrong in ("hf_wrong", "hf_bad\nheader", "hf_bäd"):
            monkeypatch.setenv("HF_TOKEN", wrong)
            line = refused_with_lines("push", model, "me/wave")
            assert "me/wave: " in line and "hf_" not in line.replace("HF_TOKEN", "")

    def test_bad_input(self, refused, here, hub, model, token):
        torch.save({"a": torch.ones(1)}, "net.pth")
        Path("net.safetensors").write_bytes(b"no")
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, "other.safetensors")
        refused("push", "net.pth", "me/wave", says="only .safetensors files")
        refused("push", "net.safetensors", "me/wave", says="net.safetensors: not a .safetensors file, or damaged")
        refused("push", "gone.safetensors", "me/wave", says="gone.safetensors: no such file")
        refused(
            "push", "other.safetensors", "me/wave", says="not a network saved by fastperc; `fastperc convert` makes"
        )
        for name in ("wave", "me/wave/x", "me wave/x", "/x", "me/"):
            refused("push", model, name, says=f"{name}: not the name of a repository, which is OWNER/NAME")
        refused("push", model, "me/wave", "--name", "a.bin", says="only .safetensors files")
        assert hub.requests == []

    def test_no_token(self, refused, hub, model):
        refused("push", model, "me/wave", says="writing needs a token; log in by `hf auth login`, or set HF_TOKEN")
        assert hub.requests == []

    def test_a_network_that_nobody_could_load(self, refused, here, hub, model, token):
        broken = bytearray(model.read_bytes())
        broken[-4:] = b"\xff\xff\xff\x7f"  # NaN
        Path("broken.safetensors").write_bytes(broken)
        refused("push", "broken.safetensors", "me/wave", says="not finite")
        assert hub.requests == []


class TestCard:
    def front(self, card):
        _, front, text = card.split("---\n", 2)
        return yaml.safe_load(front), text

    def test_of_each_network_that_ships(self):
        from fastperc.weights import STYLES, SUPER_RESOLUTION

        for name, path in (STYLES | SUPER_RESOLUTION).items():
            address = Address("me/mine", f"{name}.safetensors", None)
            front, text = self.front(model_card(address, read_safetensors_header(path).metadata))
            tag = "style-transfer" if name in STYLES else "super-resolution"
            assert front["library_name"] == "fastperc" and front["tags"] == ["fastperc", tag] and "license" not in front
            assert f"--model {address}" in text and "## Training" in text and "| iterations |" in text

    def test_any_metadata_is_valid(self):
        training = '{"style": "a|b`c`\\n<script>", "none": null, "list": [1, 2]}'
        metadata = {"network": "TransformNet", "config": "{}", "training": training, "license": "MIT: yes"}
        front, text = self.front(model_card(Address("me/mine", "a.safetensors"), metadata))
        assert front["license"] == "mit: yes"
        assert "| style | a\\|b'c' &lt;script> |" in text and "none" not in text and "| list | [1, 2] |" in text
