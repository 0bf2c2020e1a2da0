"""Fixtures of all tests. Where there is no GPU, Triton's kernels run in its interpreter.

With ``FASTPERC_TEST_ISA=avx2`` or ``baseline`` in the environment they run as on an older processor: see isa.py.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# Under pytest-xdist the workers share the cores: each computes with its part of them, and so do the commands that it
# runs. Set before the libraries that read it are imported.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))

import isa

if hidden := os.environ.get(isa.VARIABLE):
    isa.apply(hidden)

import numpy as np
import pytest
import torch
from cases import SHALLOW_VGG
from pictures import picture
from refusals import check_refused

if not torch.cuda.is_available():  # set before any kernel is imported, and before Triton's own functions are
    os.environ["TRITON_INTERPRET"] = "1"
    with suppress(ImportError):
        import triton.language  # noqa: F401

import emulation

import fastperc
from fastperc import _native, devices, dispatch
from fastperc.cli import main

if hidden:  # Winograd is chosen at baseline too, where it is slow: its code has to be tested
    _native.winograd_lanes = lambda: isa.LEVELS["avx2"].lanes

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests of Triton's kernels slow where there is no GPU, all but the first case of each: there they run in
    Triton's slow interpreter, and no user's call uses them."""
    if torch.cuda.is_available():
        return
    seen = set()
    for item in items:
        if "triton" in item.name:
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(test)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Under nohup and in a shell's background some signals are ignored, and so would the commands ignore that tests start.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)


@pytest.fixture
def half_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision is computed in half precision, on any processor; test_half_precision.py has the rest."""
    monkeypatch.setattr(devices, "_cpu_computes_in", lambda dtype: True)


@pytest.fixture(autouse=True)
def _half_precision(request: pytest.FixtureRequest) -> None:
    """Half precision is computed in half precision, but in float32 where the instruction sets for it are hidden."""
    if not hidden:
        request.getfixturevalue("half_computed")


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 are exact, also cuDNN's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor write the tables of measured backends of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dispatch.forget()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors hold NaN until they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def vgg_tensors() -> dict[str, torch.Tensor]:
    """Random weights for VGG-16 through conv2_2, under Caffe's names, scaled so that activations keep their size."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, c_in, c_out in SHALLOW_VGG:
        scale = (2 / (9 * c_in)) ** 0.5 * (1 / 64 if name == "1_1" else 1)
        tensors[f"conv{name}.weight"] = torch.randn(c_out, c_in, 3, 3, generator=generator) * scale
        tensors[f"conv{name}.bias"] = torch.randn(c_out, generator=generator) * 0.01
    return tensors


@pytest.fixture(scope="session")
def vgg_file(vgg_tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg16.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in vgg_tensors.items()})
    return path


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos, half of them in a subfolder, and one broken file with the name of a photo."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "nested").mkdir()
    for i in range(6):
        picture(60 + 7 * i, 50 + 3 * i, seed=i).save(folder / ("nested" if i % 2 else ".") / f"{i}.jpg")
    (folder / "broken.jpg").write_bytes((folder / "0.jpg").read_bytes()[:200])
    return folder


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capfd):
    """A function that runs a command in this process."""

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            status = exit.code
        return Result(status, *capfd.readouterr())

    return run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, which holds one photo and nothing else."""
    monkeypatch.chdir(tmp_path)
    picture(32, 24).save("photo.png")
    return tmp_path


@pytest.fixture
def refused(run, here):
    """Runs a command that must fail in one line and leave no trace."""
    return partial(check_refused, run, here)


@pytest.fixture(scope="module")
def one_thread():
    """On one thread, training repeats itself bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "wave.safetensors"
    fastperc.save(fastperc.TransformNet("instance", width=4), path)
    return path


@pytest.fixture
def vgg_options(vgg_file):
    return "--vgg", vgg_file, "--style-layers", "relu1_2,relu2_2", "--content-layer", "relu2_2"


@pytest.fixture(scope="session")
def sr_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "x4.safetensors"
    fastperc.save(fastperc.SuperResolutionNet(4, width=4), path)
    return path


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The CUDA launchers with kernels that run on the CPU, compiled once for all tests and workers."""
    if reason := emulation.why_not():
        pytest.skip(reason)
    return emulation.Emulation(emulation.load(emulation.build_once(tmp_path_factory)))
