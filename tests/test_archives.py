"""Archives of TorchScript and torch.export as networks of ``stylize`` and ``sr upscale``, well-meant and hostile."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gallery import networks
from pictures import picture, pixels
from PIL import Image
from torch import nn

from fastperc import InputError, archives
from fastperc.archives import _check_formula, kind_of
from fastperc.photos.archive import ArchivePainter

CPU = torch.device("cpu")


class Halved(nn.Module):
    """Image to image; TorchScript can compile it."""

    def __init__(self, c_in=3, c_out=3):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x):
        return torch.sigmoid(self.conv(x)) / 2


class Cropping(nn.Module):
    """Loses up to 3 pixels at the right and bottom, as networks with strides do."""

    def __init__(self, scale=1):
        super().__init__()
        self.pool, self.up = nn.AvgPool2d(4), nn.Upsample(scale_factor=4 * scale)

    def forward(self, x):
        return self.up(self.pool(x))


class Pair(Halved):
    def forward(self, x):
        return x, x


class Levels(Halved):
    def forward(self, x):
        return x * 255


class Classes(Halved):
    def forward(self, x):
        return x.mean((2, 3))


def script(net, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net.eval()).save(str(path))


def trace(net, path, size=(32, 24)):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net.eval(), torch.rand(1, 3, *size)).save(str(path))


def export(net, path, size=(32, 24), dynamic=True):
    sides = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} if dynamic else {}
    program = torch.export.export(net.eval(), (torch.rand(1, 3, *size),), dynamic_shapes=(sides,), strict=False)
    with path.open("wb") as file:
        torch.export.save(program, file)


WRITERS = pytest.mark.parametrize("write", [script, trace, export])


def expected(net, photo):
    x = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        return (net(x)[0].permute(1, 2, 0) * 255).clamp(0, 255).round().numpy()


@WRITERS
def test_stylize(run, here, write):
    net = Halved()
    write(net, here / "net.pt2")
    image = picture(45, 31)
    image.putalpha(77)
    image.save("in.png")
    assert run("stylize", "in.png", "-o", "out.png", "--model", "net.pt2").status == 0
    result = Image.open("out.png")
    assert result.mode == "RGBA" and result.getchannel("A").getextrema() == (77, 77)
    assert np.abs(pixels(result.convert("RGB")) - expected(net, image.convert("RGB"))).max() <= 1


@pytest.mark.parametrize("name", ["transformer_net", "cyclegan", "unet"])
def test_stylize_with_the_gallery(run, here, name):
    export(networks(0.1)[name](), here / "net.pt2", (64, 64))
    picture(45, 37).save("in.png")
    run("stylize", "in.png", "-o", "out.png", "--model", "net.pt2")
    assert Image.open("out.png").size == (45, 37)


@pytest.mark.parametrize(
    ("name", "write"), [("edsr", script), ("edsr", export), ("srresnet", script), ("rrdb", export)]
)
def test_upscale(run, here, name, write):
    net = networks(0.1)[name]()
    write(net, here / "net.pt2")
    image = picture(21, 17)
    image.save("in.png")
    assert run("sr", "upscale", "in.png", "--model", "net.pt2", "--no-match").status == 0
    result = Image.open("in-x4.png")
    assert result.size == (84, 68)
    assert np.abs(pixels(result) - expected(net.eval(), image)).max() <= 1


@WRITERS
@pytest.mark.parametrize("scale", [1, 2])
def test_networks_that_need_a_multiple(write, scale, tmp_path):
    write(Cropping(scale), tmp_path / "net")
    painter = ArchivePainter(archives.load(tmp_path / "net", CPU))
    assert (painter.scale, painter.multiple) == (scale, 32)
    image = torch.randint(256, (21, 45, 3), dtype=torch.uint8)
    ((window, y),) = painter.tiles(image)
    assert y.shape == (1, 3, 21 * scale, 45 * scale) == (1, 3, window.height, window.width)
    x = image.permute(2, 0, 1)[None] / 255
    assert torch.allclose(y[..., : 20 * scale, : 44 * scale], Cropping(scale)(x)[..., : 20 * scale, :], atol=1e-6)


def test_fixed_size(run, refused, here):
    export(Halved(), here / "net.pt2", (24, 32), dynamic=False)
    assert run("stylize", "photo.png", "-o", "out.png", "--model", "net.pt2").status == 0
    Path("out.png").unlink()
    picture(33, 24).save("in.png")
    refused(
        "stylize", "in.png", "-o", "out.png", "--model", "net.pt2", says="takes 32×24 pixels only, the photo has 33×24"
    )


BAD = {
    "tuple": (Pair(), "gives a tuple, not an image"),
    "classes": (Classes(), "gives [1, 3], not an RGB image"),
    "channels in": (Halved(4, 3), "cannot take an RGB image of 192×160"),
    "channels out": (Halved(3, 1), "gives [1, 1, 160, 192], not an RGB image"),
    "levels": (Levels(), "must take and give RGB in 0–1"),
    "enlarges": (Cropping(2), "net.pt: enlarges 2 times; use `fastperc sr upscale --model net.pt`"),
    "smaller": (nn.AvgPool2d(2), "gives 96×80 for 192×160"),
}


@pytest.mark.parametrize("kind", BAD)
def test_stylize_refuses(refused, here, kind):
    net, says = BAD[kind]
    script(net, here / "net.pt")
    refused("stylize", "photo.png", "-o", "new/out.png", "--model", "net.pt", says=says)


def test_upscale_refuses(refused, here):
    script(Halved(), here / "net.pt")
    refused("sr", "upscale", "photo.png", "--model", "net.pt", says="does not enlarge; use `fastperc stylize")
    script(Cropping(2), here / "two.pt")
    refused("sr", "upscale", "photo.png", "--model", "two.pt", "--scale", 4, says="enlarges 2 times, not 4")


def test_tiles_are_refused(refused, here):
    script(Halved(), here / "net.pt")
    refused("stylize", "photo.png", "--model", "net.pt", "--tile", 16, says="leave --tile out")


def test_weights_in_a_pickle_are_refused_with_advice(refused, here):
    torch.save(Halved().state_dict(), "weights.pth")
    refused(
        "stylize", "photo.png", "--model", "weights.pth", says="load the weights in Python and call fastperc.freeze"
    )
    torch.save(Halved(), "net.pth")
    refused("stylize", "photo.png", "--model", "net.pth", says="write an archive by torch.export.save")


# Hostile archives


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def edited(path, edit):
    """Writes the archive at ``path`` again after ``edit`` changed its records, and returns the path."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(records)).partition("/")[0]
    plain = {name.partition("/")[2]: data for name, data in records.items()}
    edit(plain)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in plain.items():
            archive.writestr(f"{folder}/{name}", data)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    export(Halved(), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripted") / "net.pt"
    script(Halved(), path)
    return path.read_bytes()


def in_graph(edit):
    def change(records):
        graph = json.loads(records["models/model.json"])
        edit(graph, graph["graph_module"]["graph"]["nodes"])
        records["models/model.json"] = json.dumps(graph).encode()

    return change


def pickled_weight(records):
    name = "data/weights/model_weights_config.json"
    config = json.loads(records[name])
    weight = next(iter(config["config"].values()))
    weight["use_pickle"] = True
    records[f"data/weights/{weight['path_name']}"] = pickle.dumps(Touch(Path("executed")))
    records[name] = json.dumps(config).encode()


def pickled_constant(records):
    name = "data/constants/model_constants_config.json"
    config = {
        "config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}
    }
    records["data/constants/opaque_obj_0"] = pickle.dumps(Touch(Path("executed")))
    records[name] = json.dumps(config).encode()


def formula(text):
    def edit(graph, nodes):
        values = graph["graph_module"]["graph"]["tensor_values"]
        next(iter(values.values()))["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}

    return in_graph(edit)


HOSTILE_EXPORTS = {
    "pickled weight": (pickled_weight, "is a pickle"),
    "pickled constant": (pickled_constant, "is a pickle"),
    "pickled sample": (
        lambda records: records.update({"data/sample_inputs/model.pt": pickle.dumps(Touch(Path("executed")))}),
        "damaged",
    ),
    "target": (in_graph(lambda graph, nodes: nodes[0].update(target="torch.hub.load")), "calls 'torch.hub.load'"),
    "file": (
        in_graph(lambda graph, nodes: nodes[0].update(target="torch.ops.aten.from_file.default")),
        "calls 'torch.ops.aten.from_file.default'",
    ),
    "name": (
        in_graph(lambda graph, nodes: nodes[0].update(name="x):\n  __import__('pathlib').Path('executed').touch()")),
        "which could be code",
    ),
    "formula": (formula("__import__('pathlib').Path('executed').touch()"), "not a formula"),
    "enum": (
        in_graph(
            lambda graph, nodes: graph["graph_module"]["module_call_graph"][0]["signature"].update(
                in_spec='[1, {"type": null, "context": "{\\"__enum__\\": true, \\"fqn\\": \\"this:x\\"}"}]'
            )
        ),
        "names a Python class",
    ),
    "nested": (lambda records: records.update({"models/model.json": b"[" * 100_000}), "damaged"),
    "no graph": (lambda records: records.pop("models/model.json"), "holds no network"),
    "no weights": (lambda records: records.pop("data/weights/weight_0"), "damaged"),
    "old": (lambda records: records.update({"serialized_exported_program.json": b"{}"}), "export the network again"),
}


@pytest.mark.parametrize("kind", HOSTILE_EXPORTS)
def test_hostile_exports(refused, here, exported, kind):
    edit, says = HOSTILE_EXPORTS[kind]
    (here / "net.pt2").write_bytes(exported)
    edited(here / "net.pt2", edit)
    refused("stylize", "photo.png", "-o", "new/out.png", "--model", "net.pt2", says=says)
    assert not Path("executed").exists()


def test_what_would_be_evaluated_or_loaded_is_left_out(here, exported):
    """Guards are text that PyTorch evaluates, and an archive may hold compiled libraries beside the network."""
    (here / "net.pt2").write_bytes(exported)

    def add(records):
        in_graph(lambda graph, nodes: graph.update(guards_code=["__import__('pathlib').Path('executed').touch()"]))(
            records
        )
        records["data/aotinductor/model/net.so"] = b"no library"

    archive = archives.load(edited(here / "net.pt2", add), CPU)
    assert archive.call(torch.rand(1, 3, 40, 40)).shape == (1, 3, 40, 40)
    assert not Path("executed").exists()


@pytest.mark.parametrize("call", ["torch.save(x, 'executed')", "torch.from_file('photo.png')", "ops.c10d.barrier(x)"])
def test_hostile_code(refused, here, scripted, call):
    (here / "net.pt").write_bytes(scripted)

    def edit(records):
        name = next(name for name, data in records.items() if name.endswith(".py") and b"def forward" in data)
        records[name] = records[name].replace(b"return", f"{call}\n    return".encode())

    edited(here / "net.pt", edit)
    refused("stylize", "photo.png", "--model", "net.pt", says="which a network does not need, so it is not opened")
    assert not Path("executed").exists()


@pytest.mark.parametrize("kind", ["exported", "scripted"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_short(refused, here, request, kind, share):
    content = request.getfixturevalue(kind)
    (here / "net.pt2").write_bytes(content[: int(share * len(content))])
    refused("stylize", "photo.png", "--model", "net.pt2", says="net.pt2: not a file of tensors")


@pytest.mark.parametrize("kind", ["exported", "scripted"])
def test_flipped_bytes(here, request, kind):
    content = bytearray(request.getfixturevalue(kind))
    generator = np.random.default_rng(0)
    for _ in range(30):
        damaged = bytearray(content)
        for position in generator.integers(len(content), size=8):
            damaged[position] ^= 0xFF
        (here / "net").write_bytes(damaged)
        if kind_of(here / "net") is not None:
            try:
                ArchivePainter(archives.load(here / "net", CPU))
            except InputError as error:
                assert "\n" not in str(error)


def test_wrong_zips(refused, here, scripted, monkeypatch):
    with zipfile.ZipFile("empty.zip", "w"):
        pass
    refused("stylize", "photo.png", "--model", "empty.zip", says="empty.zip: ")
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("net/readme.txt", "no network")
    refused("stylize", "photo.png", "--model", "other.zip", says="other.zip: not a file of tensors")
    (here / "twice.pt").write_bytes(scripted)
    with zipfile.ZipFile("twice.pt", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0], b"another")
    refused("stylize", "photo.png", "--model", "twice.pt", says="holds two files of the same name")
    (here / "bomb.pt").write_bytes(scripted)
    with zipfile.ZipFile("bomb.pt", "a", zipfile.ZIP_DEFLATED) as archive, archive.open("net/zeros", "w") as file:
        file.write(bytes(1 << 20))
    monkeypatch.setattr(archives, "MAX_EXPANDED", 1 << 19)
    refused("stylize", "photo.png", "--model", "bomb.pt", says="far larger than the file")


@pytest.mark.parametrize(
    "text", ["Mul(Integer(4), FloorDiv(Add(Symbol('s9', positive=True, integer=True), Integer(-1)), Integer(2)))", "s0"]
)
def test_formulas(text):
    _check_formula(text)


@pytest.mark.parametrize(
    "text",
    ["Pow(9, Pow(9, 9))", "9**9**9", "().__class__", "Symbol('a').name", "[x for x in s0]", "lambda: s0", "exec('1')",
     "Symbol", "'text'", "Add(*s0)", "1" * 5000, "(" * 3000, ""],
)  # fmt: skip
def test_what_is_no_formula(text):
    with pytest.raises(archives.Refused):
        _check_formula(text)
