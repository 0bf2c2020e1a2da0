"""Bad options: one line on stderr, status 2, and no file written."""

from __future__ import annotations

import pytest

STYLES = "composition_vii, great_wave, starry_night, the_scream"  # written out, so that a lost one is missed
BAD_OPTIONS = {
    "": "the following arguments are required: COMMAND",
    "paint photo.png": "invalid choice: 'paint'",
    "--nonesuch": "required: COMMAND",
    "stylize": "the following arguments are required: INPUT",
    "stylize photo.png --nonesuch": "unrecognized arguments: --nonesuch",
    "stylize photo.png --size 0": "argument --size: 0 is below 1",
    "stylize photo.png --size -5": "argument --size: -5 is not between 0 and 2^63",
    "stylize photo.png --size 1.5": "argument --size: '1.5' is not a whole number",
    "stylize photo.png --size nan": "argument --size: 'nan' is not a whole number",
    "stylize photo.png --size 99999999999999999999": "argument --size: 99999999999999999999 is not between",
    "stylize photo.png --strength 1.1": "argument --strength: 1.1 is not between 0 and 1",
    "stylize photo.png --strength -0.1": "argument --strength: -0.1 is not between 0 and 1",
    "stylize photo.png --strength nan": "argument --strength: nan is not between 0 and 1",
    "stylize photo.png --tile 15": "argument --tile: 15 is not auto, off or a number from 16 up",
    "stylize photo.png --tile small": "argument --tile: small is not auto, off or a number from 16 up",
    "stylize photo.png --strength much": "argument --strength: 'much' is not a number",
    "stylize photo.png --style photo.png": "for a painting use `fastperc optimize`, or train a network by",
    "stylize photo.png --style gone.JPG": f"--style takes a name ({STYLES}), not a file",
    "stylize photo.png --style monet": f"no style 'monet'; use {STYLES} or --model FILE",
    "stylize photo.png --style a --model b": "give each network one mask, in the same order",
    "stylize photo.png --style a --style b": "--style and --model name 2 in all, and --mask is given 0 times",
    "stylize photo.png --style a --style b --mask photo.png": "name 2 in all, and --mask is given 1 times",
    "stylize photo.png --mask photo.png --mask photo.png": "name 1 in all, and --mask is given 2 times",
    "stylize photo.png --mask gone.png": "gone.png: no such file",
    "stylize photo.png --mask": "argument --mask: expected one argument",
    "stylize photo.png --model": "argument --model: expected one argument",
    "train --out run": "the following arguments are required: --style, --data",
    "train --style a --data b --out c --preset d": "argument --preset: invalid choice: 'd'",
    "train --style a --data b --out c --lr nan": "argument --lr: nan is not a finite number above 0",
    "train --style a --data b --out c --lr 0": "argument --lr: 0 is not a finite number above 0",
    "train --style a --data b --out c --tv-weight inf": "argument --tv-weight: inf is not a finite number from 0 up",
    "train --style a --data b --out c --style-weight -1": "argument --style-weight: -1 is not a finite number",
    "train --style a --data b --out c --seed 18446744073709551616": "argument --seed: 18446744073709551616 is not",
    "optimize photo.png --style a": "the following arguments are required: -o/--out",
    "optimize photo.png --style a -o b --iterations 0": "argument --iterations: 0 is below 1",
    "optimize photo.png --style a -o b --optimizer sgd": "argument --optimizer: invalid choice: 'sgd'",
    "sr": "fastperc sr: the following arguments are required: COMMAND",
    "sr nonesuch": "invalid choice: 'nonesuch'",
    "sr upscale": "fastperc sr upscale: the following arguments are required: INPUT",
    "sr upscale photo.png --scale 3": "argument --scale: invalid choice: 3",
    "sr upscale photo.png --method best": "argument --method: invalid choice: 'best'",
    "sr upscale photo.png --method pixel --model m": "not allowed with argument",
    "sr upscale photo.png --scale 2": "no 'pixel' network ships for ×2; use --scale 4 or 8, or give the file of a",
    "sr upscale photo.png --scale 16 --method srcnn": "no 'srcnn' network ships for ×16; use --scale 4, or give",
    "sr upscale photo.png --scale 8 --method srcnn": "for ×8; use feature or pixel, or give the file of a network",
    "sr eval": "fastperc sr eval: the following arguments are required: --data",
    "sr eval --data . --methods ,": "argument --methods: no name given",
    "sr eval --data . --methods bicubic,best": "best: neither a method (bicubic, srcnn, pixel, feature) nor a file",
    "sr eval --data . --crop 1,2": "argument --crop: 1,2 is not a square like 120,80,64",
    "sr eval --data . --crop 1,2,0": "argument --crop: 1,2,0 is not a square like 120,80,64",
    "sr eval --data . --blur -1": "argument --blur: -1 is not a finite number from 0 up",
    "sr train --out run": "the following arguments are required: --data",
    "export": "the following arguments are required: -o/--out",
    "export -o net.onx": "net.onx: the name must end in .onnx or .pt2, which chooses the format",
    "export -o net.pt2 --style monet": f"no style 'monet'; use {STYLES} or --model FILE",
    "export -o net.pt2 --network monet": f"no network 'monet' ships; use {STYLES}, x4",
    "export -o net.pt2 --network all": "no network 'all' ships",
    "export -o net.pt2 --network x4_pixel --style great_wave": "not allowed with argument",
    "export -o net.pt2 --size 8": "argument --size: 8 is not a size like 512 or 1920x1080, with 16 pixels or more",
    "export -o net.pt2 --size 32,64": "argument --size: 32,64 is not dynamic, fixed or one size like 512 or 1920x1080",
    "export -o net.pt2 --input int8": "argument --input: invalid choice: 'int8'",
    "convert": "the following arguments are required: INPUT, -o/--out",
    "convert photo.png": "the following arguments are required: -o/--out",
    "convert photo.png -o net.pth": "net.pth: the name must end in .safetensors, .onnx or .pt2",
    "convert photo.png -o net.pt2": "photo.png: not a file of tensors (.safetensors, .npz or PyTorch), or damaged",
    "convert gone.t7 -o net.pt2": "gone.t7: no such file",
    "doctor now": "unrecognized arguments: now",
}


@pytest.mark.parametrize("line", BAD_OPTIONS, ids=lambda line: line or "nothing")
def test_bad_options(refused, line):
    refused(*line.split(), says=BAD_OPTIONS[line])


def test_bad_options_with_line_breaks_are_one_line(refused):
    refused("doctor", "a\nb", says="unrecognized arguments: a b (see fastperc --help)")


def test_an_empty_name_is_not_the_current_folder(refused, model):
    refused("stylize", "", "--model", model, says="argument INPUT: the name is empty")


@pytest.mark.parametrize("size", [8, 15, 10**9, 2**62])
def test_sizes_that_no_network_accepts(refused, model, size):
    says = "is too small" if size < 16 else "is larger than"
    refused("stylize", "photo.png", "-o", "new.png", "--model", model, "--size", size, says=says)


@pytest.mark.parametrize("device", ["nonesuch", "cuda:99", "meta", "gpu", "cpu:x", "xla", "vulkan", ""])
@pytest.mark.parametrize("command", ["stylize", "optimize", "train"])
def test_unknown_devices(refused, model, photo_folder, vgg_options, command, device):
    options = {
        "stylize": ["photo.png", "-o", "new.png", "--model", model],
        "optimize": ["photo.png", "-o", "new.png", "--style", "photo.png", *vgg_options],
        "train": ["--style", "photo.png", "--data", photo_folder, "--out", "run", "--size", 16, *vgg_options],
    }
    refused(command, *options[command], "--device", device, says=f"no device '{device}' here; use cpu")
