"""``fastperc convert``: other people's checkpoints, by a second reading of the same networks in plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from style_nets import BLOCKS, DECONVS, EXAMPLE, EXAMPLE_NORMS, PyTorchNet
from tensorflow_files import Lengstrom, bundle, single
from torch7_files import Johnson, saved

import fastperc
from fastperc import InputError, archives, conversion

SIZES = [(1, 48, 64), (2, 80, 44)]  # images, height, width: multiples of 4, where the originals keep the size
CPU = torch.device("cpu")


def example(path, age):
    net = PyTorchNet()
    tensors = net.state([*EXAMPLE, *DECONVS], EXAMPLE_NORMS)
    if age == "running statistics":
        weights = [name for name in tensors if name.endswith("weight") and "in" in name.split(".")[-2][:2]]
        for name in weights:
            tensors[name.replace("weight", "running_mean")] = torch.rand(tensors[name].shape)
            tensors[name.replace("weight", "running_var")] = torch.rand(tensors[name].shape)
    if age == "2017":
        renamed = {name: name.replace("weight", "scale").replace("bias", "shift") for name in tensors if "in" in name}
        tensors = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    if age == "module.":
        tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=age not in ("running statistics", "2017"))
    for norm in net.norms:
        norm.eps = 1e-9 if age == "2017" else norm.eps
    return lambda x: net(255 * x) / 255


def gordicaleksa(path):
    net = PyTorchNet()
    ups = ["up1.conv2d.conv2d", "up2.conv2d.conv2d", "up3.conv2d"]
    state = net.state([*EXAMPLE, *ups], EXAMPLE_NORMS)
    torch.save({"commit_hash": "abc", "content_weight": 1.0, "num_of_datapoints": 3, "state_dict": state}, path)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return lambda x: net((x - mean) / deviation) * deviation + mean


def rrmina(path, batch):
    net = PyTorchNet(batch=batch, transposed=True)
    first = [f"ConvBlock.{i}" for i in (0, 2, 4)]
    blocks = [f"ResidualBlock.{i}.conv{j}" for i, j in BLOCKS]
    convs = [f"{name}.conv_layer" for name in [*first, *blocks]]
    convs += ["DeconvBlock.0.conv_transpose", "DeconvBlock.2.conv_transpose", "DeconvBlock.4.conv_layer"]
    norms = [f"{name}.norm_layer" for name in [*first, *blocks, "DeconvBlock.0", "DeconvBlock.2"]]
    torch.save(net.state(convs, norms), path)
    return lambda x: net(255 * x[:, [2, 1, 0]])[:, [2, 1, 0]] / 255


def johnson(folder, **arguments):
    net = Johnson(**arguments)
    return saved(net.checkpoint(), folder / "candy.t7"), net.picture


def johnson_as(path, **arguments):
    net = Johnson(**arguments)
    saved(net.checkpoint(), path)
    return net.picture


REPRESENTED = {
    "jcjohnson": johnson_as,
    "jcjohnson, batch norm": lambda path: johnson_as(path, norm="batch"),
    "jcjohnson, zero": lambda path: johnson_as(path, padding="zero"),
    "example": lambda path: example(path, "today"),
    "example, old": lambda path: example(path, "running statistics"),
    "example, the first": lambda path: example(path, "2017"),
    "example, in parallel": lambda path: example(path, "module."),
    "gordicaleksa": gordicaleksa,
    "rrmina": lambda path: rrmina(path, False),
    "rrmina, batch norm": lambda path: rrmina(path, True),
}


def images(size):
    n, height, width = size
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(height))


def same_picture(net, original):
    with torch.no_grad():
        for size in SIZES:
            x = images(size)
            expected = original(x)
            assert expected.std() > 0.01
            assert (net(x) - expected).abs().max() < 2e-4 * max(1, expected.abs().max()), size


@pytest.mark.parametrize("name", REPRESENTED)
def test_converts_to_a_checkpoint_with_the_same_picture(run, here, name):
    original = REPRESENTED[name](here / "in.pth")
    result = run("convert", "in.pth", "-o", "out/net.safetensors")
    assert result.status == 0 and not result.err, result.err
    assert "16 convolutions, 15 " in result.out and "weights in float32" in result.out
    assert ("batch norms" if "batch" in name else "instance norms") in result.out
    net = fastperc.load("out/net.safetensors")
    assert isinstance(net, fastperc.TransformNet) and net.config["width"] == 4
    same_picture(net, original)
    assert run("stylize", "photo.png", "-o", "painted.png", "--model", "out/net.safetensors").status == 0


def lengstrom_bundle(folder):
    net = Lengstrom()
    bundle(net.tensors(), folder / "wave.ckpt")
    return folder / "wave.ckpt", net.picture


def lengstrom_single(folder):
    net = Lengstrom()
    single(net.tensors(), folder / "wave.ckpt")
    return folder / "wave.ckpt", net.picture


ARCHIVED = {
    "jcjohnson, reflect": lambda folder: johnson(folder, padding="reflect"),
    "lengstrom": lengstrom_bundle,
    "lengstrom, one file": lengstrom_single,
}


@pytest.mark.parametrize("name", ARCHIVED)
def test_reads_networks_that_ours_cannot_represent(refused, here, name):
    path, original = ARCHIVED[name](here)
    converted = conversion.read(path)
    (line,) = conversion.described(converted)
    assert name.partition(",")[0] in line and "16 convolutions" in line
    same_picture(converted.net, original)
    refused("convert", path, "-o", "out.safetensors", says=f"fastperc convert {path} -o out.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jcjohnson, reflect", "lengstrom"])
def test_writes_an_archive_that_stylize_paints_with(run, here, name):
    path, original = ARCHIVED[name](here)
    result = run("convert", path.name, "-o", "out.pt2")
    assert result.status == 0 and "wrote out.pt2: an archive of torch.export" in result.out, result
    call = archives.load("out.pt2", CPU).call
    with torch.no_grad():
        for size in SIZES:
            assert (call(images(size)) - original(images(size))).abs().max() < 2e-4
        assert call(images((1, 45, 61))).shape == (1, 3, 45, 61)
    pixels = images(SIZES[0])[0].mul(255).round().to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save("photo.png")
    assert run("stylize", "photo.png", "-o", "painted.png", "--model", "out.pt2").status == 0
    painted = torch.from_numpy(np.array(Image.open("painted.png"))).permute(2, 0, 1).double()
    with torch.no_grad():
        expected = (original(pixels[None] / 255)[0] * 255).clamp(0, 255).round()
    assert (painted - expected).abs().max() <= 1


@pytest.mark.parametrize("given", ["wave.ckpt", "wave.ckpt.index", "wave.ckpt.data-00000-of-00001", "."])
def test_a_bundle_is_found_by_any_of_its_names(here, given):
    lengstrom_bundle(here)
    assert conversion.read(here / given).kind.startswith("lengstrom")


def test_the_numbers_of_a_torch_checkpoint_choose_the_preprocessing(here):
    net = Johnson(padding="zero")
    x = images(SIZES[0])
    with torch.no_grad():
        vgg = conversion.read(saved(net.checkpoint(), here / "a.t7")).net(x)
        resnet = conversion.read(saved(net.checkpoint(preprocessing="resnet"), here / "b.t7")).net(x)
        assert torch.equal(conversion.read(saved(net.module(), here / "c.t7")).net(x), vgg)
    assert (vgg - resnet).abs().max() > 0.1
    for other in ("other", {"a": 1}):
        with pytest.raises(InputError, match=r"preprocessing .*, which is not known"):
            conversion.read(saved(net.checkpoint(preprocessing=other), here / "d.t7"))


def test_the_width_that_was_published(here):
    torch.save(PyTorchNet(32).state([*EXAMPLE, *DECONVS], EXAMPLE_NORMS), here / "mosaic.pth")
    (line,) = conversion.described(conversion.read(here / "mosaic.pth"))
    assert line == (
        "PyTorch's fast_neural_style example: 16 convolutions, 15 instance norms, 1,679,235 weights in float32"
    )
