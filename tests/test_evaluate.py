"""Evaluating super-resolution: the protocol against published figures, tables, figures and `fastperc sr eval`."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from pictures import picture, pixels
from PIL import Image

from fastperc import InputError, load, reference
from fastperc.evaluation import Score
from fastperc.photos import evaluate
from fastperc.photos.evaluate import PAPER_SCORES, Comparison
from fastperc.photos.photo import Photo, read_image
from fastperc.photos.upscale import make_painter, upscale

ROOT = Path(__file__).parents[1]
CHELSEA = ROOT / "examples" / "chelsea.jpg"
SET5 = ROOT.parent / "shared" / "sr" / "Set5"  # beside the checkout
needs_set5 = pytest.mark.skipif(not SET5.exists(), reason="Set5 is not here")


def test_a_score_leaves_out_the_border():
    truth = np.full((30, 40, 3), 100, dtype=np.uint8)
    other = truth.copy()
    other[:4] += 100
    other[10, 10] += 50
    score = evaluate.score(Photo(Image.fromarray(other)), Photo(Image.fromarray(truth)), 4)
    # The luma spans 219 levels: 43 = round(219 / 255 · 50).
    assert abs(score.psnr - 10 * math.log10(255**2 / (43**2 / (22 * 32)))) < 1e-9


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "RGB", "P"])
def test_a_file_with_one_channel_is_compared_by_its_levels_another_by_luma(tmp_path, mode):
    """Set14's comic and the like: RGB files with three equal channels are compared by luma, as published tables do."""
    gray = picture(64, 80).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(gray, dtype=np.uint16) * 257)
    else:
        image = gray.convert(mode)
    image.save(tmp_path / "image.png")
    ((_, _, _, scores),) = evaluate.compare([("image", tmp_path / "image.png")], {"bicubic": evaluate.bicubic(4)}, 4)
    truth = Photo(gray.convert("RGB"))
    small = Photo(evaluate._image(reference.to_levels(reference.degrade(truth.tensor(), 4, 0))))
    x, y = (np.asarray(photo.rgb, dtype=np.float64)[4:-4, 4:-4, 0] for photo in (evaluate.bicubic(4)(small), truth))
    if mode in ("RGB", "P"):
        x, y = (np.round(16 + 219 / 255 * levels) for levels in (x, y))
    assert abs(scores["bicubic"].psnr - 10 * math.log10(255**2 / np.square(x - y).mean())) < 1e-6


@needs_set5
def test_bicubic_on_set5_is_as_published():
    scores = [comparison.scores for comparison in evaluate.compare(files(SET5), {"bicubic": evaluate.bicubic(4)}, 4)]
    mean = evaluate.mean_scores(scores)["bicubic"]
    assert abs(mean.psnr - 28.42) < 0.02 and abs(mean.ssim - 0.810) < 0.001


def read_csv(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


@pytest.mark.parametrize("method", ["pixel", "srcnn"])
@pytest.mark.parametrize("images", [pytest.param("Set5", marks=needs_set5), "chelsea"])
def test_shipped_networks_restore_more_than_bicubic(images, method):
    """With photos made small as in training; by at least 0.3 dB for the paper's network."""
    paths = files(SET5) if images == "Set5" else [("chelsea", CHELSEA)]
    painter = make_painter(load(f"x4_{method}"))
    methods = {"bicubic": evaluate.bicubic(4), method: lambda photo: upscale(painter, photo)}
    mean = evaluate.mean_scores([comparison.scores for comparison in evaluate.compare(paths, methods, 4, blur=1.0)])
    assert mean[method].psnr > mean["bicubic"].psnr + (0.3 if method == "pixel" else 0.1)
    assert mean[method].ssim > mean["bicubic"].ssim


@pytest.mark.parametrize("scale", [4, 8])
def test_the_feature_network_is_sharper_than_bicubic(scale):
    """Sharpness is the sum of squared differences of neighbouring pixels, which blur reduces."""
    painter = make_painter(load(f"x{scale}_feature"))
    methods = {"bicubic": evaluate.bicubic(scale), "feature": lambda photo: upscale(painter, photo)}
    (comparison,) = evaluate.compare([("chelsea", CHELSEA)], methods, scale, blur=1.0)
    bicubic, feature, truth = (
        reference.tv_loss(photo.tensor()).item() for photo in (*comparison.pictures.values(), comparison.truth)
    )
    assert 1.3 * bicubic < feature < 1.5 * truth


def files(folder):
    return [(path.name, path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_compare_crops_to_the_scale_and_gives_methods_the_small_image(tmp_path, scale):
    picture(150, 139).save(tmp_path / "a.png")
    small_sizes = []

    def enlarge(photo):
        small_sizes.append(photo.rgb.size)
        return Photo(photo.rgb.resize([scale * side for side in photo.rgb.size], Image.Resampling.BICUBIC))

    (comparison,) = evaluate.compare(files(tmp_path), {"own": enlarge}, scale, blur=1.0)
    width, height = 150 // scale * scale, 139 // scale * scale
    assert small_sizes == [(width // scale, height // scale)]
    assert comparison.truth.rgb.size == comparison.pictures["own"].rgb.size == (width, height)
    assert 10 < comparison.scores["own"].psnr < 60


def test_an_image_too_small_is_refused(tmp_path):
    picture(63, 80).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="63×80 is too small; both sides need at least 64 pixels"):
        list(evaluate.compare(files(tmp_path), {"bicubic": evaluate.bicubic(4)}, 4))


SCORES = {
    "a.png": {"bicubic": Score(20.0, 0.5), "pixel": Score(21.0, 0.75)},
    "b.png": {"bicubic": Score(30.0, 0.7), "pixel": Score(math.inf, 1.0)},
}


def test_the_table_has_each_image_the_mean_and_the_paper():
    lines = evaluate.as_markdown(SCORES, PAPER_SCORES[4, "set5"]).splitlines()
    assert len({len(line) for line in lines}) == 1, "aligned"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["PSNR / SSIM", "bicubic", "pixel"]
    assert cells[2] == ["a.png", "20.00 / 0.5000", "21.00 / 0.7500"]
    assert cells[4] == ["**mean**", "**25.00 / 0.6000**", "**inf / 0.8750**"]
    assert cells[5] == ["the paper's mean", "28.43 / 0.8114", "28.40 / 0.8205"]
    assert "paper" not in evaluate.as_markdown(SCORES, {})
    assert "| the paper's mean, no blur |" in evaluate.as_markdown(SCORES, PAPER_SCORES[4, "set5"], blur=1.0)


def test_the_csv_has_a_row_for_each_image_and_the_mean(tmp_path):
    evaluate.write_csv(tmp_path / "new" / "scores.csv", SCORES)
    rows = read_csv(tmp_path / "new" / "scores.csv")
    assert [row["image"] for row in rows] == ["a.png", "b.png", "mean"]
    assert list(rows[0]) == ["image", "bicubic_psnr", "bicubic_ssim", "pixel_psnr", "pixel_ssim"]
    assert float(rows[2]["bicubic_psnr"]) == 25 and float(rows[2]["pixel_ssim"]) == 0.875


@pytest.mark.parametrize(
    ("folder", "psnr"), [("Set5", 28.43), ("set-14", 25.99), ("B100", 25.96), ("BSD100", 25.96), ("photos", None)]
)
def test_the_name_of_the_folder_selects_the_paper_scores(tmp_path, folder, psnr):
    scores = evaluate.paper_scores(tmp_path / folder, 4)
    assert (scores["bicubic"].psnr if scores else None) == psnr


def test_a_figure_shows_where_the_methods_differ(tmp_path):
    """The truth is gray; the first method is wrong in one corner. That corner is framed and shown."""
    truth = Image.new("RGB", (160, 120), (100, 100, 100))
    wrong = truth.copy()
    wrong.paste((200, 0, 0), (120, 88, 150, 118))
    comparison = Comparison(
        "a.png",
        Photo(truth),
        {"bicubic": Photo(wrong), "pixel": Photo(truth)},
        {"bicubic": Score(20.0, 0.5), "pixel": Score(30.0, 0.9)},
    )
    sheet = pixels(evaluate.figure(comparison))
    whole = 160 * 288 // 120
    assert sheet.shape == (288 + 44, whole + 3 * (288 + 12), 3)
    frame = (sheet[:288, :whole] == [255, 0, 0]).all(axis=2)
    rows, columns = np.nonzero(frame)
    assert rows.min() > 288 * 0.6 and columns.min() > whole * 0.6
    panels = [sheet[:288, whole + 12 + i * 300 :][:, :288] for i in range(3)]
    assert (panels[0] == 100).all() and (panels[2] == 100).all()
    assert (panels[1] == [200, 0, 0]).all(axis=2).mean() > 0.9
    assert (sheet[292:] < 128).any(), "captions"
    corner = pixels(evaluate.figure(comparison, (0, 0, 40)))[:288, whole + 12 + 300 :][:, :288]
    assert (corner == 100).all(), "a square that the caller chose"
    with pytest.raises(InputError, match="the square of 40 pixels at 121,0 is not inside the image, which has 160×120"):
        evaluate.figure(comparison, (121, 0, 40))


# The command line


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("set/nested").mkdir(parents=True)
    picture(101, 90).save("set/a.png")
    picture(80, 96, seed=1).convert("L").save("set/nested/b.png")
    return Path("set")


def test_eval_prints_and_writes(run, photos):
    files = "--csv", "out/scores.csv", "--markdown", "out/table.md", "--pictures", "out/pictures"
    status, out, err = run("sr", "eval", "--data", photos, "--methods", "bicubic", "--scale", 4, *files)
    assert status == 0, err
    assert out == Path("out/table.md").read_text()
    rows = read_csv("out/scores.csv")
    assert [row["image"] for row in rows] == ["a.png", "nested/b.png", "mean"]
    for row, name in zip(rows, ("a.png", "nested/b.png")):
        assert f"{float(row['bicubic_psnr']):.2f} / {float(row['bicubic_ssim']):.4f}" in out
        assert read_image(Path("out/pictures", name)).rgb.height == 288 + 44


def test_figures_do_not_overwrite_images_and_are_not_evaluated(run, photos):
    before = Path("set/a.png").read_bytes()
    status, _, err = run("sr", "eval", "--data", photos, "--methods", "bicubic", "--pictures", photos)
    assert status == 2 and "would overwrite an input" in err and Path("set/a.png").read_bytes() == before
    picture(70, 70).save("set/a.jpg")
    for _ in range(2):
        status, out, err = run("sr", "eval", "--data", photos, "--methods", "bicubic", "--pictures", "set/figures")
        assert status == 0 and len(out.splitlines()) == 2 + 3 + 1, err
    assert sorted(path.name for path in Path("set/figures").rglob("*.*")) == ["a.jpg", "a.png", "b.png"]


def test_eval_takes_networks_from_files(run, photos, sr_model):
    status, out, err = run("sr", "eval", "--data", photos, "--methods", f"bicubic,{sr_model}", "--device", "cpu")
    assert status == 0, err
    assert out.splitlines()[0].split(" | ")[-1].strip(" |") == str(sr_model)


def test_blur_lowers_the_scores(run, photos):
    def mean(*options):
        assert run("sr", "eval", "--data", photos, "--methods", "bicubic", "--csv", "a.csv", *options).status == 0
        return float(read_csv("a.csv")[-1]["bicubic_psnr"])

    assert mean("--blur", 2) < mean("--blur", 1) < mean()
