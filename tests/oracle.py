"""The networks of the paper and the total variation, written again as plain functions in float64, without the package.

Weights come from a state_dict by position: it lists convolutions and norms in the order the data meets them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Weights:
    """The parameters of a network in float64, taken in order."""

    def __init__(self, state_dict: dict[str, Tensor], norm: str) -> None:
        self.tensors = {
            name: tensor.double().clone().requires_grad_(not name.endswith(("running_mean", "running_var")))
            for name, tensor in state_dict.items()
            if not name.endswith("num_batches_tracked")
        }
        self.queue: Iterator[Tensor] = iter(self.tensors.values())
        self.norm = norm
        self.margin = 1.0  # how near to 0 the input of a ReLU came, as a share of the largest of its layer

    def take(self, count: int) -> list[Tensor]:
        return [next(self.queue) for _ in range(count)]


def reflected(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """numpy's reflect padding, by gathering indices."""
    rows = np.pad(np.arange(x.shape[2]), (top, bottom), mode="reflect")
    columns = np.pad(np.arange(x.shape[3]), (left, right), mode="reflect")
    return x[:, :, rows][:, :, :, columns]


def conv(x: Tensor, w: Weights, stride: int = 1, padding: int = 0, reflect: bool = False) -> Tensor:
    weight, bias = w.take(2)
    if reflect:
        x, padding = reflected(x, *[padding] * 4), 0
    return F.conv2d(x, weight, bias, stride, padding)


def normalise(x: Tensor, w: Weights, training: bool) -> Tensor:
    if w.norm == "instance":
        gamma, beta = w.take(2)
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
    else:
        gamma, beta, running_mean, running_var = w.take(4)
        if training:
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        else:
            mean, var = running_mean.view(1, -1, 1, 1), running_var.view(1, -1, 1, 1)
    return (x - mean) / (var + 1e-5).sqrt() * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)


def relu(x: Tensor, w: Weights) -> Tensor:
    w.margin = min(w.margin, (x.detach().abs().min() / x.detach().abs().max()).item())
    return x.clamp_min(0)


def block(x: Tensor, w: Weights, residual: bool | str, padding: int, reflect: bool, training: bool) -> Tensor:
    y = relu(normalise(conv(x, w, 1, padding, reflect), w, training), w)
    y = normalise(conv(y, w, 1, padding, reflect), w, training)
    if residual is False:
        return y.clamp_min(0)
    y = y + (x if padding else x[:, :, 2:-2, 2:-2])
    return y.clamp_min(0) if residual == "he" else y


def transposed(x: Tensor, w: Weights) -> Tensor:
    """The ½-stride convolution as the convolution of a map with zeros between its pixels."""
    weight, bias = w.take(2)
    spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    spread[:, :, ::2, ::2] = x
    return F.conv2d(spread, weight.transpose(0, 1).flip(2, 3), bias, padding=1)


def doubled(x: Tensor, w: Weights, upsample: str, reflect: bool = False) -> Tensor:
    if upsample == "nearest":
        return conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), w, 1, 1, reflect)
    return transposed(x, w)


def transform_net(
    x: Tensor, w: Weights, output: str, residual: bool | str, training: bool, upsample: str, padding: str
) -> Tensor:
    reflect, border = padding == "reflect", 40 if padding == "reflect40" else 0
    height, width = x.shape[2:]
    mean = torch.tensor([123.68, 116.779, 103.939], dtype=x.dtype).view(3, 1, 1)
    x = {"linear": 255 * x, "tanh": 2 * x - 1, "caffe": 255 * x - mean}[output]
    x = reflected(x, border, border + -width % 4, border, border + -height % 4)
    for stride, pad in ((1, 4), (2, 1), (2, 1)):
        x = normalise(conv(x, w, stride, pad, reflect), w, training).clamp_min(0)
    for _ in range(5):
        x = block(x, w, residual, 0 if border else 1, reflect, training)
    for _ in range(2):
        x = normalise(doubled(x, w, upsample, reflect), w, training).clamp_min(0)
    x = conv(x, w, 1, 4, reflect)[:, :, :height, :width]
    y = 150 * x.tanh()
    return {"linear": x, "tanh": y + 127.5, "caffe": y + mean}[output] / 255


def super_resolution_net(x: Tensor, w: Weights, scale: int, training: bool, upsample: str) -> Tensor:
    x = relu(normalise(conv(2 * x - 1, w, 1, 4), w, training), w)
    for _ in range(4):
        x = block(x, w, True, 1, False, training)
    for _ in range(scale.bit_length() - 1):
        x = relu(normalise(doubled(x, w, upsample), w, training), w)
    return 0.5 + 150 * conv(x, w, 1, 4).tanh() / 255


def tv_loss(x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """The loss and its gradient written out by hand, in float64, pair by pair."""
    x = x.detach().double()
    grad = torch.zeros_like(x)
    loss = x.new_zeros(())
    for dim in (2, 3):
        size = x.shape[dim]
        d = x.narrow(dim, 1, size - 1) - x.narrow(dim, 0, size - 1)
        loss += (d * d if norm == "l2" else d.abs()).sum()
        slope = 2 * d if norm == "l2" else d.sign()
        grad.narrow(dim, 1, size - 1).add_(slope)
        grad.narrow(dim, 0, size - 1).sub_(slope)
    return loss, grad
