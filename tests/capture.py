"""What a CUDA graph cannot record, found on a machine without a GPU.

``python tests/capture.py [--spoiled] [CASE ...]`` runs the engine's pass and whole training steps on CPU tensors that
say they are on a GPU (``fastperc.kernels.launches``), and prints what each would do that a capture refuses, as JSON.
``--spoiled``: packing the weights makes a constant on the GPU from the host's memory, as it once did.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
ATEN = torch.ops.aten
TENSOR_FROM_HOST = {ATEN.lift_fresh.default}  # torch.tensor, new_tensor, from_numpy, an index that is a list
WAITS = {  # operations whose result, or the shape of it, the host must know
    ATEN._local_scalar_dense.default,
    ATEN.equal.default,
    ATEN.is_nonzero.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN._unique2.default,
    ATEN.unique_dim.default,
    ATEN.repeat_interleave.Tensor,
}
# Functions that dispatch nothing on the CPU, but copy to the host or wait where the tensor is on a GPU.
TO_HOST = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.pin_memory, Tensor.item, Tensor.__array__}
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.rand, torch.randn, torch.eye}
FACTORIES |= {torch.linspace, torch.empty_strided, torch.scalar_tensor, torch.randint}


class RefusedCalls(TorchDispatchMode):
    """Collects the calls of the block that a capture refuses: each a call and the line of fastperc that makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TENSOR_FROM_HOST | WAITS or _boolean_index(func, args):
            self.note(str(func))
        return func(*args, **(kwargs or {}))

    def note(self, call: str) -> None:
        """Adds ``call``, which the current line makes."""
        frames = [frame for frame in traceback.extract_stack() if "/fastperc/" in frame.filename]
        frames = [frame for frame in frames if not frame.filename.endswith("/launches.py")]
        place = f"{frames[-1].filename.rpartition('/fastperc/')[2]}:{frames[-1].lineno}" if frames else "a test"
        self.calls.append(f"{call} at {place}")

    def check(self, function: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Notes a call of PyTorch's Python functions that copies between the host and the device ``cuda``."""
        if function in TO_HOST:
            self.note(function.__name__)
        elif function is Tensor.to and "cpu" in (_device_type(value) for value in (*args[1:], *kwargs.values())):
            if not _in_optimizer():
                self.note("to a CPU")
        elif function in FACTORIES and _device_type(kwargs.get("device")) != "cuda":
            self.note(f"{function.__name__} on a CPU")


def _boolean_index(func: Any, args: Any) -> bool:
    """Whether ``func`` selects or sets elements by a mask, whose count the host must know."""
    if func not in (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _in_optimizer() -> bool:
    """Whether PyTorch's optimizer makes the call: it asks C++ for the device, which is the CPU."""
    return any("/torch/optim/" in frame.filename for frame in traceback.extract_stack())


def _device_type(value: Any) -> str | None:
    """``"cuda"`` of ``"cuda:0"`` and of such a device; ``None`` of what is no device."""
    if not isinstance(value, (str, torch.device)):
        return None
    return str(value).partition(":")[0]


@contextmanager
def refused_calls() -> Iterator[list[str]]:
    """A list that receives the calls of the block that a capture refuses. To use in ``launches.recording``."""
    from fastperc.kernels import launches

    refused = RefusedCalls()
    pretend = launches._PretendGPU.__torch_function__

    def checked(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refused.check(func, args, kwargs or {})
        return pretend(self, func, types, args, kwargs)

    with mock.patch.object(launches._PretendGPU, "__torch_function__", checked), refused:
        yield refused.calls


def engine_pass(name: str, dtype: torch.dtype, image: torch.dtype) -> list[str]:
    """What a frozen network does in its second pass, which a graph records."""
    from fastperc import freeze
    from fastperc.kernels.runs import network

    engine = freeze(network(name).eval(), dtype)
    picture = torch.zeros(1, 3, 64, 72, dtype=image)
    engine(picture)
    with refused_calls() as calls:
        engine(picture)
    return calls


def training_step(
    name: str, loss: Callable[[], nn.Module], degrade: Any = None, amp: bool = True, size: int = 64
) -> list[str]:
    """What ``TrainStep`` does in the step that it records: from 8-bit photos to updated weights."""
    from fastperc.kernels.runs import network
    from fastperc.training import step

    class OnDevice:
        """Stands for the copy of photos to the device, which is not recorded."""

        def to_device(self, photos: Tensor) -> Tensor:
            return photos.contiguous(memory_format=torch.channels_last)

        def compute_stream(self) -> Any:
            return nullcontext()

    recorded: list[str] = []

    def record(run: Callable[[], Any]) -> step.Recording:
        with refused_calls() as calls:
            terms = run()
        recorded.extend(calls)
        return step.Recording(lambda: None, terms)

    net, objective = network(name).train().to(memory_format=torch.channels_last), loss()
    inputs = getattr(objective, "perturb", degrade)
    device = next(net.parameters()).device
    with (
        mock.patch.object(step, "OverlappedTransfer", lambda device: OnDevice()),
        mock.patch.object(step, "record", record),
    ):
        run = step.TrainStep(net, objective, step.adam(net.parameters(), 1e-3, device), amp, inputs)
        for _ in range(step.EAGER_STEPS + 1):
            run(torch.zeros(2, 3, size, size, dtype=torch.uint8), 1e-3)
    assert run.recording is not None, "the step was not recorded"
    return recorded


def _perceptual(stability: bool = False) -> nn.Module:
    from fastperc.kernels.runs import _perceptual_loss
    from fastperc.training.perturb import StabilityLoss

    return StabilityLoss(_perceptual_loss(), 1.0, 0.1) if stability else _perceptual_loss()


def _feature() -> nn.Module:
    """The loss of ``fastperc sr train --loss feature``, without a file of weights."""
    from fastperc.kernels.runs import _perceptual_loss
    from fastperc.training.objective import ReconstructionLoss

    loss = ReconstructionLoss("pixel", None)
    loss.distance = _perceptual_loss(style=False)
    return loss


def _pixel() -> nn.Module:
    from fastperc.training.objective import ReconstructionLoss

    return ReconstructionLoss("pixel", None)


def cases() -> dict[str, Callable[[], list[str]]]:
    """What is recorded, by name."""
    from fastperc import TransformNet, reference
    from fastperc.kernels import runs

    runs.NETWORKS["instance, reflect, nearest"] = lambda: TransformNet(
        "instance", padding="reflect", upsample="nearest"
    )
    x4 = partial(reference.degrade, scale=4, blur=1.0)
    bf16, fp16, fp32, levels = torch.bfloat16, torch.float16, torch.float32, torch.uint8
    engines = {
        f"engine, {name}, {runs.SHORT[dtype]}": partial(engine_pass, name, dtype, image)
        for name, dtype, image in [
            ("paper", bf16, levels),
            ("paper", fp32, levels),
            ("examples", fp16, fp32),
            ("instance", bf16, levels),
            ("instance, reflect, nearest", bf16, levels),
            ("super-resolution x4", bf16, fp32),
        ]
    }
    return engines | {
        "step, paper": partial(training_step, "paper", _perceptual),
        "step, paper, fp32": partial(training_step, "paper", _perceptual, amp=False),
        "step, instance, reflect, nearest": partial(training_step, "instance, reflect, nearest", _perceptual),
        "step, eccv16": partial(training_step, "eccv16", _perceptual, size=128),
        "step, super-resolution, feature": partial(training_step, "super-resolution x4", _feature, x4, size=96),
        "step, super-resolution, pixel": partial(training_step, "super-resolution x4", _pixel, x4, size=96),
        "step, noise and stability": partial(training_step, "paper", partial(_perceptual, stability=True)),
    }


def spoiled() -> Any:
    """In the block, packing a step's weights makes a constant on the GPU from the host's memory."""
    from fastperc.kernels import pack_weights

    pack = pack_weights.pack_weights

    def with_constant(weights: Any, *others: Any) -> Any:
        weights[0].new_tensor([1.0])
        return pack(weights, *others)

    return mock.patch.object(pack_weights, "pack_weights", with_constant)


def main(arguments: list[str]) -> None:
    """Prints what the named cases, or all, would do that a capture refuses."""
    from fastperc.kernels import launches

    names = [name for name in arguments if name != "--spoiled"]
    found, planted = {}, spoiled() if "--spoiled" in arguments else nullcontext()
    # Convolutions by a library run here, for their gradients; the recorder would leave their results unwritten.
    with launches.recording(90), mock.patch.object(launches, "LIBRARY", ()), planted:
        for name, run in cases().items():
            if not names or name in names:
                torch.manual_seed(0)
                found[name] = run()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
