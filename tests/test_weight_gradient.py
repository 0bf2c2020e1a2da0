"""The gradients of convolutions' weights as Triton kernels, against float64."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import GPU

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
DEVICE = "cuda" if GPU else "cpu"  # where Triton's interpreter stands in
TOLERANCE = 1e-5  # of the largest number: the products are of the rounded maps, and are added up in float32


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """Triton's interpreter multiplies the bits of bfloat16 as whole numbers. Here it multiplies the numbers."""
    if GPU:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    create_dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    )


def nhwc(*shape, dtype, seed):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last)


def exact_gradient(dense, gathered, geometry):
    """[D, rows, columns, G] in float64."""
    taps_h, taps_w = geometry.taps
    gathered = F.interpolate(gathered.double(), scale_factor=geometry.upsample, mode="nearest")
    height, width = dense.shape[2:]
    bottom = max((height - 1) * geometry.stride + taps_h - geometry.top - gathered.shape[2], 0)
    right = max((width - 1) * geometry.stride + taps_w - geometry.left - gathered.shape[3], 0)
    border = (geometry.left, right, geometry.top, bottom)
    padded = F.pad(gathered, border, mode="reflect" if geometry.reflect else "constant")
    taps = [
        padded[:, :, i:, j:][:, :, :: geometry.stride, :: geometry.stride][:, :, :height, :width]
        for i in range(taps_h)
        for j in range(taps_w)
    ]
    return torch.stack([torch.einsum("ndhw,nghw->dg", dense.double(), tap) for tap in taps], 1).unflatten(
        1, geometry.taps
    )


def computed(run, sums_class):
    """What ``run`` makes of a sum in parts, twice: the same bit for bit."""
    from fastperc.kernels.sum_parts import SumOf

    results = []
    for _ in range(2):
        sums = sums_class(1 << 20, torch.device(DEVICE))
        run(SumOf(sums, 0))
        (entry,) = sums.waiting.values()
        results.append((sums.add_up()[0], entry.parts))
    (first, parts), (second, _) = results
    assert torch.equal(first, second)
    return first, parts


CASES = {  # images, D, G, height and width of dense, geometry
    "one tap": (1, 20, 128, (9, 5), dict(taps=(3, 3), top=1, left=1)),
    "several taps": (2, 20, 16, (9, 11), dict(taps=(3, 3), top=1, left=1)),
    "stride 2": (2, 24, 40, (7, 9), dict(taps=(3, 3), top=1, left=1, stride=2)),
    "reflected": (2, 70, 8, (8, 9), dict(taps=(3, 3), top=1, left=1, reflect=True)),
    "reflected, one tap": (1, 16, 64, (10, 9), dict(taps=(1, 3), left=1, reflect=True)),
    "upsampled": (2, 16, 12, (10, 18), dict(taps=(3, 3), top=1, left=1, upsample=2)),
    "valid": (1, 16, 5, (6, 40), dict(taps=(3, 2))),
    "narrow": (5, 3, 3, (17, 1), dict(taps=(1, 1))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case, dtype):
    from fastperc.kernels.sum_parts import SplitSums
    from fastperc.kernels.weight_gradient import Geometry, weight_gradient

    images, dense_channels, channels, (height, width), geometry = case
    geometry = Geometry(**geometry)
    dense = nhwc(images, dense_channels, height, width, dtype=dtype, seed=0)
    size = [
        (n * geometry.stride if border else n + taps - 1) // geometry.upsample
        for n, taps, border in zip((height, width), geometry.taps, (geometry.top, geometry.left))
    ]
    gathered = nhwc(images, channels, *size, dtype=dtype, seed=1)
    out, _ = computed(lambda destination: weight_gradient(dense, gathered, geometry, destination), SplitSums)
    exact = exact_gradient(dense, gathered, geometry)
    assert out.shape == exact.shape and (out - exact).abs().max() <= TOLERANCE * exact.abs().max()


@pytest.mark.parametrize("multiprocessors", [1, 8, 132])
def test_the_parts_follow_the_gpu(multiprocessors, monkeypatch):
    from fastperc.kernels import rgb_weight_gradient, weight_gradient
    from fastperc.kernels.rgb_conv_stem import rgb_prepare
    from fastperc.kernels.sum_parts import SplitSums
    from fastperc.types import Padding

    for module in (weight_gradient, rgb_weight_gradient):
        monkeypatch.setattr(module, "multiprocessors", lambda device: multiprocessors)
    dense = nhwc(3, 16, 24, 20, dtype=torch.float16, seed=0)
    gathered = nhwc(3, 16, 24, 20, dtype=torch.float16, seed=1)
    geometry = weight_gradient.Geometry((3, 3), 1, 1)
    out, parts = computed(
        lambda destination: weight_gradient.weight_gradient(dense, gathered, geometry, destination), SplitSums
    )
    exact = exact_gradient(dense, gathered, geometry)
    assert (out - exact).abs().max() <= TOLERANCE * exact.abs().max()
    assert parts == {1: 1, 8: 5, 132: 6}[multiprocessors]  # of 27 tiles; a part has 3 programs, a multiprocessor 2

    image = nhwc(3, 3, 24, 20, dtype=torch.float16, seed=1)
    runs = rgb_weight_gradient.picture_runs(20, 9)
    picture = rgb_prepare(image, (0, 0, 24, 20), Padding((4, 4, 4, 4), "zeros"), (1.0, 0.0), torch.float16, runs)
    out, parts = computed(
        lambda destination: rgb_weight_gradient.rgb_weight_gradient(dense, picture, 9, 0, False, destination), SplitSums
    )
    exact = exact_gradient(dense, image, weight_gradient.Geometry((9, 9), 4, 4))
    assert (out - exact).abs().max() <= TOLERANCE * exact.abs().max()
    assert parts == {1: 1, 8: 3, 132: 3}[multiprocessors]  # of 12 steps, at least 4 each


@pytest.mark.parametrize(
    ("steps", "blocks", "programs", "expected"),
    [
        (256, 9, 132, (14, 19)),  # 126 programs: no second wave
        (256, 18, 264, (14, 19)),
        (256, 300, 132, (1, 256)),  # one part has more programs than a wave
        (10, 1, 132, (2, 5)),  # four steps or more each
        (3, 1, 132, (1, 3)),
        (37, 5, 50, (8, 5)),
    ],
)
def test_a_whole_wave(steps, blocks, programs, expected):
    from fastperc.kernels.weight_gradient import parts_of

    parts, part_steps = parts_of(steps, blocks, programs)
    assert (parts, part_steps) == expected
    assert parts * part_steps >= steps > (parts - 1) * part_steps
