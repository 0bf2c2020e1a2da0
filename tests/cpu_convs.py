"""What the tests of the C++ convolutions of frozen networks share: those of depthwise, first and other convolutions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastperc import ops, reference
from fastperc.types import NO_EPILOGUE, Activation, Epilogue, Geometry


def compare(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    """The result of ``ops.conv_bn_relu``, after a comparison with float64."""
    call = x, weight, bias, geometry, epilogue
    ours = ops.conv_bn_relu(*call).clone()
    padded = reference.pad(x.double(), geometry.padding)
    options = dict(stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups)
    y = torch.nn.functional.conv2d(padded, weight.double(), bias.double(), **options)
    if epilogue.skip is not None:
        y = y + epilogue.skip.double()
    expected = activated(y, epilogue.activation)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 3e-6 * expected.abs().max().clamp_min(1)
    assert torch.equal(ours, ops.conv_bn_relu(*call))
    return ours


def activated(y: Tensor, activation: Activation | None) -> Tensor:
    """``y`` after ``activation``, by PyTorch's own functions."""
    if activation is None:
        return y
    functions = {
        "relu": torch.relu,
        "leaky_relu": lambda y: torch.where(y > 0, y, activation.slope * y),
        "prelu": lambda y: torch.where(y > 0, y, activation.slopes.double().view(1, -1, 1, 1) * y),
        "relu6": lambda y: y.clamp(0, 6),
        "silu": lambda y: y * torch.sigmoid(y),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    return functions[activation.name](y)


def same_with_any_threads(run: Callable[[], Tensor]) -> None:
    """Asserts that the number of threads changes no bit of what ``run`` returns."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def same_with_any_layout_of_the_skip(*call: Tensor | Geometry, skip: Tensor) -> None:
    """Asserts that a skip in NCHW, and one that is a window of a larger map, give the same."""
    expected = compare(*call, Epilogue(skip=skip))
    cropped = torch.nn.functional.pad(skip, (1, 2, 2, 1))[:, :, 2:-1, 1:-2]
    for other in (skip.contiguous(), cropped, cropped.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(ops.conv_bn_relu(*call, Epilogue(skip=other)), expected)


def reads_and_writes_slices(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry) -> None:
    """Asserts that x and the output may be slices of larger maps, and of one map if they have one size."""
    expected = compare(x, weight, bias, geometry, NO_EPILOGUE)
    read, written = x.shape[1], expected.shape[1]
    wide = torch.randn_like(torch.cat([expected, expected], 1)).contiguous(memory_format=torch.channels_last)
    before = wide.clone()
    x_slice = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, read:]
    out = wide[:, written:]
    result = ops.conv_bn_relu(x_slice, weight, bias, geometry, NO_EPILOGUE._replace(out=out))
    assert torch.equal(result, expected) and result.data_ptr() == out.data_ptr()
    assert torch.equal(wide[:, :written], before[:, :written])
    if x.shape[2:] == expected.shape[2:]:
        shared = torch.cat([x, expected * 0], 1).contiguous(memory_format=torch.channels_last)
        ops.conv_bn_relu(shared[:, :read], weight, bias, geometry, NO_EPILOGUE._replace(out=shared[:, read:]))
        assert torch.equal(shared[:, read:], expected) and torch.equal(shared[:, :read], x)
