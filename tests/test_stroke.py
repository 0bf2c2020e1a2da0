"""Larger and finer strokes: painting at another size, and bringing the painting back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import picture, pixels
from PIL import Image

import fastperc
from fastperc import InputError, TransformNet, freeze, reference
from fastperc.archives import Archive
from fastperc.engine import stroke as strokes
from fastperc.photos.archive import ArchivePainter
from fastperc.photos.masks import MaskedPainter
from fastperc.photos.photo import Photo, read_image
from fastperc.photos.stylize import stylize

SIZES = {1.3: (47, 67), 2: (30, 44), 2.9: (21, 30), 0.6: (102, 145)}  # at which 61 × 87 pixels are painted
HEIGHT, WIDTH = 61, 87


def build(preset: str = "instance") -> TransformNet:
    torch.manual_seed(0)
    return TransformNet(preset, width=4).eval()


@pytest.fixture(scope="module")
def engine():
    return freeze(build())


def photo(seed: int = 0, count: int = 1) -> torch.Tensor:
    levels = [torch.from_numpy(np.array(picture(WIDTH, HEIGHT, seed + i))) for i in range(count)]
    return torch.stack(levels).permute(0, 3, 1, 2)


def resized(x, size):
    return F.interpolate(x, size, mode="bicubic", antialias=True)


def expected(net, x: torch.Tensor, size: tuple[int, int], levels: bool = False) -> torch.Tensor:
    """The picture of ``x`` [N, 3, H, W], float64 in 0–1, by plain operations in float64."""

    def mean(y):
        return F.avg_pool2d(F.pad(y, (2, 2, 2, 2), mode="replicate"), 5, 1)

    small = resized(x, size)
    small = reference.to_levels(small).double() / 255 if levels else small
    with torch.no_grad():
        painting = net.double()(small)
    picture = resized(painting, x.shape[2:])
    if size[0] < x.shape[2]:
        luma, painted = reference.luma(small), reference.luma(painting)
        variance = mean(luma**2) - mean(luma) ** 2
        gain = ((mean(luma * painted) - mean(luma) * mean(painted)) / (variance + 0.0004)).clamp(0, 1)
        picture = picture + resized(gain, x.shape[2:]) * (reference.luma(x) - resized(luma, x.shape[2:]))
    return picture


@pytest.mark.parametrize("stroke", SIZES)
class TestAgainstFloat64:
    @pytest.mark.parametrize(
        ("dtype", "error"),
        [(torch.float64, 1e-4), (torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)],
        ids=["float64", "float32", "float16", "bfloat16"],
    )
    def test_floats(self, engine, stroke, dtype, error):
        x = (photo(count=2) / 255).to(dtype)
        y = engine(x, stroke=stroke)
        assert y.dtype == dtype and y.shape == x.shape
        assert (y.double() - expected(build(), x.double(), SIZES[stroke])).abs().max() < error

    @pytest.mark.parametrize("layout", ["nchw", "nhwc", "hwc"])
    def test_levels(self, engine, stroke, layout):
        x = photo(3, count=1 if layout == "hwc" else 2)
        given = x if layout == "nchw" else x.permute(0, 2, 3, 1)
        y = engine(given[0] if layout == "hwc" else given, stroke=stroke)
        assert y.dtype == torch.uint8
        y = y[None] if layout == "hwc" else y
        y = y if layout == "nchw" else y.permute(0, 3, 1, 2)
        difference = (y.double() - 255 * expected(build(), x.double() / 255, SIZES[stroke], True).clamp(0, 1)).abs()
        assert difference.max() < 1.1 and difference.mean() < 0.27  # a level of the small image may round otherwise

    def test_bands_and_tiles_are_parts_of_the_whole(self, engine, monkeypatch, stroke):
        x = photo(5) / 255
        size = SIZES[stroke]
        whole = strokes.painted_whole(x, size, torch.float32, lambda small: engine(small))
        ((window, part),) = engine.tiles(x, stroke=stroke)
        assert window == (0, 0, HEIGHT, WIDTH) and (part - whole).abs().max() < 5e-6
        monkeypatch.setattr(strokes, "BAND_PIXELS", 7 * WIDTH)
        bands = list(engine.tiles(x, stroke=stroke))
        assert [window.top for window, _ in bands] == list(range(0, HEIGHT, 7))
        for window, band in bands:
            assert (band - part[:, :, window.top : window.top + window.height]).abs().max() < 1e-6
        tiled = torch.cat([band for _, band in engine.tiles(x, 20, stroke=stroke)], dim=2)
        assert (tiled - part).abs().max() < 2e-4  # the instance norms of a picture in tiles
        assert (engine(x, stroke=stroke) - part).abs().max() < 1e-6

    def test_a_graph_gets_the_size_and_computes_the_same(self, engine, monkeypatch, stroke):
        keys, x = [], photo(7, 2)
        on_gpu = freeze(build())

        class Graphs:
            def run(self, key, inputs, paint):
                keys.append(key)
                on_gpu.device = engine.device
                return paint(inputs)

        on_gpu._graphs, on_gpu.device = Graphs(), torch.device("cuda")
        assert on_gpu._in_one_piece(x, SIZES[stroke]) and not engine._in_one_piece(x, SIZES[stroke])
        monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
        y = on_gpu._whole(x, torch.uint8, SIZES[stroke])
        assert keys == [(x.shape, x.stride(), torch.uint8, torch.uint8, SIZES[stroke])]
        assert (y.int() - engine(x, stroke=stroke).int()).abs().max() <= 1


def test_stroke_1_changes_nothing(engine):
    for x in (photo(), photo() / 255):
        assert torch.equal(engine(x, stroke=1), engine(x)) and torch.equal(engine(x, stroke=1.0), engine(x))
        assert torch.equal(engine(x, stroke="auto"), engine(x))
    assert engine(torch.rand(0, 3, 40, 40), stroke=2).shape == (0, 3, 40, 40)
    frames = [photo(i)[0].permute(1, 2, 0).contiguous() for i in range(3)]
    for stroke in (1, 2):
        assert all(torch.equal(a, engine(b, stroke=stroke)) for a, b in zip(engine.stream(frames, stroke), frames))


def test_an_image_and_a_file_keep_their_size_and_alpha(engine, tmp_path):
    image = picture(WIDTH, HEIGHT)
    image.putalpha(image.getchannel("R"))
    painted = engine(image, stroke=2)
    assert painted.size == image.size and (pixels(painted.getchannel("A")) == pixels(image.getchannel("A"))).all()
    image.save(tmp_path / "in.png")
    assert (pixels(engine(tmp_path / "in.png", stroke=2)) == pixels(painted)).all()


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (1000, 1000, (1000, 1000)),
        (20, 999, (20, 999)),
        (750, 1001, (749, 1000)),
        (3872, 5168, (749, 1000)),
        (5168, 3872, (1000, 749)),
        (40, 4000, (16, 1600)),
        (16, 4000, (16, 4000)),
    ],
)
def test_auto_follows_the_longer_side_and_keeps_16_pixels(height, width, size):
    assert strokes.painted_size(height, width, "auto") == size


@pytest.mark.parametrize("stroke", [0, -1, float("nan"), float("inf"), 0.09, 101, "large", "2", None, [2]])
def test_refuses_strokes_it_does_not_know(engine, stroke):
    with pytest.raises(ValueError, match=r"stroke must be 'auto' or a number from 0\.1 to 100, got"):
        engine(photo(), stroke=stroke)


def test_refuses_to_paint_less_than_16_pixels(engine):
    with pytest.raises(InputError, match=r"87×61 is painted at 22×15; both sides need .* a stroke of at most 3.8"):
        engine(photo(), stroke=4)
    assert engine(photo(), stroke=3.8).shape == (1, 3, HEIGHT, WIDTH)


def test_too_little_memory_is_told(engine, monkeypatch):
    monkeypatch.setattr(strokes, "UNCHECKED_BYTES", 0)
    monkeypatch.setattr(strokes, "free_memory", lambda device: 1e5)
    assert engine(photo(), stroke=2).shape == (1, 3, HEIGHT, WIDTH)
    with pytest.raises(InputError, match=r"870×610 pixels are painted, which take .* use a larger stroke"):
        engine(photo(), stroke=0.1)


@pytest.mark.parametrize("stroke", [2, "auto"])
def test_networks_that_enlarge_take_no_stroke(stroke):
    large = freeze(fastperc.SuperResolutionNet(4, width=4))
    with pytest.raises(ValueError, match="a network that enlarges takes no stroke but 1"):
        large(photo(), stroke=stroke)


def test_flat_parts_get_no_noise_and_edges_are_sharp(engine):
    """A painting equal to its photo gets an edge back; a flat painting stays flat."""
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 30:] = 0.9
    for painting, target in ((lambda x: x, edge), (lambda x: torch.full_like(x, 0.5), torch.full_like(edge, 0.5))):
        y = strokes.painted_whole(edge, (16, 16), torch.float32, painting)
        assert (y - target).abs().max() < 0.06
    noise = 0.5 + 0.01 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    y = strokes.painted_whole(noise, (16, 16), torch.float32, lambda x: x)
    assert y.std() < 0.5 * noise.std()


def test_mask_strength_and_colours_apply_at_full_size(engine):
    shot = Photo(picture(WIDTH, HEIGHT))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:31, 20:51] = 255
    painted = pixels(stylize(engine, shot, stroke=2).rgb)
    masked = pixels(stylize(MaskedPainter([(engine, mask)]), shot, stroke=2).rgb)
    white = mask == 255
    assert (masked[white] == painted[white]).all() and (masked[~white] == pixels(shot.rgb)[~white]).all()
    assert (pixels(MaskedPainter([(engine, mask)])(shot.rgb, stroke=2)) == masked).all()
    half = pixels(stylize(engine, shot, 0.5, stroke=2).rgb)
    assert np.abs(half - (painted + pixels(shot.rgb)) / 2).max() <= 1
    assert (pixels(stylize(engine, shot, 0.0, True, stroke=2).rgb) == pixels(shot.rgb)).all()


@pytest.mark.parametrize("fixed", [False, True])
def test_archives(fixed):
    net, size = build(), (30, 44)
    shape = (1, 3, *size) if fixed else ()
    painter = ArchivePainter(Archive(Path("x.pt2"), net, torch.float32, torch.device("cpu"), shape))
    levels = photo()[0].permute(1, 2, 0)
    bands = [part for _, part in painter.tiles(levels, dtype=torch.float32, stroke=2)]
    difference = torch.cat(bands, dim=2) - expected(build(), photo().double() / 255, size, True)
    assert difference.abs().max() < 5e-3 and difference.abs().mean() < 2e-4
    if fixed:
        with pytest.raises(InputError, match="takes 44×30 pixels only"):
            list(painter.tiles(torch.zeros(1200, 1600, 3, dtype=torch.uint8), stroke="auto"))
    with pytest.raises(ValueError, match="stroke must be"):
        list(painter.tiles(levels, stroke=0))


class TestCommand:
    def read(self, name):
        return pixels(read_image(name).rgb)

    @pytest.mark.parametrize(("width", "stroke"), [(1000, 1), (1400, 1.4)])
    def test_the_default_is_auto(self, run, here, model, width, stroke):
        picture(width, 40).save("wide.png")
        assert run("stylize", "wide.png", "--model", model, "-o", "auto.png") == (0, "", "")
        assert run("stylize", "wide.png", "--model", model, "-o", "set.png", "--stroke", stroke) == (0, "", "")
        assert run("stylize", "wide.png", "--model", model, "-o", "1.png", "--stroke", 1) == (0, "", "")
        assert Path("auto.png").read_bytes() == Path("set.png").read_bytes()
        assert (Path("auto.png").read_bytes() == Path("1.png").read_bytes()) == (stroke == 1)
        net = freeze(fastperc.load(model))
        assert (self.read("auto.png") == pixels(net(Image.open("wide.png"), stroke="auto"))).all()

    def test_sixteen_bits_and_transparent(self, run, here, model):
        levels = pixels(picture(64, 48))[..., 0].astype(np.uint16) * 257
        Image.fromarray(levels).save("deep.png")
        clear = picture(64, 48)
        clear.putalpha(clear.getchannel("G"))
        clear.save("clear.png")
        for name in ("deep.png", "clear.png"):
            assert run("stylize", name, "--model", model, "-o", f"out-{name}", "--stroke", 2).status == 0
            assert read_image(f"out-{name}").rgb.size == (64, 48)
        assert (pixels(read_image("out-clear.png").alpha) == pixels(clear.getchannel("A"))).all()

    def test_a_clip(self, run, here, model):
        first, *others = (picture(64, 48, seed) for seed in range(3))
        first.save("clip.png", save_all=True, append_images=others, duration=40)
        options = "--model", model, "--stroke", 2
        assert run("stylize", "clip.png", "--frames-dir", "frames", *options).status == 0
        assert run("stylize", "clip.png", "--frames-dir", "tiled", *options, "--tile", 20).status == 0
        net = freeze(fastperc.load(model))
        for number, frame in enumerate((first, *others), 1):
            painted = pixels(net(frame, stroke=2))
            assert (self.read(f"frames/{number:06}.png") == painted).all()
            assert np.abs(self.read(f"tiled/{number:06}.png") - painted).max() <= 1

    def test_a_clip_that_is_too_small_is_named(self, run, here, model):
        for name, size in {"small.png": (40, 30), "large.png": (64, 48)}.items():
            picture(*size).save(name, save_all=True, append_images=[picture(*size, 1)], duration=40)
        Path("out").mkdir()
        status, _, said = run("stylize", "small.png", "large.png", "-o", "out/", "--model", model, "--stroke", 2)
        assert (status, Path("out/large.png").exists(), Path("out/small.png").exists()) == (2, True, False)
        assert "skipped small.png: with stroke 2, 40×30 is painted at 20×15" in " ".join(said.split())

    def test_masks_share_the_stroke(self, run, here, model):
        picture(64, 48).save("in.png")
        Image.new("L", (2, 2), 255).save("white.png")
        options = "--model", model, "--stroke", 2, "-o"
        assert run("stylize", "in.png", *options, "plain.png").status == 0
        assert run("stylize", "in.png", "--mask", "white.png", *options, "masked.png").status == 0
        assert Path("plain.png").read_bytes() == Path("masked.png").read_bytes()

    @pytest.mark.parametrize("stroke", ["0", "-1", "nan", "inf", "1e9", "large", ""])
    def test_bad_values(self, refused, model, stroke):
        told = "is not" if stroke in ("large", "") else "is not auto or a number from 0.1 to 100"
        refused("stylize", "photo.png", "--model", model, f"--stroke={stroke}", says=f"{told}")

    def test_too_small(self, refused, model):
        says = "photo.png: with stroke 2, 32×24 is painted at 16×12"
        refused("stylize", "photo.png", "--model", model, "--stroke", 2, says=says)
