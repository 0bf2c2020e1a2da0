"""Enlarging photos with a super-resolution network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import picture, pixels
from PIL import Image

from fastperc import SRCNN, InputError, SuperResolutionNet, reference, save
from fastperc.photos.matching import match_histograms
from fastperc.photos.photo import Photo, read_image
from fastperc.photos.upscale import make_painter, upscale


def network(scale=4):
    torch.manual_seed(0)
    return SuperResolutionNet(scale, width=4).eval()


@pytest.fixture(scope="module")
def painter():
    return make_painter(network())


@pytest.mark.parametrize("make", [network, SRCNN, lambda: SRCNN(2, (9, 1, 5))], ids=["sr", "srcnn", "srcnn-x2"])
@pytest.mark.parametrize("size", [(16, 16), (33, 18), (61, 47)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_picture_is_the_output_of_the_network(make, size):
    net, photo = make(), Photo(picture(*size))
    with torch.inference_mode():
        expected = reference.to_levels(net(photo.tensor()))[0].permute(1, 2, 0)
    large = upscale(make_painter(net), photo, match=False)
    scale = net.config["scale"]
    assert large.rgb.size == (scale * size[0], scale * size[1])
    assert np.abs(pixels(large.rgb) - expected.numpy().astype(int)).max() <= 1


@pytest.mark.parametrize("make", [network, SRCNN, lambda: SRCNN(8, (9, 1, 5))], ids=["sr", "srcnn", "srcnn-x8"])
@pytest.mark.parametrize("tile", [16, 23])
def test_tiles_give_the_same_picture_as_the_whole(make, tile):
    painter, photo = make_painter(make()), Photo(picture(61, 47))
    whole = upscale(painter, photo, match=False, tile="off").rgb
    assert np.abs(pixels(upscale(painter, photo, match=False, tile=tile).rgb) - pixels(whole)).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (15, 16)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_tiny_images(painter, size):
    assert upscale(painter, Photo(picture(*size))).rgb.size == (4 * size[0], 4 * size[1])


def test_gray_stays_gray_and_alpha_and_metadata_are_kept(painter):
    photo = Photo(picture(30, 20).convert("L").convert("RGB"), Image.new("L", (30, 20), 77), {"dpi": (72, 72)})
    large = upscale(painter, photo)
    levels = pixels(large.rgb)
    assert (levels == levels[..., :1]).all() and levels.std() > 0
    assert large.alpha.size == (120, 80) and large.alpha.getextrema() == (77, 77)
    assert large.metadata == {"dpi": (72, 72)}


def test_a_result_too_large_is_refused(painter):
    with pytest.raises(InputError, match="40000×40000 is larger than"):
        upscale(painter, Photo(Image.new("RGB", (10_000, 10_000))))


def test_an_overflow_of_the_network_is_an_error():
    net = SRCNN()
    net.conv3.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not a number"):
        upscale(make_painter(net), Photo(picture(20, 20)))


def image_of(levels):
    return Image.fromarray(levels.numpy())


def test_matching_gives_the_histogram_of_the_photo():
    torch.manual_seed(1)
    levels = (torch.randn(90, 80, 3) * 20 + 90).clamp(0, 255).to(torch.uint8)
    target = (torch.rand(30, 20, 3) * 200 + torch.tensor([0, 20, 50])).to(torch.uint8)
    matched = torch.from_numpy(pixels(match_histograms(image_of(levels), image_of(target)))).double()
    ranks = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for channel in range(3):
        actual, expected = (torch.quantile(x[..., channel].double().flatten(), ranks) for x in (matched, target))
        assert (actual - expected).abs().max() <= 3
        order = levels[..., channel].flatten().long().argsort()
        assert (matched[..., channel].flatten()[order].diff() >= 0).all(), "the order of levels is kept"


def test_matching_an_image_to_itself_changes_nothing():
    image = picture(40, 30)
    assert (pixels(match_histograms(image, image)) == pixels(image)).all()
    larger = image.resize((160, 120), Image.Resampling.NEAREST)
    assert (pixels(match_histograms(larger, image)) == pixels(larger)).all()


def test_matching_one_colour():
    flat = Image.new("RGB", (8, 8), (9, 8, 7))
    assert (pixels(match_histograms(picture(16, 16), flat)) == [9, 8, 7]).all()


def test_an_srcnn_keeps_its_colours_and_is_not_matched():
    painter, photo = make_painter(SRCNN()), Photo(picture(20, 20))
    assert (pixels(upscale(painter, photo).rgb) == pixels(upscale(painter, photo, match=False).rgb)).all()


# The command line


def test_the_default_output_is_beside_the_photo(run, here, sr_model):
    status, out, err = run("sr", "upscale", "photo.png", "--model", sr_model)
    assert (status, out) == (0, ""), err
    assert read_image("photo-x4.png").rgb.size == (128, 96)


def test_a_folder_in_tiles_without_matching(run, here, sr_model):
    (here / "in").mkdir()
    picture(40, 30).save("in/a.png")
    picture(30, 40).convert("LA").save("in/b.png")
    options = "--model", sr_model, "--tile", 20, "--no-match", "--scale", 4
    assert run("sr", "upscale", "in", "-o", "out", *options).status == 0
    assert read_image("out/a.png").rgb.size == (160, 120)
    assert read_image("out/b.png").alpha.size == (120, 160)


def test_srcnn_from_a_file(run, here):
    save(SRCNN(4, (9, 1, 5)), "net.safetensors")
    assert run("sr", "upscale", "photo.png", "-o", "large.png", "--model", "net.safetensors").status == 0
    assert read_image("large.png").rgb.size == (128, 96)
