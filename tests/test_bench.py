"""`fastperc bench`: what it measures and prints."""

from __future__ import annotations

import pytest
import torch

import fastperc
from fastperc import backends, devices
from fastperc.tools import bench

COLUMNS = ["network", "image", "dtype", "PyTorch", "ms", "spread", "fastperc", "ms", "spread", "faster", "pictures/s"]
SHIPPED = "composition_vii, great_wave, starry_night, the_scream, x4_feature, x4_pixel, x4_srcnn, x8_feature, x8_pixel"


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.0)


def test_a_line_for_each_size_and_dtype(run, model):
    status, out, err = run("bench", "--model", model, "--sizes", "16,33x24", "--device", "cpu")
    assert status == 0 and not err
    machine, head, *lines = out.splitlines()
    assert machine.startswith(devices.processor_model()) and devices.vector_instructions() in machine
    assert f"torch {torch.__version__}, fastperc {fastperc.__version__}" in machine
    assert head.split() == COLUMNS
    cells = [line.split() for line in lines[:4]]
    assert [line[:3] for line in cells] == [
        ["wave", size, dtype] for dtype in ("float32", "bfloat16") for size in ("16x16", "33x24")
    ]
    for line in cells:
        stock, _, ours, _, faster, speed = (float(cell.removesuffix("x")) for cell in line[3:])
        assert faster == pytest.approx(stock / ours, rel=1e-2, abs=1e-2)
        assert speed == pytest.approx(1000 / ours, rel=2e-3)
    assert not lines[4:]


def test_networks_that_ship_and_dtypes(run, monkeypatch):
    monkeypatch.setattr(devices, "_cpu_computes_in", lambda dtype: dtype != torch.float16)
    options = "--networks starry_night,x4_srcnn,x8_pixel,x8_pixel --size 16 --dtype float16 --device cpu"
    status, out, err = run("bench", *options.split())
    assert status == 0 and not err
    *lines, note = out.splitlines()[2:]
    assert [line.split()[:3] for line in lines] == [
        [name, "16x16", "float16"] for name in ("starry_night", "x4_srcnn", "x8_pixel")
    ]
    assert note == "frozen networks compute float16 in float32, which is faster here"


def test_stock_pytorch_runs_the_reference_in_channels_last(monkeypatch):
    seen = []
    net = fastperc.TransformNet("paper", width=4).eval()
    stock, engine = bench.painters(net, torch.float32)
    assert isinstance(engine, fastperc.engine.Engine) and stock is not net
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in stock.parameters() if p.dim() == 4)
    monkeypatch.setattr(stock, "forward", lambda x: seen.append((x.dtype, backends.forced())) or x)
    image = torch.rand(1, 3, 16, 16)
    bench.by_pytorch(stock, torch.bfloat16)(image)
    assert seen == [(torch.bfloat16, "reference")]


def test_all_networks(run, monkeypatch):
    names = []
    monkeypatch.setattr(bench, "report", lambda networks, *others: names.extend(name for name, _ in networks) or "")
    assert run("bench", "--networks", "all").status == 0 and ", ".join(names) == SHIPPED


@pytest.mark.parametrize("sizes", ["15", "16x", "16x16x16", "large", "-20"])
def test_refuses_bad_sizes(run, model, sizes):
    status, _, err = run("bench", "--model", model, f"--sizes={sizes}")
    reason = f"argument --sizes/--size: {sizes} is not a size like 512 or 1920x1080, with 16 pixels or more a side"
    assert status == 2 and err == f"fastperc bench: {reason} (see fastperc bench --help)\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--networks", "mona_lisa"], f"no network 'mona_lisa' ships; use {SHIPPED} or all, or --model FILE"),
        (["--networks", ","], "argument --networks: no name given"),
        (["--networks", "x4_pixel", "--model", "m"], "not allowed with"),
        (["--dtype", "int8"], "argument --dtype: int8 is not one of float32, bfloat16, float16"),
        (["--device", "abacus"], "no device 'abacus' here"),
        (["--model", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_a_line(run, here, arguments, told):
    status, out, err = run("bench", *arguments)
    assert (status, out) == (2, "") and told in err and err.count("\n") == 1
