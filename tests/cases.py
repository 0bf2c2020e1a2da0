"""Shapes, dtypes and tolerances that the tests share, and how errors are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from fastperc.types import Window

# Odd, thin, single-pixel and empty shapes.
SHAPES = [
    (2, 3, 7, 11),
    (1, 1, 1, 1),
    (1, 3, 1, 9),
    (3, 2, 9, 1),
    (0, 3, 4, 4),
    (2, 5, 33, 65),
    (1, 70, 5, 6),
    (4, 3, 64, 300),
]

# The ways in which an image [N, C, H, W] may lie in memory.
LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "nhwc": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: torch.nn.functional.pad(x, (2, 3, 1, 2))[..., 1 : 1 + x.shape[2], 2 : 2 + x.shape[3]],
    "cropped-nhwc": lambda x: torch.nn.functional.pad(x, (2, 3, 1, 2)).contiguous(memory_format=torch.channels_last)[
        ..., 1 : 1 + x.shape[2], 2 : 2 + x.shape[3]
    ],
    "some-channels": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every-other-channel": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "some-channels-nhwc": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:, :1].expand(x.shape),
}

# Images that a network gets, and windows of them.
IMAGES = {
    "levels-hwc": lambda: torch.randint(0, 256, (2, 13, 17, 3), dtype=torch.uint8).permute(0, 3, 1, 2),
    "levels-chw": lambda: torch.randint(0, 256, (1, 3, 13, 17), dtype=torch.uint8),
    "fp32": lambda: torch.rand(2, 3, 13, 17),
    "fp16-channels-last": lambda: torch.rand(2, 3, 13, 17).half().contiguous(memory_format=torch.channels_last),
    "fp64": lambda: torch.rand(1, 3, 13, 17, dtype=torch.float64),
    "slice": lambda: torch.rand(3, 5, 20, 20)[::2, 1:4, 3:16, 2:19],
}
WINDOWS = [Window(0, 0, 13, 17), Window(-40, -3, 100, 40), Window(4, 5, 3, 2), Window(-100, 30, 50, 64)]

# The norms of total variation.
NORMS = ["l2", "l1"]

# The first layers of VGG-16: (name, in, out). Enough for relu1_2 and relu2_2.
SHALLOW_VGG = [("1_1", 3, 64), ("1_2", 64, 64), ("2_1", 64, 128), ("2_2", 128, 128)]

# The largest relative error (of norms) against the same input in float64. Sums are kept in float32 or wider. Gradients
# are rounded to the dtype twice: by the kernel, and by the multiplication with the incoming gradient.
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LOSS_ERROR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
GRAD_ERROR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


# What Winograd by tiles of 4×4 pixels may add to the error in float32: of a frozen network's layer, and of all of it.
LAYER_ERROR_4X4, NETWORK_ERROR_4X4 = 2e-6, 1e-5

# The device of each backend: a GPU if there is one. Without a GPU, Triton's kernels run in its interpreter.
GPU = torch.cuda.is_available()
RUNS = [("cpu", "native"), ("cuda" if GPU else "cpu", "triton"), *[("cuda", "native")] * GPU]
DEVICES = ["cpu", *["cuda"] * GPU]


def half_precision(backend: str) -> list[torch.dtype]:
    """The half-precision dtypes to test. Triton's interpreter gets float16 only: its products of bfloat16 are wrong."""
    return [torch.float16] if backend == "triton" and not GPU else [torch.float16, torch.bfloat16]


def shape_id(shape: tuple[int, ...]) -> str:
    return "-".join(f"{name}{size}" for name, size in zip("BCHW", shape))


def dtype_id(dtype: torch.dtype) -> str:
    return {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(dtype).split(".")[1]]


def error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; the numerator alone if ``expected`` is zero. NaN gives infinity."""
    actual, expected = actual.double(), expected.double()
    scale = expected.norm().item() or 1.0
    value = (actual - expected).norm().item() / scale
    return value if value == value else float("inf")


def no_worse(ours: Tensor, stock: Tensor, exact: Tensor, floor: float = 4e-7) -> None:
    """Asserts that the error is at most 1.5 times that of stock PyTorch at the same dtype, plus ``floor``."""
    own, peer = error(ours, exact), error(stock, exact)
    assert own <= 1.5 * peer + floor, f"{own:.3g} > 1.5 · {peer:.3g} + {floor:.3g}"
