"""Windows of images, reflected and normalised, against numpy's padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DEVICES, IMAGES, WINDOWS

from fastperc import ops, use_backend
from fastperc.types import Window


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *[("native", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
        *[("reference", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)],
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: "_".join(map(str, window)))
@pytest.mark.parametrize("image", IMAGES)
def test_is_a_window_of_the_reflected_image(image, window, device, backend, dtype):
    x = IMAGES[image]()
    margin = 120
    exact = x.double().numpy() / (255 if x.dtype == torch.uint8 else 1)
    reflected = np.pad(exact, ((0, 0), (0, 0), (margin, margin), (margin, margin)), mode="reflect")
    top, left = window.top + margin, window.left + margin
    expected = reflected[:, :, top : top + window.height, left : left + window.width] * 2 - 1
    with use_backend(backend):
        y = ops.image_io(x.to(device), window, (2, -1), dtype)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(y.double().cpu().numpy() - expected).max() <= torch.finfo(dtype).eps / 2 + 2.4e-7


@pytest.mark.parametrize("device", DEVICES)
def test_a_single_pixel_is_everywhere(device):
    x = torch.rand(1, 3, 1, 1, device=device)
    assert torch.equal(ops.image_io(x, Window(-5, -6, 9, 11), (1, 0), torch.float32), x.expand(1, 3, 9, 11))


def test_refuses_what_is_no_image():
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\], got \[1, 4, 8, 8\]"):
        ops.image_io(torch.rand(1, 4, 8, 8), Window(0, 0, 8, 8), (1, 0), torch.float32)
