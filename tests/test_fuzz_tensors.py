"""Checkpoints, VGG weights and tables of ``tune`` with random damage are read or refused in one line.

No crash, no hang, no flood of memory, and code in a file is never run. ``FASTPERC_FUZZ_SECONDS`` sets how long the
files of each format are tried; ``FASTPERC_FUZZ_SEED`` makes other files.
"""

from __future__ import annotations

import pickle
import random
import re
import struct
import time
import warnings
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import LONGEST, SECONDS, SEED, damaged

import fastperc
from fastperc import InputError, checkpoints, dispatch
from fastperc.models import VGG16Features
from fastperc.ops import OPERATIONS
from fastperc.tools import tuning
from fastperc.training.resume import read_run
from fastperc.training.style import StyleRecipe

MOST = 512 << 20  # bytes of memory that one file may take
NUMBERS = (
    "0",
    "-1",
    "1",
    "3",
    "255",
    "65536",
    "1e400",
    "NaN",
    "true",
    "null",
    '""',
    "[]",
    "{}",
    str(2**31),
    str(2**63),
)
CPU = torch.device("cpu")


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def saved(content, **options):
    buffer = BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def example():
    """A state_dict of PyTorch's fast_neural_style example, two channels wide."""
    layers = {layer: name for name, layer in checkpoints.EXAMPLE_LAYERS.items()}
    state = fastperc.TransformNet("examples", width=2).state_dict()
    return {f"{layers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": x for name, x in state.items()}


def seeds(kind, folder):
    """Sound files of a format, and some with code in them."""
    path = folder / "sound"
    if kind == "safetensors":
        nets = fastperc.TransformNet("paper", width=2), fastperc.SuperResolutionNet(2, 2), fastperc.SRCNN()
        for net in nets:
            fastperc.save(net, path)
            yield path.read_bytes()
        recipe = StyleRecipe(data="photos", style="painting.png", network={"preset": "paper", "width": 2})
        training = {**vars(recipe), "step": 3, "contents": {"the painting": "0" * 16}}
        checkpoints.save(nets[0], path, training=training, optimizer=torch.optim.Adam(nets[0].parameters()))
        yield path.read_bytes()
    elif kind == "pth":
        yield saved(example())
        yield saved({"state_dict": {f"module.{name}": x for name, x in example().items()}})
        yield saved({"conv1.conv2d.weight": Touch(folder / "executed")})
    elif kind == "old pth":
        yield saved(example(), _use_new_zipfile_serialization=False)
        yield saved({"conv1.conv2d.weight": Touch(folder / "executed")}, _use_new_zipfile_serialization=False)
        yield pickle.dumps(Touch(folder / "executed"))
    elif kind == "npz":
        weights = {"conv1_1.weight": np.ones((64, 3, 3, 3), np.float32), "conv1_1.bias": np.ones(64, np.float32)}
        for save in (np.savez, np.savez_compressed):
            buffer = BytesIO()
            save(buffer, **weights)
            yield buffer.getvalue()
        buffer = BytesIO()
        np.savez(buffer, **{"conv1_1.weight": np.array([Touch(folder / "executed")], object)})
        yield buffer.getvalue()
    else:
        keys = list(tuning.cases(1, 16))[::20]
        dispatch.save(CPU, {key: {"native": 0.5, "reference": 0.25, "triton": 1.0} for key in keys})
        yield dispatch.path_of(CPU).read_bytes()


def read(kind, path):
    """Reads the file as the commands do."""
    if kind == "npz":
        VGG16Features(path, ("relu1_1",))
    elif kind == "table":
        dispatch.forget()
        if (table := dispatch.table(CPU)) is not None:
            tuning.report(table.times)
        OPERATIONS["tv_loss"].choose(torch.rand(1, 3, 16, 16), "l2", "sum")
    else:
        checkpoints.load(path)
        if kind == "safetensors":
            read_run(StyleRecipe, path)


def with_other_number(data, rng):
    """A copy of ``data`` with one of the numbers that it holds as text replaced."""
    numbers = list(re.finditer(rb"(?<![\w.])-?\d+(\.\d+)?(?![\w.])", data[:100_000]))
    number = rng.choice(numbers) if numbers else None
    return data if number is None else data[: number.start()] + rng.choice(NUMBERS).encode() + data[number.end() :]


def damaged_within(data, rng):
    """A copy of ``data`` with damage inside, where lengths and checksums do not show it."""
    change = rng.choice([damaged, with_other_number])
    if data[8:9] == b"{":  # .safetensors
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = change(data[8:end], rng)
        return struct.pack("<Q", len(header)) + header + data[end:]
    if data[:2] == b"PK":
        content = BytesIO()
        with zipfile.ZipFile(BytesIO(data)) as archive, zipfile.ZipFile(content, "w") as copy:
            names = archive.namelist()
            chosen = rng.choice([name for name in names if name.endswith((".pkl", ".npy"))])
            for name in names:
                member = archive.read(name)
                if name == chosen:
                    length = rng.choice([len(member), 300])
                    member = change(member[:length], rng) + member[length:]
                copy.writestr(name, member)
        return content.getvalue()
    return change(data, rng)


def peak():
    """The most memory that this process has had so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("kind", ["safetensors", "pth", "old pth", "npz", "table"])
def test_damaged_files(tmp_path, kind):
    rng = random.Random(f"{SEED} {kind}")
    sound = list(seeds(kind, tmp_path))
    path = dispatch.path_of(CPU) if kind == "table" else tmp_path / "in"
    end, tried = time.monotonic() + SECONDS, 0
    while time.monotonic() < end or tried < 20:
        data = rng.choice(sound)
        path.write_bytes(rng.choice([damaged, damaged_within])(data, rng))
        start, before, tried = time.monotonic(), peak(), tried + 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if kind == "table" else "error")  # a damaged table is warned of
                read(kind, path)
        except (InputError, ValueError) as error:
            assert len(str(error)) < 1000 and "\n" not in str(error)
        assert time.monotonic() - start < LONGEST and peak() - before < MOST
        assert not (tmp_path / "executed").exists()
