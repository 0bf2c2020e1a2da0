"""Frozen networks against the modules they come from, in float64; whole, in tiles, from several threads."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from cases import DEVICES, GPU, NETWORK_ERROR_4X4, error
from variants import VARIANTS, build_variant, variant_id

from fastperc import InputError, SuperResolutionNet, TransformNet, freeze, reference, use_backend
from fastperc.engine import cuda, engine
from fastperc.presets import PRESETS

SIZES = [(1, 16, 16), (2, 17, 31), (5, 37, 53), (1, 101, 64), (3, 64, 19)]
LARGE_SIZES = [(1, 257, 1097), (1, 1100, 131)]


def build(preset="paper", residual=True, **changes):
    """In eval mode, with statistics that are not trivial."""
    return build_variant(preset, residual, changes).eval()


def outputs(net, x):
    """Of the network in float64, and of itself as it is in ``x``'s dtype."""
    with torch.no_grad():
        return copy.deepcopy(net).double()(x.double()), copy.deepcopy(net).to(x.dtype)(x)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "B{}-H{}-W{}".format(*size))
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_paints_as_the_module_does(variant, size):
    net = build_variant(*variant).eval()
    n, height, width = size
    x = torch.rand(n, 3, height, width)
    y = freeze(net)(x)
    exact, stock = outputs(net, x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert error(y, exact) <= 1.5 * error(stock, exact) + NETWORK_ERROR_4X4
    assert torch.equal(y, freeze(net)(x))


@pytest.mark.parametrize("size", LARGE_SIZES, ids=lambda size: "B{}-H{}-W{}".format(*size))
@pytest.mark.parametrize("preset", PRESETS)
def test_large_primes(preset, size):
    net = build(preset)
    x = torch.rand(size[0], 3, *size[1:])
    exact, stock = outputs(net, x)
    assert error(freeze(net)(x), exact) <= 1.5 * error(stock, exact) + NETWORK_ERROR_4X4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_other_dtypes(preset, dtype):
    net = build(preset)
    x = torch.rand(2, 3, 33, 42)
    exact, stock = outputs(net, x.to(dtype))
    y = freeze(net, dtype)(x)
    assert y.dtype == torch.float32, "a picture has the image's dtype, whatever computes it"
    tolerated = 1.5 * error(stock, exact) + 1e-7
    assert error(y, outputs(net, x)[0]) <= (1e-6 if dtype == torch.float64 else tolerated)


@pytest.mark.parametrize(("dtype", "levels"), [(torch.float32, 1), (torch.bfloat16, 2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_levels_in_levels_out(preset, dtype, levels):
    net = build(preset)
    image = torch.randint(0, 256, (2, 35, 45, 3), dtype=torch.uint8)
    x = image.permute(0, 3, 1, 2).double() / 255
    exact, stock = outputs(net, x.to(dtype))
    exact = reference.to_levels(outputs(net, x)[0]).int()
    frozen = freeze(net, dtype)
    picture = frozen(image)
    assert picture.dtype == torch.uint8 and picture.shape == image.shape
    off = (picture.permute(0, 3, 1, 2).int() - exact).abs().max()
    if preset == "instance" and dtype == torch.bfloat16:  # whose eight bits are too few for anybody here
        levels = (reference.to_levels(stock.float()).int() - exact).abs().max()
    assert off <= levels
    assert torch.equal(frozen(image[1]), picture[1])
    assert torch.equal(frozen(image.permute(0, 3, 1, 2)), picture.permute(0, 3, 1, 2))


@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_super_resolution(monkeypatch, upsample):
    net = SuperResolutionNet(4, 16, upsample).eval()
    x = torch.rand(2, 3, 21, 34)
    exact, stock = outputs(net, x)
    y = freeze(net)(x)
    assert y.shape == (2, 3, 84, 136) and error(y, exact) <= 1.5 * error(stock, exact) + NETWORK_ERROR_4X4
    assert (freeze(net)(x, tile=16) - y).abs().max() < 1e-6
    monkeypatch.setattr(engine, "BAND_BYTES", 0)
    assert (freeze(net)(x) - y).abs().max() < 1e-6


@pytest.mark.parametrize("tile", [17, 40])
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_parts_equal_the_whole(variant, tile):
    frozen = freeze(build_variant(*variant).eval())
    image = torch.randint(0, 256, (51, 82, 3), dtype=torch.uint8)
    x = image.permute(2, 0, 1)[None] / 255
    assert (frozen(x, tile=tile) - frozen(x, tile="off")).abs().max() < 2e-4
    assert (frozen(image, tile=tile).int() - frozen(image).int()).abs().max() <= 1


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[0] in ("paper", "eccv16")], ids=variant_id)
def test_bands_equal_the_whole(variant, monkeypatch):
    frozen = freeze(build_variant(*variant).eval())
    x = torch.rand(2, 3, 75, 42)
    image = torch.randint(0, 256, (50, 42, 3), dtype=torch.uint8)
    expected, painted = frozen(x), frozen(image)
    monkeypatch.setattr(engine, "BAND_BYTES", 0)
    monkeypatch.setattr(engine, "BAND_PIXELS", 42 * 19)
    assert (frozen(x) - expected).abs().max() < 1e-6
    assert (frozen(image).int() - painted.int()).abs().max() <= 1


def test_autocast_changes_nothing():
    frozen, x = freeze(build("instance")), torch.rand(1, 3, 32, 40)
    for backend in ("reference", "native"):
        with use_backend(backend):
            expected = frozen(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(frozen(x), expected)


def test_parts_in_a_batch_are_of_their_own_image():
    """An instance norm's statistics are not those of the neighbour."""
    frozen = freeze(build("instance"))
    x = torch.rand(3, 3, 40, 33) * torch.tensor([0.1, 1, 0.5]).view(3, 1, 1, 1)
    assert (frozen(x, tile=16) - frozen(x)).abs().max() < 2e-4


@pytest.mark.parametrize("preset", ["paper", "instance"])
def test_memory_runs_short_and_parts_are_painted(preset, monkeypatch):
    frozen, x = freeze(build(preset)), torch.rand(1, 3, 150, 90)
    expected = frozen(x, tile="off")
    painted = []
    paint = engine.Canvas.paint
    monkeypatch.setattr(engine.Canvas, "paint", lambda *arguments: painted.append(1) or paint(*arguments))
    monkeypatch.setattr(engine, "UNCHECKED_BYTES", 0)
    monkeypatch.setattr(engine, "free_memory", lambda device: 1e6)
    assert (frozen(x) - expected).abs().max() < 2e-4 and len(painted) > 1


def test_more_memory_than_there_is_is_told(monkeypatch):
    frozen, x = freeze(build()), torch.rand(1, 3, 64, 64)
    monkeypatch.setattr(engine, "UNCHECKED_BYTES", 0)
    monkeypatch.setattr(engine, "free_memory", lambda device: 1e5)
    with pytest.raises(InputError, match=r"64×64 at once takes about 0\.\d GB, 0\.0 GB are free; paint it in tiles"):
        frozen(x, tile="off")
    monkeypatch.setattr(engine, "free_memory", lambda device: 1e3)
    with pytest.raises(InputError, match=r"a picture of 64×64 takes .* make the image smaller"):
        frozen(x)


def test_a_full_disk_is_told(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    told = r"a temporary file of .* GB is needed, 0\.0 GB are free; set TMPDIR to a folder with more"
    with pytest.raises(InputError, match=told):
        freeze(build("instance"))(torch.rand(1, 3, 64, 64), tile=16)


def test_parts_one_by_one():
    frozen, image = freeze(build("instance")), torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8)
    whole = frozen(image.permute(2, 0, 1)[None] / 255)
    loops, ticks, canvas = [], [], torch.full((1, 3, 50, 70), torch.nan)

    def watch(items, title, total):
        loops.append((title, total))
        for item in items:
            yield item
            ticks.append(item)

    for place, part in frozen.tiles(image, 32, torch.float32, watch):
        canvas[..., place.top : place.top + place.height, place.left : place.left + place.width] = part
    assert (canvas - whole).abs().max() < 2e-4
    assert loops == [("painting", len(ticks))] and len(ticks) > 15 * 9 + 6, "15 norms measured, then the picture"


def test_a_batch_of_none():
    frozen = freeze(build())
    assert frozen(torch.rand(0, 3, 20, 24)).shape == (0, 3, 20, 24)
    assert frozen(torch.zeros(0, 20, 24, 3, dtype=torch.uint8)).shape == (0, 20, 24, 3)


def test_weights_are_the_engines_own():
    net = build()
    x = torch.rand(1, 3, 20, 20)
    frozen = freeze(net)
    before = frozen(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(frozen(x), before) and not net.stem.conv.weight.any()


def test_a_network_in_training_is_frozen_as_in_eval_mode():
    net = build().train()
    before = copy.deepcopy(net.state_dict())
    x = torch.rand(1, 3, 20, 20)
    assert torch.equal(freeze(net)(x), freeze(copy.deepcopy(net).eval())(x))
    assert net.training and all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))


@pytest.mark.parametrize("device", DEVICES)
def test_several_threads_at_once(device):
    frozen = freeze(build("instance"), device=device)
    images = [torch.rand(1, 3, 16 + 5 * (i % 3), 24) for i in range(12)]
    expected = [frozen(x) for x in images]
    barrier = threading.Barrier(4)

    def paint(i):
        if i < 4:
            barrier.wait()
        return frozen(images[i])

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(paint, range(12)), expected))


def test_copies_and_pickles():
    frozen, x = freeze(build("instance")), torch.rand(1, 3, 20, 20)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(twin(x), frozen(x))


def test_video_frames_one_by_one():
    frozen = freeze(build())
    frames = [torch.randint(0, 256, (24, 32, 3), dtype=torch.uint8) for _ in range(5)]
    pictures = list(frozen.stream(iter(frames)))
    assert len(pictures) == 5 and all(torch.equal(a, frozen(b)) for a, b in zip(pictures, frames))


def test_explain_names_each_layer_its_kernel_and_the_reason():
    net = build("instance")
    told = freeze(net).explain(32, 32)
    lines = told.splitlines()
    layers = {name.removesuffix(".weight") for name in net.state_dict() if "conv" in name or name.startswith("head")}
    assert {line.split()[0] for line in lines[1:]} == {name.removesuffix(".bias") for name in layers}
    assert "head              rgb_conv_head          native     onednn: not triton: Triton" in told
    with use_backend("reference"):
        assert "use_backend asks for it" in freeze(net).explain(32, 32)


def test_plain_pytorch_runs_where_there_is_no_onednn(monkeypatch):
    net, x = build("examples"), torch.rand(1, 3, 30, 31)
    monkeypatch.setattr("fastperc.ops.onednn.why_not", lambda x: "this PyTorch has no oneDNN")
    told = freeze(net).explain(32, 32)
    assert "reference  not triton" in told and "has no oneDNN" in told
    exact, stock = outputs(net, x)
    assert error(freeze(net)(x), exact) <= 1.5 * error(stock, exact) + NETWORK_ERROR_4X4


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.rand(1, 4, 32, 32), r"RGB images \[N, 3, H, W\].*got torch.float32 \[1, 4, 32, 32\]"),
        (torch.rand(3, 32, 32), r"got torch.float32 \[3, 32, 32\]"),
        (torch.rand(1, 3, 0, 32), r"at least 16, got torch.float32 \[1, 3, 0, 32\]"),
        (torch.zeros(15, 32, 3, dtype=torch.uint8), r"got torch.uint8 \[15, 32, 3\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "or uint8 levels, got torch.int64"),
        (torch.full((1, 3, 32, 32), torch.inf), "NaN or infinite"),
        (torch.tensor(torch.nan).expand(1, 3, 32, 32), "NaN or infinite"),
        ([[0.5]], "expected a tensor, a NumPy array, a PIL image or a path, got list"),
    ],
    ids=["channels", "3-d", "no-pixels", "too-small", "integers", "infinite", "nan", "list"],
)
def test_refuses_what_is_no_image(images, told):
    with pytest.raises(ValueError, match=told):
        freeze(build())(images)


@pytest.mark.parametrize("tile", [15, 0, -1, 20.0, "all", None])
def test_refuses_tiles_it_does_not_know(tile):
    with pytest.raises(ValueError, match="tile must be 'auto', 'off' or a number of pixels from 16 up"):
        freeze(build())(torch.rand(1, 3, 20, 20), tile=tile)


def test_refuses_to_freeze_what_it_cannot():
    with pytest.raises(TypeError, match=r"freeze takes a torch.nn.Module, got Tensor"):
        freeze(torch.rand(3))
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch.int8"):
        freeze(build(), torch.int8)
    net = build()
    net.blocks[2].norm1.running_var[3] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.2\.conv1 has weights or statistics that are not finite"):
        freeze(net)


@pytest.mark.parametrize("preset", ["paper", "examples"])
def test_on_triton(preset):
    """The whole engine on Triton's kernels: on a GPU, or in the interpreter."""
    dtype, device = (torch.bfloat16, "cuda") if GPU else (torch.float32, "cpu")
    net = TransformNet(preset, width=4).eval()
    x = torch.rand(1, 3, 18, 21)
    exact, stock = outputs(net.to(device), x.to(device, dtype))
    if GPU:
        y = freeze(net, dtype)(x.to(device))
    else:
        with use_backend("triton"):
            y = freeze(net, dtype)(x)
    assert error(y, exact) <= 1.5 * error(stock, exact) + 1e-6


@pytest.mark.skipif(not GPU, reason="CUDA graphs are a GPU's")
def test_graphs_are_kept_for_the_last_shapes_and_replayed():
    net = build("instance").cuda()
    frozen = freeze(net, torch.bfloat16)
    images = [torch.rand(1, 3, 16 + 4 * i, 32, device="cuda") for i in range(cuda.GRAPHS + 3)]
    first = [frozen(x) for x in images]
    assert not frozen._graphs._kept, "a shape that comes once is not recorded"
    assert all(torch.equal(frozen(x), y) for x, y in zip(images, first))
    assert len(frozen._graphs._kept) == cuda.GRAPHS
    assert all(torch.equal(frozen(x), y) for x, y in zip(images, first))
    frames = [torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8) for _ in range(7)]
    assert all(torch.equal(a, frozen(b)) for a, b in zip(frozen.stream(frames), frames))


@pytest.mark.skipif(not GPU, reason="CUDA graphs are a GPU's")
def test_graphs_recorded_in_inference_mode_serve_outside_of_it():
    frozen, x = freeze(build("paper").cuda(), torch.bfloat16), torch.rand(1, 3, 32, 32, device="cuda")
    with torch.inference_mode():
        first = [frozen(x) for _ in range(3)]
    assert all(torch.equal(frozen(x), y) for y in first)
