"""``fastperc export``: what the files hold, and their pictures in ONNX Runtime and as archives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import error
from pictures import picture, pixels
from PIL import Image

import fastperc
from fastperc import SRCNN, InputError, SuperResolutionNet, TransformNet, archives, exporting, reference
from fastperc.cli.export import size as size_option
from fastperc.exporting import network, writing
from fastperc.presets import PRESETS

SIZES = [(2, 96, 100), (1, 97, 130), (3, 16, 16), (1, 33, 41), (2, 130, 61), (1, 64, 18)]  # N, H, W
CPU = torch.device("cpu")


def strong(net):
    """The network with larger weights, so that its picture depends on every pixel much, and with batch statistics."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.mul_(3)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return net.eval()


NETWORKS = {
    **{preset: lambda preset=preset: strong(TransformNet(preset, width=4)) for preset in PRESETS},
    "caffe": lambda: strong(TransformNet("instance", width=4, output="caffe")),
    "he": lambda: strong(TransformNet("paper", "he", width=4)),
    "plain": lambda: strong(TransformNet("eccv16", False, width=4)),
    "reflect-batch": lambda: strong(TransformNet("examples", width=4, norm="batch", upsample="transposed")),
    "x4": lambda: strong(SuperResolutionNet(4, width=4)),
    "srcnn": lambda: strong(SRCNN(2)),
}


@pytest.mark.parametrize("kind", exporting.INPUTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_folded_networks_paint_the_same_picture(name, kind):
    net, images = NETWORKS[name](), exporting.Images(kind)
    plain = network.exportable(net, images)
    assert not [module for module in plain.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(not parameter.requires_grad for parameter in plain.parameters())
    for seed, (n, height, width) in enumerate(SIZES):
        x = images.example(n, height, width, seed)
        with torch.no_grad():
            if kind == "uint8":
                assert x.shape == (n, height, width, 3) and x.dtype == torch.uint8
                expected = reference.to_levels(net(x.permute(0, 3, 1, 2) / 255)).permute(0, 2, 3, 1)
                assert plain(x).dtype == torch.uint8
                assert (plain(x).int() - expected.int()).abs().max() <= 1
            else:
                assert error(plain(x), net(x)) < 1e-5


def test_half_precision_leaves_the_network_as_it_was():
    for net in (SRCNN(2).eval(), TransformNet("paper", width=4).eval()):
        plain = network.exportable(net, exporting.Images(half=True))
        assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in plain.parameters()} == {torch.float16}
        x = exporting.Images().example()
        with torch.no_grad():
            assert plain(x).dtype == torch.float32 and (plain(x) - net(x)).abs().max() < 3 / 255


# Archives


@pytest.mark.slow
def test_an_archive(run, here):
    net = strong(TransformNet("instance", width=2))
    fastperc.save(net, "net.safetensors", training={"style": "wave.jpg"})
    result = run("export", "--model", "net.safetensors", "-o", "out/net.pt2", "--license", "CC0-1.0")
    assert result.status == 0 and not result.err, result
    lines = result.out.splitlines()
    assert lines[0].startswith("wrote out/net.pt2: an archive of torch.export, PyTorch 2.") and len(lines) == 4
    assert lines[1].endswith("[N, 3, H, W] float32, RGB in 0-1, H and W from 16 up")
    assert "against PyTorch on images of 1×48×64, 2×130×97, 1×33×16: at most" in lines[3]
    properties = json.loads(archives.read(here / "out/net.pt2")["extra/fastperc.json"])
    assert properties["name"] == "net" and properties["license"] == "CC0-1.0"
    assert json.loads(properties["training"]) == {"style": "wave.jpg"}
    assert TransformNet(**json.loads(properties["config"])).config == net.config
    assert run("stylize", "photo.png", "-o", "a.png", "--model", "out/net.pt2").status == 0
    assert run("stylize", "photo.png", "-o", "b.png", "--model", "net.safetensors").status == 0
    assert np.abs(pixels(Image.open("a.png")) - pixels(Image.open("b.png"))).max() <= 1


def test_an_archive_that_enlarges(run, here):
    fastperc.save(SRCNN(2), "net.safetensors")
    assert run("export", "--model", "net.safetensors", "-o", "net.pt2").status == 0
    picture(21, 17).save("small.png")
    for name in ("net.safetensors", "net.pt2"):
        assert run("sr", "upscale", "small.png", "-o", f"{name}.png", "--model", name, "--no-match").status == 0
    results = [pixels(Image.open(f"{name}.png")) for name in ("net.safetensors", "net.pt2")]
    assert results[0].shape == (34, 42, 3) and np.abs(results[0] - results[1]).max() <= 1


@pytest.mark.parametrize("options", ["--size 48x32", "--input uint8 --size 40", "--fp16 --size 64"])
def test_options_of_archives(run, here, options):
    net = SRCNN(2)
    fastperc.save(net, "net.safetensors")
    assert run("export", "--model", "net.safetensors", "-o", "net.pt2", *options.split()).status == 0
    archive = archives.load("net.pt2", CPU)
    size = {"--size 48x32": (32, 48), "--input uint8 --size 40": (40, 40)}.get(options, (64, 64))
    assert archive.shape == ((None, *size, 3) if "uint8" in options else (None, 3, *size))
    assert archive.dtype == (torch.uint8 if "uint8" in options else torch.float32)
    images = exporting.Images("uint8" if "uint8" in options else "float", size)
    x = images.example(3)
    with torch.no_grad():
        expected = network.Adapted(net.eval(), images)(x)
        difference = (archive.call(x).float() - expected.float()).abs().max()
    assert difference <= (1 if "uint8" in options else 3 / 255)


def test_sizes():
    assert (size_option("dynamic"), size_option("fixed"), size_option("48X32")) == (None, (512, 512), (48, 32))


# ONNX


def needs_onnx():
    """Skips the test where a package is missing; returns ``onnx``."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_onnx(run, here):
    onnx = needs_onnx()
    net = SRCNN(2)
    fastperc.save(net, "net.safetensors")
    result = run("export", "--model", "net.safetensors", "-o", "net.onnx", "--license", "MIT")
    assert result.status == 0 and not result.err, result
    assert result.out.startswith("wrote net.onnx: ONNX, opset 18, 0.2 MB\n  image    [N, 3, H, W] float32, RGB in 0-1")
    assert "picture  [N, 3, 2*H, 2*W] float32" in result.out and "checked  in ONNX Runtime against" in result.out
    model = onnx.load("net.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["name"] == "net" and properties["license"] == "MIT" and properties["network"] == "SRCNN"
    assert properties["output"] == "[N, 3, 2*H, 2*W] float32, RGB in 0-1"
    text = str(model)
    assert str(here) not in text and ".py" not in text and "site-packages" not in text
    opened = session("net.onnx")
    (image,), (painted,) = opened.get_inputs(), opened.get_outputs()
    assert (image.name, image.shape, painted.name, painted.shape) == (
        *("image", ["N", 3, "H", "W"]),
        *("picture", ["N", 3, "2*H", "2*W"]),
    )
    assert opened.get_modelmeta().producer_name == "fastperc"
    for n, height, width in SIZES:
        x = exporting.Images().example(n, height, width)
        with torch.no_grad():
            difference = np.abs(opened.run(None, {"image": x.numpy()})[0] - net.eval()(x).numpy()).max()
        assert difference < 1 / 255


OPTIONS = ("", "--input uint8", "--fp16", "--fp16 --input uint8", "--size 61x40")
EXPORTED = [
    *(("instance", options) for options in OPTIONS),
    *(("examples", "--fp16 --input uint8"), ("paper", "--input uint8"), ("reflect-batch", "")),
    *(("x4", "--fp16 --input uint8"), ("x4", "--size 61x40"), ("caffe", "")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), EXPORTED)
def test_onnx_runtime_paints_the_same_picture(run, here, name, options):
    net = NETWORKS[name]()
    fastperc.save(net, "net.safetensors")
    needs_onnx()
    result = run("export", "--model", "net.safetensors", "-o", "net.onnx", *options.split())
    assert result.status == 0, result
    opened = session("net.onnx")
    levels, size = "uint8" in options, (40, 61) if "--size" in options else None
    images = exporting.Images("uint8" if levels else "float", size)
    for seed, (n, height, width) in enumerate(SIZES[:2] if size else SIZES):
        x = images.example(n, height, width, seed)
        with torch.no_grad():
            expected = network.Adapted(net, images)(x).numpy().astype(float)
        actual = opened.run(None, {"image": x.numpy()})[0].astype(float)
        top = 255 if levels else 1
        difference = np.abs(actual.clip(0, top) - expected.clip(0, top)).max() * 255 / top
        assert difference <= (3 if "--fp16" in options else 1), (n, height, width)


@pytest.mark.slow
def test_the_networks_that_ship(run, here):
    needs_onnx()
    for name, kind in (("great_wave", "--style"), ("x4_pixel", "--network")):
        result = run("export", kind, name, "-o", f"{name}.onnx", "--fp16")
        assert result.status == 0, result
        assert session(f"{name}.onnx").get_modelmeta().custom_metadata_map["license"] == "BSD-3-Clause"


@pytest.mark.slow
def test_folded_weights_and_instance_norms_in_the_graph(tmp_path):
    """A convolution's batch norm is in its weights; an instance norm is one operation."""
    onnx = needs_onnx()
    for norm, count in (("batch", 0), ("instance", 15)):
        net = strong(TransformNet("examples", width=2, norm=norm))
        exporting.write(net, tmp_path / "net.onnx", exporting.Images(size=(32, 32)), {})
        kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
        assert kinds.count("InstanceNormalization") == count and kinds.count("Conv") == 16
        assert "BatchNormalization" not in kinds


def test_the_code_in_the_documents(here):
    """docs/export.md's, with a small network in the place of the one that ships."""
    needs_onnx()
    text = (Path(__file__).parent.parent / "docs/export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    net, images = SRCNN(2).eval(), exporting.Images("uint8")
    exporting.write(net, here / "great_wave.onnx", images, {})
    Image.open("photo.png").save("photo.jpg", quality=100)
    exec(code, {"__name__": "__main__"})
    x = torch.from_numpy(pixels(Image.open("photo.jpg").convert("RGB")).astype(np.uint8))[None]
    with torch.no_grad():
        expected = network.Adapted(net, images)(x)[0].numpy().astype(int)
    assert np.abs(pixels(Image.open("painted.png")).astype(int) - expected).max() <= 1


# Refusals


def test_a_picture_that_is_wrong_is_not_kept(refused, here, monkeypatch):
    fastperc.save(SRCNN(2), "net.safetensors")
    (here / "net.pt2").write_bytes(b"what was there")
    black = lambda x: torch.zeros(len(x), 3, *(2 * side for side in x.shape[2:]))  # noqa: E731
    monkeypatch.setattr(writing, "_open_archive", lambda path: black)
    options = "export", "--model", "net.safetensors", "-o", "net.pt2"
    refused(*options, status=1, says="levels of 255 away from PyTorch's, more than 1; not written")
    refused(*options, "--fp16", status=1, says="more than 3; not written (try without --fp16)")
    monkeypatch.setattr(writing, "_open_archive", lambda path: lambda x: x)
    refused(*options, status=1, says="net.pt2: gives [1, 3, 64, 48] for [1, 3, 64, 48], not [1, 3, 128, 96]")


def test_says_what_to_install(refused, here, monkeypatch):
    monkeypatch.setattr(writing, "NEEDED", ("onnx", "nonesuch", "nothing"))
    says = "net.onnx: an .onnx file needs nonesuch and nothing: pip install 'fastperc[onnx]'"
    refused("export", "-o", "net.onnx", says=says)
    with pytest.raises(InputError, match="needs nonesuch and nothing"):
        exporting.write(SRCNN(2), here / "net.onnx", exporting.Images(), {})


def test_refuses_archives_and_its_own_input(refused, here):
    net = SRCNN(2).eval()
    fastperc.save(net, "net.safetensors")
    exporting.write(net, here / "net.pt2", exporting.Images(), {})
    refused("export", "--model", "net.pt2", "-o", "b.pt2", says="net.pt2: is an archive of torch.export already")
    (here / "a.pt2").symlink_to("net.safetensors")
    refused("export", "--model", "net.safetensors", "-o", "a.pt2", says="a.pt2: would overwrite an input")
    refused("export", "--model", "net.safetensors", "-o", "net.pt2/a.pt2", says="net.pt2/a.pt2: cannot be written")
